"""One self-contained page per run: sections of figures, tables and text, with the run's provenance at the end."""

from verglas.report.page import write_report
from verglas.report.sections import (
    Curve,
    Field,
    Histogram,
    KeyFigures,
    Moves,
    Orientations,
    Pictures,
    Section,
    Slices,
    Stack,
    Table,
    Text,
)

__all__ = [
    "Curve",
    "Field",
    "Histogram",
    "KeyFigures",
    "Moves",
    "Orientations",
    "Pictures",
    "Section",
    "Slices",
    "Stack",
    "Table",
    "Text",
    "write_report",
]
