"""The driver of `verglas solve`: stages one after the other, each a verglas command in a folder of its own.

Every stage function runs again whenever a run goes on; what takes time are the commands, and `Story.command` leaves out those
whose results are there and are no older than what came before. So a run that was stopped continues at the right stage, and
one of whose stages was made anew by hand makes all later ones anew.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from verglas.cli.common import check_seed, ranks_here, set_threads, wake_gpu
from verglas.cli.job import options_of_run
from verglas.cli.solve_choices import Decision
from verglas.errors import InputError, VerglasError
from verglas.io.provenance import write_json
from verglas.io.runfolder import RunFolder

if TYPE_CHECKING:
    from verglas.distributed.orders import Orders

WITHOUT_DEVICE = ("align-symmetry",)
ITERATIVE = ("classify2d", "abinitio", "classify3d", "refine")  # go on after a stop; all processes of the run share them
Command = tuple[str, list[str]]  # its name, its words


@dataclass(frozen=True, kw_only=True)
class SolveJob:
    """What a solution is made from, as its config.json records it; paths are absolute."""

    particles: Path
    diameter: float
    out: Path
    sym: str = "auto"
    classes2d: int | None = None
    classes3d: int | None = None
    seed: int = 0
    folder: Path | None = None
    ignore_contrast: bool = False
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        from verglas.core.symmetry_names import normalise_name

        check_seed(self.seed)
        if not 0 < self.diameter < float("inf"):
            raise InputError("--diameter", f"{self.diameter:g}", "a finite number above 0")
        if self.sym != "auto":
            normalise_name(self.sym)


class NothingFound(Exception):
    """A stage found that there is nothing to go on with; the message says why. The report is written all the same."""


@dataclass
class Story:
    """What has been done so far. orders: of commands that other processes share; particles: those that are still in; newest: when
    the latest result was written (seconds)."""

    job: SolveJob
    run: RunFolder
    orders: Orders[Command]
    particles: Path
    decisions: list[Decision] = field(default_factory=list)
    stages: dict[str, Path] = field(default_factory=dict)
    discarded: dict[str, int] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    newest: float = 0.0

    def decide(self, stage: str, decision: str, reason: str) -> None:
        """Note a decision: in the log now, in decisions.json and the report at the end."""
        self.decisions.append(Decision(stage, decision, reason))
        self.run.log(f"{stage}: {decision} ({reason})")

    def command(self, folder: str, name: str, *words: object) -> Path:
        """Results of `verglas NAME WORDS --out DIR/folder`, made now if they are not there or older than what came before."""
        out = self.run.target / folder
        if is_done(out, self.newest):
            self.run.log(f"{folder}: its results are there")
        else:
            self._make(out, name, [str(word) for word in words])
        self.newest = max(self.newest, (out / "result.json").stat().st_mtime)
        self.stages[folder] = out
        return out

    def _make(self, out: Path, name: str, words: list[str]) -> None:
        where = ["--threads", str(self.job.threads)] if self.job.threads else []
        where += ["--device", self.job.device] if name not in WITHOUT_DEVICE else []
        if name in ITERATIVE and is_under_way(out, self.newest):
            words = ["--continue", str(out), *where]
        else:
            words = [*words, *where, "--out", str(out), *(["--overwrite"] if out.exists() else [])]
        self.run.log(f"{out.name}: verglas {shlex.join([name, *words])}")
        if name in ITERATIVE:
            self.orders.give((name, words))
        run_command(name, words)

    def table_rows(self) -> list[list[str]]:
        """Decisions as rows of a table."""
        return [[one.stage, one.decision, one.reason] for one in self.decisions]


def is_done(out: Path, newest: float) -> bool:
    """Whether the folder holds a finished run that is no older than `newest` (seconds since 1970)."""
    result = out / "result.json"
    return result.is_file() and result.stat().st_mtime >= newest


def is_under_way(out: Path, newest: float) -> bool:
    """Whether the folder holds a run that was stopped and began after `newest`."""
    config = out / "config.json"
    return config.is_file() and not (out / "result.json").exists() and config.stat().st_mtime >= newest


def run_command(name: str, words: list[str]) -> None:
    """A verglas command in this process; its record shows the command line with which it can be run again."""
    from verglas.cli.main import run_words

    with command_line_of(["verglas", name, *words]):
        if run_words(name, words) != 0:
            raise VerglasError(f"verglas {name} did not accept its options: {shlex.join(words)}")


@contextmanager
def command_line_of(words: list[str]) -> Iterator[None]:
    """Let `sys.argv`, from which records take their command line, be `words`."""
    before, sys.argv = sys.argv, words
    try:
        yield
    finally:
        sys.argv = before


def solve(job: SolveJob, resumed: bool = False) -> Story | None:
    """Run all stages, or those that are left, and write decisions and report; the story tells what happened. None for processes
    that only helped the lead: each of them runs the commands that are shared, and nothing else."""
    job.check()
    wake_gpu(job.device)  # while PyTorch is imported, which is next
    set_threads(job.threads)
    from verglas.distributed.orders import Orders

    with ranks_here(job.device) as (ranks, _, _):
        orders: Orders[Command] = Orders(ranks)
        if not ranks.is_lead:
            for name, words in orders.taken():
                run_command(name, words)
            return None
        with orders.given():
            return told(job, resumed, orders)


def told(job: SolveJob, resumed: bool, orders: Orders[Command]) -> Story:
    """The story, as far as it goes."""
    from verglas.cli import solve_stages
    from verglas.cli.solve_report import write_story

    if resumed:
        (job.out / "result.json").unlink(missing_ok=True)  # of a finished run, one of whose stages may have been made anew
        run = RunFolder.reopen(job.out, "solve", job)
    else:
        solve_stages.check_particles(job)
        run = RunFolder.create(job.out, "solve", job, job.overwrite, resumable=True)
    with run:
        story = Story(job, run, orders, job.particles)
        try:
            for stage in solve_stages.STAGES:
                stage(story)
                write_decisions(story)
        except NothingFound as nothing:
            story.facts["nothing"] = str(nothing)
        except KeyboardInterrupt:
            run.log(f"All of it can go on: verglas solve --continue {job.out}")
            raise
        write_decisions(story)
        write_story(story)
    return story


def write_decisions(story: Story) -> None:
    """decisions.json: {"decisions": [{"stage", "decision", "reason"}, ...]}."""
    write_json(story.run.path("decisions.json"), {"decisions": [asdict(one) for one in story.decisions]})


def continued_job(out: Path, device: Literal["auto", "cpu", "cuda"], threads: int | None) -> SolveJob:
    """The job of the run in the folder `out`, from its config.json; InputError if it is not one of `verglas solve`."""
    with options_of_run(out, "solve") as recorded:
        options = {one.name: recorded[one.name] for one in fields(SolveJob)}
        paths = {name: Path(options[name]) for name in ("particles", "folder") if options[name] is not None}
        return SolveJob(**{**options, **paths, "out": out.resolve(), "device": device, "threads": threads, "overwrite": False})


def was_begun(job: SolveJob) -> bool:
    """Whether a run with these very options is under way in the job's folder, device and threads apart."""
    if not (job.out / "config.json").is_file() or (job.out / "result.json").exists():
        return False
    try:
        return continued_job(job.out, job.device, job.threads) == replace(job, out=job.out.resolve(), overwrite=False)
    except InputError:
        return False
