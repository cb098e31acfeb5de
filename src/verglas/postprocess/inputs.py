"""Half-maps and masks from files, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verglas.errors import InputError
from verglas.io.mrc import Map, read_map

_OUTSIDE_BY = 1e-6  # rounding of float masks is forgiven


@dataclass(frozen=True)
class HalfMaps:
    """Two half-maps of one size and voxel size; warnings: sentences for the user."""

    first: Map
    second: Map
    warnings: list[str]

    @property
    def pixel_size(self) -> float:
        return self.first.pixel_size

    @property
    def box(self) -> int:
        return self.first.box


def other_half(half1: Path) -> Path:
    """The path of half 2, from that of half 1 by its name (half1 -> half2)."""
    if "half1" not in half1.name:
        raise InputError("--half2", f"not given, and the name {half1.name} does not hold 'half1'", "both half-maps",
                         "Give the second half-map with --half2.")  # fmt: skip
    return half1.with_name(half1.name.replace("half1", "half2"))


def read_half_maps(half1: Path, half2: Path | None, pixel_size: float | None = None) -> HalfMaps:
    """Read both half-maps; `pixel_size` (Å) replaces what the headers say.

    Raises InputError if they differ in size or voxel size, or if one is constant; identical maps get a warning.
    """
    half2 = other_half(half1) if half2 is None else half2
    if pixel_size is not None and pixel_size <= 0:
        raise InputError("--pixel", f"{pixel_size:g} Å", "a pixel size above 0")
    first, second = read_map(half1, pixel_size=pixel_size), read_map(half2, pixel_size=pixel_size)
    if first.box != second.box:
        raise InputError(half2, f"box of {second.box} px", f"{first.box} px as in {half1}",
                         "Both half-maps must come from one reconstruction.")  # fmt: skip
    if abs(first.pixel_size - second.pixel_size) > 1e-3 * first.pixel_size:
        raise InputError(half2, f"voxel size {second.pixel_size:g} Å", f"{first.pixel_size:g} Å as in {half1}",
                         "Give the right one with --pixel.")  # fmt: skip
    for path, one in ((half1, first), (half2, second)):
        check_density(path, one)
    warnings = []
    if np.array_equal(first.data_ZYX, second.data_ZYX):
        warnings.append("The two half-maps are identical: every FSC is 1 and no resolution can be told from them.")
    return HalfMaps(first, second, warnings)


def check_density(path: Path, density: Map) -> None:
    """Raise InputError if all voxels have one value: no mask, FSC or alignment can come of it."""
    if np.ptp(density.data_ZYX) == 0:
        raise InputError(path, "all voxels have one value", "a density map", "Check how the map was made.")


def read_mask(path: Path, like: Map) -> np.ndarray:
    """Read a mask [Z, Y, X] for the map `like`; InputError if the size differs, a value lies outside [0, 1], or it is empty."""
    mask_ZYX = read_map(path, pixel_size=like.pixel_size).data_ZYX
    if mask_ZYX.shape != like.data_ZYX.shape:
        raise InputError(path, f"mask of {mask_ZYX.shape[-1]} px", f"{like.box} px as the maps have",
                         "Make one from the map with `verglas mask`, or fit it with `verglas map`.")  # fmt: skip
    low, high = float(mask_ZYX.min()), float(mask_ZYX.max())
    if low < -_OUTSIDE_BY or high > 1 + _OUTSIDE_BY:
        raise InputError(path, f"mask values from {low:.4g} to {high:.4g}", "values between 0 (solvent) and 1 (particle)",
                         "Make a mask from this map with `verglas mask`.")  # fmt: skip
    if not (mask_ZYX > 0.5).any():
        raise InputError(path, "the mask is empty (no value above 0.5)", "1 where the particle is")
    return mask_ZYX.clip(0, 1)
