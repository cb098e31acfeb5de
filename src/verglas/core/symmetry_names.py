"""Names of point groups, as options give them. Imports nothing heavy: they are checked before PyTorch is imported."""

from __future__ import annotations

import re

from verglas.errors import InputError

PLATONIC = ("T", "O", "I1", "I2", "I3", "I4")


def normalise_name(symmetry: str, option: str = "--sym") -> str:
    """Canonical name ('c1' -> 'C1', 'I' -> 'I2'); InputError names the option and what is known if it is not a group."""
    name = symmetry.strip().upper()
    if name == "I":
        return "I2"
    cyclic = re.fullmatch(r"([CD])0*([1-9]\d{0,2})", name)
    if cyclic:
        return cyclic[1] + cyclic[2]
    if name in PLATONIC:
        return name
    raise InputError(option, f"unknown symmetry {symmetry!r}", "Cn, Dn (n = 1-999), T, O, I, I1, I2, I3 or I4",
                     "Give the point group of the particle, C1 if it has none.")
