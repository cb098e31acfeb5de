"""Point groups C, D, T, O, I (I1-I4) in the field's axis settings (RELION facts: generators; I = I2)."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.rotations import rotation_about_axis
from verglas.core.symmetry_names import normalise_name
from verglas.errors import InputError

Axis = tuple[int, tuple[float, float, float]]

_GENERATORS: dict[str, list[Axis]] = {
    "T": [(3, (0, 0, 1)), (2, (0, 0.816496580927726, 0.577350269189626))],
    "O": [(3, (1, 1, 1)), (4, (0, 0, 1))],
    "I1": [(2, (1, 0, 0)), (5, (0.850650808352040, 0, -0.525731112119134))],
    "I2": [(2, (0, 0, 1)), (5, (0.525731112119134, 0, 0.850650808352040))],
    "I3": [(2, (-0.525731112119134, 0, 0.850650808352040)), (5, (0, 0, 1))],
    "I4": [(2, (0.525731112119134, 0, 0.850650808352040)), (5, (0.894427190999916, 0, 0.447213595499958))],
}
# The third generators of the published settings fix which way the second axis turns the first; checked in the tests.
_GENERATORS["I1"].append((3, (0.934172358962716, 0.356822089773090, 0)))
_GENERATORS["I2"].append((3, (0, 0.356822089773090, 0.934172358962716)))
_GENERATORS["I3"].append((3, (-0.491123473188423, 0.356822089773090, 0.794654472291766)))
_GENERATORS["I4"].append((3, (0.491123473188423, 0.356822089773090, 0.794654472291766)))


def symmetry_matrices(symmetry: str) -> Tensor:
    """All rotations of the group, identity first, [G, 3, 3] float64. A(R) = A @ R gives an equivalent pose of A."""
    name = normalise_name(symmetry)
    if name[0] in "CD":
        n = int(name[1:])
        generators: list[Axis] = [(n, (0.0, 0.0, 1.0))]
        if name[0] == "D":
            generators.append((2, (1.0, 0.0, 0.0)))
    else:
        generators = _GENERATORS[name]
    group = torch.eye(3, dtype=torch.float64)[None]
    seeds = torch.stack([rotation_about_axis(axis, 360.0 / fold) for fold, axis in generators])
    while True:
        products = torch.cat([group, (group[:, None] @ seeds[None]).reshape(-1, 3, 3)])
        larger = _unique(products)
        if len(larger) == len(group):
            return group
        if len(larger) > 2000:
            raise AssertionError(f"generators of {name} do not close")
        group = larger


@lru_cache(maxsize=64)  # plans ask for it again and again
def order(symmetry: str) -> int:
    """Number of rotations in the group."""
    return len(symmetry_matrices(symmetry))


@lru_cache(maxsize=8)  # every batch asks for it
def mates_beyond(symmetry: str, relaxed: str) -> Tensor:
    """One rotation R of the group `relaxed` for each set of poses A R that `symmetry`, a group within it, makes equivalent;
    identity first, [R, 3, 3] float64, not to be changed. InputError if it is not within it, or the whole of it."""
    whole = normalise_name(relaxed, "--relax-sym")
    within_H33, whole_G33 = symmetry_matrices(symmetry), symmetry_matrices(whole)
    alike_HG = (within_H33[:, None] - whole_G33).abs().amax((2, 3)) < 1e-5
    if not bool(alike_HG.any(1).all()):
        raise InputError("--relax-sym", f"{whole}, which does not hold {normalise_name(symmetry)} of --sym",
                         "a group that holds all rotations of --sym", "With --sym C1 any group can be relaxed.")
    if len(within_H33) == len(whole_G33):
        raise InputError("--relax-sym", f"{whole}, the group of --sym itself", "a larger group",
                         "Give with --sym what is left of the symmetry, C1 if nothing is.")
    kept: list[Tensor] = []
    for rotation_33 in whole_G33:
        mates_H33 = rotation_33 @ within_H33
        if not any(bool(((mates_H33 - other).abs().amax((1, 2)) < 1e-5).any()) for other in kept):
            kept.append(rotation_33)
    return torch.stack(kept)


def _unique(matrices_G33: Tensor) -> Tensor:
    kept: list[Tensor] = []
    for matrix in matrices_G33:
        if not any((matrix - other).abs().max() < 1e-5 for other in kept):
            kept.append(matrix)
    return torch.stack(kept)
