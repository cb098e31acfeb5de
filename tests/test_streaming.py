"""Images in memory and streamed: the same numbers either way, read ahead, within what they may take."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from test_particles_loader import images, table_of
from verglas.cli.main import main
from verglas.errors import InputError
from verglas.io.mrc import read_map
from verglas.particles.files import ImageFiles, unusable
from verglas.particles.resident import read_all
from verglas.particles.streaming import ImageStream
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.plan import plan
from verglas.refinement.plan_sizes import Machine, Problem
from verglas.refinement.residency import Residency

CPU = torch.device("cpu")
DISK = Residency("disk", None, 2 * 10 * 8 * 8 * 4)  # two batches of ten images
DEVICES = [CPU, pytest.param(torch.device("cuda"), marks=[
    pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")])]  # fmt: skip


def stacks(dtype: type = np.float32) -> dict[str, np.ndarray]:
    random = np.random.default_rng(1)
    return {f"{i}.mrcs": (20 * random.normal(size=(i + 5, 8, 8))).astype(dtype) for i in range(6)}


def with_ctf(table: ParticleTable) -> ParticleTable:
    """The same with columns that a refinement needs."""
    frame = table.frame.assign(rlnDefocusU=10_000.0, rlnDefocusV=10_000.0, rlnDefocusAngle=0.0)
    optics = table.optics_frame.assign(rlnVoltage=300.0, rlnSphericalAberration=2.7, rlnAmplitudeContrast=0.1)
    return ParticleTable(frame, optics, table.folder, table.source)


def shuffled(folder: Path, dtype: type = np.float32) -> tuple[ParticleTable, np.ndarray]:
    """A table whose rows are in no order of the files, and the images of its rows."""
    data = stacks(dtype)
    names = [f"{i + 1}@{name}" for name, some in data.items() for i in range(len(some))]
    order = np.random.default_rng(2).permutation(len(names))
    return with_ctf(table_of(folder, data, [names[i] for i in order])), np.concatenate(list(data.values()))[order]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("residency", [Residency(), Residency("host", None, 2560), DISK])
@pytest.mark.parametrize(
    ("dtype", "kept"),
    [(np.float32, torch.float32), (np.float16, torch.float16), (np.int16, torch.int16), (np.int8, torch.int8),
     (np.uint16, torch.float32)],
)  # fmt: skip
def test_every_row_gets_its_image_in_the_type_of_the_files(tmp_path, dtype, kept, residency, device):
    table, expected = shuffled(tmp_path, dtype)
    data = Dataset.read(table, device, residency)
    rows = torch.from_numpy(np.random.default_rng(3).permutation(len(table)))
    data.announce(rows, 7)
    for part in rows.split(7):
        found = data.images_of(part, 0)
        assert found.dtype == kept and found.device.type == device.type
        assert np.array_equal(found.cpu().float().numpy(), expected[part.numpy()].astype(np.float32))


def test_groups_keep_to_themselves(tmp_path):
    names = ["1@a.mrcs", "1@b.mrcs", "2@a.mrcs", "2@b.mrcs", "3@a.mrcs", "4@b.mrcs"]
    data = {"a.mrcs": images(5, 8, 1), "b.mrcs": images(4, 12, 2).astype(np.float16)}
    table = with_ctf(table_of(tmp_path, data, names))
    for residency in (Residency(), DISK):
        found = list(Dataset.read(table, "cpu", residency).batches(np.arange(6), 2))
        assert [(batch.group_index, batch.index_B.tolist()) for batch in found] == [(0, [0, 2]), (0, [4]), (1, [1, 3]), (1, [5])]
        assert all(batch.image_BYX.dtype == torch.float32 for batch in found)
        assert np.array_equal(found[3].image_BYX[0].numpy(), data["b.mrcs"][3].astype(np.float32))


@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_keeps_images_of_any_grey_value(tmp_path, device):
    data = images(50, 8, 1)
    data = (data + np.linspace(-100, 100, 50)[:, None, None]) * np.geomspace(1e-6, 1e6, 50)[:, None, None]
    table = with_ctf(table_of(tmp_path, {"a.mrcs": data.astype(np.float32)}))
    exact = Dataset.read(table, device).images_of(torch.arange(50), 0)
    kept = Dataset.read(table, device, Residency("device", 2))
    assert kept.images[0].dtype == torch.float16
    found = kept.images_of(torch.arange(50), 0)
    # float16 rounds by 2^-12 of a value, here at most four deviations; giving the mean back rounds by 2^-24 of it.
    error = (found - exact).abs().amax((1, 2))
    bound = 4 * 2**-11 * exact.std((1, 2)) + 2**-22 * exact.abs().amax((1, 2))
    assert (error <= bound).all() and (error > 0).any()


def test_the_next_batch_is_read_while_one_is_in_use(tmp_path):
    table, expected = shuffled(tmp_path)
    files, begun = ImageFiles(table), threading.Semaphore(0)

    def source(row_B, out_BYX):
        files.read(row_B, out_BYX)
        begun.release()

    stream, rows = ImageStream(files, CPU, source), torch.arange(len(table))
    stream.announce(rows, 10)
    assert begun.acquire(timeout=10), "the first batch was not begun when it was announced"
    for first in range(0, len(rows), 10):
        found = stream.take(rows[first : first + 10])
        if first + 10 < len(rows):
            assert begun.acquire(timeout=10), "the next batch was not begun"
        assert np.array_equal(found.numpy(), expected[first : first + 10]), "the batch in use was overwritten"
    assert not begun.acquire(blocking=False), "something was read twice"
    stream.close()


def test_other_rows_than_announced_are_read_and_the_order_goes_on_after_them(tmp_path):
    table, expected = shuffled(tmp_path)
    stream, rows = ImageStream(ImageFiles(table), CPU), torch.arange(len(table))
    stream.announce(rows, 10)
    for part in (rows[:10], rows[10:20], rows[10:15], rows[15:20], rows[20:30], torch.tensor([3, 1, 44]), rows[30:40]):
        assert np.array_equal(stream.take(part).numpy(), expected[part.numpy()])
    stream.close()


def test_buffers_are_as_large_as_two_batches(tmp_path):
    table, _ = shuffled(tmp_path)
    data = Dataset.read(table, "cpu", DISK)
    assert data.largest_batch(0) == 10 and not data.images
    for batch in data.batches(np.arange(len(table)), 1000):
        assert len(batch) <= 10
    assert data.stream is not None
    assert sum(buffer.numel() for buffer in data.stream._buffers) <= DISK.budget


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_unusable_images_are_found_where_they_are(dtype, device):
    data = images(6, 8, 3)
    data[1] = 4.0
    data[2, 5, 5] = np.nan
    data[3, 0, 2] = -np.inf
    data[4, 0, :] = 1.5
    assert unusable(torch.from_numpy(data.astype(dtype)).to(device)).tolist() == [False, True, True, True, False, False]


@pytest.mark.parametrize("residency", [Residency(), Residency("device", 2), DISK])
def test_bad_images_are_refused_by_name(tmp_path, residency):
    data = images(30, 8, 4)
    data[17] = 0.0
    table = with_ctf(table_of(tmp_path, {"a.mrcs": data}))
    with pytest.raises(InputError, match=r"000018@.*a\.mrcs: constant image.*--skip-bad"):
        for _ in Dataset.read(table, "cpu", residency).batches(np.arange(30), 10):
            pass


def test_progress_counts_every_image(tmp_path, monkeypatch):
    monkeypatch.setattr("verglas.particles.resident.CHUNK_BYTES", 4 * 8 * 8 * 4)
    table, _ = shuffled(tmp_path)
    told: list[int] = []
    Dataset.read(table, "cpu", None, lambda _, done, total: told.append(done))
    assert told[-1] == len(table) and told == sorted(told) and len(told) == -(-len(table) // 4)


def test_chunks_of_a_large_read_are_in_place(tmp_path, monkeypatch):
    monkeypatch.setattr("verglas.particles.resident.CHUNK_BYTES", 3 * 8 * 8 * 4)
    table, expected = shuffled(tmp_path)
    files = ImageFiles(table)
    rows = files.in_file_order(np.arange(len(table)))
    assert np.array_equal(read_all(files, rows, CPU)[0].numpy(), expected[rows])
    rounded, scale_n2 = read_all(files, rows, CPU, rescale=True)
    assert scale_n2 is not None and rounded.dtype == torch.float16
    assert np.allclose(rounded * scale_n2[:, :1, None] + scale_n2[:, 1:, None], expected[rows], atol=0.05)


def test_an_iteration_with_streamed_images_is_the_same_to_the_last_bit(tmp_path):
    words = ["simulate", "--n", "60", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "1", "--device", "cpu"]
    assert main([*words, "--out", str(tmp_path / "set")]) == 0
    table, reference = ParticleTable.read(tmp_path / "set/particles.star"), read_map(tmp_path / "set/start.mrc")
    limit = 14 * 32 * 32 * 4 / 1e9  # two batches of seven images
    config = RefineConfig(diameter=120, initial_resolution=40, absolute_greyscale=True, healpix_order=1, image_memory_gb=limit)
    planned = plan(Problem.of(table), config, Machine("cpu", 8e9))
    assert planned.residency.home == "disk"
    streamed = driver.prepare(table, reference, config, planned=planned)
    resident = driver.prepare(table, reference, config)
    resident = replace(resident, data=replace(resident.data, budget=streamed.data.budget))  # in the same batches
    a, b = (next(driver.iterations(session)).state for session in (streamed, resident))
    assert streamed.chosen["residency"] == planned.residency.reason and "read from their files" in planned.residency.reason
    for one, other in zip(a.halves, b.halves, strict=True):
        assert torch.equal(one.map_ZYX, other.map_ZYX) and torch.equal(one.sigma2_noise_GS, other.sigma2_noise_GS)
    for name in ("rotation_B33", "origin_B2", "log_likelihood_B"):
        assert torch.equal(getattr(a.poses, name), getattr(b.poses, name))
