"""A large complex: eight rigid copies of a model at the corners of a cube, each turned at random; 300 Å wide for 5A1A."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

EDGE = 68.0  # Å, of the cube; neighbours touch


def write_eight(model: Path, out: Path, seed: int = 8) -> float:
    """Write the complex of `model` (npz with xyz in Å and w) to `out`; returns the diameter of its sphere in Å."""
    with np.load(model) as atoms:
        xyz_N3, weight_N = atoms["xyz"].astype(np.float64), atoms["w"]
    centred_N3 = xyz_N3 - xyz_N3.mean(0)
    draw, copies = np.random.default_rng(seed), []
    for corner in itertools.product((-1, 1), repeat=3):
        turn_33 = np.linalg.qr(draw.standard_normal((3, 3)))[0]
        turn_33 *= np.sign(np.linalg.det(turn_33))  # a rotation, no mirror
        copies.append(centred_N3 @ turn_33.T + EDGE / 2 * np.array(corner))
    complex_N3 = np.concatenate(copies).astype(np.float32)
    np.savez(out, xyz=complex_N3, w=np.tile(weight_N, 8).astype(np.float32))
    return 2 * float(np.linalg.norm(complex_N3, axis=1).max())
