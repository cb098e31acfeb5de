"""Maps made columns after columns are those of sums in memory; what the columns take is counted before."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.cli.reconstruct import Reconstruct, Task
from verglas.cli.reconstruct_columns import InColumns, KeptImages, in_columns
from verglas.core.columns import ColumnSlab
from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import ALONE
from verglas.errors import InputError
from verglas.kernels.backproject import backproject
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.anew import solve_anew
from verglas.maximization.by_columns import ByColumns, SumsByColumns
from verglas.maximization.column_choice import ColumnChoice, column_ends, least
from verglas.maximization.reconstruct import Geometry
from verglas.maximization.reconstruction import Reconstruction, solve
from verglas.particles.table import ParticleTable
from verglas.projection.volume import sampling_matrices

BOX, CPU = 24, torch.device("cpu")
GEOMETRY = Geometry(BOX, 2.0, BOX // 2)
COORDINATES = half_plane_pixels(BOX).coordinates_K3()


def some_slices(seed: int, count: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of a ball, which looks the same from everywhere, with noise."""
    rng = torch.Generator().manual_seed(seed)
    weight = torch.rand(count, len(COORDINATES), generator=rng) + 0.1
    ball_K = (-(COORDINATES.norm(dim=1) / 8).square()).exp()
    data = torch.stack([ball_K.expand(count, -1), 0 * weight], 1) + 0.01 * torch.randn(count, 2, len(COORDINATES), generator=rng)
    return data * weight[:, None], weight, random_rotations(count, rng), COORDINATES


def how(
    symmetry: str = "C1", exact: bool = False, halves: bool = False, geometry: Geometry = GEOMETRY, transforms: float = 1e5
) -> ByColumns:
    return ByColumns(geometry, symmetry, torch.device("cpu"), exact, (0, 8, 16, 32), transforms, 3, halves)


def sums_of(seed: int, way: ByColumns) -> SumsByColumns:
    return SumsByColumns(way, lambda sums, stage: sums.add(*some_slices(seed)), "all")


def whole_of(seed: int, geometry: Geometry = GEOMETRY) -> Accumulator:
    whole = Accumulator(geometry.box, geometry.radius, geometry.padding)
    whole.add(*some_slices(seed))
    return whole


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_slabs_of_columns_add_up_to_the_whole(implementation: str) -> None:
    rows = packed_sphere(float(BOX))
    data, weight, rotation, coordinates = some_slices(1, 5)
    sampling = sampling_matrices(rotation, 2.0)
    whole, joined = torch.zeros(rows.count, 4), torch.zeros(rows.count, 4)
    backproject(whole, rows, data, weight, sampling, coordinates, "reference")
    seen = torch.zeros(rows.count, dtype=torch.int64)
    for first, last in pairwise((0, 8, 24, 32)):
        slab = ColumnSlab.of(rows, first, last)
        sums = torch.zeros(slab.rows.count, 4)
        backproject(sums, slab.rows, data, weight, sampling, coordinates, implementation, columns=(first, last))
        for part, address, (x, y, z) in slab.parts(voxels=500):
            joined[address] += sums[part]
            seen[address[x < last]] += 1
            assert torch.equal(rows.coordinates_V3()[address], torch.stack([x, y, z], 1))
    assert torch.allclose(joined, whole, atol=1e-5) and bool((seen == 1).all())


@pytest.mark.parametrize("symmetry", ["C1", "D2", "O"])
@pytest.mark.parametrize("exact", [False, True])
def test_maps_are_those_made_in_memory(symmetry: str, exact: bool) -> None:
    """Of groups whose rotations turn the grid onto itself: slices added turned are then the same."""
    found = solve_anew([sums_of(1, how(symmetry, exact))], GEOMETRY, CPU).map_ZYX
    expected = solve([whole_of(1)], symmetry, 2.0, exact=exact).map_ZYX
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize("exact", [False, True])
def test_half_maps_and_curves(exact: bool) -> None:
    geometry = Geometry(BOX, 2.0, 10, 1.5)
    way = how(exact=exact, halves=True, geometry=geometry)
    check_halves(solve_anew([sums_of(1, way), sums_of(2, way)], geometry, CPU, None, 8.0), geometry, exact)


def check_halves(found: Reconstruction, geometry: Geometry, exact: bool) -> None:
    """Maps and curves of two half-sets are those made in memory."""
    expected = solve([whole_of(1, geometry), whole_of(2, geometry)], "C1", 2.0, None, 8.0, exact)
    for name in ("map_ZYX", "wiener_ZYX", "fsc_S", "fsc_masked_S", "ssnr_S", "coverage_S"):
        one, other = getattr(found, name), getattr(expected, name)
        assert float((one - other).abs().max()) < 2e-4 * float(other.abs().max()), name
    assert found.half_maps is not None and expected.half_maps is not None
    for one, other in zip(found.half_maps, expected.half_maps, strict=True):
        assert float((one - other).abs().max()) < 2e-5 * float(other.abs().max())


@pytest.mark.parametrize(("box", "exact"), [(box, exact) for box in (200, 400, 512) for exact in (False, True)])
def test_a_third_of_the_formula_is_enough(box: int, exact: bool) -> None:
    """Of 1,000 images, 35 % of 1.1e-8 (2N)^3 GB (RELION, of a rank's GPU)."""
    given = 0.35 * 11 * (2 * box) ** 3
    choice = ColumnChoice.of(Geometry(box, 1.0, box // 2), exact, 2e3 * box**2, 1000, 10**4, given)
    assert choice is not None and 0.5 * given < choice.peak <= given and choice.ends[0] == 0


def test_slabs_are_few_and_hold_no_more_than_said() -> None:
    rows = packed_sphere(100.0)
    for share in (1.01, 0.4, 0.2):
        ends = column_ends(rows, share * rows.count)
        assert ends is not None and ends[-1] > rows.half and all(end % 8 == 0 for end in ends)
        counts = [ColumnSlab.of(rows, first, last).rows.count for first, last in pairwise(ends)]
        assert max(counts) <= share * rows.count and len(counts) <= 1.6 / share + 1
    assert column_ends(rows, 0.01 * rows.count) is None
    fewest = least(GEOMETRY, True, 40)
    assert ColumnChoice.of(GEOMETRY, True, 0, 40, 1, 1.001 * fewest) is not None
    assert ColumnChoice.of(GEOMETRY, True, 0, 40, 1, 0.98 * fewest) is None


class Notes:
    """What of a run is asked for here."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.figures: dict[str, float] = {}

    def log(self, text: str) -> None:
        self.lines.append(text)

    def figure(self, name: str, value: float, unit: str = "") -> None:
        self.figures[name] = value

    def progress(self, *words: object) -> Any:
        return nullcontext(type("Bar", (), {"advance": lambda self, n=1: None})())


def test_the_command_goes_by_columns(tmp_path: Path) -> None:
    """What `verglas reconstruct` does on a GPU that is too small, here on a CPU: the same map; the choice is said and noted."""
    words = ["simulate", "--n", 30, "--box", BOX, "--pixel", 5.5, "--seed", 1, "--float16", "--out", tmp_path / "set"]
    assert main([str(word) for word in words]) == 0
    star = tmp_path / "set" / "truth.star"
    options = Reconstruct(particles=star, out=tmp_path / "out")
    task = Task.of(options, ALONE, torch.device("cpu"))
    notes: Any = Notes()
    given = 1.05 * least(task.geometry, False, 30)
    way = in_columns(task, notes, given, "x GB (--memory)", 1e9)
    assert "of columns, images stay on the device" in notes.lines[0]
    assert "in memory sums and maps would take 1 GB" in notes.lines[0]
    assert notes.figures["slabs_of_columns"] == way.choice.slabs and notes.figures["memory_expected"] > 0
    way = InColumns(replace(way.choice, ends=(0, 8, 16, 32), at_once=3))
    found = way.solved(task, notes).map_ZYX
    assert main(["reconstruct", "--particles", str(star), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    from verglas.io.mrc import read_map

    expected = torch.from_numpy(read_map(tmp_path / "out" / "map.mrc").data_ZYX.copy())
    assert float((found - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    again = InColumns(replace(way.choice, kept=0.0)).solved(task, notes).map_ZYX
    assert float((again - expected).abs().max()) < 2e-5 * float(expected.abs().max())
    with pytest.raises(InputError, match="smallest slab"):
        in_columns(task, notes, 0.5 * given, "x GB (--memory)", 1e9)


def test_kept_images_are_those_that_were_read(tmp_path: Path) -> None:
    words = ["simulate", "--n", 12, "--box", BOX, "--pixel", 5.5, "--seed", 1, "--device", "cpu", "--out", tmp_path / "set"]
    for kind in ([], ["--float16", "--overwrite"]):
        assert main([str(word) for word in [*words, *kind]]) == 0
        task = Task.of(Reconstruct(particles=tmp_path / "set" / "truth.star", out=tmp_path / "o"), ALONE, torch.device("cpu"))
        assert task.loader.stored_bytes() == (2 if kind else 4)
        kept = KeptImages(task.loader, task.device, True)
        first = [(batch.index_B, batch.image_BYX.clone()) for batch in kept]
        (tmp_path / "set" / "particles.mrcs").unlink()
        second = [(batch.index_B, batch.image_BYX) for batch in kept]
        assert kept._batches[0][1].dtype == (torch.float16 if kind else torch.float32)
        for (index, image), (its_index, its_image) in zip(first, second, strict=True):
            assert np.array_equal(index, its_index) and torch.equal(image, its_image) and its_image.dtype == torch.float32
    assert isinstance(task.table, ParticleTable)
