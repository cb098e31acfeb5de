"""What a file of the field holds, as plain facts (dictionaries of text and numbers) that print and become JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from verglas.errors import InputError
from verglas.io.cs_file import Fields, load_cs
from verglas.io.mrc import Stack, read_raw
from verglas.io.mrc_header import MrcHeader
from verglas.io.star import StarBlock, read_star

Facts = dict[str, Any]
LOOKED_AT = 1000  # images of a large stack whose values are looked at
MAPS, STACKS = {".mrc", ".map"}, {".mrcs", ".st", ".stk"}


def kind_of_file(path: Path) -> str:
    """"map", "stack", "star" or "cs", by the name; InputError for other names."""
    suffix = Path(path.stem).suffix.lower() if path.suffix.lower() in (".gz", ".bz2") else path.suffix.lower()
    if suffix in MAPS | STACKS:
        return "stack" if suffix in STACKS else "map"
    if suffix in (".star", ".cs"):
        return suffix[1:]
    if path.is_dir():
        raise InputError(path, "is a folder", "a file: .mrc .map .mrcs .star .cs")
    raise InputError(path, f"unknown kind of file {path.suffix!r}", ".mrc .map .mrcs .star .cs (maps also .gz .bz2)")


def describe(path: Path) -> tuple[Facts, list[str]]:
    """Facts of a map, stack, STAR or .cs file, first of all its "kind", and the images (`000001@stack`) that it names.

    Raises InputError if it cannot be read.
    """
    kind = kind_of_file(path)
    facts: Facts = {"path": str(path), "kind": kind}
    if kind == "star":
        blocks = read_star(path).values()
        named = [block.frame["rlnImageName"].tolist() for block in blocks if "rlnImageName" in block.frame]
        return facts | {"blocks": [_block(block) for block in blocks]}, named[0] if named else []
    if kind == "cs":
        fields = load_cs(path)
        facts |= {"rows": len(fields["uid"]), "fields": [_field(name, values) for name, values in fields.items()]}
        return facts, _cs_images(fields)
    return facts | _image_facts(path, kind), []


def _image_facts(path: Path, kind: str) -> Facts:
    compressed = path.suffix.lower() in (".gz", ".bz2")
    header, raw_ZYX = read_raw(path)
    if kind == "map" and _is_stack(header):
        kind = "stack"
    nz, ny, nx = header.shape
    facts: Facts = {"kind": kind, "mode": header.mode, "dtype": header.dtype.name, "bytes": path.stat().st_size,
                    "byte_order": "big" if header.big_endian else "little",
                    "pixel_size": header.voxel_xyz[0] if kind == "stack" else list(header.voxel_xyz)}  # fmt: skip
    if kind == "stack":
        facts |= {"images": nz, "box": [nx, ny]}
        step = max(1, -(-nz // LOOKED_AT))
        values = raw_ZYX[::step].astype(np.float32)
        facts |= {"looked_at": len(values)} | _bad_images(values)
    else:
        facts |= {"box": [nx, ny, nz], "origin": list(header.origin_xyz), "axes": list(header.axes)}
        values = np.asarray(raw_ZYX)
    if not compressed:
        facts["extra_bytes"] = path.stat().st_size - header.offset - header.data_bytes
    return facts | _statistics(values) | {"extended_header": header.offset - 1024, "labels": list(header.labels)}


def _is_stack(header: MrcHeader) -> bool:
    """Space group 0 says images, but RELION writes it for volumes too: a cube is taken for a volume."""
    nz, ny, nx = header.shape
    return header.space_group == 0 and not nx == ny == nz


def _statistics(values: np.ndarray) -> Facts:
    finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    bad = values.size - finite.size
    if finite.size == 0:
        return {"not_finite": bad}
    statistics = {"min": float(finite.min()), "max": float(finite.max()), "mean": float(finite.mean(dtype=np.float64)),
                  "std": float(finite.std(dtype=np.float64))}  # fmt: skip
    return statistics | ({"not_finite": bad} if bad else {})


def _bad_images(values_BYX: np.ndarray) -> Facts:
    with np.errstate(invalid="ignore"):
        spread_B = np.ptp(values_BYX, axis=(1, 2))
    return {"constant_images": int((spread_B == 0).sum()), "not_finite_images": int((~np.isfinite(spread_B)).sum())}


def _block(block: StarBlock) -> Facts:
    facts: Facts = {"name": block.name, "version": block.version}
    if block.values:
        facts["values"] = block.values
    if block.is_loop:
        frame = block.frame
        facts |= {"rows": len(frame), "columns": [_column(label, frame[label]) for label in frame.columns]}
        if block.name == "optics":
            facts["groups"] = frame.to_dict("records")
    return facts


def _column(label: str, column: pd.Series) -> Facts:
    if pd.api.types.is_numeric_dtype(column):
        return {"name": label} | _range(column.to_numpy())
    return {"name": label, "distinct": int(column.nunique()), "first": str(column.iloc[0]) if len(column) else ""}


def _field(name: str, values: np.ndarray) -> Facts:
    facts: Facts = {"name": name, "dtype": values.dtype.str if values.dtype.kind == "S" else values.dtype.name}
    if values.ndim > 1:
        facts["shape"] = list(values.shape[1:])
    if values.dtype.kind in "iuf" and values.size:
        return facts | _range(values)
    texts = pd.Series([str(value) for value in values[:100_000].ravel()[:100_000]])
    first = values.ravel()[0].decode("utf-8", "replace") if values.dtype.kind == "S" and values.size else str(texts.iloc[0])
    return facts | {"distinct": int(texts.nunique()), "first": first}


def _range(values: np.ndarray) -> Facts:
    known = values[~np.isnan(values)] if values.dtype.kind == "f" else values
    return {"min": known.min().item(), "max": known.max().item()} if known.size else {}


def check_images(names: list[str], index_B: np.ndarray, stack_B: np.ndarray, folder: Path) -> Facts:
    """Whether the images that a table names are there: stacks missing, unreadable, or shorter than the numbers used.

    names: distinct stacks, relative to `folder`; index_B: 0-based image number; stack_B: position in `names`.
    """
    missing, damaged, short = [], [], []
    largest = np.zeros(len(names), np.int64)
    np.maximum.at(largest, stack_B, index_B + 1)
    for name, needed in zip(names, largest.tolist()):
        path = folder / name
        if not path.is_file():
            missing.append(name)
            continue
        try:
            if Stack.open(path).n < needed:
                short.append(name)
        except InputError:
            damaged.append(name)
    return {"images": len(index_B), "stacks": len(names), "folder": str(folder), "missing_stacks": missing,
            "damaged_stacks": damaged, "short_stacks": short}  # fmt: skip


def _cs_images(fields: Fields) -> list[str]:
    if "blob/path" not in fields or "blob/idx" not in fields or fields["blob/idx"].dtype.kind not in "iu":
        return []
    paths = (path.decode("utf-8", "replace") if isinstance(path, bytes) else str(path) for path in fields["blob/path"])
    return [f"{int(index) + 1}@{path}" for index, path in zip(fields["blob/idx"].ravel(), paths)]
