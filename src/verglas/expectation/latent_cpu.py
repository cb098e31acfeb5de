"""`latent.compared` on the CPU: Numba, a particle's matrices in registers and first cache, a run of particles per task."""

from __future__ import annotations

import numba
import numpy as np
import torch
from torch import Tensor

TASKS = 64  # of all particles: each has its own sums


def sums_of_particles(arrays: tuple[Tensor, ...], starts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over particles [M, 3 + Q + Q^2], ln of the likelihoods of so many mixtures [S], class probabilities [B, M]; arrays:
    the first ones of `compare`."""
    n, size = arrays[1].shape
    count = len(arrays[4])
    class_BM = np.empty((n, count))
    sums_TMW, log_TS = np.zeros((TASKS, count, 3 + size + size**2)), np.zeros((TASKS, starts))
    gram, overlap, strange, inverse, pull, own, middle, variance = (one.double().contiguous().numpy() for one in arrays)
    compare(gram, overlap, strange, inverse, pull, own, middle, variance, class_BM, sums_TMW, log_TS)
    return torch.from_numpy(sums_TMW.sum(0)), torch.from_numpy(log_TS.sum(0)), torch.from_numpy(class_BM)


@numba.njit(inline="always", boundscheck=False)
def _factor(matrix, size):
    """Cholesky's lower triangle in place; ln of the determinant."""
    log = 0.0
    for j in range(size):
        for i in range(j, size):
            total = matrix[i, j]
            for k in range(j):
                total -= matrix[i, k] * matrix[j, k]
            matrix[i, j] = np.sqrt(total) if i == j else total / matrix[j, j]
        log += np.log(matrix[j, j])
    return 2.0 * log


@numba.njit(inline="always", boundscheck=False)
def _invert(root, backward, inverse, size):
    """The inverse of L L^T; backward: room for that of L."""
    for i in range(size):
        own = 1.0 / root[i, i]
        for j in range(i):
            total = 0.0
            for k in range(j, i):
                total += root[i, k] * backward[k, j]
            backward[i, j] = -own * total
        backward[i, i] = own
    for i in range(size):
        for j in range(i + 1):
            total = 0.0
            for k in range(i, size):
                total += backward[k, i] * backward[k, j]
            inverse[i, j] = inverse[j, i] = total


@numba.njit(inline="always", boundscheck=False)
def _probabilities(log_M, class_M, classes, log_S):
    """Of the classes of each mixture; adds ln of what they sum to."""
    for s in range(len(log_S)):
        first = s * classes
        highest = log_M[first : first + classes].max()
        total = 0.0
        for m in range(first, first + classes):
            class_M[m] = np.exp(log_M[m] - highest)
            total += class_M[m]
        class_M[first : first + classes] /= total
        log_S[s] += highest + np.log(total)


@numba.njit(parallel=True, cache=True, boundscheck=False)
def compare(gram_BQQ, overlap_BQ, strange_B, inverse_MQQ, pull_MQ, own_M, middle_M, variance_M, class_BM, sums_TMW, log_TS):
    """Fill class probabilities [B, M], and add to each task's sums over particles [T, M, 3 + Q + Q^2] of 1, u, u^2, z, z z^T
    and of ln of the likelihoods [T, S]. own_M: what of ln p does not depend on the particle."""
    n, size = overlap_BQ.shape
    count, starts = len(own_M), log_TS.shape[1]
    tasks = len(sums_TMW)
    for task in numba.prange(tasks):
        matrix, backward = np.zeros((size, size)), np.zeros((size, size))
        covariance_MQQ, mean_MQ, log_M = np.zeros((count, size, size)), np.zeros((count, size)), np.zeros(count)
        for b in range(task * n // tasks, (task + 1) * n // tasks):
            u = strange_B[b]
            for m in range(count):
                for i in range(size):
                    for j in range(i + 1):
                        matrix[i, j] = gram_BQQ[b, i, j] + inverse_MQQ[m, i, j]
                log = _factor(matrix, size)
                _invert(matrix, backward, covariance_MQQ[m], size)
                explained = 0.0
                for i in range(size):
                    mean = 0.0
                    for j in range(size):
                        mean += covariance_MQQ[m, i, j] * (overlap_BQ[b, j] + pull_MQ[m, j])
                    mean_MQ[m, i] = mean
                    explained += mean * (overlap_BQ[b, i] + pull_MQ[m, i])
                away = u - middle_M[m]
                log_M[m] = own_M[m] + 0.5 * (explained - log - away * away / variance_M[m])
            _probabilities(log_M, class_BM[b], count // starts, log_TS[task])
            for m in range(count):
                weight, sums_W = class_BM[b, m], sums_TMW[task, m]
                sums_W[0] += weight
                sums_W[1] += weight * u
                sums_W[2] += weight * u * u
                for i in range(size):
                    sums_W[3 + i] += weight * mean_MQ[m, i]
                    for j in range(size):
                        second = covariance_MQQ[m, i, j] + mean_MQ[m, i] * mean_MQ[m, j]
                        sums_W[3 + size + i * size + j] += weight * second
