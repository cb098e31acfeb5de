"""Colours and type of the report, once. Figures are drawn in stand-in colours that the page turns into CSS variables,

so that one SVG serves light and dark mode and paper.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT, RULE, PAPER = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808", "#090909")
CSS_NAMES = {INK: "ink", FAINT: "faint", RULE: "rule", PAPER: "paper", **{c: f"series{i + 1}" for i, c in enumerate(SERIES)}}


@contextmanager
def figure(width: float, height: float) -> Iterator[Figure]:
    """A matplotlib figure of width x height inches in the style of the report; pyplot and its global state are not used."""
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[Any, Any] = {
        "font.size": 10,
        "svg.fonttype": "none",
        "text.color": INK,
        "axes.edgecolor": FAINT,
        "axes.labelcolor": INK,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": RULE,
        "grid.linewidth": 0.7,
        "xtick.color": FAINT,
        "ytick.color": FAINT,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
    }
    with matplotlib.rc_context(settings):
        yield Figure(figsize=(width, height), layout="constrained")


def svg(drawn: Figure, name: str) -> str:
    """The figure as an SVG element for use inside HTML; `name` (unique on the page) keeps its ids apart from other figures'."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None}, dpi=200)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    width = 1.15 * drawn.get_figwidth()  # drawn no larger than this, so that type keeps its size
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', rf'\1 style="max-width: {width:.1f}in"', text, count=1)
    text = re.sub(r"font-family: [^;\"]*", "font-family: var(--font)", text)
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    text = re.sub(r' id="([^"]+)"', lambda found: found.group(0) if found.group(1) in used else "", text)
    return coloured(text)


def coloured(text: str) -> str:
    """SVG with the page's colours in place of those that stand for them."""
    for colour, css in CSS_NAMES.items():
        text = text.replace(colour, f"var(--{css})")
    return text
