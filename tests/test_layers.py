"""Volumes in layers: slices and sums of all layers are those of the whole, and ranks refine with them as one process does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from forked import answers_of
from verglas.cli.main import main
from verglas.core.fourier import half_plane_pixels
from verglas.core.layers import Layers
from verglas.core.rotations import random_rotations
from verglas.distributed import rounds
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.ways import Ways
from verglas.errors import InputError
from verglas.io.mrc import read_map
from verglas.kernels.backproject import backproject
from verglas.kernels.project import project
from verglas.maximization import layered
from verglas.maximization.layered import Across
from verglas.particles.table import ParticleTable
from verglas.refinement import driver
from verglas.refinement.config import RefineConfig
from verglas.refinement.state import State
from verglas.refinement.step import Iteration, iterate

BOX, SIZES = 40, (2, 3)


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
@pytest.mark.parametrize(("radius", "parts"), [(10, 4), (16, 2), (16, 3), (40, 3)])
def test_layers_serve_what_the_whole_serves(radius: int, parts: int, implementation: str) -> None:
    layers, made = Layers.of(float(radius), parts), torch.Generator().manual_seed(1)
    whole, pixels = layers.whole, half_plane_pixels(radius)
    coordinates_K3 = pixels.coordinates_K3(torch.float64)
    sampling_R33 = 2 * random_rotations(20, made)
    sampling_R33[0] = 2 * torch.eye(3)  # samples on voxels
    values_V2 = torch.randn(whole.count, 2, generator=made, dtype=torch.float64)
    data_R2K = torch.randn(20, 2, pixels.count, generator=made, dtype=torch.float64)
    weight_RK = torch.rand(20, pixels.count, generator=made, dtype=torch.float64)
    slices_R2K = project(values_V2, whole, sampling_R33, coordinates_K3, implementation)
    sums_V4, found_V4 = torch.zeros(2, whole.count, 4, dtype=torch.float64)
    backproject(sums_V4, whole, data_R2K, weight_RK, sampling_R33, coordinates_K3, implementation)
    part_K = layers.part_of(2 * coordinates_K3.norm(dim=1))
    for part in range(parts):
        table, mine_k = layers.table(part), (part_K == part).nonzero().squeeze(1)
        place_v = table.places(slice(0, table.edge), whole)
        for _ in range(2):  # the second time is where a whole volume is copied into columns
            found_R2k = project(values_V2[place_v], table, sampling_R33, coordinates_K3[mine_k], implementation)
            torch.testing.assert_close(found_R2k, slices_R2K[:, :, mine_k], rtol=0, atol=1e-12)
        mine_v4 = torch.zeros(table.count, 4, dtype=torch.float64)
        slices = data_R2K[:, :, mine_k], weight_RK[:, mine_k], sampling_R33, coordinates_K3[mine_k]
        backproject(mine_v4, table, *slices, implementation)
        found_V4.index_add_(0, place_v, mine_v4)
    torch.testing.assert_close(found_V4, sums_V4, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("radius", "parts", "most"), [(400, 2, 1.02), (400, 4, 1.05), (400, 8, 1.1), (48, 3, 1.25)])
def test_layers_are_alike_and_overlap_little(radius: int, parts: int, most: float) -> None:
    layers = Layers.of(float(radius), parts)
    share = [parts * layers.table(part).count / layers.whole.count for part in range(parts)]
    assert max(share) < most and max(share) < 1.02 * min(share)


def prepared(folder: Path, ranks: Ranks) -> driver.Session:
    config = RefineConfig(diameter=140, initial_resolution=30, healpix_order=1, local_from_order=2, seed=1)
    table, start = ParticleTable.read(folder / "set" / "particles.star"), read_map(folder / "set" / "start.mrc")
    return driver.prepare(table, start, config, ranks=ranks)


def one_iteration(session: driver.Session, state: State) -> Iteration:
    """The one after a state."""
    return iterate(state, session.data, session.config, session.on, None, driver.quiet)


def answer(done: Iteration) -> dict[str, Any]:
    """Maps, poses, accuracy of an iteration."""
    maps = [half.map_ZYX for half in done.state.halves]
    if done.final is not None:
        maps = [done.final.joined.map_ZYX, *done.final.unfil_halves]
    return {"maps": torch.stack([one.cpu() for one in maps]), "poses": done.state.poses.rotation_B33, "fsc": done.state.fsc_S,
            "accuracy": done.state.schedule.accuracy_angles}  # fmt: skip


def work(rank: int, size: int, folder: Path) -> None:
    """Of each process: every kind of iteration, each from the state that one process had."""
    torch.set_num_threads(1)
    rounds.BYTES_AT_ONCE["cpu"], layered.VOXELS_AT_ONCE = 2**16, 2000  # many rounds, many pieces
    store = dist.FileStore(str(folder / f"meeting{size}"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    ranks = Ranks(rank, size, size, store=dist.PrefixStore("verglas", store), ways=Ways(share_volumes=True))
    session = prepared(folder, ranks)
    assert session.on.in_layers and any("layer of references" in notice for notice in session.notices)
    ranks.communication()
    found = []
    for state in torch.load(folder / "states.pt", weights_only=False):
        found.append(answer(one_iteration(session, state)) | {"sent": ranks.communication()})
    torch.save(found, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("layers")
    words = ["simulate", "--n", "60", "--box", str(BOX), "--pixel", "5", "--snr", "1", "--seed", "3", "--device", "cpu"]
    assert main([*words, "--model", "demo", "--out", str(out / "set")]) == 0
    return out


@pytest.fixture(scope="module")
def alone(folder: Path) -> list[dict[str, Any]]:
    """What one process finds: by correlation, in a global search, in a local one, and last. Their states are kept."""
    session, found, states = prepared(folder, ALONE), [], list[State]()
    state = session.state
    for kind in range(4):
        if kind == 2:
            state = replace(state, schedule=replace(state.schedule, healpix_order=2, local_sigma=10.0))
        if kind == 3:
            settled = {"fine_enough": True, "iterations_without_gain": 1, "iterations_without_changes": 1}
            state = replace(state, schedule=replace(state.schedule, **settled))
        states.append(state)
        done = one_iteration(session, state)
        found.append(answer(done))
        state = done.state
    assert done.final is not None and state.schedule.local_sigma > 0
    torch.save(states, folder / "states.pt")
    return found


def shell_differences(found_ZYX: torch.Tensor, expected_ZYX: torch.Tensor) -> torch.Tensor:
    """Relative difference of each shell that holds more than rounding."""
    axis = torch.fft.fftfreq(BOX, 1 / BOX)
    shell = (axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2).sqrt().round().long().flatten()
    wrong, power = (
        torch.bincount(shell, torch.fft.fftn(one.double()).abs().square().flatten())[: BOX // 2 + 1]
        for one in (found_ZYX - expected_ZYX, expected_ZYX)
    )
    return (wrong / power)[power > 1e-5 * power.max()].sqrt()


@pytest.mark.parametrize("size", SIZES)
def test_ranks_with_layers_refine_as_one_process_does(size: int, folder: Path, alone: list[dict[str, Any]]) -> None:
    for answers in answers_of(work, size, folder):
        for found, expected in zip(answers, alone, strict=True):
            for one, other in zip(found["maps"], expected["maps"], strict=True):
                assert float(shell_differences(one, other).max()) < 2e-5
            torch.testing.assert_close(found["poses"], expected["poses"], rtol=0, atol=1e-6)
            torch.testing.assert_close(found["fsc"], expected["fsc"], rtol=0, atol=1e-6)
            assert found["accuracy"] == pytest.approx(expected["accuracy"], rel=1e-6)
            sent = found["sent"]["by_name"]
            assert {"slices of references", "slices for sums", "sums of slices, layers"} <= set(sent)
            assert "sums of slices" not in sent and sent["slices of references"]["count"] > 4


def test_every_plane_is_sent_once() -> None:
    box, radius = 32, 16
    across = Across.of(box, radius, 2.0, torch.device("cpu"), Ranks(0, 2))
    assert across is not None and across.slabs.rows.count + across.mine.count < 1.25 * across.layers.whole.count
    pieces = list(across._pieces())
    for rank in range(2):
        planes = sorted(z for piece in pieces for z in range(piece[rank].start, piece[rank].stop))
        distance = [abs(z - across.slabs.whole.half) for z in planes]
        assert len(set(planes)) == len(planes) > 0
        assert {across.slabs.ends[rank] <= z < across.slabs.ends[rank + 1] for z in distance} == {True}
    assert Across.of(box, 3, 2.0, torch.device("cpu"), Ranks(0, 8)) is None


def test_what_contradicts_itself_is_refused() -> None:
    assert Ways.of({"VERGLAS_SHARE_VOLUMES": "1"}).share_volumes and Ways.of({}).share_volumes is None
    with pytest.raises(InputError, match="SHARE_VOLUMES"):
        Ways.of({"VERGLAS_SHARE_VOLUMES": "1", "VERGLAS_SHARE_SOLVING": "0"})
