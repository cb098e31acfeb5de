"""`weigh` on the CPU: one pass per image in Numba, float32.

The sine is taken by reduction to [-pi/2, pi/2] and its Taylor polynomial of degree 11 (off by at most 6e-8), which the
compiler vectorises; a library call per pixel would take longer than all the rest.
"""

from __future__ import annotations

import math

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.positions import FASTMATH
from verglas.kernels.weigh.reference import SMALLEST, GroupTables, ImageFactors

f = np.float32
# pi in two parts: n times the first is exact for |n| < 2^15.
PI_HIGH, PI_LOW, PER_PI = f(3.140625), f(math.pi - 3.140625), f(1 / math.pi)
S3, S5, S7, S9, S11 = f(-1 / 6), f(1 / 120), f(-1 / 5040), f(1 / 362880), f(-1 / 39916800)
TINY = f(SMALLEST)


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def _contrast(q0, q1, q2, shared, u2, phase, envelope, has_envelope, out):
    """out = C of one image."""
    a, b, c, p = phase[0], phase[1], phase[2], phase[3]
    for k in range(len(out)):
        g = shared[k] + a * q0[k] + b * q1[k] + c * q2[k] + p
        n = np.floor(g * PER_PI + f(0.5))
        r = (g - n * PI_HIGH) - n * PI_LOW
        r2 = r * r
        sine = r + r * r2 * (S3 + r2 * (S5 + r2 * (S7 + r2 * (S9 + r2 * S11))))
        odd = n - f(2) * np.floor(n * f(0.5))  # 1 for odd n: the sine changes sign
        out[k] = sine * (f(1) - f(2) * odd)
    if has_envelope:
        for k in range(len(out)):
            out[k] *= envelope[1] * np.exp(f(-0.25) * envelope[0] * u2[k])
    for k in range(len(out)):
        out[k] = min(out[k], -TINY) if out[k] < 0 else max(out[k], TINY)


@numba.njit(parallel=True, fastmath=FASTMATH, cache=True, boundscheck=False)
def _weigh(fourier, index, x_K, y_K, sign, odd, turn_x, turn_y, ctf, phase, envelope, flags, data, weight):
    has_odd, has_ctf, has_envelope, premultiplied = flags
    q0, q1, q2, shared, u2 = ctf
    half = turn_y.shape[1] // 2
    for image in numba.prange(len(fourier)):
        contrast = weight[image]
        if has_ctf:
            _contrast(q0, q1, q2, shared, u2, phase[image], envelope[image], has_envelope, contrast)
        else:
            contrast[:] = f(1)
        for k in range(len(index)):
            along_x, along_y = turn_x[image, x_K[k]], turn_y[image, y_K[k] + half]
            value = fourier[image, index[k]] * (along_x * along_y) * sign[k]
            if has_odd:
                value *= odd[k]
            scale = f(1) if premultiplied else contrast[k]
            data[image, 0, k], data[image, 1, k] = value.real * scale, value.imag * scale
        for k in range(len(index)):
            contrast[k] *= contrast[k]


def weigh_cpu(fourier_BYX: Tensor, tables: GroupTables, factors: ImageFactors) -> tuple[Tensor, Tensor]:
    """See README.md; complex64 transforms (TypeError for others: this kernel computes in single precision)."""
    if fourier_BYX.dtype != torch.complex64:
        raise TypeError(f"the compiled kernel weighs complex64 transforms, got {fourier_BYX.dtype}")
    pixels, n = tables.pixels, len(fourier_BYX)
    data_B2K = torch.from_numpy(np.empty((n, 2, pixels.count), np.float32))
    weight_BK = torch.from_numpy(np.empty((n, pixels.count), np.float32))
    nothing_1, nothing_B4 = np.zeros(1, np.float32), np.zeros((n, 4), np.float32)
    has_ctf = tables.quadratic_3K is not None and tables.shared_K is not None and factors.phase_B4 is not None
    ctf = (nothing_1,) * 5
    if has_ctf:
        assert tables.quadratic_3K is not None and tables.u2_K is not None
        ctf = tuple(t.float().contiguous().numpy() for t in (*tables.quadratic_3K, tables.shared_K, tables.u2_K))
    phase = factors.phase_B4.float().contiguous().numpy() if has_ctf and factors.phase_B4 is not None else nothing_B4
    envelope = nothing_B4 if factors.envelope_B2 is None else factors.envelope_B2.float().contiguous().numpy()
    odd = np.zeros(1, np.complex64) if tables.odd_K is None else np.exp(-1j * tables.odd_K.double().numpy()).astype(np.complex64)
    sign = (tables.field * (1 - 2 * ((pixels.x_K + pixels.y_K) % 2))).float().numpy()
    turn_x, turn_y = _turn_tables(factors.turn_B2.double().numpy(), pixels.box)
    _weigh(
        fourier_BYX.reshape(n, -1).numpy(), pixels.index_K.numpy(), pixels.x_K.numpy(), pixels.y_K.numpy(), sign, odd,
        turn_x, turn_y, ctf, phase, envelope,
        (tables.odd_K is not None, has_ctf, factors.envelope_B2 is not None, tables.premultiplied),
        data_B2K.numpy(), weight_BK.numpy(),
    )  # fmt: skip
    return data_B2K, weight_BK


def _turn_tables(turn_B2: np.ndarray, box: int) -> tuple[np.ndarray, np.ndarray]:
    """exp(i x u) for x = 0..N/2 and exp(i y v) for y = -N/2..N/2 of each image, complex64: the shift is separable."""
    x, y = np.arange(box // 2 + 1), np.arange(-(box // 2), box // 2 + 1)
    return np.exp(1j * turn_B2[:, :1] * x).astype(np.complex64), np.exp(1j * turn_B2[:, 1:] * y).astype(np.complex64)
