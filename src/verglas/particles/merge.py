"""Several particle tables made one: optics groups renumbered, equal ones joined, columns that all of them have kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from verglas.errors import InputError
from verglas.particles.table import ParticleTable

# What a missing column of an optics table means.
OPTICS_DEFAULTS: dict[str, float | int | str] = {
    "rlnBeamTiltX": 0.0, "rlnBeamTiltY": 0.0, "rlnMagMat00": 1.0, "rlnMagMat01": 0.0, "rlnMagMat10": 0.0, "rlnMagMat11": 1.0,
    "rlnOddZernike": "[]", "rlnEvenZernike": "[]", "rlnCtfDataAreCtfPremultiplied": 0, "rlnCtfDataAreCtfCorrected": 0,
    "rlnImageDimensionality": 2,
}  # fmt: skip


def merge_tables(tables: list[ParticleTable]) -> tuple[ParticleTable, list[str]]:
    """(all particles in the order given, notices for the user); image names become absolute.

    Raises InputError if an optics table lacks a column that another has and that means nothing when it is missing.
    """
    notices: list[str] = []
    frames = [with_absolute_names(table) for table in tables]
    common = [label for label in frames[0].columns if all(label in frame.columns for frame in frames)]
    for table, frame in zip(tables, frames):
        extra = [label for label in frame.columns if label not in common]
        if extra:
            notices.append(f"{table.source}: columns that not every input has are left out: {', '.join(extra)}")
    optics, numbers = _join_optics(tables)
    renumbered = [
        frame[common].assign(rlnOpticsGroup=frame["rlnOpticsGroup"].map(number)) for frame, number in zip(frames, numbers)
    ]
    doubled = int(pd.concat(renumbered)["rlnImageName"].duplicated().sum())
    if doubled:
        notices.append(f"{doubled} images are named more than once (symmetry expansion, or one input given twice)")
    return ParticleTable(pd.concat(renumbered, ignore_index=True), optics, Path.cwd(), tables[0].source), notices


def with_absolute_names(table: ParticleTable) -> pd.DataFrame:
    """The table's frame with images named by absolute path."""
    where = table.image_locations()
    absolute = np.array([str(path.resolve()) for path in where.paths], dtype=object)[where.stack_index_B]
    names = [f"{image + 1:06d}@{path}" for image, path in zip(where.image_index_B.tolist(), absolute)]
    return table.frame.assign(rlnImageName=names)


def _join_optics(tables: list[ParticleTable]) -> tuple[pd.DataFrame, list[dict[int, int]]]:
    """One optics table, and for every input: its group number -> number there."""
    labels = list(dict.fromkeys(label for table in tables for label in table.optics_frame.columns))
    labels = [label for label in labels if label != "rlnOpticsGroup"]
    known: dict[tuple[object, ...], int] = {}
    rows, numbers = [], []
    for table in tables:
        optics = _completed(table, labels)
        number_of: dict[int, int] = {}
        for number, row in zip(table.optics_frame["rlnOpticsGroup"].tolist(), optics.to_dict("records")):
            key = tuple(row[label] for label in labels)
            if key not in known:
                known[key] = len(known) + 1
                rows.append(row | {"rlnOpticsGroup": known[key]})
            number_of[number] = known[key]
        numbers.append(number_of)
    return _distinct_names(pd.DataFrame(rows)), numbers


def _completed(table: ParticleTable, labels: list[str]) -> pd.DataFrame:
    missing = [label for label in labels if label not in table.optics_frame.columns]
    unclear = [label for label in missing if label not in OPTICS_DEFAULTS and label != "rlnOpticsGroupName"]
    if unclear:
        raise InputError(
            f"{table.source}, data_optics", f"no column {', '.join(unclear)}, which another input has", "the same columns in all",
            "Add it to this optics table, or remove it from the other.",
        )  # fmt: skip
    values = {label: OPTICS_DEFAULTS[label] for label in missing if label != "rlnOpticsGroupName"}
    if "rlnOpticsGroupName" in missing:
        return table.optics_frame.assign(**values, rlnOpticsGroupName=[group.name for group in table.groups])
    return table.optics_frame.assign(**values)


def _distinct_names(optics: pd.DataFrame) -> pd.DataFrame:
    if "rlnOpticsGroupName" not in optics.columns:
        return optics
    names: list[str] = []
    for name in optics["rlnOpticsGroupName"]:
        candidate, count = name, 1
        while candidate in names:
            count += 1
            candidate = f"{name}_{count}"
        names.append(candidate)
    return optics.assign(rlnOpticsGroupName=names)
