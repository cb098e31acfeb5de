"""Fields of .cs files as STAR columns and back: scalars as numbers, vectors as [a,b,c], texts as texts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from verglas.errors import InputError

# A STAR column does not say whether 0 is a whole number, so the last part of a field's name decides.
_WHOLE_NAMES = {"idx", "split", "class", "exp_group_id", "shape", "micrograph_shape"}


def shortest(values: np.ndarray) -> np.ndarray:
    """float64 of the shortest decimals of float32 values: 2.95 for 2.9500000477; other numbers just become float64."""
    if values.dtype != np.float32:
        return values.astype(np.float64)
    return pc.cast(pc.cast(pa.array(values.astype("<f4")), pa.string()), pa.float64()).to_numpy(zero_copy_only=False)


def as_texts(values: np.ndarray) -> np.ndarray | pd.Series:
    """A field as a column: numbers as they are, bytes and vectors as text."""
    if values.ndim > 1:
        flat = values.reshape(len(values), math.prod(values.shape[1:]))
        return pd.Series([_vector_text(row) for row in flat], dtype="str")
    if values.dtype.kind == "S":
        return pd.Series([_printable(text.decode("utf-8", "replace")) for text in values.tolist()], dtype="str")
    if values.dtype.kind in "iu" or values.dtype in (np.float32, np.float64):
        return values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind == "f":
        return values.astype(np.float64)
    return pd.Series([_printable(str(value)) for value in values.tolist()], dtype="str")


def _printable(text: str) -> str:
    """Without what a STAR file cannot hold (line breaks, zero bytes); cryoSPARC's own texts have none."""
    return text.translate({0: None, 10: " ", 13: " "})


def _vector_text(row: np.ndarray) -> str:
    """[a,b,c]; NumPy's own float32 values print as their shortest decimals."""
    texts = (value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value) for value in row)
    return _printable("[" + ",".join(texts) + "]")


def as_number(column: pd.Series, label: str) -> np.ndarray:
    """A column as float64 (whole numbers too); InputError names the label if it holds text."""
    try:
        return column.to_numpy().astype(np.float64)
    except (ValueError, TypeError):
        raise InputError(label, "holds text", "numbers", "Correct that column.") from None


def field_from_column(name: str, column: pd.Series) -> np.ndarray:
    """The field `name` of a column cs_<name>: uint64 for uids, uint32 for whole numbers, float32, or bytes."""
    if column.dtype != object and not isinstance(column.dtype, pd.StringDtype):
        return column.to_numpy()
    texts = [str(text) for text in column]
    last = name.rsplit("/", 1)[-1]
    dtype = "<u8" if "uid" in last or last == "import_sig" else "<u4" if last in _WHOLE_NAMES else "<f4"
    try:
        if texts and texts[0].startswith("["):
            return np.array([text.strip("[]").split(",") for text in texts]).astype(dtype)
        return np.array(texts).astype(dtype) if texts else np.zeros(0, dtype)
    except (ValueError, OverflowError):
        encoded = [text.encode() for text in texts]
        return np.array(encoded, dtype=f"S{max(map(len, encoded)) or 1}")
