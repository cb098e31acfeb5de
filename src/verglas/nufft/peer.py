"""The same transforms by finufft (Barnett, Magland & af Klinteberg 2019), on the CPU: peer and reference of accuracy."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def peer1(point_MD: Tensor, values: Tensor, shape: tuple[int, ...], sign: int, accuracy: float) -> Tensor:
    """Type 1: [..., M] -> [..., *shape]."""
    batch = values.shape[:-1]
    plan, single = _plan(1, point_MD, shape, math.prod(batch), sign, accuracy, values.dtype)
    found = plan.execute(values.reshape(-1, len(point_MD)).contiguous().numpy())
    return torch.from_numpy(np.asarray(found, single)).view(*batch, *shape)


def peer2(point_MD: Tensor, modes: Tensor, shape: tuple[int, ...], sign: int, accuracy: float) -> Tensor:
    """Type 2: [..., *shape] -> [..., M]."""
    batch = modes.shape[: modes.ndim - len(shape)]
    plan, single = _plan(2, point_MD, shape, math.prod(batch), sign, accuracy, modes.dtype)
    found = plan.execute(modes.reshape(-1, *shape).contiguous().numpy())
    return torch.from_numpy(np.asarray(found, single)).view(*batch, len(point_MD))


def _plan(kind: int, point_MD: Tensor, shape: tuple[int, ...], batch: int, sign: int, accuracy: float, dtype: torch.dtype):  # type: ignore[no-untyped-def]
    import finufft

    single = np.complex64 if dtype == torch.complex64 else np.complex128
    plan = finufft.Plan(kind, shape, n_trans=batch, eps=accuracy, isign=sign, dtype=single, nthreads=torch.get_num_threads())
    real = np.float32 if single == np.complex64 else np.float64
    # finufft's first coordinate belongs to the slowest axis of an array in C order.
    plan.setpts(*(np.ascontiguousarray(column.numpy(), real) for column in point_MD.T.flip(0)))
    return plan, single
