"""Accepted samples, their weights and sums, priors of children: compiled passes against their definitions and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from verglas.kernels.admit import Parents, admit
from verglas.kernels.blocks import Blocks
from verglas.kernels.keep import choose_keep, keep, posterior
from verglas.kernels.significant import choose_significant

SLICES_EACH, SHIFTS_EACH = (3, 0, 1, 40, 5, 7, 2), (4, 2, 1, 21, 0, 9, 1)
NOTHING_KEPT = 5  # a particle whose samples all lie below its threshold
INFINITY = math.inf


def ragged(slices_each: tuple[int, ...] = SLICES_EACH, shifts_each: tuple[int, ...] = SHIFTS_EACH, seed: int = 0) -> Blocks:
    """Random ragged lists: one particle without slices, one without shifts, one with a single sample."""
    draw = torch.Generator().manual_seed(seed)
    slices = [torch.randperm(60, generator=draw)[:n].sort().values for n in slices_each]
    shifts = [torch.randperm(30, generator=draw)[:m].sort().values for m in shifts_each]
    return Blocks.build(pointers(slices_each), torch.cat(slices), pointers(shifts_each), torch.cat(shifts))


def pointers(sizes: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *sizes]).cumsum(0)


def scores(blocks: Blocks, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """(log weights with some -inf, thresholds): some samples equal their threshold, one particle keeps nothing."""
    draw = torch.Generator().manual_seed(seed)
    value_N = 4 * torch.randn(blocks.samples, generator=draw, dtype=torch.float64)
    value_N[torch.rand(blocks.samples, generator=draw) < 0.1] = -INFINITY
    value_N = value_N.to(dtype)
    threshold_B = torch.full((blocks.particles,), INFINITY, dtype=torch.float64)
    for i in range(blocks.particles):
        mine = value_N[blocks.lists(i)[2]]
        finite = mine[torch.isfinite(mine)].double().sort().values
        if len(finite) and i != NOTHING_KEPT:
            threshold_B[i] = finite[len(finite) * 2 // 3]
    return value_N, threshold_B


def by_shift(value_N: Tensor, blocks: Blocks) -> Tensor:
    """The same samples stored shift by shift."""
    out = torch.empty_like(value_N)
    for i in range(blocks.particles):
        slices, shifts, where = blocks.lists(i)
        out[where] = value_N[where].view(len(slices), len(shifts)).T.flatten()
    return out


# The reference takes samples stored by shift for those of a matrix product: as many for each particle (tested below).
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("implementation", "stored_by_shift"), [("cpu", False), ("cpu", True), ("reference", False)])
def test_kept_blocks_hold_the_accepted_samples_and_no_more(
    implementation: str, stored_by_shift: bool, dtype: torch.dtype
) -> None:
    """Against a loop over particles."""
    blocks = ragged()
    value_N, threshold_B = scores(blocks, dtype)
    stored_N = by_shift(value_N, blocks) if stored_by_shift else value_N
    kept = keep(stored_N, blocks, threshold_B, stored_by_shift, implementation)
    slice_at, shift_at = [], []
    for i in range(blocks.particles):
        slices, shifts, where = blocks.lists(i)
        matrix = value_N[where].view(len(slices), len(shifts))
        accepted = matrix >= threshold_B[i].to(dtype)
        used_slices, used_shifts = accepted.any(1), accepted.any(0)
        got_slices, got_shifts, got_where = kept.blocks.lists(i)
        assert torch.equal(got_slices, slices[used_slices]) and torch.equal(got_shifts, shifts[used_shifts])
        expected = torch.where(accepted, matrix, -INFINITY)[used_slices][:, used_shifts]
        assert torch.equal(kept.value_N[got_where], expected.flatten())
        slice_at.append(used_slices.nonzero().squeeze(1) + blocks.slice_ptr_B1[i])
        shift_at.append(used_shifts.nonzero().squeeze(1) + blocks.shift_ptr_B1[i])
    assert torch.equal(kept.slice_at_N, torch.cat(slice_at)) and torch.equal(kept.shift_at_M, torch.cat(shift_at))
    assert kept.blocks.shape(NOTHING_KEPT) == (0, 0) and kept.value_N.dtype == dtype
    assert 0 < len(kept.value_N) < blocks.samples


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("stored_by_shift", [False, True])
def test_compiled_keep_equals_the_reference_on_random_blocks(seed: int, stored_by_shift: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    slices_each, shifts_each = (tuple(torch.randint(0, 20, (9,), generator=draw).tolist()) for _ in range(2))
    if stored_by_shift:
        slices_each, shifts_each = slices_each[:1] * 9, (7,) * 9
    blocks = ragged(slices_each, shifts_each, seed)
    value_N, threshold_B = scores(blocks, torch.float32, seed)
    got, expected = (keep(value_N, blocks, threshold_B, stored_by_shift, name) for name in ("cpu", "reference"))
    assert torch.equal(got.value_N, expected.value_N)
    assert torch.equal(got.slice_at_N, expected.slice_at_N) and torch.equal(got.shift_at_M, expected.shift_at_M)
    for name, value in vars(expected.blocks).items():
        assert not isinstance(value, Tensor) or torch.equal(getattr(got.blocks, name), value), name
    assert got.blocks.samples == expected.blocks.samples


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
@pytest.mark.parametrize("stored_by_shift", [False, True])
def test_particles_with_equal_lists(implementation: str, stored_by_shift: bool) -> None:
    """Every particle with all slices and shifts, as a global search has them."""
    blocks = ragged((60, 60, 60), (30, 30, 30))
    value_N, threshold_B = scores(blocks, torch.float32)
    stored_N = by_shift(value_N, blocks) if stored_by_shift else value_N
    kept = keep(stored_N, blocks, threshold_B, stored_by_shift, implementation)
    accepted = (value_N.view(3, -1) >= threshold_B.float()[:, None]).sum(1)
    found = torch.stack([torch.isfinite(kept.value_N[kept.blocks.lists(i)[2]]).sum() for i in range(3)])
    assert torch.equal(found, accepted) and int(accepted.min()) > 500
    total = torch.where(value_N.view(3, -1) >= threshold_B.float()[:, None], value_N.view(3, -1), 0.0).double().sum()
    assert float(kept.value_N[torch.isfinite(kept.value_N)].double().sum()) == pytest.approx(float(total), rel=1e-12)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_single_precision_thresholds_keep_the_sample_they_come_from(implementation: str) -> None:
    """A threshold is a score widened to float64: the comparison must not lose the sample itself."""
    blocks = ragged((1,), (3,))
    value_N = torch.tensor([0.1, 0.3, 0.2], dtype=torch.float32)
    kept = keep(value_N, blocks, value_N[2:].double(), implementation=implementation)
    assert kept.shift_at_M.tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_posterior_weights_and_their_sums(implementation: str, dtype: torch.dtype) -> None:
    """Against a loop over particles, in float64."""
    blocks = ragged()
    value_N = scores(blocks, dtype)[0]
    log_sum_B = torch.tensor([value_N[blocks.lists(i)[2]].double().logsumexp(0) for i in range(blocks.particles)])
    weight_N, slice_N, shift_M, entropy_B = posterior(value_N, blocks, log_sum_B, implementation)
    assert weight_N.dtype == dtype and {t.dtype for t in (slice_N, shift_M, entropy_B)} == {torch.float64}
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    for i in range(blocks.particles):
        _, _, where = blocks.lists(i)
        p = torch.exp(value_N[where].double() - log_sum_B[i])
        torch.testing.assert_close(weight_N[where].double(), p, rtol=tolerance, atol=0)
        matrix = p.view(blocks.shape(i))
        a, t = slice(*blocks.slice_ptr_B1[i : i + 2].tolist()), slice(*blocks.shift_ptr_B1[i : i + 2].tolist())
        torch.testing.assert_close(slice_N[a], matrix.sum(1), rtol=tolerance, atol=1e-15)
        torch.testing.assert_close(shift_M[t], matrix.sum(0), rtol=tolerance, atol=1e-15)
        assert float(entropy_B[i]) == pytest.approx(float(-torch.xlogy(p, p).sum()), rel=tolerance, abs=1e-12)


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_posterior_by_hand(implementation: str) -> None:
    """Weights 1/2, 0, 1/4, 1/4 of two slices and two shifts: entropy 1.5 ln 2; then all samples equal, then far too small."""
    blocks = ragged((2, 2, 1), (2, 2, 2))
    tiny = [-1e5, 0.0]
    value_N = torch.tensor([0.5, 0.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64).log()
    value_N = torch.cat([value_N, torch.tensor(tiny, dtype=torch.float64)])
    log_sum_B = torch.tensor([0.0, math.log(4), 0.0], dtype=torch.float64)
    weight_N, slice_N, shift_M, entropy_B = posterior(value_N, blocks, log_sum_B, implementation)
    torch.testing.assert_close(weight_N[:8], torch.tensor([0.5, 0, 0.25, 0.25, *[0.25] * 4], dtype=torch.float64))
    assert weight_N[8:].tolist() == [0.0, 1.0]
    torch.testing.assert_close(slice_N, torch.tensor([0.5, 0.5, 0.5, 0.5, 1.0], dtype=torch.float64))
    torch.testing.assert_close(shift_M, torch.tensor([0.75, 0.25, 0.5, 0.5, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(entropy_B, torch.tensor([1.5 * math.log(2), math.log(4), 0.0], dtype=torch.float64))


def family(slices_each: int, shifts_each: int, dtype: torch.dtype) -> tuple[Parents, Blocks, Tensor]:
    """(parents with pairs left out, their children, scores of the children)."""
    parents = ragged()
    kept_N = scores(parents, dtype, 3)[0]
    draw = torch.Generator().manual_seed(4)
    slice_prior_N = torch.randn(len(parents.slice_N), generator=draw, dtype=torch.float64)
    shift_prior_M = torch.randn(len(parents.shift_M), generator=draw, dtype=torch.float64)
    slice_N = (parents.slice_N[:, None] * slices_each + torch.arange(slices_each)).flatten()
    shift_M = (parents.shift_M[:, None] * shifts_each + torch.arange(shifts_each)).flatten()
    blocks = Blocks.build(parents.slice_ptr_B1 * slices_each, slice_N, parents.shift_ptr_B1 * shifts_each, shift_M)
    score_N = torch.randn(blocks.samples, generator=draw, dtype=torch.float64).to(dtype)
    return Parents(parents, kept_N, slice_prior_N, shift_prior_M), blocks, score_N


@pytest.mark.parametrize("each", [(8, 4), (1, 1), (64, 16)])
@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_children_get_their_parents_prior(implementation: str, each: tuple[int, int]) -> None:
    parents, blocks, score_N = family(*each, torch.float64)
    got_N = score_N.clone()
    admit(got_N, blocks, parents, *each, implementation)
    lists = parents.blocks
    left_out = 0
    for i in range(blocks.particles):
        _, _, where = blocks.lists(i)
        _, _, parent_where = lists.lists(i)
        kept = parents.kept_N[parent_where].view(lists.shape(i)) > -INFINITY
        a, t = slice(*lists.slice_ptr_B1[i : i + 2].tolist()), slice(*lists.shift_ptr_B1[i : i + 2].tolist())
        prior = parents.slice_prior_N[a][:, None] + parents.shift_prior_M[t]
        of_parent = torch.where(kept, prior, -INFINITY)
        expected = score_N[where].view(blocks.shape(i)) + of_parent.repeat_interleave(each[0], 0).repeat_interleave(each[1], 1)
        torch.testing.assert_close(got_N[where].view(blocks.shape(i)), expected, rtol=1e-14, atol=1e-14)
        left_out += int((~kept).sum())
    assert left_out > 10 and int(torch.isneginf(got_N).sum()) == left_out * each[0] * each[1]


def test_admit_does_not_depend_on_how_many_samples_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    parents, blocks, score_N = family(8, 4, torch.float32)
    whole_N, parts_N = score_N.clone(), score_N.clone()
    admit(whole_N, blocks, parents, 8, 4, "reference")
    monkeypatch.setattr("verglas.kernels.admit.reference.SAMPLES_AT_ONCE", 777)
    admit(parts_N, blocks, parents, 8, 4, "reference")
    assert torch.equal(whole_N, parts_N)
    admit(compiled := score_N.clone(), blocks, parents, 8, 4, "cpu")
    torch.testing.assert_close(compiled, whole_N, rtol=1e-6, atol=1e-6)


def test_what_children_scored_where_no_parent_is_does_not_matter() -> None:
    """Samples whose parent was left out may hold anything, numbers or not."""
    for name in ("cpu", "reference"):
        parents, blocks, score_N = family(8, 4, torch.float32)
        other_N = score_N.clone()
        admit(score_N, blocks, parents, 8, 4, name)
        other_N[torch.isneginf(score_N)] = math.nan
        admit(other_N, blocks, parents, 8, 4, name)
        assert torch.equal(other_N, score_N)


def test_which_implementation_runs() -> None:
    for choose in (choose_keep, choose_significant):
        assert choose(torch.empty(0)) == "cpu" and choose(torch.empty(0), "triton") == "triton"
        with pytest.raises(ValueError, match="fortran"):
            choose(torch.empty(0), "fortran")
    parents, blocks, score_N = family(1, 1, torch.float32)
    with pytest.raises(ValueError, match="cuda"):
        admit(score_N, blocks, parents, 1, 1, "cuda")


@pytest.mark.parametrize("bounds", [(0, 7), (0, 3), (3, 7), (4, 5)])
def test_a_part_of_the_lists_holds_the_same_particles(bounds: tuple[int, int]) -> None:
    blocks, (first, last) = ragged(), bounds
    ranges = [blocks.ranges(*bounds) for _ in range(2)]  # the pointers are kept after the first question
    assert ranges[0] == ranges[1]
    slices, shifts, values = ranges[0]
    part = blocks.part(first, last)
    assert (part.particles, part.samples) == (last - first, values.stop - values.start)
    assert (len(part.slice_N), len(part.shift_M)) == (slices.stop - slices.start, shifts.stop - shifts.start)
    for i in range(part.particles):
        (mine_n, mine_m, mine), (whole_n, whole_m, whole) = part.lists(i), blocks.lists(first + i)
        assert mine_n.equal(whole_n) and mine_m.equal(whole_m)
        assert (mine.start + values.start, mine.stop + values.start) == (whole.start, whole.stop)
