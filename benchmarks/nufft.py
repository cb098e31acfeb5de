"""Non-uniform transforms against finufft (CPU) and cufinufft (GPU), in three dimensions, at equal measured error.

python -m benchmarks.nufft --device cpu --modes 64 --points 300000
python -m benchmarks.nufft --modes 128 256 512 --points 10000000
For each kind of points (uniform; those of central slices), modes and error, every implementation is asked for less and less
error, in single precision and then in double, until the error against the sums written out in float64 (at a few hundred modes and
points) is small enough; of what it has to choose from (the peer's grids, and its two ways to spread), the quickest counts. Times
are those of a transform of one vector with points sorted before; sorting is beside them. On a CPU: processor time of one thread.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.errors import InputError
from verglas.nufft import Plan
from verglas.nufft.own import Own
from verglas.nufft.peer import Peer, peer_of
from verglas.nufft.quickest import Quickest

CHECKED = 200
RUNS = 5
ASKED = (3.0, 1.0, 0.3, 0.1)  # times the error that is to be met
AT_ONCE = 10**5  # points, in sums written out
METHODS = {2: "", 3: ", output driven"}  # cufinufft's ways to spread


def scattered(kind: str, count: int, modes: int, generator: torch.Generator) -> Tensor:
    """Points (x, y, z) in radians, float32 [M, 3]: uniform, or those of central slices of `modes` px; the generator's device."""
    device = generator.device
    if kind == "uniform":
        return (torch.rand(count, 3, generator=generator, device=device) - 0.5) * (2 * torch.pi)
    pixel_K3 = half_plane_pixels(modes).coordinates_K3(torch.float32).to(device)
    rotation_R33 = random_rotations(-(-count // len(pixel_K3)), torch.Generator().manual_seed(0)).float().to(device)
    point_RK3 = sum(rotation_R33[:, None, :, axis] * pixel_K3[:, axis, None] for axis in range(3))
    return (point_RK3 * (2 * torch.pi / modes)).reshape(-1, 3)[:count].contiguous()


@dataclass(frozen=True)
class Case:
    """Points, values and modes, and their sums at some modes (type 1) and points (type 2) in float64."""

    points: Tensor
    values: Tensor
    modes: Tensor
    some_modes: Tensor
    some_points: Tensor
    wanted1: Tensor
    wanted2: Tensor

    @classmethod
    def of(cls, kind: str, count: int, size: int, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(0)
        points = scattered(kind, count, size, generator)
        values = torch.randn(count, generator=generator, dtype=torch.complex64, device=device)
        modes = torch.randn(size, size, size, generator=generator, dtype=torch.complex64, device=device)
        some_modes = torch.randint(-(size // 2), size // 2, (CHECKED, 3), generator=generator, device=device)
        some_points = torch.randint(0, count, (CHECKED,), generator=generator, device=device)
        wanted1 = torch.zeros(CHECKED, dtype=torch.complex128, device=device)
        for some, value in zip(points.double().split(AT_ONCE), values.to(torch.complex128).split(AT_ONCE), strict=True):
            angle = -(some_modes.double() @ some.T)
            wanted1 += torch.polar(torch.ones_like(angle), angle) @ value
        k = torch.arange(size, device=device).double() - size // 2
        x, y, z = (torch.exp(1j * points[some_points].double()[:, axis, None] * k) for axis in range(3))
        wanted2 = torch.zeros(CHECKED, dtype=torch.complex128, device=device)
        for plane, along_z in zip(modes, z.T, strict=True):
            wanted2 += ((plane.to(torch.complex128) @ x.T) * y.T).sum(0) * along_z
        return cls(points, values, modes, some_modes, some_points, wanted1, wanted2)

    def errors(self, plan: Plan) -> tuple[float, float]:
        """Relative errors of type 1 and 2."""
        x, y, z = (self.some_modes + len(self.modes) // 2).unbind(1)
        one, other = plan.type1(self.values)[z, y, x], plan.type2(self.modes)[self.some_points]
        return tuple(float((got - want).norm() / want.norm()) for got, want in ((one, self.wanted1), (other, self.wanted2)))  # type: ignore[return-value]


@dataclass(frozen=True)
class Found:
    """What an implementation took, s, and its errors."""

    kernel: str
    sorting: float
    seconds: tuple[float, float]
    errors: tuple[float, float]

    def cells(self) -> str:
        """For a table, ms."""
        numbers = " | ".join(f"{1e3 * s:.2f}" for s in (self.sorting, *self.seconds))
        return f"{self.kernel} | {numbers} | {self.errors[0]:.1e}, {self.errors[1]:.1e}"


def seconds_of(run: Callable[[], object], device: torch.device) -> float:
    """Median of some runs after two that do not count."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            return time.perf_counter()
        return time.process_time()

    taken = []
    for _ in range(RUNS + 2):
        started = now()
        run()
        taken.append(now() - started)
    return median(taken[2:])


def grids_of(name: str) -> tuple[float | None, ...]:
    """Upsamplings to choose from; None: its own choice."""
    return (1.25, 2.0) if name == "cufinufft" else (None,)


def settings(case: Case, name: str, upsampling: float | None, dtype: torch.dtype, error: float) -> Iterator[Plan]:
    """Plans that may have this error, the cheapest first."""
    for factor in ASKED:
        try:
            yield Plan(case.points, tuple(case.modes.shape), error * factor, upsampling, dtype, name)
        except InputError as problem:  # not in this precision
            print(f"  {name}: {problem}")


def best(case: Case, name: str, error: float) -> Found | None:
    """The quickest setting of an implementation whose errors are small enough; in double precision only if single has none."""
    for dtype in (torch.complex64,) if name == "triton" else (torch.complex64, torch.complex128):
        found: list[Found] = []
        if case.points.is_cuda:
            torch.cuda.empty_cache()  # the peer has memory of its own
        for upsampling in grids_of(name):
            for plan in settings(case, name, upsampling, dtype, error):
                try:
                    errors = case.errors(plan)
                    if max(errors) > error:
                        continue
                    found.append(timed(case, plan, errors))
                    break  # less error is no quicker
                except (RuntimeError, MemoryError) as problem:
                    print(f"  {plan.kernel}: {str(problem)[:200]}")
        if found:
            return min(found, key=lambda one: sum(one.seconds))
    return None


def timed(case: Case, plan: Plan, errors: tuple[float, float]) -> Found:
    """Sorting, type 1 and type 2."""
    device, engine = case.points.device, plan.engine

    def sort() -> None:
        if isinstance(engine, Own):
            engine.forget()
            _ = engine.places
        elif isinstance(engine, Peer):
            engine.sort()

    kernel = plan.kernel.removeprefix("nufft: ")
    plan.type1(case.values)
    sorting = seconds_of(sort, device)
    if isinstance(engine, Peer) and engine.name == "cufinufft":
        ways = {}
        for method, name in METHODS.items():
            engine.forget()
            engine.options["gpu_method"] = method
            ways[name] = seconds_of(lambda: plan.type1(case.values), device)
        engine.options.clear()
        seconds, name = min((taken, name) for name, taken in ways.items())
        kernel += name
    else:
        seconds = seconds_of(lambda: plan.type1(case.values), device)
    return Found(kernel, sorting, (seconds, seconds_of(lambda: plan.type2(case.modes), device)), errors)


def main() -> None:
    """Print two lines of a table for each case: this package's and the peer's; then what "auto" takes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", type=int, nargs="+", default=[256])
    parser.add_argument("--points", type=int, default=10**7)
    parser.add_argument("--kinds", nargs="+", default=["slices", "uniform"])
    parser.add_argument("--errors", type=float, nargs="+", default=[1e-3, 1e-6])
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.set_num_threads(1)
    peer = peer_of(device)
    if peer is None:
        print("no peer is installed")
    print("| points | modes | error | what | sorting ms | type 1 ms | type 2 ms | errors |\n|---|---|---|---|---|---|---|---|")
    for kind in options.kinds:
        for size in options.modes:
            case = Case.of(kind, options.points, size, device)
            for error in options.errors:
                compare(case, kind, error, ["triton" if device.type == "cuda" else "cpu", *([peer] if peer else [])])
            del case


def compare(case: Case, kind: str, error: float, names: list[str]) -> None:
    """The table's lines of one case."""
    lead = f"| {kind} | {len(case.modes)} | {error:g} |"
    found = {name: best(case, name, error) for name in names}
    for name, one in found.items():
        print(lead, one.cells() if one else f"{name} does not reach it | | | |", "|", flush=True)
    own, *others = found.values()
    if own and others and others[0]:
        ratios = [theirs / ours for ours, theirs in zip(own.seconds, others[0].seconds, strict=True)]
        both = [(one.sorting + sum(one.seconds)) for one in (own, others[0])]
        print(f"{lead} times as quick as the peer: type 1 {ratios[0]:.2f}, type 2 {ratios[1]:.2f}, all {both[1] / both[0]:.2f} |")
    plan = Plan(case.points, tuple(case.modes.shape), error)
    errors = case.errors(plan)
    said = plan.kernel if isinstance(plan.engine, Quickest) else plan.kernel.split(",")[0]
    print(f"{lead} auto: {said}, errors {errors[0]:.1e}, {errors[1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
