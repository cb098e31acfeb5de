"""Many small symmetric positive definite matrices at once, their own axes first: each step is one product over all of them.

Libraries factor batches of 6 x 6 matrices one after another; with the batch last, a step is long and lies in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cholesky(matrix_QQN: Tensor) -> Tensor:
    """Lower triangles L [Q, Q, ...] with L L^T = matrix; zeros above the diagonal. NaN where one is not positive definite."""
    size = len(matrix_QQN)
    root_QQN = torch.zeros_like(matrix_QQN)
    for j in range(size):
        column_QN = matrix_QQN[j:, j] - (root_QQN[j:, :j] * root_QQN[j, :j]).sum(1)
        root_QQN[j:, j] = column_QN / column_QN[0].sqrt()
    return root_QQN


def inverse_and_log(matrix_QQN: Tensor) -> tuple[Tensor, Tensor]:
    """Inverses [Q, Q, ...], and ln of the determinants of the matrices [...]."""
    root_QQN = cholesky(matrix_QQN)
    size = len(root_QQN)
    backward_QQN = torch.zeros_like(root_QQN)  # the inverse of L, row by row
    for i in range(size):
        own_N = root_QQN[i, i].reciprocal()
        backward_QQN[i, :i] = -own_N * (root_QQN[i, :i, None] * backward_QQN[:i, :i]).sum(0)
        backward_QQN[i, i] = own_N
    inverse_QQN = torch.zeros_like(root_QQN)
    for k in range(size):  # what a row of it has beyond the diagonal is zero
        row_QN = backward_QQN[k, : k + 1]
        inverse_QQN[: k + 1, : k + 1] += row_QN[:, None] * row_QN
    return inverse_QQN, 2 * root_QQN.diagonal(dim1=0, dim2=1).log().sum(-1)
