"""Several processes find what one finds: every engine, tiles and whole objects, less on each; tiles themselves."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch

from ptycho_ranks import found_by
from ptycho_world import displaced, made_up, scan_of
from verglas.errors import InputError
from verglas.kernels import farfield
from verglas.ptychography.collect import bytes_of
from verglas.ptychography.costs import Costs
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import PassDone, reconstruct
from verglas.ptychography.tiles import Box, Tile, chosen, shared_pixels, tiles_of

SCAN = scan_of(made_up(window=16, side=9, step=4.0))
ALL_OF_IT = {
    "probe_modes": 2, "opr_modes": 1, "fit_scale": True, "fit_background": True, "positions_from": 2, "total_variation": 0.01,
    "amplitude_limit": 1.1, "halo": 10,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "cg": {"engine": "cg", "passes": 6, "warm_up": 2, "double": True},
    "cg, not overlapped": {"engine": "cg", "passes": 4, "warm_up": 0, "overlap": False},
    "cg, whole objects": {"engine": "cg", "passes": 4, "warm_up": 0, "whole": True},
    "cg, everything": {"engine": "cg", "passes": 8, "warm_up": 2, "double": True, **ALL_OF_IT},
    "lsq": {"engine": "lsq", "passes": 3, "momentum": 0.5, "double": True},
    "rpie, compact": {"engine": "rpie", "passes": 3, "batches": "compact", "double": True},
    "rpie, kernels": {"engine": "rpie", "passes": 3, "kernels": True, "subpixel": False},
    "lsq, kernels": {"engine": "lsq", "passes": 2, "kernels": True},
    "cg, kernels": {"engine": "cg", "passes": 3, "warm_up": 0, "kernels": True},
    "raar": {"engine": "raar", "passes": 4, "double": True},
}
OF_RANKS = ("whole", "overlap", "halo", "kernels")
FIELDS = ("object_OLYX", "probe_MYX", "positions_B2", "scale_B", "background_YX", "eigen_KYX", "opr_BK")


def alone(case: dict[str, Any], after: PassDone | None = None) -> PassDone:
    options = {name: value for name, value in case.items() if name not in OF_RANKS}
    with pytest.MonkeyPatch.context() as patch:
        missing = None if case.get("kernels") else "not asked for"
        patch.setattr(farfield, "why_not", lambda device, dtype, window: missing)
        *_, last = reconstruct(SCAN, PtychoOptions(**options), after=after)
    return last


def check_same(expected: PassDone, found: PassDone, name: str) -> None:
    assert found.found.error_P == pytest.approx(expected.found.error_P, rel=1e-4), name
    both = [(field, getattr(expected.found, field), getattr(found.found, field)) for field in FIELDS]
    both += [(key, value, found.memory[key]) for key, value in expected.memory.items()]
    for field, one, other in both:
        if one is not None:
            assert float((one - other).abs().max()) <= 1e-4 * float(one.abs().max()), (name, field)


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_several_find_what_one_finds(size: int, tmp_path: Path) -> None:
    answers = dict(zip(CASES, found_by(SCAN, list(CASES.values()), size, tmp_path), strict=True))
    for name, case in CASES.items():
        check_same(alone(case), answers[name]["done"], name)
        for one, other in combinations(answers[name]["parts"], 2):  # what two keep is the same to the bit
            both = one["box"].meet(other["box"])
            if both is not None:
                first, second = (part["object"][(..., *both.inside(part["box"]))] for part in (one, other))
                assert torch.equal(first, second), name
    sent = {name: answer["parts"][0]["sent"] for name, answer in answers.items()}
    assert "whole gradient" in sent["cg, whole objects"] and "gradient" in sent["cg"] and "whole gradient" not in sent["cg"]
    assert "keeps a tile" in answers["cg"]["parts"][0]["plan"][0] and "of one rank" in answers["cg"]["parts"][0]["plan"][1]
    assert ["sparse" in answers[name]["parts"][0]["plan"][-1] for name in ("lsq", "rpie, compact")] == [False, True]
    of_one = alone(CASES["raar"])
    kept = [part["bytes"] for part in answers["raar"]["parts"]]
    assert max(kept) < (1 / size + 0.1) * bytes_of(of_one.found, of_one.memory)
    assert any(part["followed"] for part in answers["cg, everything"]["parts"])


def test_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    for name in ("cg, everything", "raar"):
        case, folder = CASES[name], tmp_path / name.partition(",")[0]
        folder.mkdir()
        half = alone({**case, "passes": 4})
        [answer] = found_by(SCAN, [{**case, "passes": 7, "after": half}], 2, folder)
        check_same(alone({**case, "passes": 7}), answer["done"], name)
        check_same(alone({**case, "passes": 8}), alone({**case, "passes": 8}, answer["done"]), name)


def test_a_region_is_grown_back_by_several(tmp_path: Path) -> None:
    """From a pass of one process at which positions rest."""
    truth = made_up()
    scan = replace(scan_of(truth, seed=1), positions_B2=displaced(truth))
    case: dict[str, Any] = {"engine": "rpie", "passes": 40, "positions_from": 3, "double": True, "kernels": True}
    passes = list(reconstruct(scan, PtychoOptions(**{name: value for name, value in case.items() if name != "kernels"})))
    assert passes[18].memory["regions.rests"].any()
    [answer] = found_by(scan, [{**case, "after": passes[18]}], 2, tmp_path)
    check_same(passes[-1], answer["done"], "rpie")


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7])
def test_tiles_divide_positions_and_pixels(count: int) -> None:
    position_B2 = 100 * torch.rand(60, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shape, window = (120, 125), (16, 20)
    tiles = tiles_of(position_B2, window, shape, count, 2)
    assert torch.equal(torch.cat([tile.rows_B for tile in tiles]).sort().values, torch.arange(60))
    assert max(len(tile.rows_B) for tile in tiles) - min(len(tile.rows_B) for tile in tiles) <= 1
    counted = torch.zeros(shape)
    for tile in tiles:
        counted[tile.cell.inside(Box(0, 0, *shape))] += 1
        assert tile.cell.meet(tile.box) == tile.cell
        low_2, high_2 = position_B2[tile.rows_B].min(0).values, position_B2[tile.rows_B].max(0).values
        assert tile.box.top <= low_2[0] and tile.box.left <= low_2[1]
        assert tile.box.bottom >= high_2[0] + window[0] and tile.box.right >= high_2[1] + window[1]
    assert bool((counted == 1).all())


def test_more_ranks_than_positions_are_refused() -> None:
    with pytest.raises(InputError, match="3 positions for 4"):
        tiles_of(torch.zeros(3, 2), (4, 4), (8, 8), 4, 1)


def test_the_model_of_costs_tells_tiles_from_whole_objects() -> None:
    position_B2 = torch.cartesian_prod(*[torch.arange(40, dtype=torch.float64) * 50] * 2)
    large = tiles_of(position_B2, (512, 512), (2470, 2470), 4, 2)
    links = Costs(5e-5, 1 / 150e9, 1 / 2.5e12)  # of two GPUs of a host
    assert chosen(large, (2470, 2470), 1, links)[0] is large
    small = tiles_of(position_B2 / 500, (512, 512), (520, 520), 8, 2)  # all windows on one another: eight send all to all
    tiles, reason = chosen(small, (520, 520), 1, links)
    assert all(tile.box == Box(0, 0, 520, 520) for tile in tiles) and "whole object" in reason
    assert all(one.cell == other.cell for one, other in zip(small, tiles, strict=True))


def test_what_ranks_send_is_the_overlap() -> None:
    boxes = [Box(0, 0, 10, 6), Box(0, 4, 10, 10), Box(8, 0, 12, 10)]
    tiles = [Tile(torch.arange(1), box, box) for box in boxes]
    assert [shared_pixels(tiles, rank) for rank in range(3)] == [20 + 12, 20 + 12, 12 + 12]
