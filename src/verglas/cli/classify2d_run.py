"""One 2-D classification, from the command line or from Python."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from verglas.cli.job import Job
from verglas.cli.refine_watch import Record, record_of
from verglas.cli.run_loop import Run, check_classes, note_common_figures, rounded
from verglas.errors import InputError
from verglas.io.provenance import command_line
from verglas.refinement.config import Classify2dConfig, RefineConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    from verglas.cli.classify2d_report import Class2dReport
    from verglas.io.runfolder import RunFolder
    from verglas.particles.table import ParticleTable
    from verglas.refinement.class_quality import ClassQuality
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State

FEWEST_PER_CLASS = 5  # particles; below, classes are their particles' noise
MOST_CLASSES = 500
PSI_STEPS = 1.0, 60.0  # degrees
SELECTED, RANKING, MONTAGE = "particles_selected.star", "class_ranking.star", "class_averages.png"
MONTAGE_COLUMNS = 10
LEFT_OUT = "left_out_of_these_classes"  # figure of result.json


@dataclass(frozen=True, kw_only=True)
class Classify2dJob(Job):
    """What a 2-D classification is made from."""

    command: ClassVar[str] = "classify2d"
    config_class: ClassVar[type[RefineConfig]] = Classify2dConfig
    config: Classify2dConfig

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        from verglas.refinement.class_quality import check_rule

        c = self.config
        if c.max_iterations < 1:
            raise InputError("--iterations", str(c.max_iterations), "1 or more")
        if not 1 <= c.classes <= MOST_CLASSES:
            raise InputError("--classes", str(c.classes), f"1 to {MOST_CLASSES}")
        if not 0 < c.tau2_fudge < float("inf"):
            raise InputError("--tau2-fudge", f"{c.tau2_fudge:g}", "a finite number above 0", "2 is usual.")
        if not PSI_STEPS[0] <= c.psi_step <= PSI_STEPS[1]:
            raise InputError("--psi-step", f"{c.psi_step:g}°", f"{PSI_STEPS[0]:g} to {PSI_STEPS[1]:g}", "12 is usual.")
        if c.batch < 1:
            raise InputError("--batch", str(c.batch), "1 or more", f"{Classify2dConfig.batch} is usual.")
        check_rule(c.select, c.classes)
        super().check()


class Classification2d(Run):
    """A 2-D classification under way: iterate for one event per iteration, or `finish()`; `selected()` are then its particles.

    The averages are those of the last event's state: event.state.halves[k].map_ZYX [N, N], classes in event.state.poses.class_B.
    """

    job: Classify2dJob

    def inputs(self) -> ParticleTable:
        """Particles, checked."""
        from verglas.refinement.dataset import contrast
        from verglas.refinement.inputs import check_diameter, check_images

        table, config = self.read_particles(), self.job.config
        check_diameter(table, config)
        contrast(table)  # InputError if columns are missing
        check_classes(table, config.classes, FEWEST_PER_CLASS)
        self.notices += check_images(table, config, self.job.ignore_contrast)
        return table

    def prepare(
        self, table: ParticleTable, device: torch.device, threads: int, progress: Progress | None, planned: RunPlan
    ) -> Session:
        """The engine at its start, all images read."""
        from verglas.refinement import classify2d

        return classify2d.prepare(table, self.job.config, device, threads, progress, planned, self.ranks)

    def iterations(self, session: Session, progress: Progress) -> Iterator[Iteration]:
        """As many as the configuration asks for."""
        from verglas.refinement import classify2d

        return classify2d.iterations(session, progress)

    def record(self, iteration: Iteration, table: ParticleTable) -> Record:
        """With the figures of the classes."""
        from verglas.refinement.classify2d_schedule import searches_left, seen

        state, config = iteration.state, self.job.config
        left, looked_at = config.max_iterations - state.iteration, seen(state.iteration, len(table), config)
        self._last = state, table
        return record_of(iteration, None) | {
            "final": left == 0, "iterations_left": left, "seen": looked_at,
            "searches_left": searches_left(state.iteration, len(table), config), "pmax": state.halves[0].average_pmax,
            "changes_classes": state.schedule.changes_classes,
            "averages": [vars(one) for one in self.qualities(state)],
        }  # fmt: skip

    def qualities(self, state: State) -> list[ClassQuality]:
        """Figures of the classes."""
        from verglas.refinement.class_quality import class_qualities

        return class_qualities(state, self.job.config.diameter)

    def selected(self) -> ParticleTable:
        """The particles of the classes that the rule selects, with their poses; after the last iteration."""
        from verglas.refinement.files_data import updated_table

        state, table = self._last
        return updated_table(state, table).select(self.selected_rows(state))

    @property
    def last_state(self) -> State:
        """After the last iteration so far."""
        return self._last[0]

    def selected_rows(self, state: State) -> np.ndarray:
        """Rows of the table that the rule selects, ascending."""
        from verglas.refinement.class_quality import chosen_particles

        return chosen_particles(self.job.config.select, self.qualities(state), state).numpy()

    def report(self, run: RunFolder) -> Class2dReport:
        """With a montage of the averages."""
        from verglas.cli.classify2d_report import Class2dReport

        return Class2dReport(run, self.job.config)

    def write_files(self, run: RunFolder, table: ParticleTable, iteration: Iteration) -> None:
        """After the last iteration ranking and selection, too."""
        import numpy as np

        from verglas.cli.classify2d_files import write_ranking
        from verglas.refinement import files
        from verglas.refinement.class_quality import chosen_classes, ranking
        from verglas.refinement.files_data import updated_table
        from verglas.report.pictures import montage, write_png

        state, config = iteration.state, self.job.config
        files.write_classes2d(run.target, state, table, config, iteration.directions_D2, command_line())
        if state.iteration < config.max_iterations:
            return
        qualities, rows = self.qualities(state), self.selected_rows(state)
        stack = run.target / f"{files.iteration_name(state.iteration)}_classes.mrcs"
        write_ranking(run.target / RANKING, stack, qualities, chosen_classes(config.select, qualities))
        averages = np.stack([state.halves[k].map_ZYX.float().cpu().numpy() for k in ranking(qualities)])
        write_png(run.target / MONTAGE, montage(averages, MONTAGE_COLUMNS))
        if len(rows):
            updated_table(state, table).select(rows).write(run.target / SELECTED, overwrite=True)
        else:
            run.log(f"No class is selected by '{config.select}': {SELECTED} is not written.")

    def note_figures(self, run: RunFolder, state: State, last: Record) -> None:
        """What is selected comes first."""
        rows = self.selected_rows(state)
        selected = set(state.poses.class_B[rows].tolist())
        run.figure("selected", len(rows), "particles")
        run.figure("selected_classes", len(selected))
        run.figure(LEFT_OUT, sum(last["averages"][k]["particles"] for k in selected) - len(rows), "particles")
        run.figure("empty_classes", sum(one["particles"] == 0 for one in last["averages"]))
        run.figure("best_resolution_at_SSNR_1", rounded(state.current_resolution), "Å")
        run.figure("iterations", state.iteration)
        run.figure("class_changed", rounded(last["changes_classes"]), "of the particles in the last iteration")
        note_common_figures(run, state, last)
