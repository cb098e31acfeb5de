"""What a benchmark's module hands to the runner: `publish(figures, out)`, numbers by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path


def publish(figures: Mapping[str, float], out: Path | None) -> None:
    """Print figures one a line and, with `out`, write them there as JSON. Names end in the unit: 'cached s', 'slices G/s'."""
    for name, value in figures.items():
        print(f"{name}: {value:.6g}")
    if out is not None:
        out.write_text(json.dumps(dict(figures), indent=1) + "\n", encoding="utf-8")


def number_text(value: float) -> str:
    """Three significant digits, thousands written out."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
