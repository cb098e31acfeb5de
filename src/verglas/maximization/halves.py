"""The maximization of one refinement iteration: from the weighted sums of two half-sets to the next references.

Order and constants are RELION's (facts 4.2-4.6): Friedel partners and point group, joining at low resolution, FSC, tau^2,
Wiener solve. Spectra are per shell of the map, [N/2 + 1] float64, in units of forward-normalised 2-D transforms, one
component (real or imaginary); they are 0 beyond the radius of the sums. Weights are sums of CTF^2 / sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.core.transfers import at_once, piece_to_device, to_device, to_host
from verglas.kernels import voxels
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.shells import fsc_sums_cuda, serves
from verglas.maximization.solve import SolvedSums, gather_sums
from verglas.maximization.waiting import PIECE, Half, Waiting, alike, in_turn, pieces
from verglas.projection.volume import coordinate_chunks, radius2

CELLS_AT_ONCE = {"cpu": 2**21, "cuda": 2**24}  # of the unpadded grid that the FSC is taken on: bounded temporaries

FscOfMaps = Callable[[list[Tensor]], Tensor]
"""How to judge two unregularised half maps, for example inside a mask: maps [N, N, N] -> FSC [N/2 + 1]."""

HalfSums = tuple[Accumulator | Waiting, Accumulator | Waiting]
"""Of both half-sets; one may wait on the host."""


@dataclass(frozen=True)
class Solution:
    """One map, not yet flattened, and what is known of its shells.

    map_ZYX: float32 [N, N, N]; tau2_S: power of the signal (rlnReferenceTau2); sigma2_S: power of the map's noise,
    1 / (padding^3 mean weight) (rlnReferenceSigma2); ssnr_S: their ratio times tau2_fudge as RELION counts it
    (rlnSsnrMap); coverage_S: share of voxels where the data outweigh the prior (rlnFourierCompleteness).
    """

    map_ZYX: Tensor
    tau2_S: Tensor
    sigma2_S: Tensor
    ssnr_S: Tensor
    coverage_S: Tensor


def solve_halves(
    sums: HalfSums, symmetry: str, join_shell: int, tau2_fudge: float = 1.0,
    fsc_S: Tensor | FscOfMaps | None = None, support_ZYX: Tensor | None = None,
) -> tuple[list[Solution], Tensor]:  # fmt: skip
    """The next reference of each half-set, and the FSC of the halves that their priors come from.

    join_shell: up to it both halves get the mean of their sums, so that they do not drift apart (FSC 1 there).
    fsc_S: a curve to use, or a function of the two unregularised maps; None: of the averages, unmasked.
    The accumulators are used up. support_ZYX: bool, the voxels that are wanted of maps that ranks share (`SolvedSums.map`).
    Where one half's sums wait on the host, maps come there, too.
    """
    halves = gathered_halves(sums, symmetry)
    there = _home(halves)
    join_low_shells(halves, join_shell)
    if fsc_S is None:
        curve_S = fsc_of_sums(halves)
    else:
        curve_S = fsc_S(in_turn(halves, SolvedSums.map, keep=True)) if callable(fsc_S) else fsc_S

    def solved(half: SolvedSums) -> Solution:
        found = solve_with_fsc(half, curve_S, tau2_fudge, False, support_ZYX)
        return replace(found, map_ZYX=there(found.map_ZYX))

    return in_turn(halves, solved, keep=False), curve_S


def solve_joined(
    sums: HalfSums, symmetry: str, fsc_S: Tensor | FscOfMaps | None = None, tau2_fudge: float = 1.0, join_shell: int = 0
) -> tuple[Solution, list[Tensor], Tensor]:
    """The last iteration (facts 5.5): the map of all particles, both half maps without prior or joining, and the FSC.

    join_shell: as in `solve_halves`, for the FSC only. The accumulators are used up, and half maps come to the host as there.
    """
    halves = gathered_halves(sums, symmetry)
    device, there = halves[0].device, _home(halves)
    half_maps = in_turn(halves, lambda half: there(half.map()), keep=True)
    if fsc_S is None:
        join_low_shells(halves, join_shell)  # which leaves their sum as it is
        curve_S = fsc_of_sums(halves)
    else:
        curve_S = fsc_S([to_device(one, device) for one in half_maps]) if callable(fsc_S) else fsc_S
    return solve_with_fsc(_added(halves), curve_S, tau2_fudge, True), half_maps, curve_S


def solve_single(
    sums: Accumulator, symmetry: str, reference_tau2_S: Tensor, tau2_fudge: float = 1.0, support_ZYX: Tensor | None = None
) -> Solution:
    """Without half-sets: the prior's power is that of the reference the particles were compared with (facts 4.3).

    reference_tau2_S: from `reference.reference_spectrum`. A shell where it is 0 comes out empty. `sums` is used up.
    support_ZYX: as in `solve_halves`.
    """
    gathered = gather_sums([sums], symmetry, consume=True)
    sigma2_S = _noise_power(gathered)
    tau2_S = reference_tau2_S[: len(sigma2_S)].to(sigma2_S)
    ssnr_S = torch.where(sigma2_S > 0, tau2_fudge * tau2_S / sigma2_S, 0)
    return _solution(gathered, (tau2_S, sigma2_S, ssnr_S), tau2_fudge, support_ZYX)


def gathered_halves(sums: HalfSums, symmetry: str) -> list[Half]:
    """Both halves with Friedel partners and point group applied; the accumulators are used up."""
    return alike([half if isinstance(half, Waiting) else gather_sums([half], symmetry, consume=True) for half in sums])


def _home(halves: list[Half]) -> Callable[[Tensor], Tensor]:
    """What brings maps to where they stay."""
    return to_host if any(isinstance(half, Waiting) for half in halves) else lambda map_ZYX: map_ZYX


def _added(halves: list[Half]) -> SolvedSums:
    """Sums of both halves together, in the memory of the more precise one, on the device; `halves` are used up."""
    first, second = sorted(halves, key=lambda half: (-half.weight_V.element_size(), isinstance(half, Waiting)))
    assert isinstance(first, SolvedSums)

    def add(part: slice) -> None:
        first.set(part, first.some(part) + second.some(part))

    at_once(pieces(len(first.weight_V)), add, first.device)
    halves.clear()
    return first


def join_low_shells(halves: list[Half], shell: int) -> None:
    """Replace data and weight of both halves within r <= shell by their mean, in place; shell 0 leaves them apart."""
    first, second = halves
    rows, reach = first.rows, padded_radius(shell, first.padding)
    if shell <= 0:
        return
    low, high = max(0, rows.half - reach), min(rows.edge, rows.half + reach + 1)
    for part, coordinates in coordinate_chunks(rows, planes=range(low, high)):
        inside_V1 = (radius2(coordinates) <= reach**2)[:, None]
        a_V3, b_V3 = first.some(part), second.some(part)
        mean_V3 = 0.5 * (a_V3 + b_V3)
        first.set(part, torch.where(inside_V1, mean_V3.to(a_V3), a_V3))
        second.set(part, torch.where(inside_V1, mean_V3.to(b_V3), b_V3))


def fsc_of_sums(halves: list[Half]) -> Tensor:
    """FSC of two halves from their sums alone, [N/2 + 1]; FSC(0) = 1, 0 beyond the radius (facts 4.5).

    Sums of padded voxels are added up on the unpadded grid (index round(k / padding)) and divided there: no prior, no
    real space. The plane x = 0, stored whole, counts as stored.
    """
    first, second = sorted(halves, key=lambda half: isinstance(half, Waiting))
    assert isinstance(first, SolvedSums)
    return fsc_of_products(first, torch.stack(first.of_all(_fsc_sums(first, second))))


def fsc_of_products(sums: SolvedSums, products_3S: Tensor) -> Tensor:
    """FSC [N/2 + 1] from sums of a b, a a and b b per shell [3, radius + 1]."""
    cross, power_a, power_b = products_3S
    norm = (power_a * power_b).sqrt()
    fsc_S = cross.new_zeros(sums.box // 2 + 1)
    fsc_S[: sums.radius + 1] = torch.where(norm > 0, cross / norm.clamp_min(1e-300), 0)
    fsc_S[0] = 1.0
    return fsc_S


def _fsc_sums(first: SolvedSums, second: Half) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of a b, a a and b b per shell, float64 [radius + 1] each, of averages on the unpadded grid."""
    sums_3S = torch.zeros(3, first.radius + 1, dtype=torch.float64, device=first.device)
    plane_U, edge, columns = unpadded_grid(first)
    if isinstance(second, SolvedSums) and serves(first.data_V2, first.weight_V, second.data_V2, second.weight_V):
        pairs = (first.data_V2, first.weight_V), (second.data_V2, second.weight_V)
        cross, power_a, power_b = fsc_sums_cuda(*pairs, first.rows, plane_U, nearest_of(first), first.radius + 1)
        return cross, power_a, power_b
    if isinstance(second, Waiting) and serves(first.data_V2, first.weight_V) and first.weight_V.dtype == second.weight_V.dtype:
        return _fsc_sums_in_pieces(first, second, plane_U)
    for part_U in plane_U.split(max(1, CELLS_AT_ONCE[plane_U.device.type] // (edge * columns))):
        average_a, average_b = unpadded_average(first, part_U), unpadded_average(second, part_U)
        shell, inside = unpadded_shells(first, part_U)
        products = (average_a * average_b).sum(1), average_a.square().sum(1), average_b.square().sum(1)
        for sum_S, values in zip(sums_3S, products, strict=True):
            sum_S += torch.bincount(shell, torch.where(inside, values, 0), first.radius + 1)[: first.radius + 1]
    return sums_3S[0], sums_3S[1], sums_3S[2]


def _fsc_sums_in_pieces(first: SolvedSums, second: Waiting, plane_U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`_fsc_sums` on a GPU, to which the other half-set's sums come a few planes at a time."""
    nearest_E, starts = nearest_of(first), first.rows.slab_starts
    ends_U2 = torch.searchsorted(nearest_E, torch.stack([plane_U, plane_U + 1], 1)).tolist()  # planes of voxels, counted from 0
    runs, low = list[tuple[int, int]](), 0  # of `plane_U`, a piece of voxels each, but one plane at least
    while low < len(plane_U):
        high = low + 1
        while high < len(plane_U) and starts[ends_U2[high][1]] - starts[ends_U2[low][0]] <= PIECE:
            high += 1
        runs.append((low, high))
        low = high
    found = torch.empty(len(runs), 3, first.radius + 1, dtype=torch.float64, device=first.device)

    def add(number: int) -> None:
        low, high = runs[number]
        begin, end = ends_U2[low][0], ends_U2[high - 1][1]
        there_V3 = piece_to_device(second.values_V3[starts[begin] : starts[end]], first.device)
        pairs = (first.data_V2, first.weight_V), (there_V3[:, :2], there_V3[:, 2])
        found[number] = fsc_sums_cuda(*pairs, first.rows, plane_U[low:high], nearest_E, first.radius + 1, second_from=begin)

    at_once(range(len(runs)), add, first.device)
    cross, power_a, power_b = found.sum(0)
    return cross, power_a, power_b


def ssnr_of_fsc(fsc_S: Tensor, tau2_fudge: float = 1.0, joined: bool = False) -> Tensor:
    """T f / (1 - f) with f = FSC, or sqrt(2 FSC / (1 + FSC)) for both halves together; f within 0.001..0.999."""
    f = fsc_S.clamp_min(1e-3)
    if joined:
        f = (2 * f / (1 + f)).sqrt()
    f = f.clamp_max(0.999)
    return tau2_fudge * f / (1 - f)


def solve_with_fsc(
    sums: SolvedSums, fsc_S: Tensor, tau2_fudge: float, joined: bool, support_ZYX: Tensor | None = None, quotients: bool = False
) -> Solution:
    """The map whose prior comes from an FSC; quotients: `SolvedSums.quotients` in its place."""
    sigma2_S = _noise_power(sums)
    ssnr_S = ssnr_of_fsc(fsc_S[: len(sigma2_S)].to(sigma2_S), tau2_fudge, joined)
    return _solution(sums, (ssnr_S * sigma2_S, sigma2_S, ssnr_S), tau2_fudge, support_ZYX, quotients)


def _noise_power(sums: SolvedSums) -> Tensor:
    """1 / (padding^3 mean weight) per shell, 0 where nothing was seen, [radius + 1]."""
    weight_S = sums.shell_weight() * sums.padding**3
    return torch.where(weight_S > 0, 1 / weight_S.clamp_min(1e-300), 0)


def _solution(
    sums: SolvedSums, powers: tuple[Tensor, Tensor, Tensor], tau2_fudge: float, support_ZYX: Tensor | None,
    quotients: bool = False,
) -> Solution:  # fmt: skip
    """Solve with 1 / tau^2 in units of the weight; powers: (tau2_S, sigma2_S, ssnr_S).

    The fudge counts twice where it is in tau^2 already, as in RELION."""
    tau2_S, sigma2_S, ssnr_S = powers
    inverse_tau2_S = 1 / (sums.padding**3 * tau2_fudge * tau2_S)  # infinite where no signal is expected: the map is 0 there
    coverage_S = sums.coverage(inverse_tau2_S)

    def padded(curve_S: Tensor) -> Tensor:
        out = torch.zeros(sums.box // 2 + 1, dtype=torch.float64, device=curve_S.device)
        out[: len(curve_S)] = curve_S
        return out

    curves = [padded(curve_S) for curve_S in (tau2_S, sigma2_S, ssnr_S, coverage_S)]
    made = sums.quotients(inverse_tau2_S) if quotients else sums.map(inverse_tau2_S, support_ZYX=support_ZYX)
    return Solution(made, *curves)


def padded_radius(shell: int, padding: float) -> int:
    """Radius of a shell in voxels of the padded transform."""
    return int(shell * padding + 0.5)


def unpadded_average(sums: Half, plane_U: Tensor) -> Tensor:
    """Data over weight (re, im) on planes of `unpadded_grid`, flat, float64 [n, 2]; 0 where nothing was seen."""
    _, edge, columns = unpadded_grid(sums if isinstance(sums, SolvedSums) else sums.frame)
    total = torch.zeros(len(plane_U) * edge * columns, 3, dtype=torch.float64, device=sums.device)
    half = edge // 2
    nearest_E = nearest_of(sums)
    if voxels.compiled(total):
        shape = (len(plane_U), edge, columns, 3)
        voxels.sum_unpadded_cpu(sums.data_V2, sums.weight_V, sums.rows, nearest_E, plane_U, total.view(shape))
    else:
        place_E = torch.searchsorted(plane_U, nearest_E)
        ends = torch.searchsorted(nearest_E, torch.stack([plane_U[0], plane_U[-1] + 1])).tolist()
        for part, coordinates in coordinate_chunks(sums.rows, planes=range(*ends)):
            x, y, _ = nearest_E[coordinates.long() + sums.rows.half]
            plane = place_E[coordinates[2].long() + sums.rows.half]
            total.index_add_(0, (plane * edge + y + half) * columns + x, sums.some(part).double())
    return torch.where(total[:, 2:] > 0, total[:, :2] / total[:, 2:].clamp_min(1e-300), 0)


def nearest_of(sums: Half) -> Tensor:
    """Number on the unpadded grid of each of -half..half, int64 [edge]."""
    axis = torch.arange(-sums.rows.half, sums.rows.half + 1, device=sums.device)
    return torch.where(axis < 0, -1, 1) * (axis.abs().double() / sums.padding + 0.5).floor().long()


def unpadded_grid(sums: SolvedSums) -> tuple[Tensor, int, int]:
    """(z of its planes, edge along y, columns along x) of the unpadded grid that takes every stored voxel."""
    half = int(sums.rows.half / sums.padding + 0.5)
    z = torch.arange(-half, half + 1, device=sums.weight_V.device)
    if sums.slabs is not None:
        first, end = sums.slabs.mine
        low, high = (int(plane / sums.padding + 0.5) for plane in (first, end - 1))
        z = z[(z.abs() >= low) & (z.abs() <= high)]
    return z, 2 * half + 1, half + 1


def unpadded_shells(sums: SolvedSums, plane_U: Tensor) -> tuple[Tensor, Tensor]:
    """Shell round(r) of each voxel of planes of that grid (no more than the radius), and whether r <= radius; flat."""
    _, edge, columns = unpadded_grid(sums)
    device = sums.weight_V.device
    axis = torch.arange(edge, device=device, dtype=torch.float64) - edge // 2
    x = torch.arange(columns, device=device, dtype=torch.float64)
    r = (plane_U.double()[:, None, None] ** 2 + axis[None, :, None] ** 2 + x**2).sqrt().flatten()
    return (r + 0.5).long().clamp_max(sums.radius), r <= sums.radius
