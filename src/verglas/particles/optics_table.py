"""Optics groups from RELION's data_optics table, and that table made for older files that have none."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from verglas.errors import InputError
from verglas.optics.group import OpticsGroup

# Columns of the optics table that a particle's own column of the same name overrides.
OVERRIDES = {"rlnVoltage": "voltage_kv", "rlnSphericalAberration": "cs_mm", "rlnAmplitudeContrast": "amplitude_contrast"}
# What tells groups apart in files from before STAR 3.1.
OLD_GROUP_LABELS = [
    "rlnAmplitudeContrast", "rlnBeamTiltX", "rlnBeamTiltY", "rlnBeamTiltClass", "rlnSphericalAberration", "rlnVoltage",
    "rlnDetectorPixelSize", "rlnMagnification", "rlnPixelSize",
]  # fmt: skip
OLD_OFFSETS = ["rlnOriginX", "rlnOriginY", "rlnOriginZ", "rlnOriginXPrior", "rlnOriginYPrior", "rlnOriginZPrior"]


def groups_from_frame(optics: pd.DataFrame, where: Path | str) -> list[OpticsGroup]:
    """One OpticsGroup per row; InputError for missing columns or values that no microscope has."""
    missing = [label for label in ("rlnOpticsGroup", "rlnImagePixelSize") if label not in optics.columns]
    if missing:
        raise InputError(f"{where}, data_optics", f"no column {' and no column '.join(missing)}", "both", _FIX_OPTICS)
    rows = optics.to_dict("records")
    groups = [_group(row, f"{where}, optics group {row['rlnOpticsGroup']}") for row in rows]
    numbers = [group.number for group in groups]
    if len(set(numbers)) != len(numbers):
        raise InputError(f"{where}, data_optics", f"rlnOpticsGroup has {numbers}", "every number once", "Renumber the groups.")
    return groups


_FIX_OPTICS = "Add it to the optics table, for every group."


def _group(row: dict[Hashable, Any], where: str) -> OpticsGroup:
    tilt_x, tilt_y = (_number(row, f"rlnBeamTilt{axis}", where, 0.0) for axis in "XY")
    m00, m01, m10, m11 = (_number(row, f"rlnMagMat{ij}", where, float(ij in ("00", "11"))) for ij in ("00", "01", "10", "11"))
    mtf = str(row.get("rlnMtfFileName", ""))
    original = _number(row, "rlnMicrographOriginalPixelSize", where, 0.0)
    group = OpticsGroup(
        name=str(row.get("rlnOpticsGroupName", f"opticsGroup{row['rlnOpticsGroup']}")),
        number=int(_number(row, "rlnOpticsGroup", where)),
        voltage_kv=_number(row, "rlnVoltage", where, np.nan),
        cs_mm=_number(row, "rlnSphericalAberration", where, np.nan),
        amplitude_contrast=_number(row, "rlnAmplitudeContrast", where, np.nan),
        pixel_size=_number(row, "rlnImagePixelSize", where),
        box=int(_number(row, "rlnImageSize", where, 0)),
        even_zernike=_vector(row, "rlnEvenZernike", where),
        odd_zernike=_vector(row, "rlnOddZernike", where),
        beam_tilt_mrad=(tilt_x, tilt_y),
        magnification=((m00, m01), (m10, m11)),
        ctf_premultiplied=bool(_number(row, "rlnCtfDataAreCtfPremultiplied", where, 0)),
        ctf_corrected=bool(_number(row, "rlnCtfDataAreCtfCorrected", where, 0)),
        mtf_file=mtf if mtf not in ("", "None", "nan") else None,
        original_pixel_size=original or None,
    )
    check_group(group, where)
    if _number(row, "rlnImageDimensionality", where, 2) != 2:
        raise InputError(where, "holds 3-D subtomograms (rlnImageDimensionality)", "2-D images")
    return group


def check_group(group: OpticsGroup, where: str) -> None:
    """InputError for values that no images can have; a missing voltage, Cs or amplitude contrast (NaN) is let pass here."""
    if not group.pixel_size > 0:
        raise InputError(where, f"pixel size {group.pixel_size:g}", "a size above 0 Å", "Correct rlnImagePixelSize.")
    if group.box % 2:
        raise InputError(where, f"odd box of {group.box} px", "an even box", "Extract or resize the particles to an even box.")
    if group.voltage_kv <= 0:
        raise InputError(where, f"voltage {group.voltage_kv:g} kV", "a voltage above 0 kV", "Correct rlnVoltage.")
    if group.amplitude_contrast < 0 or group.amplitude_contrast > 1:
        raise InputError(where, f"amplitude contrast {group.amplitude_contrast:g}", "0 to 1", "Correct rlnAmplitudeContrast.")
    (a, b), (c, d) = group.magnification
    if not abs(a * d - b * c) > 1e-6:
        raise InputError(where, "magnification matrix that cannot be inverted", "one near identity", "Correct rlnMagMat00 to 11.")


def _number(row: dict[Hashable, Any], label: str, where: str, default: float | None = None) -> float:
    if label not in row and default is not None:
        return default
    try:
        value = float(row[label])
    except (TypeError, ValueError) as error:
        raise InputError(where, f"{label} is '{row[label]}'", "a number") from error
    if not np.isfinite(value):
        raise InputError(where, f"{label} is {value}", "a finite number")
    return value


def _vector(row: dict[Hashable, Any], label: str, where: str) -> tuple[float, ...]:
    """RELION's vectors in one column: [0.1,2,-3]."""
    text = str(row.get(label, "[]")).strip().strip("'\"")
    inner = text.removeprefix("[").removesuffix("]").strip()
    try:
        return tuple(float(part) for part in inner.split(",")) if inner else ()
    except ValueError as error:
        raise InputError(where, f"{label} is '{text}'", "numbers as [c0,c1,...]") from error


def assign_groups(frame: pd.DataFrame, groups: list[OpticsGroup], where: Path | str) -> tuple[list[OpticsGroup], np.ndarray]:
    """(groups, position of each particle's group [B]); a particle's own voltage, Cs or contrast makes a group of its own."""
    if "rlnOpticsGroup" not in frame.columns:
        raise InputError(where, "particles have no column rlnOpticsGroup", "the number of a row of data_optics", "Add it.")
    position = {group.number: i for i, group in enumerate(groups)}
    numbers_B = frame["rlnOpticsGroup"].to_numpy()
    unknown = [n for n in pd.unique(numbers_B) if n not in position]
    if unknown:
        raise InputError(
            where, f"particles refer to optics group {unknown[0]}", f"one of {sorted(position)}", "Add it to data_optics."
        )
    index_B = np.array([position[n] for n in pd.unique(numbers_B)], np.int64)[pd.factorize(numbers_B)[0]]
    labels = [label for label in OVERRIDES if label in frame.columns]
    return _split_by_overrides(frame, groups, index_B, labels, where) if labels else (groups, index_B)


def _split_by_overrides(
    frame: pd.DataFrame, groups: list[OpticsGroup], index_B: np.ndarray, labels: list[str], where: Path | str
) -> tuple[list[OpticsGroup], np.ndarray]:
    keys = pd.DataFrame({"group": index_B} | {label: frame[label].to_numpy() for label in labels})
    code_B, distinct = pd.factorize(pd.MultiIndex.from_frame(keys))
    split = []
    for group_index, *values in distinct:
        own = {OVERRIDES[label]: float(value) for label, value in zip(labels, values)}
        split.append(replace(groups[group_index], **own))
        check_group(split[-1], f"{where}, particles of optics group {split[-1].number}")
    return split, np.asarray(code_B, np.int64)


def with_optics_table(frame: pd.DataFrame, where: Path | str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(particles, optics) in today's layout from a file before STAR 3.1: groups from the distinct microscope settings.

    Pixel size is 1e4 rlnDetectorPixelSize (um) / rlnMagnification, or rlnPixelSize; offsets in pixels become Å.
    """
    labels = [label for label in OLD_GROUP_LABELS if label in frame.columns]
    pixel_known = "rlnPixelSize" in labels or {"rlnDetectorPixelSize", "rlnMagnification"} <= set(labels)
    if not pixel_known:
        raise InputError(
            where,
            "there is no data_optics table, and no pixel size among the particles' columns",
            "rlnDetectorPixelSize and rlnMagnification, or rlnPixelSize",
            "Add a data_optics table with rlnImagePixelSize.",
        )
    optics = frame[labels].drop_duplicates().reset_index(drop=True)
    code_B, _ = pd.factorize(pd.MultiIndex.from_frame(frame[labels]))
    pixel_G = _old_pixel_size(optics, where)
    particles = frame.drop(columns=[label for label in labels if label != "rlnBeamTiltClass"])
    particles["rlnOpticsGroup"] = np.asarray(code_B, np.int64) + 1
    for label in (name for name in OLD_OFFSETS if name in frame.columns):
        particles = particles.rename(columns={label: f"{label}Angst"})
        particles[f"{label}Angst"] = frame[label].to_numpy(np.float64) * pixel_G[code_B]
    numbers = np.arange(1, len(optics) + 1)
    head = pd.DataFrame({"rlnOpticsGroupName": [f"opticsGroup{n}" for n in numbers], "rlnOpticsGroup": numbers})
    kept = optics.drop(columns=["rlnDetectorPixelSize", "rlnMagnification", "rlnPixelSize", "rlnBeamTiltClass"], errors="ignore")
    return particles, pd.concat([head, kept], axis=1).assign(rlnImagePixelSize=pixel_G, rlnImageDimensionality=2)


def _old_pixel_size(optics: pd.DataFrame, where: Path | str) -> np.ndarray:
    if "rlnMagnification" not in optics.columns or "rlnDetectorPixelSize" not in optics.columns:
        return optics["rlnPixelSize"].to_numpy(np.float64)
    magnification = optics["rlnMagnification"].to_numpy(np.float64)
    if not (magnification > 0).all():
        raise InputError(where, f"rlnMagnification {magnification.min():g}", "a magnification above 0")
    return 1e4 * optics["rlnDetectorPixelSize"].to_numpy(np.float64) / magnification
