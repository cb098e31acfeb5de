"""Maps by slabs are those that are made in memory: in few and many slabs, with and without symmetry, half maps, on the sphere."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.cli.reconstruct import batch_size
from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import read_header, read_map
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.out_of_core import Needs, SlabAccumulator, largest_pair, slab_ends
from verglas.maximization.point_group import turns_of_planes
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.solve import gather_sums
from verglas.particles.table import ParticleTable

BOX, PIXEL, N = 24, 5.5, 60
GEOMETRY = Geometry(BOX, PIXEL, BOX // 2)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated set with half sets."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--snr", 0.5, "--seed", 1, "--device", "cpu", "--out", out]
    assert main([str(word) for word in words]) == 0
    table = ParticleTable.read(out / "truth.star")
    half_B = np.where(np.arange(N) % 3, 1, 2)
    replace(table, frame=table.frame.assign(rlnRandomSubset=half_B)).write(out / "halves.star")
    return out


def reconstruct(out: Path, particles: Path, *words: object) -> Path:
    arguments = ["--particles", particles, "--out", out, "--device", "cpu", "--threads", 1, *words]
    assert main(["reconstruct", *map(str, arguments)]) == 0
    return out


def gigabytes(sets: int, symmetry: str, pairs: float, geometry: Geometry = GEOMETRY) -> float:
    """For slabs of so many pairs of planes."""
    needs = Needs.of(geometry, sets, N, symmetry, batch_size(BOX, torch.device("cpu")))
    return (needs.fixed + pairs * largest_pair(geometry) * needs.each_voxel) / 1e9


CASES = {
    "C3": ("C3", ["--no-half-maps"], 1), "half maps, D2": ("D2", [], 2),
    "the sphere, fewer shells": ("C1", ["--no-half-maps", "--ewald", "on", "--max-resolution", 14.7], 1),
    "half maps, mask, padding": ("C1", ["--mask-diameter", 60, "--padding", 1.5], 2),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_maps_by_slabs_are_those_made_in_memory(data: Path, tmp_path: Path, case: str) -> None:
    symmetry, words, sets = CASES[case]
    shells = 9 if "fewer" in case else BOX // 2
    geometry = Geometry(BOX, PIXEL, shells, 1.5 if "padding" in case else 2.0)
    given = gigabytes(sets, symmetry, 8.3, geometry)
    whole = reconstruct(tmp_path / "whole", data / "halves.star", "--sym", symmetry, *words)
    slabs = reconstruct(tmp_path / "slabs", data / "halves.star", "--sym", symmetry, *words, "--memory", given)
    assert {path.name for path in slabs.iterdir()} == {path.name for path in whole.iterdir()}, "nothing is left behind"
    assert "in memory: sums and maps take" in (whole / "run.log").read_text()
    log = (slabs / "run.log").read_text()
    assert " slabs: in memory sums and maps would take" in log and "slab 2 of " in log
    for path in sorted(whole.glob("*.mrc")):
        expected, found = read_map(path), read_map(slabs / path.name)
        assert np.abs(found.data_ZYX - expected.data_ZYX).max() < 1e-5 * np.abs(expected.data_ZYX).max(), path.name
        assert found.pixel_size == expected.pixel_size and read_header(path) == read_header(slabs / path.name)
    if sets == 2:
        rows, others = (list(csv.DictReader((out / "fsc.csv").open())) for out in (whole, slabs))
        for row, other in zip(rows, others, strict=True):
            expected_row = [float(value or 0) for value in row.values()]
            assert [float(value or 0) for value in other.values()] == pytest.approx(expected_row, rel=1e-4, abs=1e-5)
    figures = [json.loads((out / "result.json").read_text())["figures"] for out in (whole, slabs)]
    assert figures[0] == figures[1]


@pytest.mark.parametrize("symmetry", ["C1", "C7", "D3", "O"])
def test_slabs_hold_what_the_whole_sums_hold(symmetry: str) -> None:
    """Also of a group whose rotations lead from slab to slab: slices are added turned, which on the grid is the same."""
    generator = torch.Generator().manual_seed(1)
    whole = Accumulator(BOX)
    coordinates = half_plane_pixels(BOX).coordinates_K3()
    data, weight = torch.randn(5, 2, len(coordinates), generator=generator), torch.rand(5, len(coordinates), generator=generator)
    poses = random_rotations(5, generator)
    whole.add(data, weight, poses, coordinates)
    expected = gather_sums([whole], symmetry)
    rows, largest = expected.rows, float(expected.weight_V.max())
    coordinates_V3 = rows.coordinates_V3()
    inside, distance = coordinates_V3.square().sum(1) < rows.radius**2, coordinates_V3[:, 2].abs()
    ends = slab_ends(GEOMETRY, 5 * largest_pair(GEOMETRY))
    assert ends is not None and len(ends) == 5 and ends[-1] == int(rows.radius)
    for planes in pairwise(ends):
        sums = SlabAccumulator(GEOMETRY, symmetry, planes)
        sums.add(data, weight, poses, coordinates)
        found, mine = sums.solved(), inside & (distance >= planes[0]) & (distance < planes[1])
        kept = found.rows.coordinates_V3().square().sum(1) < rows.radius**2
        assert sums.slices == 5 and int(kept.sum()) == int(mine.sum())
        for one, other in ((found.weight_V, expected.weight_V), (found.data_V2, expected.data_V2)):
            assert float((one[kept] - other[mine]).abs().max()) < 1e-5 * largest


@pytest.mark.parametrize("symmetry", ["C1", "C5", "D4", "T", "O", "I1", "I2", "I3", "I4"])
def test_turns_and_rotations_in_planes_make_up_the_group(symmetry: str) -> None:
    group, turns = symmetry_matrices(symmetry), turns_of_planes(symmetry)
    keeping = group[(group[:, 2, 2].abs() - 1).abs() < 1e-9]
    made = torch.einsum("cij,hjk->chik", turns, keeping).flatten(0, 1)
    assert len(made) == len(group) and bool((torch.cdist(made.flatten(1), group.flatten(1)) < 1e-6).sum(1).eq(1).all())
    assert torch.equal(turns[0], torch.eye(3, dtype=turns.dtype)) and (len(turns) == 1) == symmetry.startswith(("C", "D"))


def test_slabs_are_as_few_as_fit_and_alike() -> None:
    voxels = packed_sphere(float(BOX)).count
    ends = slab_ends(GEOMETRY, 0.3 * voxels)
    assert ends is not None and len(ends) == 5
    per_plane = packed_sphere(float(BOX)).length_ZY.long().sum(1)[BOX + 1 :]
    sizes = [int(per_plane[low:high].sum()) for low, high in pairwise(ends)]
    assert min(sizes) > 0.6 * max(sizes) and ends[0] == 0 and ends[-1] == BOX
    assert slab_ends(GEOMETRY, largest_pair(GEOMETRY) - 1) is None


def test_memory_that_cannot_serve_is_refused(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*words: object) -> str:
        arguments = ["--particles", data / "halves.star", "--out", tmp_path / "out", "--device", "cpu", *words]
        assert main(["reconstruct", *map(str, arguments)]) == 2 and not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    assert "GB, for the smallest slab of this box" in refused("--memory", gigabytes(2, "C1", 0.5))
    assert "a number of GB above 0" in refused("--memory", -1)
    assert "together with --gridding exact" in refused("--memory", 1, "--gridding", "exact")
    assert "together with --solver cg" in refused("--memory", 1, "--solver", "cg")
