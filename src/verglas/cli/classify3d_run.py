"""One 3-D classification, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from verglas.cli.job import Job
from verglas.cli.references import check_alike
from verglas.cli.refine_watch import Record, record_of
from verglas.cli.run_loop import Run, check_classes, note_common_figures, rounded
from verglas.errors import InputError
from verglas.refinement.config import ClassifyConfig, RefineConfig

if TYPE_CHECKING:
    import torch

    from verglas.cli.classify3d_report import ClassReport
    from verglas.io.runfolder import RunFolder
    from verglas.particles.table import ParticleTable
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State

FEWEST_PER_CLASS = 20  # particles; below, a class holds little but noise


@dataclass(frozen=True, kw_only=True)
class ClassifyJob(Job):
    """What a classification is made from. references: one for all classes, or one for each."""

    command: ClassVar[str] = "classify3d"
    config_class: ClassVar[type[RefineConfig]] = ClassifyConfig
    config: ClassifyConfig
    references: list[Path]

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        c = self.config
        if c.max_iterations < 1:
            raise InputError("--iterations", str(c.max_iterations), "1 or more")
        if c.classes < 1:
            raise InputError("--classes", str(c.classes), "1 or more")
        if len(self.references) not in (1, c.classes):
            raise InputError("--reference", f"{len(self.references)} maps for {c.classes} classes",
                             "one map, or one per class")  # fmt: skip
        if not 0 < c.tau2_fudge < float("inf"):
            raise InputError("--tau2-fudge", f"{c.tau2_fudge:g}", "a finite number above 0", "4 is usual.")
        if c.limit_resolution is not None and not 0 < c.limit_resolution < float("inf"):
            raise InputError("--limit-resolution-estep", f"{c.limit_resolution:g} Å", "a finite number above 0")
        if not 0 <= c.local_sigma <= 180:
            raise InputError("--local-search", f"{c.local_sigma:g}°", "0 (all poses) to 180")
        if c.relax_symmetry is not None and c.align != "all":
            raise InputError("--relax-sym", "given together with --skip-align or --skip-rotate", "one of them")
        if c.local_sigma and c.align != "all":
            raise InputError("--local-search", "given together with --skip-align or --skip-rotate", "one of them")
        super().check()


class Classification(Run):
    """A classification under way: iterate for one event per iteration, or `finish()`.

    The maps are those of the last event's state: event.state.halves[k].map_ZYX, classes in event.state.poses.class_B.
    """

    job: ClassifyJob

    found: ClassVar[tuple[str, ...]] = ("_references",)

    def inputs(self) -> ParticleTable:
        """Particles and references, checked."""
        from verglas.io.mrc import read_map
        from verglas.refinement.inputs import check_inputs, check_poses, check_voxel_size, reference_fault

        table, config = self.read_particles(), self.job.config
        self._references = [read_map(path) for path in self.job.references]
        check_alike(self.job.references, self._references)
        self.notices += check_inputs(table, self._references[0], config, self.job.ignore_contrast)
        check_classes(table, config.classes, FEWEST_PER_CLASS)
        if config.local_sigma:
            check_poses(table, "--local-search")
        elif config.align != "all":
            check_poses(table, "--skip-align or --skip-rotate")
        elif config.relax_symmetry is not None:
            check_poses(table, "--relax-sym")
        for path, reference in zip(self.job.references[1:], self._references[1:]):
            check_voxel_size(reference, config.diameter)
            fault = reference_fault(reference, config.diameter)
            if fault is not None and fault.is_certain and not self.job.ignore_contrast:
                raise InputError(path, fault.found, fault.expected, fault.fix)
        return table

    def prepare(
        self, table: ParticleTable, device: torch.device, threads: int, progress: Progress | None, planned: RunPlan
    ) -> Session:
        """The engine at its start, all images read."""
        from verglas.refinement import classes

        return classes.prepare(table, self._references, self.job.config, device, threads, progress, planned, self.ranks)

    def iterations(self, session: Session, progress: Progress) -> Iterator[Iteration]:
        """As many as the configuration asks for."""
        from verglas.refinement import classes

        return classes.iterations(session, progress)

    def record(self, iteration: Iteration, table: ParticleTable) -> Record:
        """With the figures of the classes."""
        return class_record(iteration, self.job.config)

    def report(self, run: RunFolder) -> ClassReport:
        """With curves and slices of the classes."""
        from verglas.cli.classify3d_report import ClassReport

        return ClassReport(run, self.job.config)

    def note_figures(self, run: RunFolder, state: State, last: Record) -> None:
        """Share and resolution of each class come first."""
        for number, one in enumerate(last["classes"], 1):
            run.figure(f"class_{number}_share", rounded(one["share"]))
            run.figure(f"class_{number}_resolution_at_SSNR_1", rounded(one["resolution"]), "Å")
        run.figure("iterations", state.iteration)
        run.figure("class_changed", rounded(last["changes_classes"]), "of the particles in the last iteration")
        run.figure("angular_sampling", rounded(last["fine_angular_step"]), "°")
        note_common_figures(run, state, last)


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
        "align": config.align,
        "settling": len(figures) < config.classes,
        "changes_classes": state.schedule.changes_classes,
        "classes": [
            {"share": one.share, "resolution": one.resolution, "particles": one.particles} for one in figures
        ],
    }  # fmt: skip
