"""The report as one HTML file: no network, no script; light, dark and printed."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import verglas
from verglas.io.atomic import atomic_path
from verglas.io.runfolder import short
from verglas.report import figures, pictures, planes, slices
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

WIDE = 1.5  # pictures that are so many times as wide as high have a row for themselves


@dataclass(frozen=True)
class Block:
    """A section as the template takes it; half: may stand beside another one on a wide screen."""

    title: str
    body: str
    caption: str
    half: bool


Draw = Callable[[Sequence[tuple[str, Section]]], list[Block]]


def write_report(
    path: Path, title: str, sections: Sequence[Section | Block], provenance: Mapping[str, Any], overwrite: bool = False,
    draw: Draw | None = None,
) -> None:  # fmt: skip
    """Write the page. sections: some may be drawn already; provenance: what RunFolder.facts() returns (the content of
    result.json); draw: as `drawn_blocks` (None)."""
    import jinja2

    source = resources.files("verglas.report").joinpath("page.html.j2").read_text(encoding="utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(source)
    waiting = [(f"figure{i}", one) for i, one in enumerate(sections) if not isinstance(one, Block)]
    drawn = iter((draw or drawn_blocks)(waiting))
    blocks = widen_lone_halves([one if isinstance(one, Block) else next(drawn) for one in sections])
    page = template.render(
        title=title, blocks=blocks, facts=provenance_rows(provenance), run=provenance, version=verglas.__version__,
        options=option_rows(provenance.get("options") or {}),
    )  # fmt: skip
    with atomic_path(path, overwrite) as temporary:
        temporary.write_text(page, encoding="utf-8")


def drawn_blocks(named: Sequence[tuple[str, Section]]) -> list[Block]:
    """Sections with names that are unique on their page, drawn one after the other."""
    return [block(section, name) for name, section in named]


def block(section: Section, name: str) -> Block:
    """Draw one section; `name` is unique on the page."""
    match section:
        case Text():
            body, half = f"<p>{section.text}</p>", False
        case KeyFigures():
            body, half = tiles(section), False
        case Table():
            body, half = table(section), False
        case Curve():
            body, half = figures.draw_curve(section, name), True
        case Stack():
            body, half = figures.draw_stack(section, name), True
        case Histogram():
            body, half = figures.draw_histogram(section, name), True
        case Slices():
            body, half = slices.draw_slices(section), False
        case Orientations():
            body, half = figures.draw_orientations(section, name), True
        case Field():
            body, half = planes.draw_field(section, name), True
        case Moves():
            body, half = planes.draw_moves(section, name), True
        case Pictures():
            body, half = framed(section), False
    return Block(section.title, body, section.caption, half)


def widen_lone_halves(blocks: Sequence[Block]) -> list[Block]:
    """Blocks stand in pairs; one that is left without a neighbour takes the whole width."""
    found: list[Block] = []
    waiting = False  # whether the last block of `found` is the left one of a pair
    for one in blocks:
        if waiting and not one.half:
            found[-1] = replace(found[-1], half=False)
        waiting = one.half and not waiting
        found.append(one)
    if waiting:
        found[-1] = replace(found[-1], half=False)
    return found


def tiles(section: KeyFigures) -> str:
    """Key figures as large numbers with their units, the name below."""
    parts = []
    for name, figure in section.figures.items():
        value, unit = html.escape(short(figure["value"])), html.escape(str(figure["unit"]))
        label = html.escape(name.replace("_", " "))
        parts.append(f'<div class="tile"><b>{value}<small>{unit}</small></b><span>{label}</span></div>')
    return f'<div class="tiles">{"".join(parts)}</div>'


def framed(section: Pictures) -> str:
    """Pictures below their lines; square ones side by side where there is room, so that they can be compared."""
    parts = []
    for line, one in section.pictures.items():
        kind = ' class="wide"' if one.shape[1] > WIDE * one.shape[0] else ""
        parts.append(f"<figure{kind}><figcaption>{html.escape(line)}</figcaption>{pictures.tag(one, line)}</figure>")
    return f'<div class="pictures">{"".join(parts)}</div>'


def table(section: Table) -> str:
    """An HTML table; numbers stand to the right."""
    head = "".join(f"<th>{html.escape(str(cell))}</th>" for cell in section.header)
    rows = []
    for row in section.rows:
        cells = [(html.escape(short(cell)), isinstance(cell, int | float) and not isinstance(cell, bool)) for cell in row]
        rows.append("<tr>" + "".join(f"<td{' class=number' * number}>{text}</td>" for text, number in cells) + "</tr>")
    return f"<table>{f'<thead><tr>{head}</tr></thead>' if head else ''}<tbody>{''.join(rows)}</tbody></table>"


def option_rows(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) of every option; those of a group (a mapping) stand for themselves."""
    rows: list[tuple[str, str]] = []
    for name, value in options.items():
        if isinstance(value, Mapping):
            rows += option_rows(value)
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            rows.append((name, "not set" if value is None else text))
    return rows


def provenance_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, text) pairs on how the run was computed, for the end of the page; what is not known is left out."""
    rows = [(name, str(facts.get(name) or "")) for name in ("device", "kernels", "precision", "reason", "finished")]
    if facts.get("seed") is not None:
        rows.append(("seed", str(facts["seed"])))
    if "seconds" in facts:
        rows.append(("time", f"{short(float(facts['seconds']))} s"))
    for where, memory in facts.get("peak_memory", {}).items():
        rows.append((f"peak memory, {where}", f"{short(memory['value'])} {memory['unit']}"))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items())))
    return [(name, text) for name, text in rows if text]
