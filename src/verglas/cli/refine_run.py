"""One refinement, from the command line or from Python: prepares, drives the engine, writes files, tells what happens.

Nothing heavy is imported before a run begins.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from verglas.cli.behind import Behind
from verglas.cli.common import check_seed
from verglas.cli.refine_watch import Record, Watch, read_history, record_of
from verglas.errors import InputError, OutputError, VerglasError
from verglas.io import staging
from verglas.io.progress import duration_text, say
from verglas.io.provenance import command_line
from verglas.io.runfolder import RunFolder
from verglas.refinement.config import RefineConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from verglas.cli.refine_report import ReportWriter
    from verglas.io.mrc import Map
    from verglas.particles.table import ParticleTable
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a refinement is made from, as its config.json records it; paths are absolute. out None: no files are written."""

    particles: Path
    reference: Path
    config: RefineConfig
    out: Path | None = None
    folder: Path | None = None
    skip_bad: bool = False
    ignore_contrast: bool = False
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        c = self.config
        check_seed(c.seed)
        for name, value in (("--diameter", c.diameter), ("--initial-resolution", c.initial_resolution),
                            ("--offset-step", c.offset_step), ("--offset-range", c.offset_range)):  # fmt: skip
            if not 0 < value < float("inf"):
                raise InputError(name, f"{value:g}", "a finite number above 0")
        for name, limit in (("--memory", c.memory_gb), ("--image-memory", c.image_memory_gb)):
            if limit is not None and not 0 < limit < float("inf"):
                raise InputError(name, f"{limit:g} GB", "a finite number above 0", "Leave it out to use what is free.")
        if c.offset_range < c.offset_step:
            raise InputError("--offset-range", f"{c.offset_range:g} px", f"at least the step, {c.offset_step:g} px")
        if not 0 <= c.healpix_order <= 6:
            raise InputError("--healpix-order", str(c.healpix_order), "0 to 6 (60° to 0.94°)")
        if c.max_iterations < 1:
            raise InputError("--max-iterations", str(c.max_iterations), "1 or more")
        if c.solvent_corrected_fsc and c.mask is None:
            raise InputError("--solvent-corrected-fsc", "given without --mask", "the mask within which the FSC is taken")


@dataclass(frozen=True)
class Result:
    """What a refinement found: the map of all particles (regularised, neither masked nor sharpened), half maps without any
    filter, their FSC per shell without a mask [S], the resolution in Å (where it falls below 0.143), the particles with their
    poses, and the whole last state."""

    map: Map
    half_maps: tuple[Map, Map]
    fsc_S: Tensor
    resolution: float
    particles: ParticleTable
    state: State


class Refinement(Iterator["Iteration"]):
    """A refinement under way: iterate for one event per iteration, or `run()` to the end; then `result` holds what came out.

    table, reference: used instead of reading the files that the job names; resumed: go on with the run in job.out.
    """

    command = "refine"

    def __init__(self, job: Job, table: ParticleTable | None = None, reference: Map | None = None, resumed: bool = False) -> None:
        self.job, self.resumed = job, resumed
        self.notices: list[str] = []
        self.history: list[Record] = []
        self._table, self._reference = table, reference
        self._result: Result | None = None
        self._events = self._drive()

    def __next__(self) -> Iteration:
        return next(self._events)

    def run(self) -> Result:
        """Go through all remaining iterations."""
        for _ in self._events:
            pass
        return self.result

    @property
    def result(self) -> Result:
        """Map, half maps, FSC and poses; RuntimeError before the last iteration."""
        if self._result is None:
            raise RuntimeError("the refinement is not finished: iterate to the end, or call run()")
        return self._result

    def _drive(self) -> Iterator[Iteration]:
        from verglas.cli.common import resolve_device, set_threads

        threads = set_threads(self.job.threads)
        device, reason = resolve_device(self.job.device)
        run = self._run_folder()
        table, reference = self._inputs()
        planned = self._plan(table, device)
        with run or nullcontext(), _withdrawn_if_refused(run, self.resumed), _way_on(run, self.command):
            yield from self._iterate(run, table, self._session(run, table, reference, (device, threads, reason), planned))

    def _run_folder(self) -> RunFolder | None:
        if self.job.out is None:
            return None
        if self.resumed:
            return RunFolder.reopen(self.job.out, self.command, self.job)
        return RunFolder.create(self.job.out, self.command, self.job, self.job.overwrite, resumable=True)

    def _inputs(self) -> tuple[ParticleTable, Map]:
        """Particles and reference, checked; what the user should know goes to `notices`."""
        from verglas.core.symmetry import normalise_name
        from verglas.io.mrc import read_map
        from verglas.particles.table import ParticleTable
        from verglas.refinement.inputs import bad_rows, check_inputs

        normalise_name(self.job.config.symmetry)
        table = self._table if self._table is not None else ParticleTable.read(self.job.particles, self.job.folder)
        reference = self._reference if self._reference is not None else read_map(self.job.reference)
        self.notices += table.notices
        if self.job.skip_bad:
            bad = bad_rows(table)
            table = table.without([row for row, _, _ in bad]) if bad else table
            self.notices += [f"left out {name}: {reason}" for _, name, reason in bad[:20]]
            self.notices += [f"left out {len(bad)} unusable images in all"] if bad else []
        self.notices += check_inputs(table, reference, self.job.config, self.job.ignore_contrast)
        return table, reference

    def _plan(self, table: ParticleTable, device: torch.device) -> RunPlan:
        """What the engine may use, and a notice of it. InputError if that cannot fit, with the nearest setting that does."""
        from verglas.cli.plan import this_machine
        from verglas.refinement.plan import plan
        from verglas.refinement.plan_sizes import Problem

        made = plan(Problem.of(table), self.job.config, this_machine(device))
        made.check()
        peaks = " and ".join(f"{made.peak(where) / 1e9:.2g} GB of the {where}" for where in made.places)
        self.notices.append(f"planned: at most {peaks}, about {duration_text(made.seconds)}")
        return made

    def _session(
        self, run: RunFolder | None, table: ParticleTable, reference: Map, computing: tuple[Any, int, str], planned: RunPlan
    ) -> Session:  # fmt: skip
        """The engine with all images read, at the state of the last checkpoint if there is one."""
        from verglas.refinement import checkpoint, driver
        from verglas.refinement.files import remove_leftovers

        device, threads, reason = computing
        if run is None:
            session = self._prepared(table, reference, device, threads, None, planned)
            self.notices += session.notices
            return session
        with run.progress("Reading images", len(table), "particles") as bar:
            session = self._prepared(
                table, reference, device, threads, lambda _, done, total: bar.advance(done - bar.done), planned
            )
        self.notices += session.notices
        chosen = dict(session.chosen)
        reasons = "; ".join(text for text in (reason, chosen.get("residency"), chosen.get("reason")) if text)
        run.provenance(device, chosen.get("kernels", ""), chosen.get("precision", ""), reasons)
        for notice in self.notices:
            run.log(notice)
        remove_leftovers(run.target)
        newest = checkpoint.newest(run.target, run.log) if self.resumed else None
        if newest is None:
            if self.resumed:
                run.log("no iteration was finished: starting from the beginning")
            return session
        state, _, fingerprint = checkpoint.load(newest)
        if fingerprint != checkpoint.fingerprint(table):
            raise InputError(self.job.particles, "these are not the particles that the run began with", "the same file",
                             "Put the file back as it was, or start a new run.")  # fmt: skip
        run.log(f"going on after iteration {state.iteration}")
        self.history = read_history(run.path("events.jsonl"), state.iteration)
        return driver.resume(session, state)

    def _prepared(
        self, table: ParticleTable, reference: Map, device: torch.device, threads: int, progress: Progress | None,
        planned: RunPlan,
    ) -> Session:  # fmt: skip
        """The engine at its start."""
        from verglas.refinement import driver

        return driver.prepare(table, reference, self.job.config, device, threads, progress, planned)

    def _iterate(self, run: RunFolder | None, table: ParticleTable, session: Session) -> Iterator[Iteration]:
        from verglas.cli.refine_report import ReportWriter
        from verglas.refinement import driver

        report = ReportWriter(run, self.job.config) if run else None
        say_line = run.log if run else lambda line: None
        # A GPU goes on while the files are written; on a CPU both would want the same cores.
        behind = session.on.device.type == "cuda"
        with Behind(behind) as later, Watch(say_line, self.history, quiet=run is None) as watch:
            for iteration in driver.iterations(session, watch.progress):
                if iteration.final is not None:
                    self._result = result_of(iteration, table)
                watch.finished(record_of(iteration, self._result.resolution if self._result else None))
                if run is not None and report is not None:
                    later.do(partial(self._write, run, table, iteration, list(self.history), report))
                yield iteration
        if self._result is None:
            raise VerglasError("The refinement ended without its last iteration.")

    def _write(
        self, run: RunFolder, table: ParticleTable, iteration: Iteration, history: list[Record], report: ReportWriter
    ) -> None:
        """Files, event, checkpoint, report: a kill between any two leaves a run that goes on and writes the same again.

        The last iteration has no checkpoint: what it has beyond its state, the joined map, is not in one.
        """
        from verglas.refinement import checkpoint, files

        state, config = iteration.state, self.job.config
        files.write_iteration(run.target, state, table, config, iteration.directions_D2, command_line())
        note_figures(run, state, history)
        if iteration.final is not None:
            maps = files.FinalMaps(iteration.final.joined, iteration.final.unfil_halves)
            files.write_final(run.target, state, table, config, maps, iteration.directions_D2, command_line())
        run.event("iteration", **history[-1])
        if iteration.final is None:
            path = checkpoint.path_of(run.target, state.iteration)
            checkpoint.save(path, state, config, checkpoint.fingerprint(table))
            checkpoint.prune(run.target)
        report.update(history, iteration)


@contextmanager
def _withdrawn_if_refused(run: RunFolder | None, resumed: bool) -> Iterator[None]:
    """Remove the folder of a new run that ends by an error of the input before its first checkpoint, and put the run that it
    was to replace back: nothing was computed."""
    from verglas.refinement import checkpoint

    try:
        yield
    except (InputError, OutputError):
        if run is not None and not resumed and checkpoint.newest(run.target) is None:
            shutil.rmtree(run.target, ignore_errors=True)
            old = staging.sibling(run.target, "replaced")
            if old.exists():
                staging.unsign(old)
                os.rename(old, run.target)
        raise


@contextmanager
def _way_on(run: RunFolder | None, command: str) -> Iterator[None]:
    """Say how to go on when the user stops a run."""
    try:
        yield
    except KeyboardInterrupt:
        if run is not None:
            say(f"The run can go on: verglas {command} --continue {run.out}")
        raise


def note_figures(run: RunFolder, state: State, history: list[Record]) -> None:
    """Key figures of the run as it stands; `resolution` (FSC 0.143 of the unfiltered halves, no mask) is known at the end."""
    last = history[-1]
    run.figures.clear()  # what is known at the end only comes first
    if last["resolution_fsc"] is not None:
        run.figure("resolution", rounded(last["resolution_fsc"]), "Å")
    run.figure("resolution_at_SSNR_1", rounded(state.current_resolution), "Å")
    run.figure("iterations", state.iteration)
    run.figure("angular_sampling", rounded(last["fine_angular_step"]), "°")
    for name, unit in (("angles", "°"), ("offsets", "Å")):
        if last[f"accuracy_{name}"] is not None:
            run.figure(f"accuracy_of_{name}", rounded(last[f"accuracy_{name}"]), unit)
    run.figure("particles", len(state.poses.norm_B))
    run.figure("box", state.box, "px")
    run.figure("pixel_size", state.pixel_size, "Å")
    run.figure("mean_Pmax", rounded(last["pmax"]))


def rounded(value: float) -> float:
    """To three significant digits."""
    return float(f"{value:.3g}")


def result_of(iteration: Iteration, table: ParticleTable) -> Result:
    """The result from the last iteration."""
    import numpy as np

    from verglas.core.shells import fsc, resolution_angstrom
    from verglas.io.mrc import Map
    from verglas.refinement.files_data import updated_table

    final, state = iteration.final, iteration.state
    assert final is not None, "the last iteration"
    joined, first, second = (
        Map(np.asarray(map_ZYX.detach().cpu(), np.float32), state.pixel_size)
        for map_ZYX in (final.joined.map_ZYX, *final.unfil_halves)
    )
    fsc_S = fsc(*final.unfil_halves)
    resolution = resolution_angstrom(fsc_S, state.box, state.pixel_size)
    return Result(joined, (first, second), fsc_S, resolution, updated_table(state, table), state)


def job_of_run(out: Path, device: Literal["auto", "cpu", "cuda"], threads: int | None) -> Job:
    """The job of the run in the folder `out`, from its config.json; InputError if it is not one of `verglas refine`."""
    where = out / "config.json"
    if not where.is_file():
        raise InputError("--continue", f"{out} holds no run (no config.json in it)", "the --out of a run that was stopped")
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
        options = content["options"]
        if content["command"] != "refine":
            raise InputError("--continue", f"{out} is a run of `verglas {content['command']}`", "one of `verglas refine`")
        config = RefineConfig(**(options["config"] | {"mask": path_or_none(options["config"]["mask"])}))
        paths = {name: path_or_none(options[name]) for name in ("particles", "reference", "folder")}
        rest = {name: options[name] for name in ("skip_bad", "ignore_contrast")}
        return Job(config=config, out=out, device=device, threads=threads, **paths, **rest)  # type: ignore[arg-type]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(where, f"it cannot be understood ({error})", "the file that `verglas refine` wrote",
                         "Start the run again.") from error  # fmt: skip


def path_or_none(text: str | None) -> Path | None:
    """JSON's null or text -> None or Path."""
    return None if text is None else Path(text)


def absolute(path: Path | str) -> Path:
    """The path from the root on, links kept: a run may be continued from another folder."""
    return Path(os.path.abspath(path))


def refine(
    particles: Path | str | ParticleTable,
    reference: Path | str | Map,
    config: RefineConfig | None = None,
    *,
    out: Path | str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    **options: Any,
) -> Refinement:
    """Refine poses and map; iterate the returned object for one event per iteration, or call its `run()`.

    particles, reference: files, or what was read from them. config: options of the refinement; single ones may be given
    (`diameter=180, symmetry="D2"`), beside it or instead. out: folder for files and report as `verglas refine` writes them
    (needs files as input); None writes nothing. Further options: threads, folder, skip_bad, ignore_contrast, overwrite.
    Raises InputError for what cannot be refined.
    """
    names = {one.name for one in fields(RefineConfig)}
    own = {name: options.pop(name) for name in list(options) if name in names}
    if config is None and "diameter" not in own:
        raise InputError("refine", "no diameter", "diameter=... (Å), or a RefineConfig")
    chosen = RefineConfig(**own) if config is None else replace(config, **own)
    in_memory = not isinstance(particles, Path | str) or not isinstance(reference, Path | str)
    if in_memory and out is not None:
        raise InputError("refine", "out together with particles or a reference in memory", "files, which a run can go on with")
    job = Job(
        particles=absolute(particles if isinstance(particles, Path | str) else particles.source),
        reference=absolute(reference) if isinstance(reference, Path | str) else Path("reference"),
        config=chosen if chosen.mask is None else replace(chosen, mask=absolute(chosen.mask)),
        out=None if out is None else Path(out), device=device, **options,
    )  # fmt: skip
    job.check()
    table = None if isinstance(particles, Path | str) else particles
    return Refinement(job, table, None if isinstance(reference, Path | str) else reference)
