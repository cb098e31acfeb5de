"""Whether the GPU computes: samples of its utilisation from outside, and every kernel of a piece of work from inside."""

from __future__ import annotations

import ctypes
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NANOSECONDS = 1e-9
KINDS = {  # what a kernel does by what its name holds, first match
    "products": ("gemm", "cutlass", "nvjet", "xmma", "cublas"), "transforms": ("fft", "regular_fft", "vector_fft"),
    "sorting": ("sort", "radix", "scan"), "copies": ("memcpy", "memset"),
}  # fmt: skip


class _Utilisation(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Sampler:
    """Samples NVML's utilisation: the share of the time in which any kernel ran, averaged by the driver over its own period of
    up to a second. From a thread of this process, so that the watched process runs undisturbed: `with Sampler() as watch: ...`,
    then `watch.share(begin, end)`. Raises OSError where NVML is missing or does not tell.
    """

    def __init__(self, device: int = 0, period: float = 0.05) -> None:
        self.samples: list[tuple[float, float]] = []  # (time.time(), share)
        self.period = period
        self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
        self._handle = ctypes.c_void_p()
        self._call("nvmlInit_v2")
        self._call("nvmlDeviceGetHandleByIndex_v2", ctypes.c_uint(device), ctypes.byref(self._handle))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._sample()

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def share(self, begin: float, end: float) -> float:
        """Mean utilisation between two values of time.time(), 0 to 1; NaN without samples there."""
        inside = [value for at, value in self.samples if begin <= at <= end]
        return sum(inside) / len(inside) if inside else float("nan")

    def _watch(self) -> None:
        while not self._stop.wait(self.period):
            self._sample()

    def _sample(self) -> None:
        found = _Utilisation()
        self._call("nvmlDeviceGetUtilizationRates", self._handle, ctypes.byref(found))
        self.samples.append((time.time(), found.gpu / 100))

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._nvml, name)(*arguments)
        if code:
            raise OSError(f"{name} answers {code}")


@contextmanager
def utilisation() -> Iterator[Sampler | None]:
    """A sampler at work; None, and a line that says so, where NVML does not tell."""
    try:
        sampler = Sampler()
    except OSError as error:
        print(f"utilisation not sampled: {error}", flush=True)
        yield None
        return
    with sampler:
        yield sampler


@dataclass
class Trace:
    """Kernels of a piece of work, as CUPTI timed them. kernels: (name, begin, end), s of one clock; wall: s of the whole work."""

    kernels: list[tuple[str, float, float]] = field(default_factory=list)
    wall: float = 0.0

    @property
    def busy(self) -> float:
        """Seconds in which at least one kernel or copy ran."""
        return union((begin, end) for _, begin, end in self.kernels)

    def by_kind(self, owners: Mapping[str, str]) -> dict[str, float]:
        """Seconds by kind of kernel, longest first; owners: as `kind_of` wants them."""
        total: dict[str, float] = {}
        for name, begin, end in self.kernels:
            kind = kind_of(name, owners)
            total[kind] = total.get(kind, 0.0) + end - begin
        return dict(sorted(total.items(), key=lambda pair: -pair[1]))

    def longest(self, count: int = 12) -> list[tuple[str, int, float]]:
        """(name, launches, seconds) of the kernels that took most."""
        total: dict[str, list[float]] = {}
        for name, begin, end in self.kernels:
            total.setdefault(name, []).append(end - begin)
        rows = [(name, len(times), sum(times)) for name, times in total.items()]
        return sorted(rows, key=lambda row: -row[2])[:count]


def kind_of(name: str, owners: Mapping[str, str]) -> str:
    """The owner of a kernel of that name, else one of KINDS, else 'elementwise and other'."""
    if name in owners:
        return owners[name]
    low = name.lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in low for mark in marks)), "elementwise and other")


def kernel_owners(kernels: Path) -> dict[str, str]:
    """Name of each compiled kernel -> the folder below `kernels` (src/verglas/kernels) that defines it, 'keep, significant'
    where several have one of that name."""
    owners: dict[str, set[str]] = {}
    cuda = r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\("
    for pattern, definition in (("**/*.py", r"^def (\w+_kernel)\("), ("**/*.cu", cuda)):
        for path in kernels.glob(pattern):
            folder = path.parent.name if path.parent != kernels else path.stem
            for name in re.findall(definition, path.read_text(encoding="utf-8"), re.M):
                owners.setdefault(name, set()).add(folder)
    return {name: ", ".join(sorted(folders)) for name, folders in owners.items()}


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    return sum((end - begin for begin, end in merged(intervals)), 0.0)


def merged(intervals: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The union of intervals as some that do not touch, in order."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(intervals):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


def traced(work: Callable[[], object]) -> Trace:
    """Do `work` on the GPU under CUPTI and list its kernels and copies. Launches take a little longer than without."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        begin = time.perf_counter()
        work()
        torch.cuda.synchronize()
        wall = time.perf_counter() - begin
    found = [
        (event.name(), event.start_ns() * NANOSECONDS, event.end_ns() * NANOSECONDS)
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.name() and "Context Sync" not in event.name()
    ]
    return Trace(found, wall)
