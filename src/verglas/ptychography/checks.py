"""What cannot be right in a scan: counts, the place of the direct beam, positions.

Errors say what to do, notices what was found. Axes: B positions, Y X pixels of a pattern.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
from scipy.spatial import cKDTree

from verglas.errors import InputError
from verglas.ptychography.scan import Scan

AT_ONCE = 256  # patterns that are looked at together
LOOKED_AT = 500  # patterns of which the centre of mass is taken
CONCENTRATED = 0.15  # length of the mean direction from which a centre of mass tells where the beam is
ISOLATED = 0.9  # of a window's edge: no other position is nearer
FEW_ISOLATED = 0.05  # share of positions that may be isolated by an error of their own; more mean wrong units
MARKER = np.iinfo(np.uint32).max
LARGEST_OBJECT = 2**29  # px, 4 GB as complex64


def counts(
    path: Path, patterns_BYX: np.ndarray, mask_YX: np.ndarray | None, clip: bool, notices: list[str]
) -> tuple[np.ndarray, np.ndarray | None]:
    """Patterns without negative counts and with 0 in bad pixels, and the mask, to which pixels are added that hold a detector's
    marker of bad ones. InputError for NaN and, unless clip, for counts below 0 in good pixels."""
    mask_YX = _without_marked(patterns_BYX, mask_YX, notices)
    good_YX = np.ones(patterns_BYX.shape[1:], bool) if mask_YX is None else mask_YX
    if not good_YX.any():
        raise InputError(path, "the mask leaves no good pixel", "pixels that are not 0 where the detector is good",
                         "If it marks bad pixels instead, invert it and give it with --mask.")  # fmt: skip
    below_B, lowest, empty_B = _looked_through(path, patterns_BYX, good_YX)
    if empty_B.all():
        raise InputError(path, "all patterns are empty", "counts above 0")
    if empty_B.any():
        first = int(np.flatnonzero(empty_B)[0])
        notices.append(f"{empty_B.sum()} of {len(patterns_BYX)} patterns are empty, the first is number {first}")
    negative = int(below_B.sum())
    if negative and not clip:
        first = int(np.flatnonzero(below_B)[0])
        found = f"{negative} counts below 0 in good pixels, down to {lowest:g}, first in pattern {first}"
        raise InputError(path, found, "counts of 0 or more", "--clip-negative sets them to 0; bad pixels that are marked so "
                         "belong into a mask (--mask).")  # fmt: skip
    if negative:
        notices.append(f"{negative} counts below 0 were set to 0")
    if negative or (mask_YX is not None and patterns_BYX.dtype != np.uint16):
        patterns_BYX = np.where(good_YX, np.maximum(patterns_BYX, 0), 0)  # bad pixels may hold anything, also NaN
    return patterns_BYX, mask_YX


def _without_marked(patterns_BYX: np.ndarray, mask_YX: np.ndarray | None, notices: list[str]) -> np.ndarray | None:
    """The mask without pixels that ever hold the greatest 32-bit number: so some detectors mark bad ones."""
    if patterns_BYX.dtype != np.uint32:
        return mask_YX
    marked_YX = np.zeros(patterns_BYX.shape[1:], bool)
    for start in range(0, len(patterns_BYX), AT_ONCE):
        marked_YX |= (patterns_BYX[start : start + AT_ONCE] == MARKER).any(0)
    if mask_YX is not None:
        marked_YX &= mask_YX
    if not marked_YX.any():
        return mask_YX
    notices.append(f"{marked_YX.sum()} pixels hold {MARKER}, a detector's marker of bad ones, and are masked")
    return ~marked_YX if mask_YX is None else mask_YX & ~marked_YX


def _looked_through(path: Path, patterns_BYX: np.ndarray, good_YX: np.ndarray) -> tuple[np.ndarray, float, np.ndarray]:
    """(number of counts below 0 of each pattern, the lowest count, which patterns are empty), of good pixels; InputError for
    NaN."""
    below, empty, lowest = [], [], 0.0
    for start in range(0, len(patterns_BYX), AT_ONCE):
        chosen_BP = patterns_BYX[start : start + AT_ONCE][:, good_YX]
        if chosen_BP.dtype.kind == "f" and not np.isfinite(chosen_BP).all():
            row = start + int(np.flatnonzero(~np.isfinite(chosen_BP).all(1))[0])
            raise InputError(path, f"pattern {row} holds NaN or infinite counts", "finite counts in good pixels",
                             "Mask these pixels (--mask), or use the patterns before it (--first).")  # fmt: skip
        below.append((chosen_BP < 0).sum(1))
        empty.append(chosen_BP.max(1) <= 0)
        lowest = min(lowest, float(chosen_BP.min()))
    return np.concatenate(below), lowest, np.concatenate(empty)


def direct_beam(
    path: Path, patterns_BYX: np.ndarray, mask_YX: np.ndarray | None, rule: str, asked: str, notices: list[str]
) -> Literal["middle", "corner"]:
    """Where the direct beam is in far-field patterns: as asked for, else as the patterns' centre of mass says.

    rule: where the format has it ("" if it has no rule); InputError if the centre of mass contradicts it. The centre of mass is
    taken on a circle along each axis, on which the corner and the middle are opposite each other.
    """
    found, text = _where_light_is(patterns_BYX, mask_YX)
    if asked != "auto":
        if found not in ("", asked):
            notices.append(f"the direct beam is taken to be in the {asked}, as asked for, though {text}")
        return "corner" if asked == "corner" else "middle"
    if rule and found and found != rule:
        half = "an fftshift of one axis only" if found == "one axis" else "an fftshift too many or too few"
        raise InputError(
            path,
            f"{text}: {half}",
            f"the direct beam in the {rule} of each pattern",
            "Shift the patterns back." if found == "one axis" else f"If that is how they are stored: --direct-beam {found}.",
        )
    if found == "one axis":
        raise InputError(
            path,
            f"{text}: an fftshift of one axis only",
            "the direct beam in the middle or in the corner",
            "Shift the patterns back.",
        )
    if not found and not rule:
        raise InputError(
            path,
            f"it is not clear where the direct beam is ({text})",
            "patterns with a centre of mass",
            "Say it: --direct-beam middle or --direct-beam corner.",
        )
    place: Literal["middle", "corner"] = "corner" if (found or rule) == "corner" else "middle"
    if not rule:
        notices.append(f"the direct beam is in the {place}: {text}")
    return place


def _where_light_is(patterns_BYX: np.ndarray, mask_YX: np.ndarray | None) -> tuple[str, str]:
    """('middle', 'corner', 'one axis' or '' if the light is spread all over; a sentence with the centre of mass)."""
    step = -(-len(patterns_BYX) // LOOKED_AT)
    mean_YX = patterns_BYX[::step].mean(0, dtype=np.float64) * (1 if mask_YX is None else mask_YX)
    places, centres, clear = [], [], True
    for axis in (0, 1):
        profile = mean_YX.sum(1 - axis)
        edge = len(profile)
        direction = (profile * np.exp(2j * math.pi * np.arange(edge) / edge)).sum() / max(profile.sum(), 1e-300)
        centre = np.angle(direction) / (2 * math.pi) * edge % edge
        centres.append(centre)
        places.append("middle" if abs(centre - edge / 2) < edge / 4 else "corner")
        clear &= abs(direction) > CONCENTRATED
    text = f"the light's centre of mass is at row {centres[0]:.0f}, column {centres[1]:.0f} of {len(mean_YX)} x {edge} px"
    if not clear:
        return "", text.replace("the light's", "the light is spread all over; its")
    return (places[0] if places[0] == places[1] else "one axis"), text


def positions(path: Path, position_B2: np.ndarray, window: tuple[int, int], skip: bool, notices: list[str]) -> np.ndarray:
    """Which positions can be used, bool [B]. InputError for units that cannot be right, and for positions far outside of the
    scan unless skip."""
    span_2 = np.ptp(position_B2, axis=0)
    spanned = f"positions span {span_2[0]:.3g} x {span_2[1]:.3g} px of the object, the window has {window[0]} x {window[1]} px"
    if len(position_B2) > 1 and span_2.max() < 1:
        raise InputError(path, spanned, "steps of pixels", "The unit may be wrong: see --position-unit.")
    nearest_B = cKDTree(position_B2 / np.array(window)).query(position_B2 / np.array(window), k=2, p=np.inf)[0][:, 1]
    isolated_B = nearest_B > ISOLATED
    if isolated_B.mean() > FEW_ISOLATED and not skip:
        raise InputError(
            path,
            f"{spanned}; {isolated_B.sum()} of {len(position_B2)} windows meet no other",
            "windows that overlap",
            "The unit of the positions or the geometry may be wrong: --position-unit, --distance, --energy.",
        )
    if isolated_B.any() and not skip:
        rows = ", ".join(map(str, np.flatnonzero(isolated_B)[:5]))
        raise InputError(
            path,
            f"{isolated_B.sum()} positions outside of the scan (numbers {rows}): their windows meet no other",
            "windows that overlap",
            "Put them right, or leave them out with --skip-isolated.",
        )
    if isolated_B.any():
        notices.append(f"left out {isolated_B.sum()} positions whose windows meet no other")
    kept_B2 = position_B2[~isolated_B]
    if len(kept_B2) < 2:
        raise InputError(path, f"{len(kept_B2)} positions that overlap with another", "at least 2")
    pixels = float(np.prod(np.ptp(kept_B2, axis=0) + np.array(window)))
    if pixels > LARGEST_OBJECT:
        raise InputError(
            path,
            f"{spanned}: an object of {pixels:.2g} px",
            f"at most {LARGEST_OBJECT:.2g} px",
            "The unit may be wrong: see --position-unit.",
        )
    return ~isolated_B


def object_holds(path: Path, scan: Scan) -> None:
    """InputError if the file's own object does not reach as far as its positions."""
    if scan.object_OLYX is None:
        return
    corner_B2 = scan.positions_B2.numpy() - np.array(scan.object_origin_2)
    edges = np.array(scan.object_OLYX.shape[-2:])
    outside_B = ((corner_B2 < -1) | (corner_B2 + np.array(scan.window) > edges + 1)).any(1)
    if outside_B.any():
        row = int(np.flatnonzero(outside_B)[0])
        first = f"the first is number {row} at {corner_B2[row][0]:.1f}, {corner_B2[row][1]:.1f}"
        found = f"{outside_B.sum()} positions reach outside of the file's object of {edges[0]} x {edges[1]} px; {first}"
        raise InputError(path, found, "windows that lie on the object")
