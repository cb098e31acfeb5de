"""The built-in model: seven helix bundles of different lengths around a plug, about 100 Å across, made from a seed.

It is asymmetric (every subunit has its own length and tilt), shows helices at 8 Å and needs no download.
`demo-open` is a second conformation: two neighbouring subunits swung outwards and the plug pulled out.
"""

from __future__ import annotations

import numpy as np

DEMO_NAMES = ("demo", "demo-open")
_LENGTHS = (66.0, 38.0, 54.0, 30.0, 72.0, 46.0, 34.0)  # Å, one per subunit
_RING_RADIUS = 31.0  # Å
_RISE, _TURN, _HELIX_RADIUS = 1.5, np.deg2rad(100.0), 2.3  # alpha helix: Å per residue, radians per residue, Å
_HELIX_SPACING = 9.5  # Å between the axes of packed helices
_ATOMS_PER_RESIDUE = 5
_WEIGHT = 6.7  # mean atomic number of C, N and O in protein


def demo_atoms(name: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions [N, 3] in Å and weights [N] of `demo` or `demo-open`; the same seed gives atoms that correspond."""
    rng = np.random.default_rng([seed, 7])
    opened = name == "demo-open"
    parts = [_subunit(index, rng, swing=25.0 if opened and index in (0, 1) else 0.0) for index in range(len(_LENGTHS))]
    plug = _bundle(26.0, 3, rng) @ _tilted(55.0, 20.0).T
    parts.append(plug + np.array([3.0, -2.0, 22.0 if opened else 4.0]))
    xyz_N3 = np.concatenate(parts)
    return xyz_N3, np.full(len(xyz_N3), _WEIGHT)


def _subunit(index: int, rng: np.random.Generator, swing: float) -> np.ndarray:
    """One bundle of four helices standing on the ring, tilted along it, its foot at z = -30 Å; swing in degrees."""
    length = _LENGTHS[index]
    upright = _bundle(length, 4, rng) + np.array([0.0, 0.0, length / 2])
    leaning = upright @ _tilted(12.0 + 3.0 * index, 90.0).T @ _tilted(swing, 0.0).T
    placed = leaning + np.array([_RING_RADIUS, 0.0, -30.0])
    turn = 2 * np.pi * index / len(_LENGTHS)
    about_z = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    return placed @ about_z.T


def _bundle(length: float, n_helices: int, rng: np.random.Generator) -> np.ndarray:
    """Parallel helices along z about the origin, [atoms, 3] Å."""
    angles = 2 * np.pi * np.arange(n_helices) / n_helices
    radius = _HELIX_SPACING / (2 * np.sin(np.pi / n_helices))
    return np.concatenate([
        _helix(length * rng.uniform(0.8, 1.0), rng) + np.array([radius * np.cos(a), radius * np.sin(a), 0.0]) for a in angles
    ])  # fmt: skip


def _helix(length: float, rng: np.random.Generator) -> np.ndarray:
    """Atoms of one helix along z, centred: backbone on the spiral, side chains scattered outside it."""
    residue = np.repeat(np.arange(max(int(length / _RISE), 1)), _ATOMS_PER_RESIDUE)
    side = np.tile(np.arange(_ATOMS_PER_RESIDUE), len(residue) // _ATOMS_PER_RESIDUE)
    angle = residue * _TURN + rng.normal(0, 0.2, len(residue))
    radius = _HELIX_RADIUS + 0.9 * np.maximum(side - 2, 0)
    z = residue * _RISE - length / 2
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), z], 1) + rng.normal(0, 0.4, (len(residue), 3))


def _tilted(tilt: float, azimuth: float) -> np.ndarray:
    """Rotation that leans the z axis by `tilt` degrees towards the direction `azimuth` (degrees from x)."""
    t, a = np.deg2rad(tilt), np.deg2rad(azimuth)
    about_y = np.array([[np.cos(t), 0, np.sin(t)], [0, 1, 0], [-np.sin(t), 0, np.cos(t)]])
    about_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    return about_z @ about_y @ about_z.T
