"""Tables of promises and figures: on a terminal, and in docs/performance.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.figures import number_text
from benchmarks.record import RECORDS, ROOT, Record, all_records
from benchmarks.registry import BENCHMARKS, Bar, Benchmark, bars

PAGE = ROOT / "docs" / "performance.md"
BEGIN, END = "<!-- begin: figures from records, by `python -m benchmarks page` -->", "<!-- end: figures from records -->"
FLOOR = " floor s"  # figures 'NAME floor s' are the least time of the stage 'NAME', measured as 'NAME s'


def show(record: Record, one: Benchmark) -> bool:
    """Print promised beside measured for one benchmark; whether every promise with a figure is kept."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{one.name}: {record.machine['device']}, {record.seconds:.0f} s", title_justify="left")
    for heading in ("row", "what", "promised", "measured", ""):
        table.add_column(heading, overflow="fold")
    good = True
    for bar in one.bars:
        value = bar.measured(record.figures)
        kept = value is not None and bar.kept(value)
        good = good and (kept or value is None)
        verdict = "not measured" if value is None else "[green]kept" if kept else "[red]missed"
        table.add_row(bar.row, bar.text, bar.promise, measured_text(bar, value), verdict)
    Console().print(table if one.bars else f"{one.name}: {len(record.figures)} figures, nothing promised")
    return good


def measured_text(bar: Bar, value: float | None) -> str:
    """'0.83 s', or a dash for what was not measured."""
    return "–" if value is None else f"{number_text(value)} {bar.unit}".strip()


def newest(name: str, records: Sequence[Record], figures: str | None = None) -> Record | None:
    """The youngest record of a benchmark (one that has a figure of that pattern); clean ones before those of dirty trees."""
    from fnmatch import filter as matching

    mine = [one for one in records if one.name == name and (figures is None or matching(one.figures, figures))]
    return max(mine, key=lambda one: (not one.source.dirty, one.date), default=None)


def promised(records: Sequence[Record]) -> list[str]:
    """Markdown lines: every promise, the youngest figure for it, and where that comes from."""
    lines = ["| row | what | promised | measured | | on | commit, date |", "|---|---|---|---|---|---|---|"]
    for bar, one in bars():
        record = newest(one.name, records, bar.figures)
        value = bar.measured(record.figures) if record else None
        if record is None or value is None:
            lines.append(f"| {bar.row} | {bar.text} | {bar.promise} | not measured yet | | | `{one.name}` |")
            continue
        verdict = "kept" if bar.kept(value) else "**missed**"
        lines.append(f"| {bar.row} | {bar.text} | {bar.promise} | {measured_text(bar, value)} | {verdict} | "
                     f"{record.machine['device']} | {origin(record)} |")  # fmt: skip
    return lines


def origin(record: Record) -> str:
    """'1a2b3c4d5e6f (changed since), 2026-11-21'."""
    return f"{record.source.commit[:12]}{' with changes' if record.source.dirty else ''}, {record.date[:10]}"


def floors(records: Sequence[Record]) -> list[str]:
    """Markdown lines: every stage with a floor, its measured time, and the share of the floor in it."""
    lines = ["| benchmark: stage | floor | measured | share reached | on |", "|---|---|---|---|---|"]
    for one in BENCHMARKS:
        record = newest(one.name, records, f"*{FLOOR}")
        if record is None:
            continue
        for name, floor in record.figures.items():
            stage = name.removesuffix(FLOOR)
            seconds = record.figures.get(f"{stage} s")
            if name.endswith(FLOOR) and seconds:
                times = f"{1e3 * floor:.3g} ms | {1e3 * seconds:.3g} ms | {100 * floor / seconds:.0f} %"
                lines.append(f"| {one.name}: {stage} | {times} | {record.machine['device']} |")
    return lines if len(lines) > 2 else ["No stage with a computed floor has been measured yet."]


def generated(records: Sequence[Record]) -> str:
    """The part of docs/performance.md that is made from records."""
    parts = [BEGIN, *promised(records), "", "Floors, stage by stage:", "", *floors(records), END]
    return "\n".join(parts)


def split_page(text: str) -> tuple[str, str, str]:
    """(before, generated part with its marks, after) of the page; ValueError without the marks."""
    first, last = text.find(BEGIN), text.find(END)
    if first < 0 or last < first:
        raise ValueError(f"no {BEGIN!r} ... {END!r} in the page")
    last += len(END)
    return text[:first], text[first:last], text[last:]


def rewrite_page(page: Path = PAGE, records: Path = RECORDS) -> None:
    """Fill the generated part of the page from the records."""
    before, _, after = split_page(page.read_text(encoding="utf-8"))
    page.write_text(before + generated(all_records(records)) + after, encoding="utf-8")
