"""Sums over a point group, as little interpolated as the group allows.

Rotations that turn the grid onto itself (all of O; D2; 12 of the 60 of I) form a subgroup H and need no interpolation.
With coset representatives c (G = union of c H), the sum over G of in(R k) is the sum over H of S(h k), S(k) = sum over c
of in(c k): only the c other than 1 are interpolated, and H is done step by step along a chain of subgroups.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.rows import RowTable
from verglas.core.symmetry import symmetry_matrices
from verglas.core.symmetry_names import normalise_name
from verglas.kernels import voxels
from verglas.kernels.project import project
from verglas.projection.volume import coordinate_chunks, radius2

PLANES_AT_ONCE = 2**23  # voxels of planes that are worked on in memory of their own


def apply_point_group(sums_V: Tensor, rows: RowTable, symmetry: str, in_planes: bool = False) -> Tensor:
    """Sum over the group of the volume sampled (trilinearly) at turned positions: out(k) = sum over R of in(R k).

    sums_V: (re, im, weight) in columns 0-2. Returns [V, 3]; the input itself for C1. Beyond the radius nothing is added.
    in_planes: over those rotations alone that keep |z|; what was added has been turned by the others (`turns_of_planes`).
    """
    representatives, steps = _plan(normalise_name(symmetry), in_planes)
    if len(representatives) == 1 and not steps:
        return sums_V
    out_V3 = sums_V[:, :3].clone()
    if len(representatives) > 1:
        _add_interpolated(sums_V, rows, representatives[1:], out_V3)
    for step in steps:
        before_V3 = out_V3.clone()
        for operator in step:
            add_turned(before_V3, rows, operator, out_V3)
    return out_V3


def apply_in_planes(sums_V: Tensor, rows: RowTable, symmetry: str) -> None:
    """The same in place, some planes +-z at a time, for groups whose rotations lead from these to no others (C and D)."""
    representatives, steps = _plan(normalise_name(symmetry), False)
    if len(representatives) == 1 and not steps:
        return
    starts, low = rows.slab_starts, 0
    while low <= rows.half:
        high = low + 1
        while high <= rows.half and _of_planes(starts, rows.half, low, high + 1) <= PLANES_AT_ONCE:
            high += 1
        here = slice(rows.half - high + 1, rows.half + high) if low == 0 else None
        runs = [here] if here else [slice(rows.half - high + 1, rows.half - low + 1), slice(rows.half + low, rows.half + high)]
        parts = [slice(starts[run.start], starts[run.stop]) for run in runs]
        some_V3 = torch.cat([sums_V[part, :3] for part in parts])
        turned_V3 = apply_point_group(some_V3, rows.only(rows.between(low, high)), symmetry)
        for part, values_V3 in zip(parts, turned_V3.split([part.stop - part.start for part in parts]), strict=True):
            sums_V[part, :3] = values_V3
        low = high


def _of_planes(starts: list[int], half: int, low: int, high: int) -> int:
    """Voxels of the planes low <= |z| < high."""
    return 2 * (starts[half + high] - starts[half + low])


@lru_cache(maxsize=16)
def _plan(symmetry: str, in_planes: bool = False) -> tuple[Tensor, list[list[Tensor]]]:
    """Coset representatives and the steps of the subgroup chain; remembered, as every iteration asks again."""
    operators_G33 = symmetry_matrices(symmetry)
    whole_G33 = operators_G33.round()  # exactly, so that what stays in a plane is sampled there alone
    operators_G33 = torch.where((operators_G33 - whole_G33).abs() < 1e-12, whole_G33, operators_G33)
    representatives, on_grid = cosets(operators_G33[_keeps_planes(operators_G33)] if in_planes else operators_G33)
    return representatives, subgroup_chain(on_grid)


def turns_of_planes(symmetry: str) -> Tensor:
    """Representatives c of the rotations that lead from planes +-z to others, identity first: slices added at poses A c, and then
    the rotations that keep the planes (`apply_point_group`), make up the group. C and D groups have no other."""
    operators_G33 = symmetry_matrices(symmetry)
    keeping_H33 = operators_G33[_keeps_planes(operators_G33)]
    found: list[Tensor] = []
    for operator in operators_G33:
        if not any(bool(((known.T @ operator) - keeping_H33).abs().amax((1, 2)).min() < 1e-6) for known in found):
            found.append(operator)
    return torch.stack(found)


def _keeps_planes(operators_G33: Tensor) -> Tensor:
    return (operators_G33[:, 2, 2].abs() - 1).abs() < 1e-9


def cosets(operators_G33: Tensor) -> tuple[Tensor, Tensor]:
    """(representatives c, subgroup H of the rotations that keep the grid), identities first, with G = union of c H."""
    representatives: list[Tensor] = []
    for operator in operators_G33:
        if not any(_is_integer(known.T @ operator) for known in representatives):
            representatives.append(operator)
    return torch.stack(representatives), torch.stack([one.round() for one in operators_G33 if _is_integer(one)])


def subgroup_chain(group_H33: Tensor) -> list[list[Tensor]]:
    """Steps t of a chain of subgroups 1 < ... < H: the sum over H of f(h k) comes from f <- f(k) + sum over t of f(t k)."""
    known, steps = [group_H33[0]], []
    while len(known) < len(group_H33):
        larger = min((_generated([*known, one]) for one in group_H33 if not _holds(known, one)), key=len)
        step: list[Tensor] = []
        for one in larger:
            if not any(_holds(known, one @ earlier.T) for earlier in (group_H33[0], *step)):
                step.append(one)
        steps.append(step)
        known = larger
    return steps


def add_turned(values_V3: Tensor, rows: RowTable, operator_33: Tensor, out_V3: Tensor) -> None:
    """out(k) += in(R k) in place, for a rotation that keeps the grid, within the table's radius."""
    if voxels.compiled(values_V3):
        voxels.add_turned_cpu(values_V3, rows, operator_33, out_V3)
        return
    conjugated = values_V3.new_tensor([1.0, -1.0, 1.0])
    turn = operator_33.tolist()
    for part, (x, y, z) in coordinate_chunks(rows):
        tx, ty, tz = (int(a) * x + int(b) * y + int(c) * z for a, b, c in turn)
        sign = torch.where(tx < 0, -1, 1)
        inside = radius2(torch.stack([x, y, z])) <= rows.limit2
        row = torch.where(inside, (sign * tz + rows.half) * rows.edge + sign * ty + rows.half, 0)
        source = torch.where(inside, rows.start_ZY.flatten()[row] + tx.abs(), 0)
        turned = values_V3[source] * torch.where((sign < 0)[:, None], conjugated, 1)
        out_V3[part] += torch.where(inside[:, None], turned, 0)


def _add_interpolated(sums_V: Tensor, rows: RowTable, operators_C33: Tensor, out_V3: Tensor) -> None:
    dtype = sums_V.dtype
    data_V2 = sums_V[:, :2].contiguous()
    weight_V2 = torch.stack([sums_V[:, 2], torch.zeros_like(sums_V[:, 2])], 1)
    for part, coordinates in coordinate_chunks(rows):
        position_V3 = coordinates.T.to(dtype)
        for operator in operators_C33.to(sums_V.device, dtype):
            turned = project(data_V2, rows, operator[None], position_V3)[0]
            out_V3[part, :2] += turned.T
            out_V3[part, 2] += project(weight_V2, rows, operator[None], position_V3)[0, 0]


def _is_integer(matrix_33: Tensor) -> bool:
    return bool((matrix_33 - matrix_33.round()).abs().max() < 1e-9)


def _holds(group: list[Tensor], matrix_33: Tensor) -> bool:
    return any(torch.equal(one, matrix_33) for one in group)


def _generated(seeds: list[Tensor]) -> list[Tensor]:
    """The group of integer matrices that `seeds` (identity first) generate."""
    group = list(seeds)
    for one in group:  # grows while it is walked through
        for other in seeds:
            product = one @ other
            if not _holds(group, product):
                group.append(product)
    return group
