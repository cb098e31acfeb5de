"""Euler angles and rotation matrices in the field's ZYZ convention (docs/conventions.md).

A = Rz(psi) Ry(tilt) Rz(rot) maps object coordinates (x, y, z) into the image frame; the image is the integral along the
image z axis. Rows of A are the image axes seen from the object; row 2 is the viewing direction.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def matrix_from_euler(rot_B: Tensor, tilt_B: Tensor, psi_B: Tensor) -> Tensor:
    """Angles in degrees -> A [B, 3, 3]. At (0, 0, 90): row 0 is (0, 1, 0), so image x looks along object y."""
    ca, sa = torch.cos(torch.deg2rad(rot_B)), torch.sin(torch.deg2rad(rot_B))
    cb, sb = torch.cos(torch.deg2rad(tilt_B)), torch.sin(torch.deg2rad(tilt_B))
    cg, sg = torch.cos(torch.deg2rad(psi_B)), torch.sin(torch.deg2rad(psi_B))
    elements = [
        cg * cb * ca - sg * sa, cg * cb * sa + sg * ca, -cg * sb,
        -sg * cb * ca - cg * sa, -sg * cb * sa + cg * ca, sg * sb,
        sb * ca, sb * sa, cb,
    ]  # fmt: skip
    return torch.stack(elements, -1).unflatten(-1, (3, 3))


def euler_from_matrix(matrix_B33: Tensor) -> Tensor:
    """A [B, 3, 3] -> (rot, tilt, psi) [B, 3] in degrees; rot, psi in (-180, 180], tilt in [0, 180]; rot = 0 at the poles."""
    a = matrix_B33.double()
    sin_tilt = torch.hypot(a[..., 0, 2], a[..., 1, 2])
    regular = sin_tilt > 16 * 1.1920929e-07
    rot = torch.where(regular, torch.atan2(a[..., 2, 1], a[..., 2, 0]), torch.zeros_like(sin_tilt))
    tilt = torch.atan2(torch.where(regular, sin_tilt, torch.zeros_like(sin_tilt)), a[..., 2, 2])
    up = a[..., 2, 2] > 0
    psi_pole = torch.where(up, torch.atan2(-a[..., 1, 0], a[..., 0, 0]), torch.atan2(a[..., 1, 0], -a[..., 0, 0]))
    psi = torch.where(regular, torch.atan2(a[..., 1, 2], -a[..., 0, 2]), psi_pole)
    return torch.rad2deg(torch.stack([rot, tilt, psi], -1))


def rotation_about_axis(axis: tuple[float, float, float], degrees: float) -> Tensor:
    """Matrix [3, 3] float64 that turns vectors by `degrees` about `axis` (right-handed; Rodrigues' formula)."""
    x, y, z = (c / math.sqrt(sum(v * v for v in axis)) for c in axis)
    cross = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    angle = math.radians(degrees)
    return torch.eye(3, dtype=torch.float64) + math.sin(angle) * cross + (1 - math.cos(angle)) * cross @ cross


def matrix_from_quaternion(quaternion_B4: Tensor) -> Tensor:
    """Rotation matrices [B, 3, 3] of quaternions (w, x, y, z) of any length above 0."""
    w, x, y, z = (quaternion_B4 / quaternion_B4.norm(dim=-1, keepdim=True)).unbind(-1)
    elements = [
        1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w),
        2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w),
        2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y),
    ]  # fmt: skip
    return torch.stack(elements, -1).unflatten(-1, (3, 3))


def random_rotations(n: int, generator: torch.Generator) -> Tensor:
    """`n` rotation matrices uniform on SO(3), [n, 3, 3] float64 (normalised Gaussian quaternions)."""
    return matrix_from_quaternion(torch.randn(n, 4, generator=generator, dtype=torch.float64))


def angular_distance(a_B33: Tensor, b_B33: Tensor) -> Tensor:
    """Angle of the rotation between a and b, degrees [B]; stable for small angles."""
    difference = a_B33.transpose(-1, -2) @ b_B33
    sine = 0.5 * torch.linalg.vector_norm(
        torch.stack([difference[..., 2, 1] - difference[..., 1, 2],
                     difference[..., 0, 2] - difference[..., 2, 0],
                     difference[..., 1, 0] - difference[..., 0, 1]], -1), dim=-1)  # fmt: skip
    cosine = 0.5 * (difference.diagonal(dim1=-2, dim2=-1).sum(-1) - 1)
    return torch.rad2deg(torch.atan2(sine, cosine))
