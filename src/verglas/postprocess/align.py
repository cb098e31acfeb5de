"""Rigid-body alignment of one map to another: exhaustive over rotations, exact over shifts, then polished.

Coarse: both maps are cut down in Fourier space to about 20 Å, every rotation of an even set is correlated with the
reference over all shifts at once (FFT), where the moving map is, and the best few are kept. Fine: their six parameters are
optimised a little, on the CPU, and those of the best one to the end, on finer maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import fourier_resize
from verglas.core.masks import radius_grid, raised_cosine
from verglas.core.rotations import matrix_from_quaternion
from verglas.core.threads import few_threads
from verglas.postprocess.mapops import flip_hand

_COARSE_BOX, _FINE_BOX = 32, 64
_KEPT, _FEW_ROUNDS = 8, 12
# Super-Fibonacci constants (Alexa 2022, CVPR): the square root of 2 and the positive root of x^4 = x + 4.
_PHI, _PSI = math.sqrt(2.0), 1.533751168755204288118041


@dataclass(frozen=True)
class Alignment:
    """out(A r + shift) = map(r) lies on the reference: rotation A [3, 3], shift (x, y, z) in pixels of the map,
    correlation of the two within the inscribed sphere, and whether the map was mirrored first."""

    rotation_33: Tensor
    shift_3: Tensor
    correlation: float
    mirrored: bool = False


def even_rotations(n: int) -> Tensor:
    """`n` rotation matrices spread evenly over SO(3), [n, 3, 3] float64 (super-Fibonacci spiral)."""
    s = torch.arange(n, dtype=torch.float64) + 0.5
    inner, outer = (s / n).sqrt(), (1 - s / n).sqrt()
    alpha, beta = 2 * math.pi * s / _PHI, 2 * math.pi * s / _PSI
    quaternions = [outer * beta.cos(), inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin()]
    return matrix_from_quaternion(torch.stack(quaternions, 1))


def turned(map_ZYX: Tensor, rotation_R33: Tensor, shift_R3: Tensor | None = None) -> Tensor:
    """out(A r + shift) = map(r), trilinear, [R, Z, Y, X]; shift (x, y, z) in pixels."""
    box = map_ZYX.shape[0]
    axis = torch.arange(box, dtype=map_ZYX.dtype, device=map_ZYX.device) - box // 2
    z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
    target = torch.stack([x, y, z], -1).reshape(1, -1, 3)
    if shift_R3 is not None:
        target = target - shift_R3[:, None].to(map_ZYX)
    source = target @ rotation_R33.to(map_ZYX)  # row vectors times A: A^T r
    grid = (source + box // 2) * (2 / (box - 1)) - 1
    shape = (len(rotation_R33), box, box, box, 3)
    volume = map_ZYX.expand(len(rotation_R33), 1, box, box, box)
    sampled = torch.nn.functional.grid_sample(volume, grid.expand(shape[0], -1, 3).reshape(shape), align_corners=True)
    return sampled[:, 0]


def _prepared(map_ZYX: Tensor, box: int) -> Tensor:
    """Reduced to `box` px, masked to the sphere, mean 0, norm 1; float32."""
    small = fourier_resize(map_ZYX.double(), box).float() if box < map_ZYX.shape[0] else map_ZYX.float()
    size = small.shape[0]
    soft = raised_cosine(radius_grid(size, 3), 0.42 * size, 0.08 * size)
    small = (small - (small * soft).sum() / soft.sum()) * soft
    return small / small.norm()


def _coarse(moving_ZYX: Tensor, reference_ZYX: Tensor, n_rotations: int) -> list[tuple[float, Tensor, Tensor]]:
    """Best correlation over shifts for every rotation; the `_KEPT` best as (correlation, A, shift (x, y, z) px)."""
    box = moving_ZYX.shape[0]
    conjugate = torch.fft.rfftn(reference_ZYX)
    rotations = even_rotations(n_rotations)
    found: list[tuple[float, int, int]] = []
    for start in range(0, n_rotations, 64):
        part = rotations[start : start + 64]
        fourier = torch.fft.rfftn(turned(moving_ZYX, part), dim=(1, 2, 3))
        correlation = torch.fft.irfftn(fourier.conj() * conjugate, s=[box] * 3, dim=(1, 2, 3)).flatten(1)
        best, where = correlation.max(1)
        found += [(b, start + i, w) for i, (b, w) in enumerate(zip(best.tolist(), where.tolist()))]
    found.sort(reverse=True)
    kept = []
    for value, index, place in found[:_KEPT]:
        at = np.array(np.unravel_index(place, [box] * 3))[::-1]
        kept.append((value, rotations[index], torch.tensor((at + box // 2) % box - box // 2, dtype=torch.float64)))
    return kept


def small_rotation(vector_3: Tensor) -> Tensor:
    """Rotation by |vector| radians about the vector, [3, 3]; differentiable."""
    x, y, z = vector_3.unbind()
    zero = torch.zeros_like(x)
    return torch.linalg.matrix_exp(torch.stack([zero, -z, y, z, zero, -x, -y, x, zero]).view(3, 3))


def _polish(
    moving_ZYX: Tensor, reference_ZYX: Tensor, rotation_33: Tensor, shift_3: Tensor, rounds: int = 40
) -> tuple[float, Tensor, Tensor]:
    """Maximise the correlation over rotation and shift (px of these maps) from a start."""

    def correlation(rotation_33: Tensor, shift_3: Tensor) -> Tensor:
        placed_ZYX = turned(moving_ZYX, rotation_33[None], shift_3[None])[0]
        return (placed_ZYX * reference_ZYX).sum() / placed_ZYX.norm().clamp_min(1e-12)

    return best_placed(correlation, rotation_33, shift_3, moving_ZYX.shape[0], rounds, 1e-9)


def best_placed(
    score: Callable[[Tensor, Tensor], Tensor], rotation_33: Tensor, shift_3: Tensor, box: int, rounds: int, tolerance: float
) -> tuple[float, Tensor, Tensor]:
    """Maximise a differentiable score of a rotation and a shift (px of maps of `box` px) from a start, by its gradient (L-BFGS).

    Returns (score, rotation [3, 3], shift [3]); rounds: at most; tolerance: relative gain at which it ends.
    """
    from scipy.optimize import minimize

    unit = 4.0 / box  # a turn by one unit moves the particle's rim by about one pixel, as a shift does

    def placed(p: Tensor) -> tuple[Tensor, Tensor]:
        return small_rotation(p[:3] * unit) @ rotation_33, shift_3 + p[3:]

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        p = torch.tensor(parameters, requires_grad=True)
        value = -score(*placed(p))
        value.backward()
        assert p.grad is not None
        return float(value.detach()), p.grad.numpy()

    best = minimize(loss, np.zeros(6), jac=True, method="L-BFGS-B", options={"maxiter": rounds, "ftol": tolerance})
    return -float(best.fun), *placed(torch.from_numpy(best.x))


@few_threads()
def align(
    moving_ZYX: Tensor, reference_ZYX: Tensor, n_rotations: int = 4608, either_hand: bool = False, smooth: bool = False
) -> Alignment:
    """Rotation and shift that lay `moving` on `reference` (equal boxes and pixel sizes); 4,608 rotations are 15 degrees apart.

    either_hand: try the mirror image as well and keep the better one; smooth: the maps hold nothing beyond 20 Å or so, what the
    coarse maps say is all, and costs a fraction of the time.
    """
    best: Alignment | None = None
    for mirrored in (False, True) if either_hand else (False,):
        start = flip_hand(moving_ZYX) if mirrored else moving_ZYX
        found = _align_one(start, reference_ZYX, n_rotations, smooth)
        if best is None or found[0] > best.correlation:
            best = Alignment(found[1], found[2], found[0], mirrored)
    assert best is not None
    return best


def _align_one(
    moving_ZYX: Tensor, reference_ZYX: Tensor, n_rotations: int, smooth: bool
) -> tuple[float, Tensor, Tensor]:
    box, device = moving_ZYX.shape[0], moving_ZYX.device
    coarse, fine = min(_COARSE_BOX, box), min(_FINE_BOX, box)
    moving_ZYX, reference_ZYX = moving_ZYX.cpu(), reference_ZYX.cpu()
    moving, reference = _prepared(moving_ZYX, coarse), _prepared(reference_ZYX, coarse)
    starts = _coarse(moving.to(device), reference.to(device), n_rotations)
    candidates = [_polish(moving, reference, rotation, shift, _FEW_ROUNDS) for _, rotation, shift in starts]
    value, rotation, shift = max(candidates, key=lambda candidate: candidate[0])
    if smooth:
        return value, rotation, shift * (box / coarse)
    moving, reference = _prepared(moving_ZYX, fine), _prepared(reference_ZYX, fine)
    value, rotation, shift = _polish(moving, reference, rotation, shift * (fine / coarse))
    return value, rotation, shift * (box / fine)
