"""HEALPix pixels in the NEST numbering: equal-area cells of the sphere whose number tells their parents and children.

Gorski et al. 2005, ApJ 622, 759. Each of the 12 base faces is a square of side 2^order: the even bits of the number within
a face are x, the odd ones y; so pixel p has the parent p >> 2 and the children 4p ... 4p + 3. Angles in degrees.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

_FACE_RING = (2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 4)  # rings between the north pole and the face's southern corner, / side
_FACE_LONGITUDE = (1, 3, 5, 7, 0, 2, 4, 6, 1, 3, 5, 7)  # of the face's centre, in units of 45 degrees


def pixel_count(order: int) -> int:
    """Number of pixels on the sphere, 12 * 4^order."""
    return 12 * 4**order


def directions_of_pixels(order: int, pixel_D: Tensor) -> Tensor:
    """Centres of NEST pixels (int64 [D]) as (rot, tilt) in degrees, float64 [D, 2], on their device; rot in (-180, 180], tilt in
    [0, 180].

    The operations keep numbers such as 45 and 90 degrees exact, because the borders of asymmetric units lie there.
    """
    side = 1 << order
    face = pixel_D.long() >> 2 * order
    x, y = face_coordinates(pixel_D.long() & (side * side - 1))
    first_ring, longitude = (torch.tensor(of_face, device=pixel_D.device)[face] for of_face in (_FACE_RING, _FACE_LONGITUDE))
    ring = first_ring * side - x - y - 1  # 1 (north) ... 4 side - 1 (south)
    polar = torch.minimum(ring, 4 * side - ring).clamp_(max=side)  # pixels per quarter of the ring
    area = 1.0 - polar.double().square_() * (4.0 / pixel_count(order))  # height of a ring of the polar caps
    belt = (2 * side - ring).double() * (2.0 / (3 * side))
    height = torch.where(ring < side, area, torch.where(ring > 3 * side, -area, belt))
    eighths = (longitude * polar + x - y) % (8 * polar)  # of the way round, in units of 45 degrees / polar
    quarter = torch.tensor(0.5 * math.pi, dtype=torch.float64, device=pixel_D.device)  # a number would be multiplied by 1 / polar
    rot = 0.5 * eighths.double() * (quarter / polar.double()) * 180.0 / math.pi
    # On a CPU, where units are cut out, by NumPy: two libraries may differ in the last bit, which decides on borders.
    angle = torch.from_numpy(np.arccos(height.numpy())) if height.device.type == "cpu" else height.acos()
    return torch.stack([torch.where(rot > 180.0, rot - 360.0, rot), angle * 180.0 / math.pi], -1)


def face_coordinates(number: Tensor) -> tuple[Tensor, Tensor]:
    """(x, y) of pixels from their numbers within a face: every second bit, gathered by halving the gaps."""
    return _every_second_bit(number), _every_second_bit(number >> 1)


def child_pixels(pixel_D: Tensor, levels: int) -> Tensor:
    """Descendants of pixels, int64 [D, 4^levels], in rows of y (outer) and x (inner) within the parent; on their device."""
    side = 1 << levels
    inside = torch.arange(side * side)
    x, y = face_coordinates(inside)
    in_rows = torch.empty_like(inside)
    in_rows[y * side + x] = inside
    return pixel_D[:, None] * 4**levels + in_rows.to(pixel_D.device)


def largest_radius(order: int) -> float:
    """Largest distance between a pixel's centre and its corners, degrees."""
    side = 1 << order
    centre = _vector(2.0 / 3.0, math.pi / (4 * side))
    corner = _vector(1.0 - (1.0 - 1.0 / side) ** 2 / 3.0, 0.0)
    return math.degrees(math.atan2(float(np.linalg.norm(np.cross(centre, corner))), float(centre @ corner)))


def _vector(z: float, longitude: float) -> np.ndarray:
    radius = math.sqrt(1.0 - z * z)
    return np.array([radius * math.cos(longitude), radius * math.sin(longitude), z])


def _every_second_bit(number: Tensor) -> Tensor:
    bits = number & 0x5555555555555555
    for shift, mask in ((1, 0x3333333333333333), (2, 0x0F0F0F0F0F0F0F0F), (4, 0x00FF00FF00FF00FF),
                        (8, 0x0000FFFF0000FFFF), (16, 0x00000000FFFFFFFF)):  # fmt: skip
        bits = (bits | (bits >> shift)) & mask
    return bits
