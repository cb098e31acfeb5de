"""Type 1 after type 2 without points: a convolution of the modes, hence two FFTs of twice the size.

With A f = type 2 of f (sign +1) and weights w, A* w A f = K * f with K[d] = sum_j w_j exp(-i d.x_j), d = -N .. N - 1 along each
axis: a type 1 on twice the modes, made once. Each application costs the same however many points there are (Wajer & Pruessmann
2001, ISMRM).
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.nufft.plan import Plan


class Toeplitz:
    """The normal operator of type 2: modes [..., *shape] -> A* w A modes."""

    def __init__(self, kernel: Tensor, real: bool = False) -> None:
        """kernel: K [*2 shape] complex, d ascending from -N. real: modes are real and K Hermitian (points in pairs x, -x)."""
        self.shape = tuple(n // 2 for n in kernel.shape)
        self.real = real
        axes = tuple(range(kernel.ndim))
        unrolled = torch.fft.ifftshift(kernel, dim=axes)
        # A pair of points makes K real; then only real transforms are needed, in half of the memory.
        self.multiplier = torch.fft.rfftn(unrolled.real, dim=axes) if real else torch.fft.fftn(unrolled, dim=axes)

    @classmethod
    def of(
        cls, point_MD: Tensor, weight_M: Tensor, shape: tuple[int, ...], accuracy: float = 1e-6,
        upsampling: float | None = None, dtype: torch.dtype = torch.complex64, implementation: str = "auto",
    ) -> Toeplitz:  # fmt: skip
        """For points (radians) of weights w; as `Plan`."""
        plan = Plan(point_MD, tuple(2 * n for n in shape), accuracy, upsampling, dtype, implementation)
        return cls(plan.type1(weight_M.to(dtype), sign=-1))

    def __call__(self, modes: Tensor) -> Tensor:
        """A* w A modes; modes [..., *shape]: real ones if `real`."""
        axes, double = tuple(range(modes.ndim - len(self.shape), modes.ndim)), [2 * n for n in self.shape]
        if self.real:
            found = torch.fft.irfftn(torch.fft.rfftn(modes, s=double, dim=axes) * self.multiplier, s=double, dim=axes)
        else:
            found = torch.fft.ifftn(torch.fft.fftn(modes, s=double, dim=axes) * self.multiplier, dim=axes)
        for axis, n in zip(axes, self.shape):
            found = found.narrow(axis, 0, n)
        return found
