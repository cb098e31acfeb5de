"""Plans: points sorted once, transformed often; and the two transforms as functions of points and values."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.kernels import choose
from verglas.kernels.spread import Places, interpolate, located, spread
from verglas.nufft.fine import FineGrid
from verglas.nufft.peer import peer1, peer2

PEER_FROM = 1e-5  # accuracy from which finufft is the faster one in single precision, and reaches it (benchmarks/NOTES.md)
SINGLE = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Plan:
    """Transforms between fixed points and modes of one shape.

    point_MD: (x, y) or (x, y, z) in radians, float32 or float64 whatever the values' precision (rounding to float32 moves points
    of N modes by about N 1e-7); shape: of the modes, (Y, X) or (Z, Y, X); accuracy: relative error wanted; upsampling: of the
    grid, 1.2 to 4: less takes less memory and more taps; dtype: complex64 or complex128; implementation: "auto", "reference",
    "cpu", "triton" or "finufft" (CPU). `kernel` says which "auto" took. InputError for what cannot be served.
    """

    def __init__(
        self, point_MD: Tensor, shape: tuple[int, ...], accuracy: float = 1e-6, upsampling: float = 2.0,
        dtype: torch.dtype = torch.complex64, implementation: str = "auto",
    ) -> None:  # fmt: skip
        if point_MD.ndim != 2 or point_MD.shape[1] != len(shape) or not point_MD.is_floating_point():
            raise InputError("nufft", f"points {tuple(point_MD.shape)}", f"real coordinates [M, {len(shape)}]")
        if dtype not in SINGLE:
            raise InputError("nufft", f"precision {dtype}", "complex64 or complex128")
        if implementation == "finufft" and point_MD.device.type != "cpu":
            raise InputError("nufft", f"finufft on {point_MD.device}", "points on the CPU")
        self.dtype, self.accuracy, self.upsampling = dtype, accuracy, upsampling
        self.fine = FineGrid.of(tuple(shape), accuracy, upsampling, point_MD.device, SINGLE[dtype])
        if implementation == "auto" and point_MD.device.type == "cpu" and dtype == torch.complex64 and accuracy >= PEER_FROM:
            implementation = "finufft"
        self.implementation = choose(point_MD.device, SINGLE[dtype], implementation).name
        self.points = point_MD.detach()
        self._places: Places | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.fine.shape

    @property
    def kernel(self) -> str:
        """What computes, for a run record."""
        if self.implementation == "finufft":
            return f"nufft: finufft, accuracy {self.accuracy:g}"
        return f"nufft: {self.implementation}, window of {self.fine.window.width} cells, grid {self.fine.sizes}"

    @property
    def places(self) -> Places:
        """The points on the fine grid, sorted when first needed."""
        if self._places is None:
            cells = torch.tensor(self.fine.sizes[::-1], dtype=torch.float64, device=self.points.device)
            point_M3 = torch.zeros(len(self.points), 3, dtype=torch.float64, device=self.points.device)
            point_M3[:, : len(cells)] = self.points * (cells / (2 * math.pi))
            self._places = located(point_M3, self.fine.cells, self.fine.taps(), self.implementation)
        return self._places

    def type1(self, values: Tensor, sign: int = -1) -> Tensor:
        """f[..., k] = sum_j values[..., j] exp(sign i k.x_j): [..., M] -> [..., *shape]. Differentiable, any number of times."""
        self._check(values, (len(self.points),), sign)
        return _Transform.apply(self, 1, sign, values.to(self.dtype), None)

    def type2(self, modes: Tensor, sign: int = +1) -> Tensor:
        """c[..., j] = sum_k modes[..., k] exp(sign i k.x_j): [..., *shape] -> [..., M]. Differentiable, any number of times."""
        self._check(modes, self.shape, sign)
        return _Transform.apply(self, 2, sign, modes.to(self.dtype), None)

    def _check(self, given: Tensor, last: tuple[int, ...], sign: int) -> None:
        if tuple(given.shape[given.ndim - len(last) :]) != last:
            raise InputError("nufft", f"values of shape {tuple(given.shape)}", f"{last} as the last axes")
        if sign not in (-1, 1):
            raise InputError("nufft", f"sign {sign}", "-1 or +1")

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2, without gradients."""
        if self.implementation == "finufft":
            return (peer1 if kind == 1 else peer2)(self.points, given, self.shape, sign, self.accuracy)
        if kind == 1:
            grid = self.fine.zeros(math.prod(given.shape[:-1]))
            spread(grid, self.places, torch.view_as_real(given.contiguous()).view(-1, len(self.points), 2), self.implementation)
            return self.fine.modes(grid, sign).view(*given.shape[:-1], *self.shape)
        lead = given.shape[: given.ndim - len(self.shape)]
        grid = self.fine.grid(given.reshape(-1, *self.shape), sign)
        values = torch.view_as_complex(interpolate(grid, self.places, self.implementation))
        return values.view(*lead, len(self.points))


class _Transform(torch.autograd.Function):
    """A transform of either type; its gradient is the other type with the other sign.

    Points, if given, must be those of the plan: they get a gradient, too. With c real or complex values and g the gradient of the
    result, d/dx_j of either sum is (sign i k) under the sum.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, kind: int, sign: int, given: Tensor, points: Tensor | None) -> Tensor:
        ctx.plan, ctx.kind, ctx.sign = plan, kind, sign
        ctx.save_for_backward(given)
        return plan.run(kind, sign, given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor | None, Tensor | None]:  # type: ignore[override]
        plan, sign = ctx.plan, ctx.sign
        given_grad = points_grad = None
        if ctx.needs_input_grad[3]:
            given_grad = _Transform.apply(plan, 3 - ctx.kind, -sign, gradient, None)
        if ctx.needs_input_grad[4]:
            (given,) = ctx.saved_tensors
            modes, values = (gradient, given) if ctx.kind == 1 else (given, gradient)
            points_grad = _gradient_of_points(plan, sign if ctx.kind == 2 else -sign, modes, values)
        return None, None, None, given_grad, points_grad


def _gradient_of_points(plan: Plan, sign: int, modes: Tensor, values: Tensor) -> Tensor:
    """Re sum conj(values_j) d/dx_j sum_k modes_k exp(sign i k.x_j), [M, D]; alike for both types but for conjugates."""
    columns = []
    for axis in range(len(plan.shape) - 1, -1, -1):
        n = plan.shape[axis]
        k = (torch.arange(n, device=modes.device) - n // 2).to(plan.fine.dtype).view(-1, *[1] * (len(plan.shape) - 1 - axis))
        slope = plan.run(2, sign, modes * (1j * sign * k))
        columns.append((values.conj() * slope).real.reshape(-1, slope.shape[-1]).sum(0))
    return torch.stack(columns, 1).to(plan.points.dtype)


def nufft1(
    point_MD: Tensor, values: Tensor, shape: tuple[int, ...], sign: int = -1, accuracy: float = 1e-6, upsampling: float = 2.0,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Type 1, points to modes [..., *shape]; gradients for points and values. Real values count as complex. See `Plan`."""
    plan = Plan(point_MD, shape, accuracy, upsampling, _complex(values), implementation)
    plan._check(values, (len(point_MD),), sign)
    return _Transform.apply(plan, 1, sign, values.to(plan.dtype), point_MD)


def nufft2(
    point_MD: Tensor, modes: Tensor, sign: int = +1, accuracy: float = 1e-6, upsampling: float = 2.0, implementation: str = "auto"
) -> Tensor:
    """Type 2, modes [..., (Z,) Y, X] to points [..., M], as many axes as the points have; gradients for both. See `Plan`."""
    shape = tuple(modes.shape[modes.ndim - point_MD.shape[1] :])
    plan = Plan(point_MD, shape, accuracy, upsampling, _complex(modes), implementation)
    plan._check(modes, plan.shape, sign)
    return _Transform.apply(plan, 2, sign, modes.to(plan.dtype), point_MD)


def _complex(values: Tensor) -> torch.dtype:
    return torch.complex128 if values.dtype in (torch.float64, torch.complex128) else torch.complex64
