"""One refinement, from the command line or from Python. Nothing heavy is imported before a run begins."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from verglas.cli.common import absolute
from verglas.cli.job import Job
from verglas.cli.refine_watch import Record, record_of
from verglas.cli.run_loop import Run, note_common_figures, rounded
from verglas.errors import InputError, VerglasError
from verglas.io.provenance import command_line
from verglas.refinement.config import RefineConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from verglas.cli.refine_report import ReportWriter
    from verglas.io.mrc import Map
    from verglas.io.runfolder import RunFolder
    from verglas.particles.table import ParticleTable
    from verglas.refinement.dataset import Progress
    from verglas.refinement.driver import Iteration, Session
    from verglas.refinement.plan import RunPlan
    from verglas.refinement.state import State


@dataclass(frozen=True, kw_only=True)
class RefineJob(Job):
    """What a refinement is made from."""

    command: ClassVar[str] = "refine"
    reference: Path

    def check(self) -> None:
        """InputError for options that make no sense whatever the particles are."""
        super().check()
        c = self.config
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


class Refinement(Run):
    """A refinement under way: iterate for one event per iteration, or `run()` to the end; then `result` holds what came out.

    table, reference: used instead of reading the files that the job names; resumed: go on with the run in job.out.
    """

    job: RefineJob
    found: ClassVar[tuple[str, ...]] = ("_reference",)

    def __init__(
        self, job: RefineJob, table: ParticleTable | None = None, reference: Map | None = None, resumed: bool = False
    ) -> None:
        super().__init__(job, table, resumed)
        self._reference = reference
        self._result: Result | None = None

    def run(self) -> Result:
        """Go through all remaining iterations."""
        self.finish()
        return self.result

    @property
    def result(self) -> Result:
        """Map, half maps, FSC and poses; RuntimeError before the last iteration."""
        if self._result is None:
            raise RuntimeError("the refinement is not finished: iterate to the end, or call run()")
        return self._result

    def inputs(self) -> ParticleTable:
        """Particles and reference, checked."""
        from verglas.io.mrc import read_map
        from verglas.refinement.inputs import check_inputs, check_poses

        table, config = self.read_particles(), self.job.config
        if config.relax_symmetry is not None:
            check_poses(table, "--relax-sym")
        elif config.healpix_order >= config.local_from_order:
            check_poses(table, f"a local search (--healpix-order {config.local_from_order} or more)")
        if self._reference is None:
            self._reference = read_map(self.job.reference)
        self.notices += check_inputs(table, self._reference, config, self.job.ignore_contrast)
        return table

    def prepare(
        self, table: ParticleTable, device: torch.device, threads: int, progress: Progress | None, planned: RunPlan
    ) -> Session:
        """The engine at its start, all images read."""
        from verglas.refinement import driver

        assert self._reference is not None
        return driver.prepare(table, self._reference, self.job.config, device, threads, progress, planned, self.ranks)

    def iterations(self, session: Session, progress: Progress) -> Iterator[Iteration]:
        """Until it has converged."""
        from verglas.refinement import driver

        yield from driver.iterations(session, progress)
        if self._result is None:
            raise VerglasError("The refinement ended without its last iteration.")

    def record(self, iteration: Iteration, table: ParticleTable) -> Record:
        """The last iteration's makes the result, too."""
        if iteration.final is not None:
            self._result = result_of(iteration, table)
        return record_of(iteration, self._result.resolution if self._result else None)

    def report(self, run: RunFolder) -> ReportWriter:
        """The page of a refinement."""
        from verglas.cli.refine_report import ReportWriter

        return ReportWriter(run, self.job.config)

    def write_files(self, run: RunFolder, table: ParticleTable, iteration: Iteration) -> None:
        """After the last iteration its own, too."""
        from verglas.refinement import files

        super().write_files(run, table, iteration)
        if iteration.final is not None:
            maps = files.FinalMaps(iteration.final.joined, iteration.final.unfil_halves)
            directions_D2 = iteration.directions_D2
            files.write_final(run.target, iteration.state, table, self.job.config, maps, directions_D2, command_line())

    def note_figures(self, run: RunFolder, state: State, last: Record) -> None:
        """`resolution` (FSC 0.143 of the unfiltered halves, no mask) is known at the end."""
        if last["resolution_fsc"] is not None:
            run.figure("resolution", rounded(last["resolution_fsc"]), "Å")
        run.figure("resolution_at_SSNR_1", rounded(state.current_resolution), "Å")
        run.figure("iterations", state.iteration)
        run.figure("angular_sampling", rounded(last["fine_angular_step"]), "°")
        for name, unit in (("angles", "°"), ("offsets", "Å")):
            if last[f"accuracy_{name}"] is not None:
                run.figure(f"accuracy_of_{name}", rounded(last[f"accuracy_{name}"]), unit)
        note_common_figures(run, state, last)


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
    job = RefineJob(
        particles=absolute(particles if isinstance(particles, Path | str) else particles.source),
        reference=absolute(reference) if isinstance(reference, Path | str) else Path("reference"),
        config=chosen if chosen.mask is None else replace(chosen, mask=absolute(chosen.mask)),
        out=None if out is None else Path(out), device=device, **options,
    )  # fmt: skip
    job.check()
    table = None if isinstance(particles, Path | str) else particles
    return Refinement(job, table, None if isinstance(reference, Path | str) else reference)
