"""One `data_` block of a STAR file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from verglas.io.labels import REAL_LABELS, WHOLE_LABELS

Value = str | int | float


@dataclass
class StarBlock:
    """A block: a table (`frame`, from a loop), single values (`values`, from a list), or a list followed by a table.

    Labels stand without their underscore ("rlnImageName"). RELION's numeric labels hold int64 or float64, all other
    columns hold text exactly as it stood in the file. version: of the `# version` line above the block, if there was one.
    """

    name: str
    is_loop: bool = False
    frame: pd.DataFrame = field(default_factory=pd.DataFrame)
    values: dict[str, Value] = field(default_factory=dict)
    version: int | None = None

    @classmethod
    def table(cls, name: str, frame: pd.DataFrame) -> StarBlock:
        """A block that is one table."""
        return cls(name, True, frame)

    @classmethod
    def pairs(cls, name: str, values: Mapping[str, Value]) -> StarBlock:
        """A block of single values."""
        return cls(name, values=dict(values))


def kind_of(label: str) -> str:
    """"whole", "real" or "text": what a column of this label holds."""
    if label in WHOLE_LABELS:
        return "whole"
    return "real" if label in REAL_LABELS else "text"


def to_numbers(tokens: list[bytes], kind: str) -> np.ndarray:
    """Tokens of a numeric column as int64 ("whole", also if written as 3.000) or float64; ValueError at the first misfit.

    A fraction in a column of whole numbers keeps its value: the column becomes float64.
    """
    if b"_" in b" ".join(tokens):  # Python's own numbers may hold underscores, those of files may not
        raise ValueError("underscore in a number")
    if kind == "whole":
        try:
            return np.array([int(token) for token in tokens], dtype=np.int64)
        except (ValueError, OverflowError):
            pass
    numbers = np.array([float(token) for token in tokens], dtype=np.float64)
    if kind == "whole" and bool((np.abs(numbers) < 2**53).all()) and bool((numbers == np.floor(numbers)).all()):
        return numbers.astype(np.int64)
    return numbers


def first_misfit(tokens: list[bytes], kind: str) -> int:
    """Index of the first token that is no number (to name it in an error)."""
    for index, token in enumerate(tokens):
        try:
            to_numbers([token], kind)
        except ValueError:
            return index
    raise AssertionError("every token is a number")
