"""Plans: points sorted once, transformed often; and the two transforms as functions of points and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from verglas.distributed.ranks import ALONE, Ranks
from verglas.errors import InputError
from verglas.kernels import choose
from verglas.nufft.fine import FineGrid
from verglas.nufft.own import Own
from verglas.nufft.peer import ASKED, OF_DEVICE, Peer, peer_of, reaches
from verglas.nufft.quickest import Engine, Quickest
from verglas.nufft.shared import SharedGrid, check_shared

COARSE = 1.6  # where this package's grid is coarser, a peer gets its coarser one, too
IMPLEMENTATIONS = ("auto", "reference", "cpu", "triton", "finufft", "cufinufft", "quickest")
SINGLE = {torch.complex64: torch.float32, torch.complex128: torch.float64}


class Plan:
    """Transforms between fixed points and modes of one shape.

    point_MD: (x, y) or (x, y, z) in radians, float32 or float64 whatever the values' precision (rounding to float32 moves points
    of N modes by about N 1e-7); shape: of the modes, (Y, X) or (Z, Y, X); accuracy: relative error wanted; upsampling: of the
    grid, 1.2 to 4: less takes less memory and more taps (None: 1.25 to 2, what should take least time for so many points); dtype:
    complex64 or complex128. InputError for what cannot be served.

    implementation: "reference", "cpu" or "triton" (kernels/spread), "finufft" (CPU), "cufinufft" (GPU), "quickest" (of the two
    that the device has, found out with the first transform of each type), or "auto": single precision takes a peer that reaches
    the accuracy, finufft on the CPU and the quickest on a GPU that has cufinufft. `kernel` says what was taken.

    tables: keep the weights of every point along each axis as 16-bit numbers (half of single precision's bytes) with sums in
    single precision, for errors from 1e-4 on: 6 bytes more a point and cell of the window. On one GPU, or for "reference".

    ranks: who share the transforms. Each has points of its own (all of them give `accuracy` and so on alike), makes the plan and
    transforms together with the others, and has its range of modes: `shared.turn.mine` along the second slowest axis, of shape
    `modes_shape`. way: "values" or "sums" travel, or "auto": what costs less (verglas.nufft.shared). `shared` is None without
    other ranks.
    """

    def __init__(
        self, point_MD: Tensor, shape: tuple[int, ...], accuracy: float = 1e-6,
        upsampling: float | None = None, dtype: torch.dtype = torch.complex64, implementation: str = "auto",
        ranks: Ranks = ALONE, way: str = "auto", tables: bool = False,
    ) -> None:  # fmt: skip
        check_points(point_MD, len(shape))
        if dtype not in SINGLE:
            raise InputError("nufft", f"precision {dtype}", "complex64 or complex128")
        if implementation not in IMPLEMENTATIONS:
            raise InputError("nufft", f"implementation {implementation!r}", f"one of {', '.join(IMPLEMENTATIONS)}")
        self.dtype, self.points = dtype, point_MD.detach()
        check_shared(shape, implementation, ranks)
        most = max(ranks.counts(len(point_MD), "points of ranks"))
        count, device = most * ranks.size, point_MD.device
        self.fine = FineGrid.of(tuple(shape), accuracy, upsampling, device, SINGLE[dtype], count, tables)
        self.shared: SharedGrid | None = None
        if ranks.size > 1:
            name = choose(point_MD.device, self.fine.dtype, implementation).name
            self.shared = SharedGrid(self.fine, self.fine.in_cells(self.points), ranks, name, way)
        if tables:
            self.engine: Engine | SharedGrid = _with_tables(self.fine, self.points, implementation, ranks)
        else:
            self.engine = self.shared or _engine(self.fine, self.points, accuracy, upsampling, implementation)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the modes, of all ranks."""
        return self.fine.shape

    @property
    def modes_shape(self) -> tuple[int, ...]:
        """Of this rank's modes."""
        return self.shape if self.shared is None else self.shared.modes_shape

    @property
    def kernel(self) -> str:
        """What computes, for a run record."""
        return f"nufft: {self.engine.kernel}"

    def type1(self, values: Tensor, sign: int = -1) -> Tensor:
        """f[..., k] = sum_j values[..., j] exp(sign i k.x_j): [..., M] -> [..., *modes_shape], j over the points of all ranks.
        Differentiable, any number of times."""
        self.check(values, (len(self.points),), sign)
        return _Transform.apply(self, 1, sign, values.to(self.dtype), None)

    def type2(self, modes: Tensor, sign: int = +1) -> Tensor:
        """c[..., j] = sum_k modes[..., k] exp(sign i k.x_j): [..., *modes_shape] -> [..., M], k over the modes of all ranks.
        Differentiable, any number of times."""
        self.check(modes, self.modes_shape, sign)
        return _Transform.apply(self, 2, sign, modes.to(self.dtype), None)

    def check(self, given: Tensor, last: tuple[int, ...], sign: int) -> None:
        """InputError unless the last axes of what is given are `last`, and the sign is one."""
        if tuple(given.shape[given.ndim - len(last) :]) != last:
            raise InputError("nufft", f"values of shape {tuple(given.shape)}", f"{last} as the last axes")
        if sign not in (-1, 1):
            raise InputError("nufft", f"sign {sign}", "-1 or +1")

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2, without gradients."""
        if given.numel() == 0 and self.shared is None:  # no points, or a batch of none
            inner, outer = ((len(self.points),), self.shape) if kind == 1 else (self.shape, (len(self.points),))
            return given.new_zeros(*given.shape[: given.ndim - len(inner)], *outer)
        return self.engine.run(kind, sign, given.resolve_conj().resolve_neg())


def check_points(point_MD: Tensor, axes: int) -> None:
    """InputError for what are not points, or lie nowhere."""
    if not isinstance(point_MD, Tensor):
        raise InputError("nufft", f"points of type {type(point_MD).__name__}", "a torch tensor")
    if point_MD.ndim != 2 or point_MD.shape[1] != axes or not point_MD.is_floating_point():
        found = f"points {tuple(point_MD.shape)} of {point_MD.dtype}"
        raise InputError("nufft", found, f"real coordinates [M, {axes}], one for each axis of the modes")
    if not bool(point_MD.detach().isfinite().all()):
        raise InputError("nufft", "points that are not finite numbers", "radians")


def _engine(fine: FineGrid, point_MD: Tensor, accuracy: float, upsampling: float | None, implementation: str) -> Engine:
    """What computes on one device; see `Plan`."""
    device, dtype = point_MD.device, torch.complex64 if fine.dtype == torch.float32 else torch.complex128
    installed = peer_of(device)
    asked = accuracy
    if implementation == "auto" and dtype == torch.complex64 and installed and reaches(accuracy, fine.shape, dtype):
        implementation, asked = "finufft" if device.type == "cpu" else "quickest", accuracy * ASKED
    if implementation in OF_DEVICE.values() or implementation == "quickest":
        if installed is None or implementation not in ("quickest", installed):
            raise InputError("nufft", f"{implementation} on {device}", "finufft for the CPU, cufinufft for CUDA, installed")
        if implementation != "quickest":
            return Peer(installed, fine, point_MD, asked, upsampling)
        coarse = min(size / n for size, n in zip(fine.sizes, fine.shape)) < COARSE
        peer = Peer(installed, fine, point_MD, accuracy * ASKED, upsampling or (1.25 if coarse else 2.0))
        return Quickest([Own(fine, point_MD, choose(device, fine.dtype).name), peer])
    return Own(fine, point_MD, choose(device, fine.dtype, implementation).name)


def _with_tables(fine: FineGrid, point_MD: Tensor, implementation: str, ranks: Ranks) -> Own:
    """As `_engine`, with weights of 16 bits; InputError where they are not served."""
    name = choose(point_MD.device, fine.dtype, implementation).name
    if ranks.size > 1 or name not in ("reference", "triton") or fine.dtype != torch.float32:
        raise InputError("nufft", f"tables, {fine.dtype} by {name} on {ranks.size} ranks", "complex64 on one GPU, or reference")
    return Own(fine, point_MD, name, tables=True)


class _Transform(torch.autograd.Function):
    """A transform of either type; its gradient is the other type with the other sign. Differentiable any number of times.

    Points, if given, must be those of the plan: they get a gradient, too. With c real or complex values and g the gradient of the
    result, d/dx_j of either sum is (sign i k) under the sum.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, kind: int, sign: int, given: Tensor, points: Tensor | None) -> Tensor:
        ctx.plan, ctx.kind, ctx.sign = plan, kind, sign
        ctx.save_for_backward(given, points)
        return plan.run(kind, sign, given)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, None, None, Tensor | None, Tensor | None]:  # type: ignore[override]
        plan, sign, (given, points) = ctx.plan, ctx.sign, ctx.saved_tensors
        given_grad = points_grad = None
        if ctx.needs_input_grad[3]:
            given_grad = _Transform.apply(plan, 3 - ctx.kind, -sign, gradient, points)
        if ctx.needs_input_grad[4]:
            modes, values = (gradient, given) if ctx.kind == 1 else (given, gradient)
            points_grad = _gradient_of_points(plan, sign if ctx.kind == 2 else -sign, modes, values, points)
        return None, None, None, given_grad, points_grad


def _gradient_of_points(plan: Plan, sign: int, modes: Tensor, values: Tensor, points: Tensor) -> Tensor:
    """Re sum conj(values_j) d/dx_j sum_k modes_k exp(sign i k.x_j), [M, D]; alike for both types but for conjugates. It can be
    differentiated again, by points, too."""
    columns = []
    for axis in range(len(plan.shape) - 1, -1, -1):
        n = plan.shape[axis]
        k = (torch.arange(n, device=modes.device) - n // 2).to(plan.fine.dtype).view(-1, *[1] * (len(plan.shape) - 1 - axis))
        slope = _Transform.apply(plan, 2, sign, modes * (1j * sign * k), points)
        columns.append((values.conj() * slope).real.reshape(-1, slope.shape[-1]).sum(0))
    return torch.stack(columns, 1).to(plan.points.dtype)


def nufft1(
    point_MD: Tensor, values: Tensor, shape: tuple[int, ...], sign: int = -1, accuracy: float = 1e-6,
    upsampling: float | None = None, implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Type 1, points to modes [..., *shape]; gradients for points and values. Real values count as complex. See `Plan`."""
    plan = Plan(point_MD, shape, accuracy, upsampling, _complex(values), implementation)
    plan.check(values, (len(point_MD),), sign)
    return _Transform.apply(plan, 1, sign, values.to(plan.dtype), point_MD)


def nufft2(
    point_MD: Tensor, modes: Tensor, sign: int = +1, accuracy: float = 1e-6, upsampling: float | None = None,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """Type 2, modes [..., (Z,) Y, X] to points [..., M], as many axes as the points have; gradients for both. See `Plan`."""
    check_points(point_MD, point_MD.shape[-1] if point_MD.ndim == 2 else modes.ndim)
    shape = tuple(modes.shape[max(0, modes.ndim - point_MD.shape[1]) :])
    plan = Plan(point_MD, shape, accuracy, upsampling, _complex(modes), implementation)
    plan.check(modes, plan.shape, sign)
    return _Transform.apply(plan, 2, sign, modes.to(plan.dtype), point_MD)


def _complex(values: Tensor) -> torch.dtype:
    return torch.complex128 if values.dtype in (torch.float64, torch.complex128) else torch.complex64
