"""cryoSPARC's poses (axis times angle, radians) as Euler angles and back.

The vector w turns by |w| about w/|w| and takes the image frame to the object frame; verglas' A (docs/conventions.md)
takes the object to the image, so A = R(w)^T. Checked in the tests against scipy's rotations.
"""

from __future__ import annotations

import numpy as np
import torch

from verglas.core.rotations import euler_from_matrix, matrix_from_euler


def euler_from_pose(pose_B3: np.ndarray) -> np.ndarray:
    """cryoSPARC poses [B, 3] (radians) -> rot, tilt, psi [B, 3] (degrees, RELION)."""
    return euler_from_matrix(torch.from_numpy(_rodrigues(pose_B3).transpose(0, 2, 1).copy())).numpy()


def pose_from_euler(euler_B3: np.ndarray) -> np.ndarray:
    """rot, tilt, psi [B, 3] (degrees, RELION) -> cryoSPARC poses [B, 3] (radians, |w| <= pi)."""
    from scipy.spatial.transform import Rotation

    angles = torch.from_numpy(np.ascontiguousarray(euler_B3, dtype=np.float64))
    matrix_B33 = matrix_from_euler(*angles.unbind(1)).numpy()
    if len(matrix_B33) == 0:
        return np.zeros((0, 3))
    return Rotation.from_matrix(matrix_B33.transpose(0, 2, 1)).as_rotvec()


def _rodrigues(vector_B3: np.ndarray) -> np.ndarray:
    """exp([w]x) = I + sin(t)/t [w]x + (1 - cos t)/t^2 [w]x^2 with t = |w| (Rodrigues), float64 [B, 3, 3]."""
    w = np.asarray(vector_B3, dtype=np.float64)
    x, y, z = w.T
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    angle = np.linalg.norm(w, axis=1)[:, None, None]
    # sinc keeps both factors exact at angle 0: (1 - cos t)/t^2 = sinc(t/2)^2 / 2.
    first, second = np.sinc(angle / np.pi), 0.5 * np.sinc(angle / (2 * np.pi)) ** 2
    return np.eye(3) + first * cross + second * cross @ cross
