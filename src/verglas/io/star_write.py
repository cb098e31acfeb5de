"""Writing STAR files: values exactly (shortest decimals that read back the same), columns aligned, blocks as RELION's."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from verglas.errors import OutputError
from verglas.io.atomic import atomic_path
from verglas.io.star_block import StarBlock

ROWS_AT_ONCE = 50_000
COLUMNS_AT_ONCE, MANY_ROWS = 4, 10_000  # threads that make the texts of columns, of long tables: arrow leaves Python's lock free
NUMBER_WIDTH = 12
# What would be read as something else if it stood bare: blanks, quotes, comments, labels, keywords, nothing at all.
_NEEDS_QUOTES = r"""[\s\v"']|^$|^[_#;]|^data_|^loop_"""


def write_star(path: Path | str, blocks: Mapping[str, StarBlock], overwrite: bool = False, version: int = 50001) -> None:
    """Write all blocks in order, each under a `# version` line; see `StarBlock` for what they hold.

    Floats are written as the shortest decimal that reads back to the same value, float32 columns in float32.
    Raises OutputError if the file exists, the disk is full, or a text cannot be said in STAR (line breaks, say).
    """
    for name in (text for block in blocks.values() for text in (block.name, *block.values, *block.frame.columns)):
        if len(str(name).split()) > 1 or str(name) != str(name).strip():
            raise OutputError(f"{path}: {name!r} cannot name a block or column of a STAR file: it holds a blank.")
    with atomic_path(Path(path), overwrite) as temporary, open(temporary, "wb") as file:
        for block in blocks.values():
            file.write(f"\n# version {version}\n\ndata_{block.name}\n\n".encode())
            _write_values(file, block)
            if block.is_loop:
                _write_table(file, block.frame)


def _write_values(file: BinaryIO, block: StarBlock) -> None:
    for label, value in block.values.items():
        text = _quote(value) if isinstance(value, str) else _texts(pd.Series([value]))[0].as_py()
        file.write(f"_{label:<44} {text:>{NUMBER_WIDTH}}\n".encode())
    if block.values:
        file.write(b"\n")


def _write_table(file: BinaryIO, frame: pd.DataFrame) -> None:
    lines = [f"_{label} #{number}" for number, label in enumerate(frame.columns, 1)]
    file.write("\n".join(["loop_", *lines, ""]).encode())
    with ThreadPoolExecutor(COLUMNS_AT_ONCE if len(frame) >= MANY_ROWS else 1, "verglas-columns") as pool:
        for start in range(0, len(frame), ROWS_AT_ONCE):
            part = frame.iloc[start : start + ROWS_AT_ONCE]
            columns = list(pool.map(_texts, [part.iloc[:, index] for index in range(part.shape[1])]))
            rows = pc.binary_join_element_wise(*columns, _large(" "))
            with_ends = pc.binary_join_element_wise(rows, _large("\n"), _large(""))
            # The bytes of all strings of an array lie one after another: they are the text of the file.
            _validity, _offsets, data = with_ends.buffers()
            file.write(data)
    file.write(b"\n")


def _large(text: str) -> pa.Scalar:
    return pa.scalar(text, pa.large_string())


def _texts(column: pd.Series) -> pa.LargeStringArray:
    """A column as STAR tokens: numbers padded to one width, texts quoted where they must be."""
    if column.dtype == bool:
        column = column.astype(np.int8)
    if isinstance(column.dtype, np.dtype) and column.dtype.kind in "iuf":
        return pc.utf8_lpad(pc.cast(pa.array(column.to_numpy()), pa.large_string()), NUMBER_WIDTH)
    if not isinstance(column.dtype, pd.StringDtype):
        column = pd.Series(["" if missing else str(value) for value, missing in zip(column, column.isna())], dtype="str")
    texts = pc.fill_null(_one_array(column), "")
    needy = pc.match_substring_regex(texts, _NEEDS_QUOTES)
    if not pc.any(needy).as_py():
        return texts
    quoted = [_quote(text) if need else text for text, need in zip(texts.to_pylist(), needy.to_pylist())]
    return pa.array(quoted, pa.large_string())


def _one_array(column: pd.Series) -> pa.LargeStringArray:
    array = pa.array(column, pa.large_string())
    return array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array


def _quote(text: str) -> str:
    """`text` as one STAR token, quoted only where it must be."""
    if not pc.match_substring_regex(pa.array([text]), _NEEDS_QUOTES)[0].as_py():
        return text
    if not any(mark in text for mark in "\n\r\0"):
        for mark in ('"', "'"):
            # A quote ends a string only where a blank follows, so it may stand inside.
            if not any(f"{mark}{blank}" in text for blank in " \t\v\f") and not text.endswith(mark):
                return f"{mark}{text}{mark}"
    raise OutputError(f"The text {text!r} cannot be written to a STAR file: it holds a line break or both kinds of quotes.")
