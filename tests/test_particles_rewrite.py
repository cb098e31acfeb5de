"""Merging tables and rewriting images: what lands in the new stack, and what the new table says of it."""

from __future__ import annotations

from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch

from verglas.errors import InputError, OutputError
from verglas.particles.loader import ImageLoader
from verglas.particles.merge import merge_tables
from verglas.particles.preprocess import normalise_background, resample
from verglas.particles.rewrite import Changes, find_bad_images, rewrite
from verglas.particles.table import ParticleTable

CPU = torch.device("cpu")


def data_set(
    folder: Path, n: int = 7, box: int = 16, pixel: float = 2.0, seed: int = 0, optics: dict | None = None, **columns
) -> ParticleTable:
    """`n` random images in two stacks, named in mixed order."""
    folder.mkdir(exist_ok=True)
    data = np.random.default_rng(seed).normal(3, 2, size=(n, box, box)).astype(np.float32)
    names = []
    for number, part in enumerate((data[: n // 2], data[n // 2 :])):
        with mrcfile.new(folder / f"{number}.mrcs", overwrite=True) as file:
            file.set_data(part)
            file.set_image_stack()
        names += [f"{i + 1:06d}@{number}.mrcs" for i in range(len(part))]
    order = np.random.default_rng(seed + 1).permutation(n)
    frame = pd.DataFrame(
        {"rlnImageName": [names[i] for i in order], "rlnOpticsGroup": 1, "truth": [f"{seed}_{i}" for i in order]}
    )
    row = {
        "rlnOpticsGroupName": "krios",
        "rlnOpticsGroup": 1,
        "rlnVoltage": 300.0,
        "rlnImagePixelSize": pixel,
        "rlnImageSize": box,
    }
    return ParticleTable(frame.assign(**columns), pd.DataFrame([row | (optics or {})]), folder, folder / "particles.star")


def pixels_of(table: ParticleTable) -> dict[int, torch.Tensor]:
    return {int(row): image for batch in ImageLoader(table) for row, image in zip(batch.index_B, batch.image_BYX)}


def rewritten(table: ParticleTable, folder: Path, changes: Changes, dtype: str = "float32") -> ParticleTable:
    """Written, saved as STAR and read back."""
    folder.mkdir(exist_ok=True)
    new = rewrite(table, folder, changes, dtype, CPU, lambda n: None)
    new.write(folder / "particles.star", overwrite=True)
    return ParticleTable.read(folder / "particles.star")


@pytest.mark.parametrize("batch_bytes", [1, 3 * 4 * 16**2, 1e9])
def test_plain_copy_keeps_rows_columns_and_pixels(tmp_path, monkeypatch, batch_bytes):
    monkeypatch.setattr("verglas.particles.rewrite.BATCH_BYTES", batch_bytes)
    table = data_set(tmp_path / "in")
    new = rewritten(table, tmp_path / "out", Changes())
    old_pixels, new_pixels = pixels_of(table), pixels_of(new)
    assert new.frame["truth"].tolist() == table.frame["truth"].tolist()
    assert all(torch.equal(new_pixels[row], old_pixels[row]) for row in range(len(table)))
    assert new.frame["rlnImageName"].tolist() == [f"{i:06d}@particles.mrcs" for i in range(1, 8)]


def test_half_precision(tmp_path):
    table = data_set(tmp_path / "in")
    new = rewritten(table, tmp_path / "out", Changes(), "float16")
    assert mrcfile.mmap(tmp_path / "out/particles.mrcs").data.dtype == np.float16
    assert all(torch.equal(pixels_of(new)[row], image.half().float()) for row, image in pixels_of(table).items())


def test_downsampling_crops_transforms_and_updates_the_optics(tmp_path):
    table = data_set(tmp_path / "in", rlnOriginXAngst=3.3, rlnOriginYAngst=-1.0)
    new = rewritten(table, tmp_path / "out", Changes(box=12))
    (group,) = new.groups
    assert (group.box, group.pixel_size) == (12, pytest.approx(16 * 2.0 / 12))
    assert torch.equal(new.origins(), table.origins())
    for row, image in pixels_of(table).items():
        assert torch.allclose(pixels_of(new)[row], resample(image[None], 12)[0], atol=1e-5)


def test_pixel_size_asked_for_gives_the_nearest_even_box(tmp_path):
    (group,) = rewritten(data_set(tmp_path / "in"), tmp_path / "out", Changes(pixel=3.1)).groups
    assert (group.box, group.pixel_size) == (10, pytest.approx(3.2))


@pytest.mark.parametrize("changes", [Changes(box=18), Changes(pixel=1.5), Changes(pixel=1000.0)])
def test_boxes_that_do_not_fit(tmp_path, changes):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="asked for"):
        rewrite(data_set(tmp_path / "in"), tmp_path / "out", changes, "float32", CPU, lambda n: None)
    assert list((tmp_path / "out").iterdir()) == []


def test_recentring_moves_whole_pixels_and_keeps_the_rest(tmp_path):
    """2 Å pixels: an origin of (7.1, -3.0) Å is 4 px and -2 px (halves away from zero), with (-0.9, 1.0) Å left."""
    table = data_set(
        tmp_path / "in", n=2, rlnOriginXAngst=7.1, rlnOriginYAngst=-3.0, rlnOriginXPriorAngst=8.0, rlnCoordinateX=100.0,
        rlnCoordinateY=50.0, optics={"rlnMicrographPixelSize": 0.5},
    )  # fmt: skip
    new = rewritten(table, tmp_path / "out", Changes(recentre=True))
    assert torch.allclose(new.origins(), torch.tensor([[-0.9, 1.0]], dtype=torch.float64), atol=1e-9)
    assert new.frame["rlnOriginXPriorAngst"].tolist() == pytest.approx([0.0, 0.0])
    # The box centre moved by -8 Å and +4 Å on a micrograph of 0.5 Å pixels.
    assert new.frame["rlnCoordinateX"].tolist() == pytest.approx([84.0, 84.0])
    assert new.frame["rlnCoordinateY"].tolist() == pytest.approx([58.0, 58.0])
    before, after = pixels_of(table)[0], pixels_of(new)[0]
    assert torch.equal(after[:14, 4:], before[2:, :12])
    assert after[14:].abs().max() == after[:, :4].abs().max() == 0


def test_inverting_and_normalising(tmp_path):
    table = data_set(tmp_path / "in")
    new = rewritten(table, tmp_path / "out", Changes(normalise=24.0, invert=True))
    for row, image in pixels_of(table).items():
        assert torch.allclose(pixels_of(new)[row], -normalise_background(image[None], 6.0)[0], atol=1e-5)
    with pytest.raises(InputError, match="--normalise"):
        rewritten(table, tmp_path / "out2", Changes(normalise=40.0))


def test_too_large_for_half_precision_leaves_no_stack(tmp_path):
    table = data_set(tmp_path / "in")
    with mrcfile.mmap(tmp_path / "in/0.mrcs", "r+") as file:
        file.data[0, 0, 0] = 1e6
    with pytest.raises(OutputError, match="float16"):
        rewritten(table, tmp_path / "out", Changes(), "float16")
    assert list((tmp_path / "out").iterdir()) == []


def test_bad_images_are_found(tmp_path):
    table = data_set(tmp_path / "in")
    with mrcfile.mmap(tmp_path / "in/1.mrcs", "r+") as file:
        file.data[2] = 7.0
    (bad,) = find_bad_images(table, lambda n: None)
    assert table.frame["rlnImageName"][bad.row] == "000003@1.mrcs"
    with pytest.raises(InputError, match=r"000003@.*constant"):
        rewritten(table, tmp_path / "out", Changes())
    assert len(pixels_of(rewritten(table.without([bad.row]), tmp_path / "out", Changes()))) == 6
    with pytest.raises(InputError, match="every image"):
        table.without(range(7))


def test_merging_joins_equal_groups_and_tells_others_apart(tmp_path):
    one, same = data_set(tmp_path / "a", seed=1), data_set(tmp_path / "b", seed=2)
    other = data_set(tmp_path / "c", seed=3, pixel=1.5, optics={"rlnBeamTiltX": 0.5})
    merged, notices = merge_tables([one, same, other])
    assert notices == []
    assert merged.frame["truth"].tolist() == [name for table in (one, same, other) for name in table.frame["truth"]]
    assert [group.name for group in merged.groups] == ["krios", "krios_2"]
    assert [group.beam_tilt_mrad[0] for group in merged.groups] == [0.0, 0.5]
    assert np.bincount(merged.group_index_B).tolist() == [14, 7]
    expected = [image for table in (one, same, other) for _, image in sorted(pixels_of(table).items())]
    assert all(torch.equal(pixels_of(merged)[row], image) for row, image in enumerate(expected))


def test_merged_sets_of_two_boxes_make_two_stacks(tmp_path):
    merged, _ = merge_tables([data_set(tmp_path / "a", box=16), data_set(tmp_path / "b", box=12, seed=5)])
    new = rewritten(merged, tmp_path / "out", Changes())
    assert sorted(path.name for path in (tmp_path / "out").glob("*.mrcs")) == ["particles_1.mrcs", "particles_2.mrcs"]
    assert all(torch.equal(pixels_of(new)[row], image) for row, image in pixels_of(merged).items())


def test_merging_says_what_it_leaves_out_and_refuses_unclear_optics(tmp_path):
    posed = data_set(tmp_path / "a", rlnAngleRot=1.0)
    merged, (notice,) = merge_tables([posed, data_set(tmp_path / "b")])
    assert "rlnAngleRot" in notice and "rlnAngleRot" not in merged.frame.columns
    _, notices = merge_tables([posed, posed])
    assert any("more than once" in text for text in notices)
    with pytest.raises(InputError, match="rlnSphericalAberration"):
        merge_tables([posed, data_set(tmp_path / "c", optics={"rlnSphericalAberration": 2.7})])
