"""What a report can hold. Sections are plain data; `figures` draws them and `page` puts them on the page.

Every section has a title and may have a caption (a sentence below it). Letters at the end of names are axes: B particles,
S shells or points of a curve, Z Y X volume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Text:
    """A paragraph; `text` may hold simple HTML (<b>, <a>, <sub>), and is put on the page as it is."""

    title: str
    text: str
    caption: str = ""


@dataclass(frozen=True)
class KeyFigures:
    """A row of tiles. figures: name -> {"value", "unit"}, as RunFolder.figures holds them."""

    title: str
    figures: Mapping[str, Mapping[str, Any]]
    caption: str = ""


@dataclass(frozen=True)
class Table:
    """rows: one sequence of cells per row (numbers are shown with four significant digits); header: the names of the columns."""

    title: str
    rows: Sequence[Sequence[Any]]
    header: Sequence[str] = ()
    caption: str = ""


@dataclass(frozen=True)
class Curve:
    """One or more curves over the same x.

    x: [S]; ys: one [S] per label; thresholds: y of horizontal lines. With resolution_axis, x is a frequency in 1/Å and the
    ticks say Å; mark_crossings then marks, per curve, the last point before it first drops below the first threshold.
    Whole numbers as x (iterations) get dots at the points. ramp: the curves are one quantity as it develops, pale to strong;
    unmarked: labels of curves whose crossing means nothing; log_y: y by powers of ten.
    """

    title: str
    x: np.ndarray
    ys: Sequence[np.ndarray]
    labels: Sequence[str]
    x_label: str
    y_label: str
    thresholds: Sequence[float] = ()
    resolution_axis: bool = False
    mark_crossings: bool = False
    y_range: tuple[float, float] | None = None
    ramp: bool = False
    unmarked: Sequence[str] = ()
    log_y: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Stack:
    """Bars that stand on each other. x: [S], whole numbers; parts: name -> height [S]."""

    title: str
    x: np.ndarray
    parts: Mapping[str, np.ndarray]
    x_label: str
    y_label: str
    caption: str = ""


@dataclass(frozen=True)
class Histogram:
    """Distribution of values [B] (NaN is left out); x_label with its unit."""

    title: str
    values: np.ndarray
    x_label: str
    bins: int = 50
    caption: str = ""


@dataclass(frozen=True)
class Slices:
    """Three central slices of a map [Z, Y, X], orthogonal to z, y and x, in grey (dense is bright). pixel_size in Å.

    map_ZYX: or only those of its slices, [Y, X], [Z, X], [Z, Y]: what is handed to another process.
    """

    title: str
    map_ZYX: np.ndarray | tuple[np.ndarray, ...]
    pixel_size: float
    thickness: int = 1  # slices averaged, in voxels
    caption: str = ""


@dataclass(frozen=True)
class Orientations:
    """Viewing directions (row 2 of each rotation matrix [B, 3, 3]) as a density on the sphere, relative to uniform."""

    title: str
    rotation_B33: np.ndarray
    symmetry_R33: np.ndarray = field(default_factory=lambda: np.eye(3)[None])
    caption: str = ""


@dataclass(frozen=True)
class Pictures:
    """Pictures with a line of text below each, one below the other. pictures: line -> uint8 [row, column, 4] (`pictures`)."""

    title: str
    pictures: Mapping[str, np.ndarray]
    caption: str = ""


@dataclass(frozen=True)
class Field:
    """A quantity over a plane [Y, X], row 0 above, with its scale of colours and a bar of length (pixel_size, m; None: axes in
    pixels). label: quantity with its unit; limits: values of the first and last colour (None: 0.5th and 99.5th percentile of
    what is shown); cyclic: the quantity is an angle from -pi to pi. NaN is left blank."""

    title: str
    field_YX: np.ndarray
    label: str
    pixel_size: float | None = None
    limits: tuple[float, float] | None = None
    cyclic: bool = False
    caption: str = ""


@dataclass(frozen=True)
class Moves:
    """Points of a plane, (row, column) [B, 2] in `unit`, and where they went. Arrows are `stretch` times as long as the moves."""

    title: str
    start_B2: np.ndarray
    end_B2: np.ndarray
    unit: str
    stretch: float = 1.0
    caption: str = ""


Section = Text | KeyFigures | Table | Curve | Stack | Histogram | Slices | Orientations | Pictures | Field | Moves
