"""What the CPU kernels share about ragged lists (`Blocks`): plain arrays, tasks, and the samples that have weight."""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from torch import Tensor

from verglas.kernels.blocks import Blocks


class Lists(NamedTuple):
    """The tensors of `Blocks` as contiguous arrays, for Numba."""

    slice_ptr: np.ndarray
    slice_N: np.ndarray
    shift_ptr: np.ndarray
    shift_M: np.ndarray
    value_ptr: np.ndarray

    @classmethod
    def of(cls, blocks: Blocks) -> Lists:
        """Views of the lists of `blocks` (on the CPU)."""
        lists = (blocks.slice_ptr_B1, blocks.slice_N, blocks.shift_ptr_B1, blocks.shift_M, blocks.value_ptr_B1)
        return cls(*(tensor.contiguous().numpy() for tensor in lists))


class Weighted(NamedTuple):
    """Samples of non-zero weight, listed slice by slice: entry n of `slice_N` has those from ptr[n] to ptr[n + 1].

    image_S: int32, which shifted image; weight_S: float32; sum_N: sum of the weights of each entry.
    """

    ptr_N1: np.ndarray
    image_S: np.ndarray
    weight_S: np.ndarray
    sum_N: np.ndarray


def cut(lists: Lists, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Tasks of at most `size` slices: (particle, first of its slices) of each; particles without samples have none."""
    tasks_B = np.where(np.diff(lists.value_ptr) > 0, -(-np.diff(lists.slice_ptr) // size), 0)
    particle = np.repeat(np.arange(len(tasks_B)), tasks_B)
    start_B = np.cumsum(tasks_B) - tasks_B
    return particle, (np.arange(len(particle)) - start_B[particle]) * size


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _count(posterior: Any, slice_ptr: Any, shift_ptr: Any, value_ptr: Any, count_N: Any, sum_N: Any) -> None:
    for i in numba.prange(len(value_ptr) - 1):
        shifts = shift_ptr[i + 1] - shift_ptr[i]
        for a in range(slice_ptr[i + 1] - slice_ptr[i]):
            start = value_ptr[i] + a * shifts
            count, total = 0, np.float32(0)
            for p in posterior[start : start + shifts]:
                count += p != 0
                total += p
            count_N[slice_ptr[i] + a], sum_N[slice_ptr[i] + a] = count, total


@numba.njit(parallel=True, cache=True, boundscheck=False)
def _fill(posterior: Any, lists: Any, ptr_N1: Any, image_S: Any, weight_S: Any) -> None:
    slice_ptr, _, shift_ptr, shift_M, value_ptr = lists
    for i in numba.prange(len(value_ptr) - 1):
        shifts = shift_M[shift_ptr[i] : shift_ptr[i + 1]]
        for a in range(slice_ptr[i + 1] - slice_ptr[i]):
            place, last = ptr_N1[slice_ptr[i] + a], ptr_N1[slice_ptr[i] + a + 1]
            start = value_ptr[i] + a * len(shifts)
            for t in range(len(shifts)):
                if place == last:
                    break
                p = posterior[start + t]
                if p != 0:
                    image_S[place], weight_S[place] = shifts[t], p
                    place += 1


def with_weight(posterior_N: Tensor, lists: Lists) -> Weighted:
    """The samples of non-zero weight, slice by slice."""
    posterior = posterior_N.to(torch.float32).contiguous().numpy()
    count_N, sum_N = np.empty(len(lists.slice_N), np.int64), np.empty(len(lists.slice_N), np.float32)
    _count(posterior, lists.slice_ptr, lists.shift_ptr, lists.value_ptr, count_N, sum_N)
    ptr_N1 = np.concatenate([np.zeros(1, np.int64), np.cumsum(count_N)])
    image_S, weight_S = np.empty(ptr_N1[-1], np.int32), np.empty(ptr_N1[-1], np.float32)
    _fill(posterior, tuple(lists), ptr_N1, image_S, weight_S)
    return Weighted(ptr_N1, image_S, weight_S, sum_N)
