"""How far the log-probabilities of a precision are from the float64 reference: what the searches themselves compute.

Scores are taken where the search hands them to `significant`: priors are in them, the constant of the image is not. Where it
hands images to `coarse` instead, which never has all scores, those that hold nearly all of the weight are asked for. Each
particle's log-sum is removed, so that what is left are logarithms of posterior weights.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor

from verglas.expectation import search
from verglas.expectation.search import Searcher
from verglas.expectation.slices import FineSlices, Slicer
from verglas.kernels.admit import Parents
from verglas.kernels.blocks import Blocks
from verglas.kernels.coarse import Orientations, coarse
from verglas.kernels.keep import Kept
from verglas.kernels.significant import Significance, significant
from verglas.projection.volume import LARGEST_HALF, FourierVolume, in_half
from verglas.refinement.computing import Computing
from verglas.refinement.expect import HalfExpectation
from verglas.testing.made_up import Problem

NEARLY_ALL = 1 - 1e-7  # of the weight
LEFT_OUT = -1e6  # score of a sample that holds nothing of it
NEAR = 12.0  # nats below a particle's best sample, within which errors count
REFERENCE = Computing(torch.device("cpu"), torch.float64, torch.float64, 0.0)


@dataclass(frozen=True)
class Scores:
    """Scores of all samples in float64 on the CPU, and where each particle's begin; parents: what the coarse pass kept."""

    coarse_N: Tensor
    coarse_ptr_B1: Tensor
    fine_N: Tensor
    fine_ptr_B1: Tensor
    parents: Parents
    power_snr_B: Tensor


@dataclass(frozen=True)
class Difference:
    """largest_B: largest error of the log-probabilities near the best; variation_B: total variation of the weights;
    finite: whether no score overflowed; samples: how many were compared on average."""

    largest_B: Tensor
    variation_B: Tensor
    finite: bool
    samples: float


class RoundedSlicer(Slicer):
    """Slices of volumes rounded to float16, rounded again, then in single precision: what half-precision operands are worth."""

    def _into(self, out: Tensor, volume: FourierVolume, rotation_R33: Tensor) -> Tensor:
        half_V2, scale = in_half(volume.values)
        volume = replace(volume, values=half_V2.to(volume.values) * scale)
        return out.copy_(super()._into(out, volume, rotation_R33).clamp_(-LARGEST_HALF, LARGEST_HALF).half())


class RoundedSearcher(Searcher):
    """Half-precision operands with single-precision products and sums, emulated on any device."""

    @classmethod
    def like(cls, searcher: Searcher) -> RoundedSearcher:
        """With the slices of another searcher, rounded."""

        def rounded(slicer: Slicer) -> RoundedSlicer:
            copy = RoundedSlicer.__new__(RoundedSlicer)
            copy.__dict__.update(slicer.__dict__)
            return copy

        fine = FineSlices(rounded(searcher.full), searcher.space.grid, whole=False)
        coarse, full = rounded(searcher.coarse_slicer), rounded(searcher.full)
        made = cls(searcher.preparer, searcher.space, coarse, full, fine, searcher.some_weights)
        made.measured = False  # strong coefficients are treated as those of real half-precision operands
        return made

    def shifted(
        self, image_B2K: Tensor, offset_T2: Tensor, count: int | None = None, lists: Blocks | None = None
    ) -> Tensor:
        return super().shifted(image_B2K, offset_T2, count, lists).half().float()


def scores_of(problem: Problem, on: Computing, rows: Tensor, parents: Parents | None = None, rounded: bool = False) -> Scores:
    """What the coarse and the fine search score. parents: whose children the fine one compares (default: its own).

    rounded: emulate half-precision operands (of a single-precision computation).
    """
    half = HalfExpectation([problem.model], problem.data, problem.poses, problem.plan, problem.config, on)
    searcher, prepared = half.prepared(rows, 0)
    if rounded:
        searcher = RoundedSearcher.like(searcher)
    offset_B2 = half._facts(rows, 0).old_offset_B2
    seen: list[tuple[Tensor, Tensor]] = []

    def recording(log_weight_N: Tensor, ptr_B1: Tensor, fraction: float) -> Significance:
        seen.append((log_weight_N.detach().cpu().double(), ptr_B1.cpu()))
        return significant(log_weight_N, ptr_B1, fraction)

    def recording_coarse(
        images_BTL: Tensor, weight_BK: Tensor, log_offset_BT: Tensor, orientations: Orientations, fraction: float
    ) -> tuple[Kept, Significance]:
        inputs = (images_BTL, weight_BK, log_offset_BT, orientations)
        seen.append(dense(coarse(*inputs, NEARLY_ALL)[0], images_BTL.shape[1], len(orientations.slices_OL)))
        return coarse(*inputs, fraction)

    with mock.patch.object(search, "significant", recording), mock.patch.object(search, "coarse", recording_coarse):
        own, significant_B = searcher.coarse(prepared, offset_B2, half._own(rows))
        mine = own if parents is None else moved(parents, on)
        searcher.fine(prepared, mine, significant_B)
    true_K2 = searcher.full(problem.poses.rotation_B33[rows]).double().square().sum(1)
    power_snr_B = (true_K2 * prepared.weight_BK.double()).sum(1).cpu()
    return Scores(*seen[0], *seen[1], own, power_snr_B)


def dense(kept: Kept, shifts: int, slices: int) -> tuple[Tensor, Tensor]:
    """Scores of all samples, shift by shift, from those that were kept, and where each particle's begin; on the CPU."""
    blocks = kept.blocks
    particle_N, slice_at_N, shift_at_N = blocks.sample_indices()
    place_N = (particle_N * shifts + blocks.shift_M[shift_at_N].long()) * slices + blocks.slice_N[slice_at_N].long()
    score_N = torch.full((blocks.particles * shifts * slices,), LEFT_OUT, dtype=torch.float64)
    value_N = kept.value_N.double().cpu()
    score_N[place_N.cpu()] = torch.where(value_N > -torch.inf, value_N, LEFT_OUT)
    return score_N, torch.arange(blocks.particles + 1) * (shifts * slices)


def moved(parents: Parents, on: Computing) -> Parents:
    """Parents in the precision and on the device of another computation."""
    numbers = (parents.kept_N, parents.slice_prior_N, parents.shift_prior_M)
    return Parents(parents.blocks.to(on.device), *(tensor.to(on.device, on.dtype) for tensor in numbers))


def difference(got_N: Tensor, expected_N: Tensor, ptr_B1: Tensor) -> Difference:
    """Errors of the logarithms of the posterior weights, particle by particle."""
    largest, variation, samples = [], [], 0
    ends = ptr_B1.tolist()
    for first, last in itertools.pairwise(ends):
        got, expected = got_N[first:last], expected_N[first:last]
        got, expected = got - got.logsumexp(0), expected - expected.logsumexp(0)
        near = expected > expected.max() - NEAR
        largest.append((got - expected)[near].abs().max())
        variation.append(0.5 * (got.exp() - expected.exp()).abs().sum())
        samples += int(near.sum())
    allowed = torch.isfinite(got_N) | (torch.isneginf(got_N) & torch.isneginf(expected_N))
    return Difference(torch.stack(largest), torch.stack(variation), bool(allowed.all()), samples / len(largest))
