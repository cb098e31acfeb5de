"""What a refinement says while it runs: one record per iteration (events.jsonl, log, report), and a live view on a terminal."""

from __future__ import annotations

import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from verglas.io import progress as terminal
from verglas.io.provenance import plain
from verglas.io.runfolder import records_of

if TYPE_CHECKING:
    from rich.console import Group
    from rich.live import Live

    from verglas.refinement.driver import Iteration
    from verglas.refinement.state import Schedule

Record = dict[str, Any]
UNKNOWN = 999.0  # what the schedule holds before something was measured
ITERATIONS_PER_SAMPLING = 3  # until a run has shown its own: one that gains, one without gain, one without change
FINAL_COST = 2.0  # iterations; the last one goes to Nyquist
FIRST_LOCAL, FORESEEN = 4, 5  # HEALPix orders: local searches begin; a global search is expected to get at least so far
FINER, LOCAL = 8.0, 0.25  # cost of a search on a grid twice as fine, and of the first local one, in those of the grid before
FIRST_FORECAST = 3  # iteration; before, accuracies are those of the rough reference


def record_of(iteration: Iteration, resolution_fsc: float | None = None) -> Record:
    """All numbers of one iteration in terms of JSON. Lengths in Å unless the name ends in px; unknown values are null.

    `resolution` is what the run works with (SSNR 1); resolution_fsc: of the last iteration, FSC 0.143 of the unfiltered halves.
    """
    state, schedule, poses = iteration.state, iteration.state.schedule, iteration.state.poses
    return plain({
        "iteration": state.iteration,
        "final": iteration.final is not None,
        "resolution": state.current_resolution,
        "resolution_fsc": resolution_fsc,
        "current_size": state.current_size,
        "healpix_order": schedule.healpix_order,
        "angular_step": schedule.angular_step,
        "fine_angular_step": schedule.fine_angular_step,
        "local_sigma": schedule.local_sigma,
        "offset_range_px": schedule.offset_range / state.pixel_size,
        "offset_step_px": schedule.offset_step / state.pixel_size,
        "fine_offset_step": schedule.fine_offset_step,
        "fine_offset_step_px": schedule.fine_offset_step / state.pixel_size,
        "changes_angles": known(schedule.changes_angles),
        "changes_offsets": known(schedule.changes_offsets),
        "accuracy_angles": known(schedule.accuracy_angles),
        "accuracy_offsets": known(schedule.accuracy_offsets),
        "iterations_without_gain": schedule.iterations_without_gain,
        "iterations_without_changes": schedule.iterations_without_changes,
        "iterations_left": iterations_left(schedule),
        "searches_left": None if iterations_left(schedule) is None else sum(searches_ahead(schedule)),
        "pmax": float(poses.pmax_B.double().mean()),
        "significant": float(poses.significant_B.double().mean()),
        "entropy": float(poses.entropy_B.double().mean()),
        "log_likelihood": float(poses.log_likelihood_B.double().sum()),
        "offset_sigma": [half.offset_sigma for half in state.halves],
        "norm_average": [half.norm_average for half in state.halves],
        "fsc": [round(value, 5) for value in state.fsc_S.tolist()],
        "pixel_size": state.pixel_size,
        "converged": schedule.converged,
        "took": {name: round(value, 3) for name, value in iteration.seconds.items()},
        "notes": iteration.notes,
        **({"communication": iteration.communication} if iteration.communication else {}),
    })  # fmt: skip


def known(value: float) -> float | None:
    """None for the 999 of what was not measured yet."""
    return None if value >= UNKNOWN or not math.isfinite(value) else value


def iterations_left(schedule: Schedule) -> int | None:
    """Expected number of iterations until the end, None before the accuracy is known."""
    if schedule.converged:
        return 1
    if known(schedule.accuracy_angles) is None or not schedule.accuracy_angles > 0:
        return None
    return len(searches_ahead(schedule))


def searches_ahead(schedule: Schedule) -> list[float]:
    """What the searches of each expected iteration cost, in those of the present grid; the final one counts `FINAL_COST`.

    The grid is halved until its fine step is below 0.75 of the accuracy (RELION facts 5.3), each time after
    `ITERATIONS_PER_SAMPLING` iterations; then follow one without gain and the final one. While searches are global, poses are
    less accurate than they will be: the grid is expected to reach order `FORESEEN` at least.
    """
    if schedule.converged:
        return [FINAL_COST]
    steps = max(0, math.ceil(math.log2(schedule.fine_angular_step / (0.75 * schedule.accuracy_angles))))
    if not schedule.local_sigma:
        steps = max(steps, FORESEEN - schedule.healpix_order)
    stalled = min(schedule.iterations_without_gain, schedule.iterations_without_changes)
    cost, costs = 1.0, [1.0] * max(0, ITERATIONS_PER_SAMPLING - 1 - stalled)
    for order in range(schedule.healpix_order + 1, schedule.healpix_order + steps + 1):
        if not schedule.local_sigma and order <= FIRST_LOCAL:
            cost *= LOCAL if order == FIRST_LOCAL else FINER
        costs += [cost] * ITERATIONS_PER_SAMPLING
    return [*costs, FINAL_COST * cost]


def seconds_left(history: Sequence[Record], now: float = 0.0) -> float | None:
    """Expected seconds to the end, `now` s into the running iteration; None before there is ground to tell.

    From the last iterations on this grid, up to three: of the search the quickest (poses become surer, and searches with them),
    which grows with the grid; of the rest the median.
    """
    last = history[-1] if history else None
    if last is None or last["final"] or last["iteration"] < FIRST_FORECAST or last.get("searches_left") is None:
        return None
    recent = [record["took"] for record in history[-3:] if record["healpix_order"] == last["healpix_order"]]
    search = min(took.get("expectation", 0.0) for took in recent)
    rest = statistics.median(total_of(took) - took.get("expectation", 0.0) for took in recent)
    return max(0.0, search * last["searches_left"] + rest * last["iterations_left"] - now)


def total_of(took: Mapping[str, float]) -> float:
    """Seconds of an iteration from those of its stages."""
    return took.get("total", sum(took.values()))


def read_history(events: Path, last: int) -> list[Record]:
    """Records of the iterations up to `last` from an events.jsonl, each in its latest version; torn lines are left out."""
    found = {record["iteration"]: record for record in records_of(events, "iteration") if record["iteration"] <= last}
    return [found[number] for number in sorted(found)]


def value_text(value: float | None, unit: str, digits: int = 3) -> str:
    """'3.75°', '0.5 px', or '?' for what is not known."""
    space = "" if unit == "°" else " "
    return "?" if value is None else f"{value:.{digits}g}{space}{unit}"


def stages_text(took: Mapping[str, float]) -> str:
    """'expectation 10.1 s, maximization 1.0 s', the longest first, without the total and what took no time."""
    stages = sorted(((value, name) for name, value in took.items() if name != "total" and value >= 0.05), reverse=True)
    return ", ".join(f"{name} {value:.1f} s" for value, name in stages)


def pair_text(record: Record, name: str) -> str:
    """'1.5° and 0.4 px' of the angles and offsets called `name`, '' before they were measured."""
    angle, offset = record[f"{name}_angles"], record[f"{name}_offsets"]
    if angle is None or offset is None:
        return ""
    return f"{value_text(angle, '°')} and {value_text(offset / record['pixel_size'], 'px')}"


def facts_of(record: Record) -> dict[str, str]:
    """What is shown of an iteration, name -> text; what is not known yet is left out."""
    search = f"local, {record['local_sigma']:.2g}° wide" if record["local_sigma"] else "global"
    sampling = f"{value_text(record['fine_angular_step'], '°')} and {value_text(record['fine_offset_step_px'], 'px')} ({search})"
    if record.get("align", "all") == "offsets":
        sampling = f"{value_text(record['fine_offset_step_px'], 'px')} (orientations are kept)"
    elif record.get("align", "all") == "none":
        sampling = "none (poses are kept)"
    at_end = f" (FSC 0.143: {record['resolution_fsc']:.3g} Å)" if record["resolution_fsc"] is not None else ""
    facts = {
        "resolution": value_text(record["resolution"], "Å") + at_end,
        "image size": f"{record['current_size']} px",
        "sampling": sampling,
        "changes": pair_text(record, "changes"),
        "accuracy": pair_text(record, "accuracy"),
        "Pmax": f"{record['pmax']:.3f}",
        "classes": ", ".join(f"{100 * one['share']:.1f} % {one['resolution']:.3g} Å" for one in record.get("classes", [])),
    }
    return {name: text for name, text in facts.items() if text}


def block(record: Record, left: float | None, before: Record | None = None) -> list[str]:
    """The lines that tell of one iteration; left: expected seconds to the end; before: the record of the iteration before,
    whose notes are not told again."""
    name = "final iteration" if record["final"] else f"iteration {record['iteration']}"
    facts = facts_of(record)
    lines = [
        f"{name}: {facts['resolution']}, image size {facts['image size']}, sampling {facts['sampling']}",
        "  " + ", ".join(f"{name} {facts[name]}" for name in ("changes", "accuracy", "Pmax") if name in facts),
        f"  {terminal.duration_text(total_of(record['took']))}: {stages_text(record['took'])}" + end_text(left, "; "),
    ]
    if "communication" in record:
        lines += [f"  {sent_text(record['communication'])}", *work_lines(record["communication"].get("work", []))]
    if "helpers" in record:
        lines.append(f"  {record['helpers']['said']}")
    if "classes" in facts:
        lines.insert(1, f"  classes {facts['classes']}")
    told = {gist(note) for note in before["notes"]} if before else set()
    return lines + [f"  {note}" for note in record["notes"] if gist(note) not in told]


def sent_text(communication: Mapping[str, Any]) -> str:
    """'2 ranks: each sent 12 MB in 0.05 s (0.02 s more behind computing), waited up to 0.3 s for others'."""
    size, sent = communication["ranks"], max(communication["bytes_of_ranks"]) / 1e6
    stood, hidden, waited = (max(communication[f"{name}seconds_of_ranks"]) for name in ("", "hidden_", "waiting_"))
    behind = f" ({hidden:.2g} s more behind computing)" if hidden else ""
    return f"{size} ranks: each sent {sent:.3g} MB in {stood:.2g} s{behind}, waited up to {waited:.2g} s for others"


def work_lines(work_R: Sequence[Mapping[str, Any]]) -> list[str]:
    """'computing 3.1 s (rank 1) to 3.3 s (rank 0), 4 % of the particles were those of other ranks'; nothing without ranks."""
    worked = sum(work["worked"] for work in work_R)
    if not worked:
        return []
    (least, quick), (most, slow) = (pick((work["seconds"], rank) for rank, work in enumerate(work_R)) for pick in (min, max))
    helped = 100 * sum(work["helped"] for work in work_R) / worked
    return [f"  computing {least:.3g} s (rank {quick}) to {most:.3g} s (rank {slow}), {helped:.2g} % of the particles for others"]


def gist(note: str) -> str:
    """A note without its numbers: notes of one gist tell of one state that lasts."""
    return re.sub(r"\d+(\.\d+)?", "#", note)


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
        if console is not None and not self.quiet:
            from rich.live import Live

            self.live = Live(console=console, get_renderable=self.view, refresh_per_second=4, transient=True)
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self, reason: str = "") -> str:
        """Take the live view away; nothing is to be said beside the reason of an end."""
        if self.live is not None:
            self.live.stop()
        return ""

    @property
    def iteration(self) -> int:
        """Number of the running one."""
        return self.history[-1]["iteration"] + 1 if self.history else 1

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
        before = self.history[-1] if self.history else None
        self.history.append(record)
        for line in block(record, seconds_left(self.history), before):
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
        return Group(Panel(grid, title=f"iteration {self.iteration}", title_align="left", border_style="cyan", expand=False))
