"""Local searches: which coarse orientations of the grid lie near what is known of each particle's pose.

Prior of a pose A on the grid: a Gaussian in the distance between viewing directions times a Gaussian in the turn within the
image plane, both cut at 3 sigma. As in RELION the grid is taken unperturbed and the prior sums to 1 over what is selected.
Two things are done better than there. Each symmetry mate A R of the pose is a prior of its own, with its own in-plane angle
(RELION takes the best mate's direction but keeps the first one's psi); the density is the largest over the mates. And the
in-plane turn is what remains after the shortest tilt of one view onto the other, not a difference of psi angles, which
says little near the poles, where rot and psi turn about the same axis.

`select_relaxed` is for particles that are nearly symmetric: their pose is known but for an operation of a larger group than the
map has. Each of these poses is as likely before the image is seen (RELION's --relax_sym does this for Cn alone).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.symmetry import mates_beyond, symmetry_matrices
from verglas.errors import InputError
from verglas.expectation.healpix import directions_of_pixels, largest_radius
from verglas.expectation.sampling import OrientationGrid, directions_of_unit, view_vectors, views_of_unit
from verglas.kernels.blocks import owner

_CUT = 3.0  # sigmas
_CHILDREN = 4  # of a HEALPix pixel
_FIRST_ORDER = 2  # of the HEALPix pixels with which the descent to the grid's directions starts
_PAIRS_AT_ONCE = 2**21  # (prior, first pixel) pairs, and so the memory of a block of particles: some 100 MB


@dataclass(frozen=True)
class _Level:
    """HEALPix pixels of one order that hold directions of the grid.

    view_U3: their centres; reach: cosine of the distance up to which one may hold a direction within the cut;
    child_ptr_U1: where the children of each lie in the next level.
    """

    view_U3: Tensor
    reach: float
    child_ptr_U1: Tensor


@dataclass(frozen=True)
class _Descent:
    """How directions near a pose are found: pixels from a coarse order down to the grid's directions, whose views are view_D33.

    The last level has a reach of just the cut, and no children.
    """

    levels: list[_Level]
    view_D33: Tensor


def select_local(grid: OrientationGrid, prior_B33: Tensor, sigma_degrees: float, symmetry: str) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse orientations within 3 sigma of each pose, as ragged lists on the device of the poses.

    prior_B33: matrices A of the poses; sigma_degrees: of both Gaussians. Returns ptr_B1 (int64 [B + 1]), orientation_N (int64,
    ascending for each particle, never twice) and log_prior_N (float64, natural logarithm; exp sums to 1 for each particle).
    A particle without any direction within 3 sigma gets the nearest one, likewise the in-plane angle.
    """
    if not 0 < sigma_degrees <= 180:
        raise InputError("local search", f"a prior of {sigma_degrees:g} degrees", "more than 0, up to 180",
                         "Search globally, or give the spread of the pose errors.")  # fmt: skip
    mates_G33 = _mates(symmetry, prior_B33.device)
    descent = _descent(grid.healpix_order, grid.symmetry, _CUT * sigma_degrees, prior_B33.device)
    block = max(1, _PAIRS_AT_ONCE // (len(mates_G33) * len(descent.levels[0].view_U3)))
    counts, orientations, logs = [], [], []
    for start in range(0, len(prior_B33), block):
        prior_BG33 = prior_B33[start : start + block, None].double() @ mates_G33
        count_B, orientation_N, log_N = _select_block(grid, prior_BG33, sigma_degrees, descent)
        counts.append(count_B)
        orientations.append(orientation_N)
        logs.append(log_N)
    if not counts:
        raise InputError("local search", "no particles", "at least one pose", "Give particles.")
    ptr_B1 = torch.cat([counts[0].new_zeros(1), torch.cat(counts).cumsum(0)])
    return ptr_B1, torch.cat(orientations), torch.cat(logs)


def select_relaxed(
    grid: OrientationGrid, prior_B33: Tensor, sigma_degrees: float, symmetry: str, relaxed: str
) -> tuple[Tensor, Tensor, Tensor]:
    """As `select_local`, about every pose that the group `relaxed` makes of each one.

    The prior is the mean of the priors about the R mates that `symmetry` tells apart, so each mate has 1/R of it. Raises
    InputError if `relaxed` is no larger group than `symmetry`.
    """
    mates_R33 = mates_beyond(symmetry, relaxed).to(prior_B33.device)
    prior_Q33 = (prior_B33[:, None].double() @ mates_R33).reshape(-1, 3, 3)
    ptr_Q1, orientation_N, log_prior_N = select_local(grid, prior_Q33, sigma_degrees, symmetry)
    prior_N = owner(ptr_Q1, len(orientation_N))
    key_N = torch.div(prior_N, len(mates_R33), rounding_mode="floor") * grid.count + orientation_N
    key_M, which_N = torch.unique(key_N, sorted=True, return_inverse=True)
    share_M = log_prior_N.new_zeros(len(key_M)).index_add_(0, which_N, log_prior_N.exp() / len(mates_R33))
    particle_M = torch.div(key_M, grid.count, rounding_mode="floor")
    count_B = ptr_Q1.new_zeros(len(prior_B33)).index_add_(0, particle_M, torch.ones_like(particle_M))
    ptr_B1 = torch.cat([count_B.new_zeros(1), count_B.cumsum(0)])
    return ptr_B1, key_M - particle_M * grid.count, share_M.log()


@lru_cache(maxsize=4)  # every batch asks for them
def _mates(symmetry: str, device: torch.device) -> Tensor:
    return symmetry_matrices(symmetry).to(device)


@lru_cache(maxsize=2)  # every batch of every iteration on this grid asks for it
def _descent(healpix_order: int, symmetry: str, cut: float, device: torch.device) -> _Descent:
    healpix_D, levels = directions_of_unit(healpix_order, symmetry)[1].to(device), []
    view_D33 = views_of_unit(healpix_order, 0, symmetry, device)
    first = min(_FIRST_ORDER, healpix_order)
    pixels = [torch.unique_consecutive(healpix_D >> 2 * (healpix_order - order)) for order in range(first, healpix_order + 1)]
    for order, pixel_U in enumerate(pixels, first):
        last = order == healpix_order
        radius = cut if last else cut + largest_radius(order)
        following = pixel_U if last else pixels[order - first + 1]
        ends = torch.cat([pixel_U, pixel_U[-1:] + 1]) * (1 if last else 4)
        view_U3 = view_D33[:, 2] if last else view_vectors(directions_of_pixels(order, pixel_U))
        reach = math.cos(math.radians(min(radius, 180.0)))
        levels.append(_Level(view_U3, reach, torch.searchsorted(following, ends)))
    return _Descent(levels, view_D33)


def _select_block(grid: OrientationGrid, prior_BG33: Tensor, sigma: float, descent: _Descent) -> tuple[Tensor, Tensor, Tensor]:
    """Number of orientations per particle, the orientations and their log priors, of one block of particles and their mates."""
    particles, mates = prior_BG33.shape[:2]
    prior_Q33 = prior_BG33.reshape(-1, 3, 3)
    prior_P, direction_P = _directions_within(prior_Q33[:, 2], descent.levels)
    found_B = torch.zeros(particles, dtype=torch.bool, device=prior_P.device)
    found_B.index_fill_(0, torch.div(prior_P, mates, rounding_mode="floor"), True)  # unlike an assignment, without a wait
    lost_L = torch.nonzero(~found_B)[:, 0]
    if len(lost_L):
        nearest_L, direction_L = nearest_directions(prior_BG33[lost_L, :, 2], descent.levels[-1].view_U3)
        prior_P = torch.cat([prior_P, lost_L * mates + nearest_L])
        direction_P = torch.cat([direction_P, direction_L])
    view_P33 = descent.view_D33[direction_P]
    pair_N, psi_N, log_N = _in_plane(grid, prior_Q33[prior_P], view_P33, sigma)
    particle_P = torch.div(prior_P, mates, rounding_mode="floor")
    key_M, log_M = _largest(particle_P[pair_N] * grid.count + direction_P[pair_N] * grid.n_psi + psi_N, log_N, mates > 1)
    particle_M = torch.div(key_M, grid.count, rounding_mode="floor")
    highest_B = log_M.new_full((particles,), -torch.inf).scatter_reduce_(0, particle_M, log_M, "amax")
    log_M = log_M - highest_B[particle_M]
    total_B = log_M.new_zeros(particles).index_add_(0, particle_M, log_M.exp())
    count_B = torch.zeros_like(found_B, dtype=torch.int64).index_add_(0, particle_M, torch.ones_like(particle_M))
    return count_B, key_M - particle_M * grid.count, log_M - total_B.log()[particle_M]


def _largest(key_N: Tensor, log_N: Tensor, repeated: bool) -> tuple[Tensor, Tensor]:
    """Keys, ascending, each once, and the largest value of each. repeated: whether any may be there more than once."""
    if not repeated:
        key_M, order_M = key_N.sort()
        return key_M, log_N[order_M]
    key_M, which_N = torch.unique(key_N, sorted=True, return_inverse=True)
    log_M = torch.full((len(key_M),), -torch.inf, dtype=torch.float64, device=key_M.device)
    return key_M, log_M.scatter_reduce_(0, which_N, log_N, "amax")


def _directions_within(view_Q3: Tensor, levels: list[_Level]) -> tuple[Tensor, Tensor]:
    """Pairs (prior, direction of the grid) closer than the cut: descent through the pixels that are close enough.

    One wait for a GPU at each level: pixels have four children at most, so all four are looked at, whether they exist or not.
    """
    prior_P, pixel_P = torch.nonzero(view_Q3 @ levels[0].view_U3.T > levels[0].reach, as_tuple=True)
    for above, level in itertools.pairwise(levels):
        first_P1, end_P1 = above.child_ptr_U1[pixel_P, None], above.child_ptr_U1[pixel_P + 1, None]
        child_P4 = first_P1 + torch.arange(_CHILDREN, device=pixel_P.device)
        view_P43 = level.view_U3[child_P4.clamp_max(len(level.view_U3) - 1)]
        close_P4 = ((view_Q3[prior_P, None] * view_P43).sum(2) > level.reach) & (child_P4 < end_P1)
        parent_P, child_P = close_P4.nonzero().unbind(1)
        prior_P, pixel_P = prior_P[parent_P], child_P4[parent_P, child_P]
    return prior_P, pixel_P


def nearest_directions(view_LG3: Tensor, view_D3: Tensor) -> tuple[Tensor, Tensor]:
    """(mate, direction) that come closest for each of L poses."""
    mates, best = [], []
    for view_lG3 in view_LG3.split(max(1, _PAIRS_AT_ONCE // (view_LG3.shape[1] * len(view_D3)))):
        pair = (view_lG3 @ view_D3.T).flatten(1).argmax(1)
        mates.append(torch.div(pair, len(view_D3), rounding_mode="floor"))
        best.append(pair % len(view_D3))
    return torch.cat(mates), torch.cat(best)


def _in_plane(grid: OrientationGrid, prior_P33: Tensor, view_P33: Tensor, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
    """In-plane angles within the cut for pairs of a pose and a view: (pair, psi index, log density up to a constant).

    The view V (psi = 0) turned by psi is nearest to the pose where the trace of (Rz(psi) V) A^T is largest.
    """
    a, v = prior_P33, view_P33
    distance_P = torch.rad2deg(torch.atan2(torch.linalg.cross(a[:, 2], v[:, 2]).norm(dim=1), (a[:, 2] * v[:, 2]).sum(1)))
    sine = (v[:, 1] * a[:, 0]).sum(1) - (v[:, 0] * a[:, 1]).sum(1)
    cosine = (v[:, 0] * a[:, 0]).sum(1) + (v[:, 1] * a[:, 1]).sum(1)
    middle_P = torch.rad2deg(torch.atan2(sine, cosine)) / grid.psi_step  # in steps
    half = _CUT * sigma / grid.psi_step
    first_P = torch.floor(middle_P - half).long() + 1
    count_P = torch.ceil(middle_P + half).long() - first_P
    nearest_P = torch.round(middle_P).long()
    first_P = torch.where(count_P > grid.n_psi, nearest_P - grid.n_psi // 2, torch.where(count_P < 1, nearest_P, first_P))
    count_P = count_P.clamp(1, grid.n_psi)
    pair_N, place_N = _repeat(torch.arange(len(first_P), device=first_P.device), count_P)
    psi_N = first_P[pair_N] + place_N
    turn_N = (psi_N - middle_P[pair_N]) * grid.psi_step
    log_N = -(distance_P[pair_N].square() + turn_N.square()) / (2 * sigma**2)
    return pair_N, torch.remainder(psi_N, grid.n_psi), log_N


def _repeat(value_P: Tensor, times_P: Tensor) -> tuple[Tensor, Tensor]:
    """Each value `times` times, and the number of each repetition, counted from 0 for each value."""
    end_P = times_P.cumsum(0)
    count = int(end_P[-1]) if len(end_P) else 0
    which_N = torch.repeat_interleave(times_P, output_size=count)
    return value_P[which_N], torch.arange(count, device=value_P.device) - (end_P - times_P)[which_N]
