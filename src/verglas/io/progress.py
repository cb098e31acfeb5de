"""What a run says on the terminal: lines, a header panel and progress bars. All of it goes to stderr.

On a terminal rich draws bars with rate and expected end; elsewhere (a log file, a batch system) plain lines come at growing
intervals, so that a day's run does not fill a file, and rich, a tenth of a second of every command, is not imported.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

FIRST_LINE_AFTER = 10.0  # s; later lines come when the time since the start has grown by half
LONGEST_SILENCE = 300.0  # s


def console() -> Console | None:
    """The terminal that stderr is (asked each time, so that redirection of sys.stderr is respected); None if it is none."""
    if not (sys.stderr.isatty() or os.environ.get("FORCE_COLOR")):  # the variable: as rich takes it, a terminal all the same
        return None
    from rich.console import Console

    found = Console(stderr=True, highlight=False, soft_wrap=False)
    return found if found.is_terminal else None


def say(text: str) -> None:
    """One line to the person (or the log file) that watches; never parsed for markup."""
    if (target := console()) is not None:
        target.print(text, markup=False)
    else:
        print(text, file=sys.stderr, flush=True)


def say_facts(title: str, facts: Mapping[str, str]) -> None:
    """A titled panel of name / value pairs on a terminal, plain `name: value` lines elsewhere; empty values are left out."""
    shown = {name: value for name, value in facts.items() if value}
    target = console()
    if target is None:
        for line in [title, *(f"  {name}: {value}" for name, value in shown.items())]:
            say(line)
        return
    from rich.panel import Panel
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in shown.items():
        grid.add_row(name, value)
    target.print(Panel(grid, title=title, title_align="left", border_style="cyan", expand=False))


def duration_text(seconds: float) -> str:
    """'0.8 s', '42 s', '3 min 05 s', '2 h 07 min'."""
    if seconds < 10 and not isinstance(seconds, int):
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def rate_text(done: float, seconds: float, unit: str) -> str:
    """'1,740 particles/s', or '2.1 s per particle-like unit' when slow."""
    if done <= 0 or seconds <= 0:
        return ""
    rate = done / seconds
    if rate >= 1:
        return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"
    single = unit.removesuffix("es") if unit.endswith("sses") else unit.removesuffix("s")
    return f"{1 / rate:.1f} s per {single}"


class Bar:
    """Handle that a stage advances: `bar.advance(k)`. Counts also where nothing is drawn."""

    def __init__(self, stage: str, total: int | None, unit: str) -> None:
        self.name, self.total, self.unit = stage, total, unit
        self.text = stage
        self.done = 0
        self.started = time.monotonic()
        self._shown: Callable[[Bar, int], None] = lambda bar, n: None

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.started

    def closing_line(self) -> str:
        """'Backprojecting: 1,391 particles in 0.8 s (1,740 particles/s)'."""
        rate = rate_text(self.done, self.seconds, self.unit)
        return f"{self.name}: {self.done:,} {self.unit} in {duration_text(self.seconds)}" + (f" ({rate})" if rate else "")

    def advance(self, n: int = 1) -> None:
        """`n` more units are done."""
        self.done += n
        self._shown(self, n)

    def describe(self, text: str) -> None:
        """Change the text in front of the bar (a step within the stage)."""
        self.text = text
        self._shown(self, 0)


@contextmanager
def progress(stage: str, total: int | None = None, unit: str = "steps") -> Iterator[Bar]:
    """Show the progress of one stage; one closing line tells how much was done, in what time, at what rate.

    total: number of units if known; unit: plural noun, as in 'particles'.
    """
    bar = Bar(stage, total, unit)
    target = console()
    with _rich_bar(bar, target) if target is not None else _plain_lines(bar):
        yield bar
    say(bar.closing_line())


@contextmanager
def _rich_bar(bar: Bar, target: Console) -> Iterator[None]:
    from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(rate_text(task.completed, task.elapsed or 0.0, bar.unit), style="cyan", no_wrap=True)

    class End(ProgressColumn):
        def render(self, task: Task) -> Text:
            left = task.time_remaining
            if left is None:
                return Text("")
            at = time.strftime("%H:%M" if left < 43200 else "%a %H:%M", time.localtime(time.time() + left))
            return Text(f"{duration_text(round(left))} left, ends {at}", style="dim", no_wrap=True)

    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(20),
        TaskProgressColumn(),
        Rate(),
        TimeElapsedColumn(),
        End(),
    ]
    with Progress(*columns, console=target, transient=True, refresh_per_second=5) as display:
        task = display.add_task(bar.text, total=bar.total)

        def shown(bar: Bar, n: int) -> None:
            display.update(task, advance=n, description=bar.text)

        bar._shown = shown
        yield


@contextmanager
def _plain_lines(bar: Bar) -> Iterator[None]:
    next_line = FIRST_LINE_AFTER

    def shown(bar: Bar, n: int) -> None:
        nonlocal next_line
        seconds = bar.seconds
        if seconds < next_line:
            return
        next_line = seconds + min(max(seconds / 2, FIRST_LINE_AFTER), LONGEST_SILENCE)
        text = f"{bar.text}: {bar.done:,}" + (f" of {bar.total:,}" if bar.total else "") + f" {bar.unit}"
        text += f", {rate_text(bar.done, seconds, bar.unit)}" if bar.done else ""
        if bar.total and bar.done:
            text += f", {duration_text(seconds * (bar.total - bar.done) / bar.done)} left"
        say(text)

    bar._shown = shown
    yield
