"""The commands postprocess, mask and localres: results on disk, and bad input."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from scipy import ndimage

from verglas.cli.main import main
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import read_star

BOX, PIXEL = 32, 3.0


def particle(box: int = BOX) -> np.ndarray:
    rng = np.random.default_rng(0)
    points = np.zeros((box, box, box))
    at = (box // 2 + rng.uniform(-box / 5, box / 5, (40, 3))).astype(int)
    np.add.at(points, tuple(at.T), rng.uniform(0.5, 1.5, 40))
    return ndimage.gaussian_filter(points, 1.0) * 30


@pytest.fixture
def halves(tmp_path):
    """Folder with half1.mrc and half2.mrc."""
    rng = np.random.default_rng(1)
    for i in (1, 2):
        noisy = particle() + rng.normal(0, 0.15, (BOX, BOX, BOX))
        write_map(tmp_path / f"half{i}.mrc", Map(noisy.astype(np.float32), PIXEL, origin=(1.0, 2.0, 3.0)))
    return tmp_path


def call(folder, *words) -> int:
    """Run `verglas` with every word that names a file or folder put into `folder`."""
    return main([str(folder / w) if str(w).endswith((".mrc", ".star", "run")) else str(w) for w in words])


def test_postprocess_writes_all_results(halves):
    words = ["--half1", "half1.mrc", "--out", "run", "--directional", "--half-maps", "--molecular-weight", 100]
    assert call(halves, "postprocess", *words, "--autob-lowres", 20) == 0
    run = halves / "run"
    names = {"map.mrc", "map.png", "map_masked.mrc", "mask.mrc", "half1_sharpened.mrc", "half2_sharpened.mrc", "fsc.csv",
             "guinier.csv", "directional_fsc.csv", "fsc.xml", "postprocess.star", "report.html", "result.json", "config.json",
             "run.log", "events.jsonl"}  # fmt: skip
    assert {path.name for path in run.iterdir()} == names
    result = json.loads((run / "result.json").read_text())
    star = read_star(run / "postprocess.star")
    assert star["general"].values["rlnFinalResolution"] == pytest.approx(result["figures"]["resolution"]["value"])
    assert star["general"].values["rlnMaskName"] == str(run / "mask.mrc")
    assert len(star["fsc"].frame) == BOX // 2 + 1 and "rlnFourierShellCorrelationCorrected" in star["fsc"].frame
    first, second, whole = (read_map(run / name) for name in ("half1_sharpened.mrc", "half2_sharpened.mrc", "map.mrc"))
    assert np.abs((first.data_ZYX + second.data_ZYX) / 2 - whole.data_ZYX).max() < 1e-4 * np.abs(whole.data_ZYX).max()
    assert whole.pixel_size == PIXEL and whole.origin == (1.0, 2.0, 3.0)
    masked = read_map(run / "map_masked.mrc").data_ZYX
    assert np.allclose(masked, whole.data_ZYX * read_map(run / "mask.mrc").data_ZYX)


def test_no_mask_uses_the_unmasked_curve(halves):
    assert call(halves, "postprocess", "--half1", "half1.mrc", "--out", "run", "--no-mask", "--bfactor", -50) == 0
    figures = json.loads((halves / "run/result.json").read_text())["figures"]
    assert figures["bfactor"]["value"] == -50 and figures["resolution"] == figures["resolution_unmasked"]
    assert not (halves / "run/mask.mrc").exists()


def test_identical_half_maps_get_a_warning(halves, capsys):
    shutil.copy(halves / "half1.mrc", halves / "half2.mrc")
    assert call(halves, "postprocess", "--half1", "half1.mrc", "--out", "run") == 0
    assert "identical" in capsys.readouterr().err and "identical" in (halves / "run/report.html").read_text()


def small(folder, name="half2.mrc", pixel=PIXEL):
    write_map(folder / name, Map(particle(24).astype(np.float32), pixel), overwrite=True)


def mask_with(value):
    def write(folder):
        data = np.zeros((BOX, BOX, BOX), np.float32)
        data[10:20, 10:20, 10:20] = value
        write_map(folder / "mask.mrc", Map(data, PIXEL))

    return write


def with_nan(folder):
    data = bytearray((folder / "half1.mrc").read_bytes())
    data[1024:1028] = np.float32(np.nan).tobytes()
    (folder / "half1.mrc").write_bytes(bytes(data))


def without_voxel_size(folder):
    data = bytearray((folder / "half1.mrc").read_bytes())
    data[40:52] = bytes(12)
    (folder / "half1.mrc").write_bytes(bytes(data))


def other_voxel_size(folder):
    write_map(folder / "half2.mrc", Map(read_map(folder / "half2.mrc").data_ZYX, 2.0), overwrite=True)


def constant(folder):
    write_map(folder / "half2.mrc", Map(np.ones((BOX, BOX, BOX), np.float32), PIXEL), overwrite=True)


def nothing(folder):
    pass


MASK = ["--mask", "mask.mrc"]
BAD = [
    (small, [], "24 px"),
    (other_voxel_size, [], "voxel size 2 Å"),
    (lambda folder: small(folder, "mask.mrc"), MASK, "24 px"),
    (mask_with(0.0), MASK, "empty"),
    (mask_with(2.0), MASK, "from 0 to 2"),
    (with_nan, [], "half1.mrc"),
    (without_voxel_size, [], "voxel size"),
    (constant, [], "one value"),
    (lambda folder: (folder / "half2.mrc").unlink(), [], "half2.mrc"),
    (nothing, ["--half2", "nowhere.mrc"], "nowhere.mrc"),
    (nothing, ["--pixel", "0"], "--pixel"),
    (nothing, ["--mtf", "half1.mrc"], "half1.mrc"),
    (nothing, ["--randomise-at-fsc", "2"], "--randomise-at-fsc"),
    (lambda folder: (folder / "run").mkdir(), [], "exists"),
]


@pytest.mark.parametrize("spoil, extra, word", BAD)
def test_bad_input_is_named_and_leaves_nothing(halves, capsys, spoil, extra, word):
    spoil(halves)
    before = sorted(path.name for path in halves.iterdir())
    assert call(halves, "postprocess", "--half1", "half1.mrc", "--out", "run", *extra) == 2
    assert word in capsys.readouterr().err
    assert sorted(path.name for path in halves.iterdir()) == before


def test_half1_without_its_name_needs_half2(halves, capsys):
    (halves / "half1.mrc").rename(halves / "a.mrc")
    assert call(halves, "postprocess", "--half1", "a.mrc", "--out", "run") == 2
    assert "--half2" in capsys.readouterr().err


def test_mask_command(halves, capsys):
    assert call(halves, "mask", "--map", "half1.mrc", "--out", "mask.mrc", "--mask-extend", 2, "--mask-edge", 4) == 0
    mask = read_map(halves / "mask.mrc").data_ZYX
    assert mask.min() == 0 and mask.max() == 1
    share = json.loads((halves / "mask.result.json").read_text())["figures"]["share_of_box"]["value"]
    assert share == pytest.approx(100 * (mask > 0.5).mean())
    assert call(halves, "mask", "--map", "half1.mrc", "--out", "mask.mrc") == 2
    assert "exists" in capsys.readouterr().err
    assert call(halves, "mask", "--map", "half1.mrc", "--out", "other.mrc", "--mask-threshold", 1e9) == 2
    assert "no voxel" in capsys.readouterr().err and not (halves / "other.mrc").exists()


def test_localres_command(halves):
    assert call(halves, "localres", "--half1", "half1.mrc", "--out", "run", "--sampling", 20, "--window-edge", 12) == 0
    run = halves / "run"
    resolution = read_map(run / "localres.mrc").data_ZYX
    assert {"filtered.mrc", "windows.csv", "report.html", "result.json"} <= {path.name for path in run.iterdir()}
    median = json.loads((run / "result.json").read_text())["figures"]["resolution_median"]["value"]
    assert 2 * PIXEL <= resolution[resolution > 0].min() <= median <= resolution.max() <= 50.001


def test_localres_refuses_a_window_that_does_not_fit(halves, capsys):
    assert call(halves, "localres", "--half1", "half1.mrc", "--out", "run", "--sampling", 300) == 2
    assert "--window-radius" in capsys.readouterr().err and not (halves / "run").exists()
