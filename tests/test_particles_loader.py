"""ImageLoader: the right pixels in the right rows, bounded reading ahead, and a clear error for every bad stack."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import mrcfile
import numpy as np
import pandas as pd
import pytest
import torch

from verglas.errors import InputError
from verglas.particles import loader as loader_module
from verglas.particles.loader import ImageLoader, unusable_images
from verglas.particles.table import ParticleTable


def images(n: int, box: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, box, box)).astype(np.float32)


def table_of(
    folder: Path, stacks: dict[str, np.ndarray], names: list[str] | None = None, box: int | None = None
) -> ParticleTable:
    """One optics group per box; `names` default to every image of every stack."""
    boxes = sorted({data.shape[-1] for data in stacks.values()})
    for name, data in stacks.items():
        with mrcfile.new(folder / name, overwrite=True) as file:
            file.set_data(data)
            file.set_image_stack()
    names = names or [f"{i + 1}@{name}" for name, data in stacks.items() for i in range(len(data))]
    group_of = {name: boxes.index(data.shape[-1]) + 1 for name, data in stacks.items()}
    frame = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": [group_of.get(n.partition("@")[2], 1) for n in names]})
    optics = pd.DataFrame(
        [{"rlnOpticsGroup": i + 1, "rlnImagePixelSize": 1.0, "rlnImageSize": box or size} for i, size in enumerate(boxes)]
    )
    return ParticleTable(frame, optics, folder, folder / "particles.star")


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int16, np.int8])
@pytest.mark.parametrize("order", ["file", "shuffled", "some", "repeated"])
def test_every_row_gets_its_own_pixels(tmp_path, dtype, order):
    random = np.random.default_rng(1)
    stacks = {f"{i}.mrcs": (20 * random.normal(size=(7, 8, 8))).astype(dtype) for i in range(5)}
    table = table_of(tmp_path, stacks)
    everything = np.concatenate(list(stacks.values())).astype(np.float32)
    rows = {
        "file": np.arange(35),
        "shuffled": random.permutation(35),
        "some": np.sort(random.permutation(35)[:11]),
        "repeated": np.array([3, 3, 2, 30, 3]),
    }[order]
    seen = []
    for batch in ImageLoader(table, rows, batch_size=4):
        assert batch.image_BYX.dtype == torch.float32
        assert len(batch) <= 4
        assert np.array_equal(batch.image_BYX.numpy(), everything[batch.index_B])
        seen += batch.index_B.tolist()
    assert sorted(seen) == sorted(rows.tolist())


def test_batches_hold_one_group_and_one_box(tmp_path):
    stacks = {"a.mrcs": images(5, 8, 1), "b.mrcs": images(4, 12, 2)}
    names = ["1@a.mrcs", "1@b.mrcs", "2@a.mrcs", "2@b.mrcs", "3@a.mrcs", "3@b.mrcs", "4@b.mrcs"]
    loader = ImageLoader(table_of(tmp_path, stacks, names), batch_size=2)
    batches = list(loader)
    assert [(batch.group.box, batch.image_BYX.shape[-1], len(batch)) for batch in batches] == [
        (8, 8, 2),
        (8, 8, 1),
        (12, 12, 2),
        (12, 12, 2),
    ]
    assert len(loader) == len(batches)
    assert np.array_equal(batches[2].image_BYX[1].numpy(), stacks["b.mrcs"][1])


def test_a_second_iteration_reads_again(tmp_path):
    loader = ImageLoader(table_of(tmp_path, {"a.mrcs": images(5, 8, 1)}), batch_size=2)
    first, second = ([b.image_BYX for b in loader] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_long_runs_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("verglas.particles.stacks.TASK_BYTES", 3 * 4 * 4 * 4)  # three images
    stacks = {f"{i}.mrcs": images(7 * i + 1, 4, i) for i in range(5)}
    everything = np.concatenate(list(stacks.values()))
    for batch in ImageLoader(table_of(tmp_path, stacks), batch_size=50):
        assert np.array_equal(batch.image_BYX.numpy(), everything[batch.index_B])


def test_files_are_closed(tmp_path):
    loader = ImageLoader(table_of(tmp_path, {f"{i}.mrcs": images(3, 4, i) for i in range(40)}), batch_size=64)
    before = len(list(Path("/proc/self/fd").iterdir()))
    assert sum(len(batch) for batch in loader) == 120
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_reading_ahead_is_bounded_and_ends_with_the_consumer(tmp_path, monkeypatch):
    reads = []
    original = ImageLoader._read
    monkeypatch.setattr(ImageLoader, "_read", lambda self, reader, rows: reads.append(1) or original(self, reader, rows))
    before = threading.active_count()
    iterator = iter(ImageLoader(table_of(tmp_path, {"a.mrcs": images(40, 4, 1)}), batch_size=2, prefetch=2))
    for done in range(1, 4):
        next(iterator)
        assert len(reads) <= done + 2
    iterator.close()
    assert threading.active_count() == before


def test_batches_that_were_begun_are_read_once_and_ahead(tmp_path, monkeypatch):
    reads = []
    original = ImageLoader._read
    monkeypatch.setattr(ImageLoader, "_read", lambda self, reader, rows: reads.append(1) or original(self, reader, rows))
    loader = ImageLoader(table_of(tmp_path, {"a.mrcs": images(11, 4, 1)}), batch_size=2, prefetch=2)
    loader.begin()
    loader.begin()
    deadline = time.monotonic() + 20
    while len(reads) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert len(reads) == 2
    first, second = ([batch.index_B.tolist() for batch in loader] for _ in range(2))
    assert first == second == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10]]
    assert len(reads) == 12


def test_constant_and_not_finite_images_are_told_from_good_ones():
    data = images(7, 6, 3)
    data[1] = 4.0
    data[2, 5, 5] = np.nan
    data[3, 0, 2] = -np.inf
    data[4, 0, :] = 1.5  # the first row alone is constant: a good image
    data[5] *= 1e30  # the squares overflow: a good image
    found = dict(unusable_images(data))
    assert set(found) == {1, 2, 3}
    assert "constant" in found[1] and "1 pixels" in found[2] and "1 pixels" in found[3]


def test_bad_images_are_named_or_left_out(tmp_path):
    data = images(6, 8, 4)
    data[2] = 0.0
    data[4, 1, 1] = np.nan
    table = table_of(tmp_path, {"a.mrcs": data})
    with pytest.raises(InputError, match=r"000003@.*a\.mrcs: constant image.*--skip-bad"):
        list(ImageLoader(table, batch_size=4))
    loader = ImageLoader(table, batch_size=4, skip_bad=True)
    batches = list(loader)
    assert np.concatenate([batch.index_B for batch in batches]).tolist() == [0, 1, 3, 5]
    assert torch.equal(torch.cat([batch.image_BYX for batch in batches]), torch.from_numpy(data[[0, 1, 3, 5]]))
    assert [(image.row, image.name[:6]) for image in loader.bad] == [(2, "000003"), (4, "000005")]


def test_a_batch_of_bad_images_alone_is_skipped(tmp_path):
    data = images(4, 8, 4)
    data[:2] = 1.0
    loader = ImageLoader(table_of(tmp_path, {"a.mrcs": data}), batch_size=2, skip_bad=True)
    assert [batch.index_B.tolist() for batch in loader] == [[2, 3]]


def test_missing_stack(tmp_path):
    table = table_of(tmp_path, {"a.mrcs": images(2, 8, 1)}, ["1@a.mrcs", "1@gone.mrcs"])
    with pytest.raises(InputError, match=r"gone\.mrcs.*not found"):
        ImageLoader(table)
    assert len(ImageLoader(table, np.array([0]))) == 1, "stacks that no row needs are not opened"


def test_image_beyond_the_stack(tmp_path):
    with pytest.raises(InputError, match=r"000003@.*has 2 images"):
        ImageLoader(table_of(tmp_path, {"a.mrcs": images(2, 8, 1)}, ["1@a.mrcs", "3@a.mrcs"]))


def test_truncated_stack(tmp_path):
    table = table_of(tmp_path, {"a.mrcs": images(4, 8, 1)})
    path = tmp_path / "a.mrcs"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"a\.mrcs"):
        ImageLoader(table)


def test_stack_that_shrinks_while_it_is_read(tmp_path):
    table = table_of(tmp_path, {"a.mrcs": images(4, 8, 1)})
    loader = ImageLoader(table, batch_size=2)
    path = tmp_path / "a.mrcs"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="shorter"):
        list(loader)


def test_box_that_disagrees_with_its_group(tmp_path):
    with pytest.raises(InputError, match=r"box of 8 px.*16 px"):
        ImageLoader(table_of(tmp_path, {"a.mrcs": images(2, 8, 1)}, box=16))


@pytest.mark.parametrize("shape, said", [((2, 7, 7), "odd box of 7"), ((2, 6, 8), "8 x 6")])
def test_odd_and_oblong_images(tmp_path, shape, said):
    table = table_of(tmp_path, {"a.mrcs": np.random.default_rng(0).normal(size=shape).astype(np.float32)}, box=8)
    with pytest.raises(InputError, match=said):
        ImageLoader(table)


def test_box_of_the_group_is_taken_from_the_stack_where_the_file_does_not_say(tmp_path):
    table = table_of(tmp_path, {"a.mrcs": images(2, 8, 1)})
    optics = table.optics_frame.drop(columns="rlnImageSize")
    bare = ParticleTable(table.frame, optics, table.folder, table.source)
    assert next(iter(ImageLoader(bare))).image_BYX.shape == (2, 8, 8)


def test_errors_in_the_reading_thread_reach_the_consumer(tmp_path, monkeypatch):
    def fail(image_BYX):
        raise RuntimeError("boom")

    monkeypatch.setattr(loader_module, "unusable_images", fail)
    with pytest.raises(RuntimeError, match="boom"):
        list(ImageLoader(table_of(tmp_path, {"a.mrcs": images(4, 8, 1)})))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_for_a_gpu_are_pinned(tmp_path):
    data = images(5, 8, 1)
    for batch in ImageLoader(table_of(tmp_path, {"a.mrcs": data}), batch_size=2, device="cuda"):
        assert batch.image_BYX.is_pinned()
        assert np.array_equal(batch.image_BYX.numpy(), data[batch.index_B])


def test_real_stacks(shared):
    table = ParticleTable.read(shared / "data/betagal_tutorial/particles_1391_with_poses.star")
    loader = ImageLoader(table, np.arange(0, 1391, 7), batch_size=50)
    batch = next(iter(loader))
    where = table.image_locations()
    row = int(batch.index_B[3])
    expected = mrcfile.mmap(where.paths[where.stack_index_B[row]]).data[where.image_index_B[row]]
    assert np.array_equal(batch.image_BYX[3].numpy(), expected.astype(np.float32))
