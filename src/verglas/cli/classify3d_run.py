"""One 3-D classification, from the command line or from Python: as `refine_run`, whose steps it shares."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from verglas.cli.behind import Behind
from verglas.cli.refine_run import Job, Refinement, absolute, path_or_none, rounded
from verglas.cli.refine_watch import Record, Watch, record_of
from verglas.errors import InputError
from verglas.io.provenance import command_line
from verglas.refinement.config import ClassifyConfig, RefineConfig

if TYPE_CHECKING:
    import torch

    from verglas.cli.classify3d_report import ClassReport
    from verglas.io.mrc import Map
    from verglas.io.runfolder import RunFolder
    from verglas.particles.table import ParticleTable
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State

FEWEST_PER_CLASS = 20  # particles; below, a class holds little but noise


@dataclass(frozen=True, kw_only=True)
class ClassifyJob(Job):
    """What a classification is made from. reference: of the first class, or of all; further: of the other classes."""

    config: ClassifyConfig
    further: list[Path] = field(default_factory=list)

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        c = self.config
        if c.max_iterations < 1:
            raise InputError("--iterations", str(c.max_iterations), "1 or more")
        if c.classes < 1:
            raise InputError("--classes", str(c.classes), "1 or more")
        if len(self.further) + 1 not in (1, c.classes):
            raise InputError("--reference", f"{len(self.further) + 1} maps for {c.classes} classes",
                             "one map, or one per class")  # fmt: skip
        if not 0 < c.tau2_fudge < float("inf"):
            raise InputError("--tau2-fudge", f"{c.tau2_fudge:g}", "a finite number above 0", "4 is usual.")
        if c.limit_resolution is not None and not 0 < c.limit_resolution < float("inf"):
            raise InputError("--limit-resolution-estep", f"{c.limit_resolution:g} Å", "a finite number above 0")
        if not 0 <= c.local_sigma <= 180:
            raise InputError("--local-search", f"{c.local_sigma:g}°", "0 (all poses) to 180")
        super().check()


class Classification(Refinement):
    """A classification under way: iterate for one event per iteration. In memory: as for `Refinement`, with the first reference.

    The maps are those of the last event's state: event.state.halves[k].map_ZYX, classes in event.state.poses.class_B.
    """

    command = "classify3d"
    job: ClassifyJob

    def _inputs(self) -> tuple[ParticleTable, Map]:
        from verglas.io.mrc import read_map
        from verglas.refinement.inputs import check_voxel_size, reference_fault

        table, first = super()._inputs()
        config = self.job.config
        if len(table) < config.classes * FEWEST_PER_CLASS:
            raise InputError("--classes", f"{config.classes} for {len(table)} particles",
                             f"at most {len(table) // FEWEST_PER_CLASS}: {FEWEST_PER_CLASS} particles a class")  # fmt: skip
        if config.local_sigma and "rlnAngleRot" not in table.frame.columns:
            raise InputError(self.job.particles, "no poses (rlnAngleRot, ...) to search near to", "particles with poses",
                             "Leave --local-search out.")  # fmt: skip
        self._references = [first, *(read_map(path) for path in self.job.further)]
        for path, reference in zip(self.job.further, self._references[1:]):
            check_voxel_size(reference, config.diameter)
            fault = reference_fault(reference, config.diameter)
            if fault is not None and fault.is_certain and not self.job.ignore_contrast:
                raise InputError(path, fault.found, fault.expected, fault.fix)
        return table, first

    def _plan(self, table: ParticleTable, device: torch.device) -> RunPlan:
        """What the engine may use: as for a refinement to the pixels' resolution, whose iterations take no less memory."""
        from verglas.cli.plan import this_machine
        from verglas.refinement.plan import plan
        from verglas.refinement.plan_sizes import Problem

        config = self.job.config
        plain = {one.name: getattr(config, one.name) for one in fields(RefineConfig)}
        plain |= {"local_from_order": RefineConfig.local_from_order, "max_iterations": RefineConfig.max_iterations}
        made = plan(Problem.of(table), RefineConfig(**plain), this_machine(device))
        made.check()
        return made

    def _prepared(
        self, table: ParticleTable, reference: Map, device: torch.device, threads: int, progress: Progress | None,
        planned: RunPlan,
    ) -> Session:  # fmt: skip
        from verglas.refinement import classes

        return classes.prepare(table, self._references, self.job.config, device, threads, progress, planned)

    def _iterate(self, run: RunFolder | None, table: ParticleTable, session: Session) -> Iterator[Iteration]:
        from verglas.cli.classify3d_report import ClassReport
        from verglas.refinement import classes

        report = ClassReport(run, self.job.config) if run else None
        say_line = run.log if run else lambda line: None
        behind = session.on.device.type == "cuda"
        with Behind(behind) as later, Watch(say_line, self.history, quiet=run is None) as watch:
            for iteration in classes.iterations(session, watch.progress):
                watch.finished(class_record(iteration, self.job.config))
                if run is not None and report is not None:
                    later.do(partial(self._write_classes, run, table, iteration, list(self.history), report))
                yield iteration

    def _write_classes(
        self, run: RunFolder, table: ParticleTable, iteration: Iteration, history: list[Record], report: ClassReport
    ) -> None:
        """Files, event, checkpoint, report: a kill between any two leaves a run that goes on and writes the same again."""
        from verglas.refinement import checkpoint, files

        state, config = iteration.state, self.job.config
        files.write_iteration(run.target, state, table, config, iteration.directions_D2, command_line())
        note_figures(run, state, history)
        run.event("iteration", **history[-1])
        checkpoint.save(checkpoint.path_of(run.target, state.iteration), state, config, checkpoint.fingerprint(table))
        checkpoint.prune(run.target)
        report.update(history, iteration)


def class_record(iteration: Iteration, config: ClassifyConfig) -> Record:
    """All numbers of one iteration, as `record_of`, with those of the classes."""
    from verglas.refinement.classes import class_figures

    state = iteration.state
    left = config.max_iterations - state.iteration
    figures = class_figures(state)
    return record_of(iteration, None) | {
        "final": left == 0,
        "iterations_left": left,
        "searches_left": float(left),
        "changes_classes": state.schedule.changes_classes,
        "classes": [
            {"share": one.share, "resolution": one.resolution, "particles": one.particles} for one in figures
        ],
    }  # fmt: skip


def note_figures(run: RunFolder, state: State, history: list[Record]) -> None:
    """Key figures of the run as it stands."""
    last = history[-1]
    run.figures.clear()
    for number, one in enumerate(last["classes"], 1):
        run.figure(f"class_{number}_share", rounded(one["share"]))
        run.figure(f"class_{number}_resolution_at_SSNR_1", rounded(one["resolution"]), "Å")
    run.figure("iterations", state.iteration)
    run.figure("class_changed", rounded(last["changes_classes"]), "of the particles in the last iteration")
    run.figure("angular_sampling", rounded(last["fine_angular_step"]), "°")
    run.figure("particles", len(state.poses.norm_B))
    run.figure("box", state.box, "px")
    run.figure("pixel_size", state.pixel_size, "Å")
    run.figure("mean_Pmax", rounded(last["pmax"]))


def job_of_run(out: Path, device: Literal["auto", "cpu", "cuda"], threads: int | None) -> ClassifyJob:
    """The job of the run in the folder `out`, from its config.json; InputError if it is not one of `verglas classify3d`."""
    where = out / "config.json"
    if not where.is_file():
        raise InputError("--continue", f"{out} holds no run (no config.json in it)", "the --out of a run that was stopped")
    try:
        content = json.loads(where.read_text(encoding="utf-8"))
        options = content["options"]
        if content["command"] != Classification.command:
            raise InputError("--continue", f"{out} is a run of `verglas {content['command']}`", "one of `verglas classify3d`")
        config = ClassifyConfig(**(options["config"] | {"mask": path_or_none(options["config"]["mask"])}))
        return ClassifyJob(
            config=config, out=out, device=device, threads=threads, particles=Path(options["particles"]),
            reference=Path(options["reference"]), further=[Path(text) for text in options["further"]],
            folder=path_or_none(options["folder"]), skip_bad=options["skip_bad"], ignore_contrast=options["ignore_contrast"],
        )  # fmt: skip
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(where, f"it cannot be understood ({error})", "the file that `verglas classify3d` wrote",
                         "Start the run again.") from error  # fmt: skip


__all__ = ["Classification", "ClassifyJob", "absolute", "job_of_run"]
