"""Non-uniform transforms against finufft: time and measured error, uniform points and slices.

python -m benchmarks.nufft --device cpu --modes 64 --points 300000
The error is against the sums written out in float64, at a few hundred modes (type 1) and points (type 2).
"""

from __future__ import annotations

import argparse
import math
import time

import torch
from torch import Tensor

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.nufft import Plan

CHECKED = 200


def scattered(kind: str, count: int, modes: int, generator: torch.Generator) -> Tensor:
    """Points (x, y, z) in radians, float32 [M, 3]: uniform, or those of central slices of `modes` px."""
    if kind == "uniform":
        return (torch.rand(count, 3, generator=generator) - 0.5) * (2 * math.pi)
    pixel_K3 = half_plane_pixels(modes).coordinates_K3(torch.float32)
    rotation_R33 = random_rotations(-(-count // len(pixel_K3)), generator).float()
    return (torch.einsum("rij,kj->rki", rotation_R33, pixel_K3) * (2 * math.pi / modes)).reshape(-1, 3)[:count].contiguous()


def error1(found: Tensor, point_M3: Tensor, values_M: Tensor) -> float:
    """Relative error of type 1 at some modes."""
    n = len(found)
    mode_K3 = torch.randint(-(n // 2), n // 2, (CHECKED, 3), generator=torch.Generator().manual_seed(1)).to(found.device)
    wanted = torch.zeros(CHECKED, dtype=torch.complex128, device=found.device)
    for points, values in zip(point_M3.double().split(10**5), values_M.to(torch.complex128).split(10**5)):
        angle = -(mode_K3.double() @ points.T)
        wanted += torch.polar(torch.ones_like(angle), angle) @ values
    x, y, z = (mode_K3 + n // 2).unbind(1)
    return float((found[z, y, x] - wanted).norm() / wanted.norm())


def error2(found: Tensor, point_M3: Tensor, modes: Tensor) -> float:
    """Relative error of type 2 at some points."""
    some = torch.randperm(len(point_M3), generator=torch.Generator().manual_seed(2))[:CHECKED].to(found.device)
    k = torch.arange(len(modes), device=found.device).double() - len(modes) // 2
    x, y, z = (torch.exp(1j * point_M3[some].double()[:, axis, None] * k) for axis in range(3))
    wanted = (torch.einsum("zyx,mx->mzy", modes.to(torch.complex128), x) * y[:, None]).sum(2).mul(z).sum(1)
    return float((found[some] - wanted).norm() / wanted.norm())


def main() -> None:
    """Print one line for each kind of points, accuracy and implementation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", type=int, default=256)
    parser.add_argument("--points", type=int, default=10**7)
    parser.add_argument("--accuracies", type=float, nargs="+", default=[1e-3, 1e-6])
    parser.add_argument("--upsampling", type=float, default=2.0)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    generator = torch.Generator().manual_seed(0)
    for kind in ("uniform", "slices"):
        points = scattered(kind, options.points, options.modes, generator).to(options.device)
        values = torch.randn(len(points), generator=generator, dtype=torch.complex64).to(options.device)
        modes = torch.randn(*[options.modes] * 3, generator=generator, dtype=torch.complex64).to(options.device)
        for accuracy in options.accuracies:
            for implementation in ("triton",) if cuda else ("cpu", "finufft"):
                try:
                    measure(kind, points, values, modes, accuracy, options.upsampling, implementation)
                except (RuntimeError, TypeError) as error:
                    print(kind, accuracy, implementation, "failed:", str(error)[:300], flush=True)


def measure(
    kind: str, points: Tensor, values: Tensor, modes: Tensor, accuracy: float, upsampling: float, implementation: str
) -> None:
    """Best of three of sorting, type 1 and type 2, and their errors. On a CPU: processor time of one thread."""
    torch.set_num_threads(1)

    def now() -> float:
        if points.is_cuda:
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    best = [math.inf] * 3
    for _ in range(3):
        start = now()
        plan = Plan(points, tuple(modes.shape), accuracy, upsampling, torch.complex64, implementation)
        if implementation != "finufft":
            _ = plan.places  # finufft sorts within each transform
        sorted_at = now()
        found1 = plan.type1(values)
        first = now()
        found2 = plan.type2(modes)
        best = [min(pair) for pair in zip(best, (sorted_at - start, first - sorted_at, now() - first))]
    errors = error1(found1, points, values), error2(found2, points, modes)
    rates = [len(points) / seconds / 1e6 for seconds in best[1:]]
    print(
        f"{kind:8s} {accuracy:g} {plan.kernel}: sort {best[0]:.4f} s, type 1 {best[1]:.4f} s ({rates[0]:.1f} M/s), type 2 "
        f"{best[2]:.4f} s ({rates[1]:.1f} M/s); errors {errors[0]:.1e} {errors[1]:.1e}", flush=True,
    )  # fmt: skip


if __name__ == "__main__":
    main()
