"""The same transforms by finufft (Barnett, Magland & af Klinteberg 2019, SIAM J. Sci. Comput. 41, C479) on the CPU and cufinufft
(Shih, Wright, Andén, Blaschke & Barnett 2021, arXiv 2102.08463) on GPUs: peers, and what computes where they are quicker."""

from __future__ import annotations

import math
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verglas.nufft.fine import FineGrid

OF_DEVICE = {"cpu": "finufft", "cuda": "cufinufft"}
BEST, BEST_OF_MODE = 1e-5, 1e-7  # errors they reach in single precision: any, and times modes (benchmarks/NOTES.md)
ASKED = 0.3  # of the wanted error, of a peer: measured is up to 2.4 (cufinufft) and 3.3 times (finufft) what they are asked for
OUTPUT_DRIVEN = 3  # cufinufft's quicker way to spread in three dimensions (its own choice adds up by atomics in shared memory)


def peer_of(device: torch.device) -> str | None:
    """Which of the two computes on a device; None where it is not installed."""
    name = OF_DEVICE.get(device.type)
    return name if name is not None and find_spec(name) is not None else None


def reaches(accuracy: float, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether a peer's error is as small as asked for. In single precision it has points in single precision, too, an error of
    phases that grows with the modes."""
    return dtype == torch.complex128 or accuracy >= max(BEST, BEST_OF_MODE * max(shape))


class Peer:
    """Its transforms between fixed points and modes; the last plan is kept, with the points sorted.

    fine: what was asked for (shape, precision, device); its grid is not used. point_MD: in radians.
    """

    def __init__(self, name: str, fine: FineGrid, point_MD: Tensor, accuracy: float, upsampling: float | None) -> None:
        self.name, self.shape, self.points, self.accuracy = name, fine.shape, point_MD, accuracy
        self.real = fine.dtype
        self.upsampling = upsampling if upsampling in (1.25, 2.0) else 0.0  # 0: its own choice
        self.options: dict[str, Any] = {}  # of its plans, beside those below
        self._kept: tuple[tuple[int, ...], Any] | None = None

    @property
    def kernel(self) -> str:
        """What computes, for a run record."""
        return f"{self.name}, accuracy {self.accuracy:g}, {self.real}"

    def run(self, kind: int, sign: int, given: Tensor) -> Tensor:
        """Type 1 or 2; given [..., M] or [..., *shape], complex."""
        inner, outer = ((len(self.points),), self.shape) if kind == 1 else (self.shape, (len(self.points),))
        lead = given.shape[: given.ndim - len(inner)]
        if given.numel() == 0 or math.prod(outer) == 0:
            return given.new_zeros(*lead, *outer)
        vectors = given.reshape(-1, *inner).contiguous()
        found = self.prepared(kind, sign, len(vectors)).execute(vectors if vectors.is_cuda else vectors.numpy())
        return (found if vectors.is_cuda else torch.from_numpy(found)).view(*lead, *outer)

    def forget(self) -> None:
        """Free what is kept."""
        self._kept = None

    def prepared(self, kind: int, sign: int, batch: int) -> Any:
        """Its plan, with the points sorted; for transforms of so many vectors."""
        stream = torch.cuda.current_stream(self.points.device).cuda_stream if self.points.is_cuda else 0
        if self._kept is not None and self._kept[0] == (kind, sign, batch, stream):
            return self._kept[1]
        self.forget()  # its grid goes before another one is made
        options: dict[str, Any] = {"upsampfac": self.upsampling}
        if self.points.is_cuda and kind == 1 and len(self.shape) == 3:
            options["gpu_method"] = OUTPUT_DRIVEN
        options |= self.options
        if self.points.is_cuda:
            options |= {"gpu_device_id": self.points.device.index or 0, "gpu_stream": stream}
        else:
            options |= {"nthreads": torch.get_num_threads(), "showwarn": 0}  # it warns of threads that Numba, too, has
        dtype = "complex64" if self.real == torch.float32 else "complex128"
        plan = import_module(self.name).Plan(kind, self.shape, batch, self.accuracy, sign, dtype, **options)
        self._give_points(plan)
        self._kept = (kind, sign, batch, stream), plan
        return plan

    def sort(self) -> None:
        """Give the points once more to the plan that is kept."""
        assert self._kept is not None
        self._give_points(self._kept[1])

    def _give_points(self, plan: Any) -> None:
        # The first coordinate belongs to the slowest axis of an array in C order.
        columns = [column.to(self.real).contiguous() for column in self.points.T.flip(0)]
        plan.setpts(*(column if column.is_cuda else np.asarray(column) for column in columns))
