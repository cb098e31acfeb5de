"""What a refinement says while it runs: one record per iteration (events.jsonl, log, report), and a live view on a terminal."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from verglas.io import progress as terminal
from verglas.io.provenance import plain

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

    from verglas.refinement.driver import Iteration
    from verglas.refinement.state import Schedule

Record = dict[str, Any]
UNKNOWN = 999.0  # what the schedule holds before something was measured
ITERATIONS_PER_SAMPLING = 3  # until a run has shown its own: one that gains, one without gain, one without change
FINAL_COST = 2.0  # iterations; the last one goes to Nyquist


def record_of(iteration: Iteration) -> Record:
    """All numbers of one iteration in terms of JSON. Lengths in Å unless the name ends in px; unknown values are null."""
    state, schedule = iteration.state, iteration.state.schedule
    poses, pixel_size = state.poses, iteration.state.pixel_size
    return plain({
        "iteration": state.iteration,
        "final": iteration.final is not None,
        "resolution": state.current_resolution,
        "current_size": state.current_size,
        "healpix_order": schedule.healpix_order,
        "angular_step": schedule.angular_step,
        "fine_angular_step": schedule.fine_angular_step,
        "local_sigma": schedule.local_sigma,
        "offset_range_px": schedule.offset_range / pixel_size,
        "offset_step_px": schedule.offset_step / pixel_size,
        "fine_offset_step": schedule.fine_offset_step,
        "fine_offset_step_px": schedule.fine_offset_step / pixel_size,
        "changes_angles": known(schedule.changes_angles),
        "changes_offsets": known(schedule.changes_offsets),
        "accuracy_angles": known(schedule.accuracy_angles),
        "accuracy_offsets": known(schedule.accuracy_offsets),
        "iterations_without_gain": schedule.iterations_without_gain,
        "iterations_without_changes": schedule.iterations_without_changes,
        "iterations_left": iterations_left(schedule),
        "pmax": float(poses.pmax_B.double().mean()),
        "significant": float(poses.significant_B.double().mean()),
        "entropy": float(poses.entropy_B.double().mean()),
        "log_likelihood": float(poses.log_likelihood_B.double().sum()),
        "offset_sigma": [half.offset_sigma for half in state.halves],
        "norm_average": [half.norm_average for half in state.halves],
        "fsc": [round(value, 5) for value in state.fsc_S.tolist()],
        "pixel_size": pixel_size,
        "converged": schedule.converged,
        "took": {name: round(value, 3) for name, value in iteration.seconds.items()},
        "notes": iteration.notes,
    })  # fmt: skip


def known(value: float) -> float | None:
    """None for the 999 of what was not measured yet."""
    return None if value >= UNKNOWN or not math.isfinite(value) else value


def iterations_left(schedule: Schedule) -> int | None:
    """Expected number of iterations until the end, None before the accuracy is known.

    The grid is halved until its fine step is below 0.75 of the accuracy (RELION facts 5.3), each time after
    `ITERATIONS_PER_SAMPLING` iterations; then follow one without gain and the final one.
    """
    if schedule.converged:
        return 1
    if known(schedule.accuracy_angles) is None or not schedule.accuracy_angles > 0:
        return None
    refinements = max(0, math.ceil(math.log2(schedule.fine_angular_step / (0.75 * schedule.accuracy_angles))))
    stalled = min(schedule.iterations_without_gain, schedule.iterations_without_changes)
    return refinements * ITERATIONS_PER_SAMPLING + max(0, ITERATIONS_PER_SAMPLING - 1 - stalled) + 1


def seconds_left(history: Sequence[Record], now: float = 0.0) -> float | None:
    """Expected seconds to the end: iterations left times the mean of the last three, `now` s into the running one."""
    if not history or history[-1]["final"] or history[-1]["iterations_left"] is None:
        return None
    recent = [record["took"].get("total", sum(record["took"].values())) for record in history[-3:]]
    iterations = history[-1]["iterations_left"] - 1 + FINAL_COST
    return max(0.0, iterations * sum(recent) / len(recent) - now)


def read_history(events: Path, last: int) -> list[Record]:
    """Records of the iterations up to `last` from an events.jsonl, each in its latest version; torn lines are left out."""
    found: dict[int, Record] = {}
    for line in events.read_text(encoding="utf-8", errors="replace").splitlines() if events.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:  # the line that a kill cut off
            continue
        if isinstance(record, dict) and record.get("event") == "iteration" and record["iteration"] <= last:
            found[record["iteration"]] = record
    return [found[number] for number in sorted(found)]


def value_text(value: float | None, unit: str, digits: int = 3) -> str:
    """'3.75°', '0.5 px', or '?' for what is not known."""
    space = "" if unit == "°" else " "
    return "?" if value is None else f"{value:.{digits}g}{space}{unit}"


def stages_text(took: Mapping[str, float]) -> str:
    """'expectation 10.1 s, maximization 1.0 s', the longest first, without the total and what took no time."""
    stages = sorted(((value, name) for name, value in took.items() if name != "total" and value >= 0.05), reverse=True)
    return ", ".join(f"{name} {value:.1f} s" for value, name in stages)


def facts_of(record: Record) -> dict[str, str]:
    """What is shown of an iteration, name -> text."""
    px = record["pixel_size"]
    search = f"local, {record['local_sigma']:.2g}° wide" if record["local_sigma"] else "global"
    offsets = [None if record[name] is None else record[name] / px for name in ("changes_offsets", "accuracy_offsets")]
    changes = f"{value_text(record['changes_angles'], '°')} and {value_text(offsets[0], 'px')}"
    accuracy = f"{value_text(record['accuracy_angles'], '°')} and {value_text(offsets[1], 'px')}"
    sampling = f"{value_text(record['fine_angular_step'], '°')} and {value_text(record['fine_offset_step_px'], 'px')}"
    return {
        "resolution": value_text(record["resolution"], "Å"),
        "image size": f"{record['current_size']} px",
        "sampling": f"{sampling} ({search})",
        "changes": changes,
        "accuracy": accuracy,
        "Pmax": f"{record['pmax']:.3f}",
    }


def block(record: Record, left: float | None) -> list[str]:
    """The lines that tell of one iteration; left: expected seconds to the end."""
    name = "final iteration" if record["final"] else f"iteration {record['iteration']}"
    facts = facts_of(record)
    total = record["took"].get("total", sum(record["took"].values()))
    lines = [
        f"{name}: {facts['resolution']}, image size {facts['image size']}, sampling {facts['sampling']}",
        f"  changes {facts['changes']}, accuracy {facts['accuracy']}, Pmax {facts['Pmax']}",
        f"  {terminal.duration_text(float(total))}: {stages_text(record['took'])}" + end_text(left, "; "),
    ]
    return lines + [f"  {note}" for note in record["notes"]]


def end_text(left: float | None, before: str = "") -> str:
    """'about 3 min 20 s left, ends 14:02'; '' if it is not known."""
    if left is None:
        return ""
    at = time.strftime("%H:%M" if left < 43200 else "%a %H:%M", time.localtime(time.time() + left))
    return f"{before}about {terminal.duration_text(round(left))} left, ends {at}"


class Watch(AbstractContextManager["Watch"]):
    """Shows a running refinement: live on a terminal, else a line when an iteration takes long.

    particles: how many there are; say: takes the lines of each iteration; quiet: show nothing.
    """

    def __init__(self, say: Callable[[str], None], history: list[Record], quiet: bool = False) -> None:
        self.say, self.history, self.quiet = say, history, quiet
        self.stage, self.done, self.total = "preparing", 0, 0
        self.stage_started = self.iteration_started = time.monotonic()
        self.next_line = terminal.LONGEST_SILENCE
        self.live: Live | None = None

    def __enter__(self) -> Watch:
        console = terminal.console()
        if console.is_terminal and not self.quiet:
            from rich.live import Live

            self.live = Live(console=console, get_renderable=self.view, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.live is not None:
            self.live.stop()

    def progress(self, stage: str, done: int, total: int) -> None:
        """`done` of `total` particles have passed `stage` of the running iteration."""
        now = time.monotonic()
        if stage != self.stage or done < self.done:
            self.stage_started = now
        self.stage, self.done, self.total = stage, done, total
        if self.live is None and not self.quiet and now - self.iteration_started > self.next_line:
            self.next_line += terminal.LONGEST_SILENCE
            terminal.say(f"  {self.stage_text()}")

    def finished(self, record: Record) -> None:
        """An iteration is done: tell its numbers, and start the clock of the next."""
        self.history.append(record)
        for line in block(record, seconds_left(self.history)):
            self.say(line)
        self.stage, self.done, self.total = "preparing", 0, 0
        self.stage_started = self.iteration_started = time.monotonic()
        self.next_line = terminal.LONGEST_SILENCE

    def stage_text(self) -> str:
        """'expectation: 500 of 1,391 particles, 412 particles/s'."""
        if not self.total:
            return self.stage
        rate = terminal.rate_text(self.done, time.monotonic() - self.stage_started, "particles")
        return f"{self.stage}: {self.done:,} of {self.total:,} particles" + (f", {rate}" if rate else "")

    def view(self) -> Group:
        """What the terminal shows below the lines: where the running iteration is, and the numbers of the last one."""
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        last = self.history[-1] if self.history else None
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        bar = Table.grid(padding=(0, 2))
        bar.add_row(ProgressBar(total=max(self.total, 1), completed=self.done, width=28), self.stage_text())
        grid.add_row("now", bar)
        if last is not None:
            for name, text in facts_of(last).items():
                grid.add_row(name, text)
            grid.add_row("last iteration", stages_text(last["took"]))
            end = end_text(seconds_left(self.history, time.monotonic() - self.iteration_started))
            if end:
                grid.add_row("end", end)
        title = f"iteration {last['iteration'] + 1 if last else 1}"
        return Group(Panel(grid, title=title, title_align="left", border_style="cyan", expand=False))
