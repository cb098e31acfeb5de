"""Phase randomisation that a reader can compare shell by shell with the field's reference program.

A phase-randomised FSC (Chen et al. 2013, Ultramicroscopy 135, 24) depends on the random numbers: one shell can differ by
0.05 between generators. relion_postprocess draws its phases from C's `rand()`, so the same published generator is used
here (glibc TYPE_3: additive feedback r[i] = r[i-3] + r[i-31] mod 2^32, lowest bit dropped, seeded by Lehmer's minimal
standard generator, 310 values thrown away), in the same order and float32 arithmetic. Curves then agree per shell.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

RAND_MAX = 2**31 - 1
_DISCARDED = 310
_LAG = 31


@lru_cache(maxsize=1)
def _feedback() -> Callable[..., Any]:
    """The compiled recurrence; compiled at first use so that importing this module does no work."""
    import numba

    def advance(history: np.ndarray, out: np.ndarray) -> None:
        """history: the last 31 values, oldest first (uint32), updated in place; out: uint32 [n], filled."""
        at = 0
        for i in range(len(out)):
            before3 = at + _LAG - 3 if at < 3 else at - 3
            value = np.uint32(history[at] + history[before3])  # numba adds in 64 bits; the carry must go
            history[at] = value
            out[i] = value >> np.uint32(1)
            at = 0 if at == _LAG - 1 else at + 1
        if at:
            turned = np.concatenate((history[at:], history[:at]))
            history[:] = turned

    return numba.njit(cache=True)(advance)


class GlibcRandom:
    """The sequence of glibc's srand(seed); rand(), rand(), ... A seed of 0 means 1, as in glibc."""

    def __init__(self, seed: int = 0) -> None:
        word = (seed or 1) & 0xFFFFFFFF
        word = word - 2**32 if word >= 2**31 else word
        history = [word]
        for _ in range(_LAG - 1):
            high = int(word / 127773)  # C's division truncates towards zero, which matters for negative seeds
            low = word - high * 127773
            word = 16807 * low - 2836 * high
            word = word + RAND_MAX if word < 0 else word
            history.append(word)
        # The additive generator starts three values on: r[31..33] repeat r[0..2].
        turned = history[3:] + history[:3]
        self._history = np.array([value & 0xFFFFFFFF for value in turned], dtype=np.uint32)
        self.draw(_DISCARDED)

    def draw(self, count: int) -> np.ndarray:
        """The next `count` values, 0..2^31-1, uint32 [count]."""
        out = np.empty(count, dtype=np.uint32)
        _feedback()(self._history, out)
        return out

    def phases(self, count: int) -> np.ndarray:
        """`count` phases in [0, 2 pi], radians, float32: rand() / (RAND_MAX / 2 pi) in single precision."""
        return self.draw(count).astype(np.float32) / (np.float32(RAND_MAX) / np.float32(2 * np.pi))


def squared_radius(box: int, device: torch.device | str = "cpu") -> Tensor:
    """z^2 + y^2 + x^2 of every stored coefficient [N, N, N/2+1], int64 (integer frequencies)."""
    axis = torch.arange(box, device=device)
    axis2 = torch.where(axis <= box // 2, axis, axis - box) ** 2
    return axis2[:, None, None] + axis2[None, :, None] + axis2[None, None, : box // 2 + 1]


def randomise_phases(fourier_ZYX: Tensor, first_shell: int, random: GlibcRandom) -> Tensor:
    """Give coefficients with |k| >= `first_shell` random phases, amplitudes kept; returns the changed real map [Z, Y, X].

    fourier_ZYX: [N, N, N/2+1] complex128, forward 1/N^3, origin in the corner. Phases are drawn for z, y, x in storage
    order (x fastest) over the whole stored half. The plane x = 0 is therefore not Hermitian any more; the inverse takes
    the real part along x, which is what FFTW's complex-to-real transform does.
    """
    box = fourier_ZYX.shape[0]
    chosen = squared_radius(box, fourier_ZYX.device) >= first_shell**2
    phase = torch.from_numpy(random.phases(int(chosen.sum()))).to(fourier_ZYX.device).double()
    changed = fourier_ZYX.clone()
    changed[chosen] = torch.polar(fourier_ZYX[chosen].abs(), phase)
    planes = torch.fft.ifftn(changed, dim=(0, 1), norm="forward")
    planes[..., 0].imag.zero_()
    planes[..., box // 2].imag.zero_()
    return torch.fft.irfft(planes, n=box, dim=-1, norm="forward")
