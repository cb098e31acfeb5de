"""One run of an iterative command: prepares the engine, drives it, writes files, tells what happens, goes on after a stop.

A command derives its `Job` and its `Run`, and fills in what is its own. Nothing heavy is imported before a run begins.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from verglas.cli.behind import Behind, written
from verglas.cli.common import HelpedComputing, refuse_beside_continue, started_again
from verglas.cli.disk import disk_notice
from verglas.cli.helped import helped, with_helpers
from verglas.cli.job import Job, job_of_run, was_begun
from verglas.cli.refine_watch import Record, Watch, read_history
from verglas.errors import InputError, OutputError
from verglas.io import staging
from verglas.io.progress import duration_text, say
from verglas.io.provenance import command_line
from verglas.io.runfolder import RunFolder
from verglas.refinement.config import RefineConfig

if TYPE_CHECKING:
    import torch

    from verglas.cli.refine_report import ReportWriter
    from verglas.distributed.ranks import Ranks
    from verglas.particles.table import ParticleTable
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State
    from verglas.report.page import Draw

CHECKPOINT_EVERY = 10.0  # s, where iterations are shorter than writing their files
MOST_BEHIND, SHARE_BEHIND = 4, 0.05  # iterations whose files are not written; their maps' share of the memory of a batch
USUAL_ITERATIONS = 25  # of a refinement, which ends by itself


class IterativeOptions(Protocol):
    """What the command line said to a command that iterates."""

    continue_from: Path | None
    elastic: bool
    computing: HelpedComputing

    def job(self) -> Job:
        """What a new run is made from, not checked yet."""


class Run(Iterator["Iteration"]):
    """A run under way: iterate for one event per iteration. What a command fills in: `inputs`, `prepare`, `iterations`, and,
    where it differs, `plan`, `record`, `note_figures`, `write_files`, `report`.

    table: used instead of reading the particles that the job names; resumed: go on with the run in job.out. found: names of what
    `inputs` sets.
    """

    found: ClassVar[tuple[str, ...]] = ()

    def __init__(self, job: Job, table: ParticleTable | None = None, resumed: bool = False) -> None:
        self.job, self.resumed = job, resumed
        self.notices: list[str] = []
        self.history: list[Record] = []
        self._table = table
        self._disk_looked_at, self._saved = False, -math.inf  # time.monotonic() of the last checkpoint
        self.ranks: Ranks
        self._events = self._drive()

    @classmethod
    def of(cls, options: IterativeOptions, kind: type[Job]) -> Self:
        """The run that a command's options ask for: new, or the rest of a stopped one. InputError for what makes no sense."""
        if options.continue_from is not None:
            refuse_beside_continue(options)
            where = options.computing
            job = job_of_run(kind, options.continue_from, where.device, where.threads)
            return cls(replace(job, cpu_ranks=where.cpu_ranks), resumed=True)
        job = options.job()
        job.check()
        return cls(job, resumed=started_again(options.elastic) and was_begun(job))

    def __next__(self) -> Iteration:
        return next(self._events)

    def finish(self) -> None:
        """Go through all remaining iterations."""
        for _ in self._events:
            pass

    # What a command fills in

    def inputs(self) -> ParticleTable:
        """Particles, checked together with all other inputs; what the user should know goes to `notices`."""
        raise NotImplementedError

    def plan(self, table: ParticleTable, device: torch.device) -> RunPlan:
        """What the engine may use, and a notice of it. InputError if that cannot fit, with the nearest setting that does."""
        from verglas.cli.plan import this_machine
        from verglas.refinement.plan import plan
        from verglas.refinement.plan_sizes import Problem

        machine = replace(this_machine(device, self.ranks.local_size), ranks=self.ranks.size)
        made = plan(Problem.of(table, self.ranks.size), self.job.config, machine)
        made.check()
        peaks = " and ".join(f"{made.peak(where) / 1e9:.3g} GB of the {where}" for where in made.places)
        self.notices.append(f"planned: at most {peaks}, about {duration_text(made.seconds)}")
        if self.job.scratch is None:
            return made
        if self.ranks.size == 1 and not made.residency.streams:
            self.notices.append("--scratch is not needed: images are read once, and stay in memory.")
            return made
        return replace(made, residency=made.residency.copied_to(self.job.scratch))

    def prepare(
        self, table: ParticleTable, device: torch.device, threads: int, progress: Progress | None, planned: RunPlan
    ) -> Session:
        """The engine at its start, all images read."""
        raise NotImplementedError

    def iterations(self, session: Session, progress: Progress) -> Iterator[Iteration]:
        """The engine's iterations from the session's state on."""
        raise NotImplementedError

    def record(self, iteration: Iteration, table: ParticleTable) -> Record:
        """All numbers of an iteration in terms of JSON."""
        raise NotImplementedError

    def note_figures(self, run: RunFolder, state: State, last: Record) -> None:
        """Put the key figures of the run as it stands into its folder. last: record of the last iteration."""
        raise NotImplementedError

    def report(self, run: RunFolder) -> ReportWriter:
        """What writes the page."""
        raise NotImplementedError

    def write_files(self, run: RunFolder, table: ParticleTable, iteration: Iteration) -> None:
        """STAR files and maps of an iteration."""
        from verglas.refinement import files

        state, directions_D2 = iteration.state, iteration.directions_D2
        files.write_iteration(run.target, state, table, self.job.config, directions_D2, command_line())

    # What all have in common

    def read_particles(self) -> ParticleTable:
        """The particles, without unusable ones if the job says so; what is left out goes to `notices`."""
        from verglas.core.symmetry import mates_beyond
        from verglas.core.symmetry_names import normalise_name
        from verglas.particles.table import ParticleTable
        from verglas.refinement.inputs import bad_rows

        normalise_name(self.job.config.symmetry)
        if self.job.config.relax_symmetry is not None:
            mates_beyond(self.job.config.symmetry, self.job.config.relax_symmetry)
        table = self._table if self._table is not None else ParticleTable.read(self.job.particles, self.job.folder)
        self.notices += table.notices
        if self.job.skip_bad:
            bad = bad_rows(table)
            table = table.without([row for row, _, _ in bad]) if bad else table
            self.notices += [f"left out {name}: {reason}" for _, name, reason in bad[:20]]
            self.notices += [f"left out {len(bad)} unusable images in all"] if bad else []
        return table

    def _drive(self) -> Iterator[Iteration]:
        from verglas.cli.common import ranks_here, set_threads, wake_gpu, wake_triton
        from verglas.core.imports import importing

        wake_gpu(self.job.device)  # while PyTorch is imported, which is next
        with importing():
            threads = set_threads(self.job.threads)
            import verglas.particles.table  # noqa: F401  and with it pandas
        from verglas.distributed.ranks import lead_first

        with ranks_here(self.job.device) as (self.ranks, device, reason):
            wake_triton(device)
            self.resumed = self.ranks.agreed(self.resumed)  # others may look at the folder a moment later
            self.ranks.doing("reading input", part="")
            run, table, planned = None, None, None
            with lead_first(self.ranks):
                if self.ranks.is_lead:
                    run, table = self._run_folder(), self.inputs()
                    planned = self.plan(table, device)
            table = self._of_lead(table)
            planned = self.plan(table, device) if planned is None else planned
            going_on = way_on(run, self.job.command, self.ranks, self.job.out)
            with run or nullcontext(), withdrawn_if_refused(run, self.resumed), going_on:
                session = self._session(run, table, (device, threads, reason), planned)
                with with_helpers(session, self.job.cpu_ranks, run.log if run else lambda text: None) as session:
                    yield from self._iterate(run, table, session)

    def _of_lead(self, table: ParticleTable | None) -> ParticleTable:
        """The particles, and what else `inputs` found, on all ranks: the lead alone reads files before the images."""
        found = {name: getattr(self, name) for name in self.found} if self.ranks.is_lead else {}
        all_found, table = self.ranks.agreed((found, table), "inputs")
        for name, value in all_found.items():
            setattr(self, name, value)
        assert table is not None
        return table

    def _run_folder(self) -> RunFolder | None:
        job = self.job
        if job.out is None:
            return None
        if self.resumed:
            return RunFolder.reopen(job.out, job.command, job)
        return RunFolder.create(job.out, job.command, job, job.overwrite, resumable=True)

    def _session(
        self, run: RunFolder | None, table: ParticleTable, computing: tuple[Any, int, str], planned: RunPlan
    ) -> Session:
        """The engine with all images read, at the state of the last checkpoint if there is one."""
        from verglas.refinement.files import remove_leftovers

        device, threads, reason = computing
        if run is None:
            session = self.prepare(table, device, threads, lambda *at: self.ranks.doing("reading images", at[1]), planned)
            self.notices += session.notices
            return self._resumed(None, table, session) if self.resumed else session
        with run.progress("Reading images", len(table), "particles") as bar:

            def advance(_: str, done: int, total: int) -> None:
                self.ranks.doing("reading images", done)
                bar.advance(done - bar.done)

            session = self.prepare(table, device, threads, advance, planned)
        self.notices += session.notices
        chosen = dict(session.chosen)
        reasons = "; ".join(text for text in (reason, chosen.get("residency"), chosen.get("reason")) if text)
        run.provenance(device, chosen.get("kernels", ""), chosen.get("precision", ""), reasons)
        for notice in self.notices:
            run.log(notice)
        remove_leftovers(run.target)
        return self._resumed(run, table, session) if self.resumed else session

    def _resumed(self, run: RunFolder | None, table: ParticleTable, session: Session) -> Session:
        """The session at the state of the last checkpoint, which the lead names; as it is if there is none."""
        from verglas.refinement import checkpoint, driver

        newest = self.ranks.agreed(checkpoint.newest(run.target, run.log) if run else None)
        log = run.log if run else lambda text: None
        if newest is None:
            log("no iteration was finished: starting from the beginning")
            return session
        state, _, fingerprint = checkpoint.load(newest)
        if fingerprint != checkpoint.fingerprint(table):
            raise InputError(self.job.particles, "these are not the particles that the run began with", "the same file",
                             "Put the file back as it was, or start a new run.")  # fmt: skip
        log(f"going on after iteration {state.iteration}")
        self.history = read_history(run.path("events.jsonl"), state.iteration) if run else []
        return driver.resume(session, state)

    def _iterate(self, run: RunFolder | None, table: ParticleTable, session: Session) -> Iterator[Iteration]:
        say_line = run.log if run else lambda line: None
        # A GPU goes on while the files are written; on a CPU both would want the same cores.
        pieces = pieces_behind(session) if session.on.device.type == "cuda" else 0
        with (
            _painters(pieces > 0 and run is not None) as draw, Behind(pieces) as later,
            Watch(say_line, self.history, quiet=run is None) as watch, self.ranks.ending(watch.close),
        ):  # fmt: skip

            def progress(stage: str, done: int, total: int) -> None:
                self.ranks.doing(stage, done)
                watch.progress(stage, done, total)

            if run is not None:
                later.do(partial(self._open_report, run, draw))
            self.ranks.doing("beginning", part=f"iteration {watch.iteration}")
            for iteration in self.iterations(session, progress):
                watch.finished(self.record(iteration, table) | helped(session))
                self.ranks.doing("beginning", part=f"iteration {watch.iteration}")
                if run is not None:
                    later.do(partial(self._write, run, table, iteration, list(self.history), later))
                yield iteration

    def _open_report(self, run: RunFolder, draw: Draw | None) -> None:
        """Import what pages are made of; draw: draws their sections elsewhere."""
        self._report = self.report(run)
        self._report.draw = draw

    def _write(
        self, run: RunFolder, table: ParticleTable, iteration: Iteration, history: list[Record], later: Behind
    ) -> None:  # fmt: skip
        """Files, event, checkpoint, report: a kill between any two leaves a run that goes on and writes the same again.

        A checkpoint is written beside the files, and named after them. The last iteration of a refinement has none: what it has
        beyond its state, the joined map, is not in one. Nor has one whose successor waits for its own files already, if there
        was a checkpoint a moment ago: computing that again takes less than writing it.
        """
        from verglas.refinement import checkpoint

        state, config = iteration.state, self.job.config
        with ThreadPoolExecutor(1, "verglas-files") as beside:
            files = beside.submit(self._tell, run, table, iteration, history)
            if iteration.final is None and not (later.waiting and time.monotonic() - self._saved < CHECKPOINT_EVERY):
                path = checkpoint.path_of(run.target, state.iteration)
                checkpoint.save(path, state, config, checkpoint.fingerprint(table), after=partial(written, files))
                checkpoint.prune(run.target)
                self._saved = time.monotonic()
            files.result()
        if not self._disk_looked_at:
            self._disk_looked_at = True
            ends_by_itself = type(config) is RefineConfig
            expected = min(config.max_iterations, USUAL_ITERATIONS) if ends_by_itself else config.max_iterations
            notice = disk_notice(run.target, state.iteration, expected)
            if notice is not None:
                run.log(notice)
        self._report.update(history, iteration)

    def _tell(self, run: RunFolder, table: ParticleTable, iteration: Iteration, history: list[Record]) -> None:
        """Files and event."""
        self.write_files(run, table, iteration)
        run.figures.clear()  # what is known at the end only comes first
        self.note_figures(run, iteration.state, history[-1])
        run.event("iteration", **history[-1])


def pieces_behind(session: Session) -> int:
    """Iterations whose files may be missing while the next ones are computed: the first ones of many GPUs are shorter than what
    their files take. Their maps stay on the device."""
    maps = sum(model.map_ZYX.nbytes for model in session.state.halves)
    return max(1, min(MOST_BEHIND, int(SHARE_BEHIND * session.on.memory / max(1, maps))))


@contextmanager
def _painters(wanted: bool) -> Iterator[Draw | None]:
    """What has other processes draw the sections of a page, if that is wanted."""
    if not wanted:
        yield None
        return
    from verglas.cli.painters import Painters, painters_for

    with Painters(painters_for(os.cpu_count() or 1)) as painters:
        yield painters.draw


@contextmanager
def withdrawn_if_refused(run: RunFolder | None, resumed: bool) -> Iterator[None]:
    """Remove the folder of a new run that ends by an error of the input before its first checkpoint, and put the run that it
    was to replace back: nothing was computed."""
    try:
        yield
    except (InputError, OutputError):
        if run is not None and not resumed and not any(run.target.glob("*.checkpoint")):
            shutil.rmtree(run.target, ignore_errors=True)
            old = staging.sibling(run.target, "replaced")
            if old.exists():
                staging.unsign(old)
                os.rename(old, run.target)
        raise


@contextmanager
def way_on(run: RunFolder | None, command: str, ranks: Ranks | None = None, out: Path | None = None) -> Iterator[None]:
    """Say how to go on when the user stops a run, or when it ends because one of its processes was lost. out: of all ranks."""
    where = run.out if run is not None else out
    text = f"The run can go on: verglas {command} --continue {where}"

    def farewell(reason: str) -> str:
        if run is not None:
            run.stopped(reason)
        return "" if where is None else text

    try:
        with nullcontext() if ranks is None else ranks.ending(farewell):
            yield
    except KeyboardInterrupt:
        if run is not None:
            say(text)
        raise


def rounded(value: float) -> float:
    """To three significant digits."""
    return float(f"{value:.3g}")


def check_classes(table: ParticleTable, classes: int, fewest: int) -> None:
    """InputError if there are less than `fewest` particles for each class."""
    if len(table) < classes * fewest:
        raise InputError("--classes", f"{classes} for {len(table)} particles",
                         f"at most {len(table) // fewest}: {fewest} particles a class")  # fmt: skip


def note_common_figures(run: RunFolder, state: State, last: Record) -> None:
    """Key figures that all runs have."""
    run.figure("particles", len(state.poses.norm_B))
    run.figure("box", state.box, "px")
    run.figure("pixel_size", state.pixel_size, "Å")
    run.figure("mean_Pmax", rounded(last["pmax"]))
