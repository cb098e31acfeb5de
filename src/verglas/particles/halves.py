"""Two independent halves of a data set: kept if the file has them, drawn at random otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from verglas.errors import InputError


def half_sets(frame: pd.DataFrame, seed: int, where: Path | str) -> np.ndarray:
    """1 or 2 for every particle [B]: rlnRandomSubset where it is set, else an even random split that `seed` fixes.

    Rows that share an image (symmetry expansion) or a helical tube are never split. Raises InputError if only some
    particles have a half, if a value is not 0, 1 or 2, or if one half is empty.
    """
    given = "rlnRandomSubset" in frame.columns
    half_B = frame["rlnRandomSubset"].to_numpy(np.int64) if given else np.zeros(len(frame), np.int64)
    other = np.setdiff1d(half_B, [0, 1, 2])
    if len(other):
        raise InputError(f"{where}, rlnRandomSubset", f"value {other[0]}", "1 or 2 (0: not assigned)")
    if (half_B == 0).all():
        half_B = random_halves(_units(frame), seed)
        if len(np.unique(half_B)) < 2:
            raise InputError(where, "all particles show one image", "two images or more, to make two halves of them")
    elif (half_B == 0).any():
        count = int((half_B == 0).sum())
        raise InputError(
            f"{where}, rlnRandomSubset", f"{count} of {len(half_B)} particles have no half", "all of them, or none",
            "Remove the column to draw new halves.",
        )  # fmt: skip
    if len(np.unique(half_B)) < 2:
        raise InputError(
            f"{where}, rlnRandomSubset", f"all {len(half_B)} particles are in one half", "particles in both",
            "Remove the column to draw new halves.",
        )  # fmt: skip
    return half_B


def _units(frame: pd.DataFrame) -> np.ndarray:
    """Number of the unit that must stay together, for every particle [B]."""
    tube = ["rlnMicrographName", "rlnHelicalTubeID"]
    if set(tube) <= set(frame.columns):
        return np.asarray(pd.factorize(pd.MultiIndex.from_frame(frame[tube]))[0])
    if "rlnImageName" in frame.columns:
        return np.asarray(pd.factorize(frame["rlnImageName"])[0])
    return np.arange(len(frame))


def random_halves(unit_B: np.ndarray, seed: int) -> np.ndarray:
    """Halves 1 and 2 [B], as many units in each (one more in half 1 if the number is odd)."""
    n_units = int(unit_B.max()) + 1 if len(unit_B) else 0
    half_of_unit = np.random.default_rng(seed).permutation(1 + np.arange(n_units) % 2)
    return half_of_unit[unit_B]
