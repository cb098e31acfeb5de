"""One search for first models, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from verglas.cli.abinitio_maps import consistency_of, place_on_axes, propose_group
from verglas.cli.classify3d_run import FEWEST_PER_CLASS, class_record
from verglas.cli.job import Job
from verglas.cli.refine_watch import Record
from verglas.cli.run_loop import Run, check_classes, note_common_figures, rounded
from verglas.cli.solve_choices import doubt_of_starts
from verglas.errors import InputError
from verglas.refinement.config import AbInitioConfig, RefineConfig

if TYPE_CHECKING:
    import torch

    from verglas.cli.abinitio_report import FirstModelsReport
    from verglas.io.runfolder import RunFolder
    from verglas.particles.table import ParticleTable
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State

HAND = "The hand of the maps is undetermined: images of a map and of its mirror image are the same."


@dataclass(frozen=True, kw_only=True)
class AbInitioJob(Job):
    """What first models are made from."""

    command: ClassVar[str] = "abinitio"
    config_class: ClassVar[type[RefineConfig]] = AbInitioConfig
    config: AbInitioConfig

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        c = self.config
        for name, count in (("--classes", c.classes), ("--restarts", c.restarts), ("--steps", c.steps), ("--batch", c.batch),
                            ("--full-iterations", c.full_iterations)):  # fmt: skip
            if count < 1:
                raise InputError(name, str(count), "1 or more")
        for name, value in (("--tau2-fudge", c.tau2_fudge), ("--final-resolution", c.final_resolution)):
            if not 0 < value < float("inf"):
                raise InputError(name, f"{value:g}", "a finite number above 0")
        if c.final_resolution > c.initial_resolution:
            raise InputError("--final-resolution", f"{c.final_resolution:g} Å",
                             f"at most --initial-resolution, {c.initial_resolution:g} Å")  # fmt: skip
        super().check()


class FirstModels(Run):
    """A search under way: iterate for one event per round or iteration, or `finish()`.

    The maps are those of the last event's state: event.state.halves[k].map_ZYX, classes in event.state.poses.class_B.
    """

    job: AbInitioJob

    def inputs(self) -> ParticleTable:
        """Particles, checked; a ball stands in for the reference where contrast is judged."""
        from verglas.refinement.inputs import check_without_reference

        table, config = self.read_particles(), self.job.config
        check_classes(table, config.classes, FEWEST_PER_CLASS)
        self.notices += check_without_reference(table, config, self.job.ignore_contrast)
        return table

    def prepare(
        self, table: ParticleTable, device: torch.device, threads: int, progress: Progress | None, planned: RunPlan
    ) -> Session:
        """The engine at its start, all images read."""
        from verglas.refinement import abinitio

        self.notices.append(HAND)
        return abinitio.prepare(table, self.job.config, device, threads, progress, planned, self.ranks)

    def iterations(self, session: Session, progress: Progress) -> Iterator[Iteration]:
        """Rounds of the gradient, then iterations with all particles."""
        from verglas.refinement import abinitio

        return abinitio.iterations(session, progress, place_on_axes, propose_group)

    def record(self, iteration: Iteration, table: ParticleTable) -> Record:
        """With the figures of the classes, the stage, and, when restarts were compared, how much they agree."""
        return abinitio_record(iteration, self.job.config, self.history[-1] if self.history else None)

    def report(self, run: RunFolder) -> FirstModelsReport:
        """With curves, slices and projections of the classes."""
        from verglas.cli.abinitio_report import FirstModelsReport

        return FirstModelsReport(run, self.job.config)

    def note_figures(self, run: RunFolder, state: State, last: Record) -> None:
        """Share and resolution of each class come first."""
        for number, one in enumerate(last["classes"], 1):
            run.figure(f"class_{number}_share", rounded(one["share"]))
            run.figure(f"class_{number}_resolution_at_SSNR_1", rounded(one["resolution"]), "Å")
        if last["consistency"] is not None:
            run.figure("consistency_of_restarts", rounded(last["consistency"]), "mean correlation at 20 Å, either hand")
        if doubt_of_starts(last["consistency"]):
            run.figure("warning", "random starts found different maps: noise, or too few particles")
        run.figure("hand", "undetermined")
        run.figure("symmetry", last["point_group"] or "not looked for yet")
        if last["agreement_with_turned_copies"] is not None:
            run.figure("worst_operation", rounded(last["agreement_with_turned_copies"]), "agreement with turned copies")
        run.figure("iterations", state.iteration)
        note_common_figures(run, state, last)

    def write_files(self, run: RunFolder, table: ParticleTable, iteration: Iteration) -> None:
        """STAR files and maps under the symmetry that they have by now; at the end the map of the largest class."""
        import numpy as np

        from verglas.io.mrc import Map, write_map
        from verglas.io.provenance import command_line
        from verglas.refinement import abinitio, files
        from verglas.refinement.abinitio_schedule import stage_of, total_iterations
        from verglas.refinement.abinitio_symmetry import decided

        state = iteration.state
        config = decided(self.job.config, state)
        now = abinitio.full_config(config, stage_of(state.iteration, config), state.pixel_size)
        files.write_iteration(run.target, state, table, now, iteration.directions_D2, command_line())
        if state.iteration == total_iterations(config):
            largest = max(state.halves, key=lambda model: float(model.direction_prior_D.sum()))
            map_ZYX = np.asarray(largest.map_ZYX.cpu(), np.float32)
            write_map(run.target / "initial_model.mrc", Map(map_ZYX, state.pixel_size), overwrite=True)


def abinitio_record(iteration: Iteration, config: AbInitioConfig, before: Record | None) -> Record:
    """All numbers of one round or iteration, as `class_record`. before: the record of the one before."""
    from verglas.refinement.abinitio_schedule import Stage, stage_of, total_iterations
    from verglas.refinement.abinitio_symmetry import decided

    state = iteration.state
    config = decided(config, state)
    stage = stage_of(state.iteration, config)
    assert stage is not None
    left = total_iterations(config) - state.iteration
    consistency = before["consistency"] if before else None
    if stage is Stage.COMPARE:
        consistency = consistency_of(state, config.classes)
        doubt = doubt_of_starts(consistency)
        iteration = replace(iteration, notes=[*iteration.notes, doubt] if doubt else iteration.notes)
    return class_record(iteration, config) | {
        "final": left == 0,
        "iterations_left": left,
        "searches_left": float(left),
        "stage": stage.value,
        "point_group": None if config.find_symmetry else config.symmetry,
        "agreement_with_turned_copies": state.found_agreement if state.found_group else None,
        "consistency": consistency,
    }
