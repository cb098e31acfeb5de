"""verglas refine: particles and a rough reference in, poses and the final map out. Options; the work is in refine_run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Computing, Flag, refuse_beside_continue
from verglas.errors import InputError
from verglas.refinement.config import Precision, RefineConfig

if TYPE_CHECKING:
    from verglas.cli.refine_run import Job


@dataclass(kw_only=True)
class Refine:
    """Refine poses and map from particles and a rough reference, by itself, to convergence.

    Gold-standard auto-refinement of two independent half-sets, as RELION's --auto_refine --split_random_halves: global
    searches that become finer, then local ones, until neither the resolution nor the poses improve; then all particles
    make one map. Writes run_itNNN_data.star, _model.star, _sampling.star, _optimiser.star and both half maps of every
    iteration; at the end run_class001.mrc, run_half1_class001_unfil.mrc, run_half2_class001_unfil.mrc and run_data.star,
    which `verglas postprocess` and RELION read. report.html shows how it goes, iteration by iteration.

    A run that was stopped goes on with --continue DIR.

    Example: verglas refine --particles particles.star --reference start.mrc --sym C1 --diameter 170 --out refine
    """

    particles: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """Particles, .star or .cs; poses in it are not used, half-sets (rlnRandomSubset) are kept."""
    reference: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(required)")] = None
    """A rough map, protein bright. Another box or pixel size is brought to the particles'."""
    diameter: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(required)")] = None
    """Of the particle with some room around it: circular mask on the images, spherical mask on the maps."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """Folder to be made."""
    continue_from: Annotated[Path | None, arg(name="continue", metavar="DIR", help_behavior_hint="(default: a new run)")] = None
    """Go on with a run that was stopped, from its last whole iteration; everything but --device and --threads is kept."""
    sym: Annotated[str, arg(metavar="GROUP")] = RefineConfig.symmetry
    """Point group: Cn, Dn, T, O, I (= I2), I1, I2, I3, I4."""
    initial_resolution: Annotated[float, arg(metavar="Å")] = RefineConfig.initial_resolution
    """The reference is low-passed to this before the first iteration."""
    absolute_greyscale: Flag = RefineConfig.absolute_greyscale
    """The reference has the grey values of the particles: no first iteration by cross-correlation."""
    mask: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: a soft sphere)")] = None
    """Map with values 0..1: the solvent outside is flattened in every iteration."""
    solvent_corrected_fsc: Flag = RefineConfig.solvent_corrected_fsc
    """Take the FSC within the mask, corrected by phase randomisation; needs --mask."""
    healpix_order: Annotated[int, arg(metavar="N")] = RefineConfig.healpix_order
    """Angular sampling of the first iteration: 1 = 30°, 2 = 15°, 3 = 7.5°, halved by oversampling."""
    offset_range: Annotated[float, arg(metavar="PX")] = RefineConfig.offset_range
    """How far from the last centre shifts are searched in the first iterations."""
    offset_step: Annotated[float, arg(metavar="PX")] = RefineConfig.offset_step
    """Step of the coarse search over shifts, halved by oversampling."""
    max_iterations: Annotated[int, arg(metavar="N")] = RefineConfig.max_iterations
    """After so many iterations, make the final one even without convergence."""
    seed: int = RefineConfig.seed
    """For half-sets and the random turns of the grids. On a CPU the same seed gives the same files."""
    precision: Annotated[Precision, arg(metavar="auto|half|single|double")] = RefineConfig.precision
    """Of the comparison; sums are single or better. auto: half on a GPU, single on a CPU."""
    memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")] = None
    """Of the GPU (of the computer with --device cpu), all that may be used."""
    image_memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")] = None
    """For images. What does not fit is read from the files again in every iteration, while the last batch is compared."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the STAR file's)")] = None
    """What image names are relative to, if not the STAR file's folder (or the current one)."""
    skip_bad: Flag = False
    """Leave out images with NaN or without contrast instead of stopping (one more reading of all images)."""
    ignore_contrast: Flag = False
    """Go on even if reference or images look inverted (protein dark)."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Check the options, then refine to the end, or go on with a stopped run."""
        from verglas.cli.refine_run import Refinement, job_of_run

        if self.continue_from is not None:
            refuse_beside_continue(self)
            job = job_of_run(self.continue_from, self.computing.device, self.computing.threads)
            Refinement(job, resumed=True).run()
            return
        job = self.job()
        job.check()
        Refinement(job).run()

    def job(self) -> Job:
        """The options in the terms of the engine, paths absolute; InputError if a required one is missing."""
        from verglas.cli.refine_run import Job, absolute

        for name in ("particles", "reference", "diameter", "out"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}", "not given", "it, for a new run", "Or go on with a run: --continue DIR.")
        assert self.particles and self.reference and self.out and self.diameter is not None
        config = RefineConfig(
            diameter=self.diameter, symmetry=self.sym, initial_resolution=self.initial_resolution,
            absolute_greyscale=self.absolute_greyscale, mask=absolute(self.mask) if self.mask else None,
            solvent_corrected_fsc=self.solvent_corrected_fsc, healpix_order=self.healpix_order,
            offset_range=self.offset_range, offset_step=self.offset_step, max_iterations=self.max_iterations,
            seed=self.seed, precision=self.precision, memory_gb=self.memory, image_memory_gb=self.image_memory,
        )  # fmt: skip
        return Job(
            particles=absolute(self.particles), reference=absolute(self.reference), out=self.out, config=config,
            folder=absolute(self.folder) if self.folder else None, skip_bad=self.skip_bad, ignore_contrast=self.ignore_contrast,
            overwrite=self.overwrite, device=self.computing.device, threads=self.computing.threads,
        )  # fmt: skip
