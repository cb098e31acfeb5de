"""The rows of a STAR loop as a table: a fast path for plain rows, an exact one for quotes, comments and odd rows.

Both give the same table for the same rows (the tests compare them); the exact one alone reports errors, with line numbers.
"""

from __future__ import annotations

import io
import mmap
import re
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from verglas.errors import InputError
from verglas.io.star_block import first_misfit, kind_of, to_numbers

LONGEST_LINE = 2**20
ROWS_AT_ONCE = 20_000

_TOKEN = re.compile(rb'"(.*?)"(?=\s|$)|\'(.*?)\'(?=\s|$)|(\S+)')
_DTYPES = {"whole": "int64", "real": "float64", "text": "str"}
_BEYOND = " beyond "  # holds a space, so no label can be called so
# pandas' default parser of floats is exact from 3.1 on, where naming the exact one is deprecated.
_EXACT_FLOATS = {} if tuple(map(int, pd.__version__.split(".")[:2])) >= (3, 1) else {"float_precision": "round_trip"}


def read_rows(text: mmap.mmap, span: tuple[int, int], labels: list[str], path: Path) -> pd.DataFrame:
    """Table of the rows in bytes `span`; InputError names the line of a ragged row or of a value that is no number."""
    start, end = span
    if start < end and not _needs_care(text, start, end):
        frame = _read_plain(text, start, end, labels)
        if frame is not None:
            return frame
    return _read_exactly(text, start, end, labels, path)


def _needs_care(text: mmap.mmap, start: int, end: int) -> bool:
    """Whether the rows hold something that splitting at blanks gets wrong: quotes, comments, unusual blanks."""
    if any(text.find(mark, start, end) >= 0 for mark in (b'"', b"'", b"\v", b"\f")):
        return True
    if text.find(b"#", start, end) >= 0 and re.compile(rb"(?:^|\n|\s)#").search(text, start, end):
        return True
    return text.find(b"\r", start, end) >= 0 and re.compile(rb"\r(?!\n)").search(text, start, end) is not None


class _Window(io.RawIOBase):
    """Bytes start..end of a memory map as a file, so that parsing copies nothing."""

    def __init__(self, text: mmap.mmap, start: int, end: int) -> None:
        self.text, self.position, self.end = text, start, end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        stop = min(self.position + len(buffer), self.end)
        count = stop - self.position
        buffer[:count] = self.text[self.position : stop]
        self.position = stop
        return count


def _read_plain(text: mmap.mmap, start: int, end: int, labels: list[str]) -> pd.DataFrame | None:
    """The fast path, about 4 s per million rows of 25 columns; None if anything about the rows is not plain."""
    dtypes = {label: _DTYPES[kind_of(label)] for label in labels} | {_BEYOND: "str"}
    file = io.BufferedReader(_Window(text, start, end), 2**20)
    try:
        with warnings.catch_warnings():
            # What pandas warns of (casts that fail, long rows) also raises or leaves traces: the exact path explains it.
            warnings.simplefilter("ignore")
            frame = pd.read_csv(file, sep=r"\s+", header=None, names=[*labels, _BEYOND], dtype=dtypes, index_col=False,
                                na_filter=False, quoting=3, engine="c", encoding="utf-8", **_EXACT_FLOATS)  # type: ignore
    except (ValueError, OverflowError, TypeError):  # ragged rows, no numbers, not UTF-8: the exact path says which and where
        return None
    # A missing number has raised above; missing text at the end of a row reads as empty, which no plain token is.
    has_gap = any(bool((frame[label] == "").any()) for label in labels[-1:] if dtypes[label] == "str")
    if has_gap or bool((frame[_BEYOND] != "").any()):
        return None
    return frame.drop(columns=_BEYOND)


def _read_exactly(text: mmap.mmap, start: int, end: int, labels: list[str], path: Path) -> pd.DataFrame:
    """Token by token: quoted strings, comments, whole numbers written as 3.000; about 15 s per million rows."""
    number = line_number(text, start)
    rows: list[list[bytes]] = []
    numbers_of_rows: list[int] = []
    parts: list[list[np.ndarray]] = []
    position = start
    while position < end:
        stop = text.find(b"\n", position, end)
        stop = end if stop < 0 else stop
        row = split_line(text, position, stop, number, len(labels), path)
        if row:
            if len(row) != len(labels):
                raise InputError(path, f"line {number} has {len(row)} values", f"{len(labels)}, one for each label",
                                 "If a text holds spaces, put double quotes around it.")
            rows.append(row)
            numbers_of_rows.append(number)
        if len(rows) == ROWS_AT_ONCE:
            parts.append(_convert(rows, numbers_of_rows, labels, path))
            rows, numbers_of_rows = [], []
        position, number = stop + 1, number + 1
    parts.append(_convert(rows, numbers_of_rows, labels, path))
    columns = (np.concatenate([part[i] for part in parts]) for i in range(len(labels)))
    series = [pd.Series(column, dtype="str") if column.dtype == object else pd.Series(column) for column in columns]
    return pd.DataFrame(dict(zip(labels, series)), columns=labels)


def line_number(text: mmap.mmap, offset: int) -> int:
    """1-based number of the line that holds byte `offset`."""
    piece = 2**24
    return 1 + sum(text[at : min(at + piece, offset)].count(b"\n") for at in range(0, offset, piece))


def split_line(text: mmap.mmap, start: int, stop: int, number: int, count: int, path: Path) -> list[bytes]:
    """Tokens of one line; a quoted string is one token and loses its quotes.

    A bare '#' opens a comment only at the start of the line or behind `count` tokens: elsewhere it belongs to a value.
    """
    if stop - start > LONGEST_LINE:
        raise InputError(path, f"line {number} has {stop - start} characters", f"at most {LONGEST_LINE}", "Is this a STAR file?")
    line = text[start:stop].strip()
    if line.startswith(b"#"):
        return []
    if b'"' not in line and b"'" not in line:
        tokens = line.split()
        return tokens[:count] if len(tokens) > count and tokens[count].startswith(b"#") else tokens
    return _split_quoted(line, number, count, path)


def _split_quoted(line: bytes, number: int, count: int, path: Path) -> list[bytes]:
    tokens: list[bytes] = []
    for match in _TOKEN.finditer(line):
        double, single, bare = match.groups()
        if bare is not None:
            if bare.startswith(b"#") and len(tokens) == count:
                break
            if bare[:1] in (b'"', b"'"):
                raise InputError(path, f"line {number} opens a quote that is not closed", "a second quote before a blank",
                                 'Put double quotes (") around the whole string.')
        tokens.append(next(token for token in (double, single, bare) if token is not None))
    return tokens


def _convert(rows: list[list[bytes]], numbers: list[int], labels: list[str], path: Path) -> list[np.ndarray]:
    """Columns of some rows: int64, float64, or object arrays of str."""
    columns = []
    for index, label in enumerate(labels):
        tokens = [row[index] for row in rows]
        kind = kind_of(label)
        if kind == "text":
            columns.append(_decode(tokens, numbers, path))
            continue
        try:
            columns.append(to_numbers(tokens, kind))
        except ValueError:
            bad = first_misfit(tokens, kind)
            raise InputError(path, f"line {numbers[bad]}: {label} is {tokens[bad][:40].decode('utf-8', 'replace')!r}",
                             "a number", "Correct that value or remove the row.") from None
    return columns


def _decode(tokens: list[bytes], numbers: list[int], path: Path) -> np.ndarray:
    texts = np.empty(len(tokens), dtype=object)
    for index, token in enumerate(tokens):
        try:
            texts[index] = token.decode("utf-8")
        except UnicodeDecodeError:
            raise InputError(path, f"line {numbers[index]} is not UTF-8 text", "a STAR file in UTF-8 or ASCII",
                             "Convert it: iconv -f latin1 -t utf-8 FILE > NEW.") from None
    return texts
