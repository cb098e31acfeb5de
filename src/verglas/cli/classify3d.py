"""verglas classify3d: particles and one or several references in, classes out. Options; the work is in classify3d_run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Computing, Flag, refuse_beside_continue
from verglas.errors import InputError
from verglas.refinement.config import ClassifyConfig, Precision

if TYPE_CHECKING:
    from verglas.cli.classify3d_run import ClassifyJob


@dataclass(kw_only=True)
class Classify3d:
    """Sort particles into classes, each with a map of its own, while their poses are searched.

    All particles are compared with all references; no half-sets, fixed sampling, as RELION's Class3D. With one reference for
    several classes the particles are divided among them at random to begin with. Writes run_itNNN_data.star (rlnClassNumber),
    _model.star, _sampling.star, _optimiser.star and run_itNNN_classNNN.mrc of every iteration, which RELION reads;
    report.html shows how it goes.

    A run that was stopped goes on with --continue DIR.

    Example: verglas classify3d --particles particles.star --reference start.mrc --classes 4 --diameter 170 --out classes
    """

    particles: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """Particles, .star or .cs; poses in it are used with --local-search only."""
    reference: Annotated[list[Path], arg(metavar="MAP ...", help_behavior_hint="(required)")] = field(default_factory=list)
    """One rough map for all classes, or one for each, protein bright. Other boxes or pixel sizes are resampled."""
    classes: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: one per reference)")] = None
    """Number of classes."""
    diameter: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(required)")] = None
    """Of the particle with some room around it: circular mask on the images, spherical mask on the maps."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """Folder to be made."""
    continue_from: Annotated[Path | None, arg(name="continue", metavar="DIR", help_behavior_hint="(default: a new run)")] = None
    """Go on with a run that was stopped, from its last whole iteration; everything but --device and --threads is kept."""
    sym: Annotated[str, arg(metavar="GROUP")] = ClassifyConfig.symmetry
    """Point group of every class: Cn, Dn, T, O, I (= I2), I1, I2, I3, I4."""
    iterations: Annotated[int, arg(metavar="N")] = ClassifyConfig.max_iterations
    """How many are made."""
    tau2_fudge: Annotated[float, arg(metavar="T")] = ClassifyConfig.tau2_fudge
    """Weight of the data against the prior: more gives finer maps, and more noise in them."""
    initial_resolution: Annotated[float, arg(metavar="Å")] = ClassifyConfig.initial_resolution
    """References are low-passed to this before the first iteration."""
    limit_resolution_estep: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: no limit)")] = None
    """Compare the images up to this resolution only; maps may still get finer."""
    absolute_greyscale: Flag = ClassifyConfig.absolute_greyscale
    """The references have the grey values of the particles: no first iteration by cross-correlation."""
    mask: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: a soft sphere)")] = None
    """Map with values 0..1: the solvent outside is flattened in every iteration."""
    healpix_order: Annotated[int, arg(metavar="N")] = ClassifyConfig.healpix_order
    """Angular sampling: 1 = 30°, 2 = 15°, 3 = 7.5°, halved by oversampling."""
    offset_range: Annotated[float, arg(metavar="PX")] = ClassifyConfig.offset_range
    """How far from the last centre shifts are searched."""
    offset_step: Annotated[float, arg(metavar="PX")] = ClassifyConfig.offset_step
    """Step of the coarse search over shifts, halved by oversampling."""
    local_search: Annotated[float, arg(metavar="DEGREES")] = ClassifyConfig.local_sigma
    """Search near the poses of the particles only: standard deviation about them, cut at three. 0: all poses."""
    seed: int = ClassifyConfig.seed
    """For the random division and the random turns of the grids. On a CPU the same seed gives the same files."""
    precision: Annotated[Precision, arg(metavar="auto|half|single|double")] = ClassifyConfig.precision
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
    """Go on even if references or images look inverted (protein dark)."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Check the options, then classify, or go on with a stopped run."""
        from verglas.cli.classify3d_run import Classification, job_of_run

        if self.continue_from is not None:
            refuse_beside_continue(self)
            job = job_of_run(self.continue_from, self.computing.device, self.computing.threads)
            classification = Classification(job, resumed=True)
        else:
            job = self.job()
            job.check()
            classification = Classification(job)
        for _ in classification:
            pass

    def job(self) -> ClassifyJob:
        """The options in the terms of the engine, paths absolute; InputError if a required one is missing."""
        from verglas.cli.classify3d_run import ClassifyJob
        from verglas.cli.refine_run import absolute

        for name in ("particles", "reference", "diameter", "out"):
            if not getattr(self, name):
                raise InputError(f"--{name}", "not given", "it, for a new run", "Or go on with a run: --continue DIR.")
        assert self.particles and self.reference and self.out and self.diameter is not None
        config = ClassifyConfig(
            diameter=self.diameter, symmetry=self.sym, initial_resolution=self.initial_resolution,
            absolute_greyscale=self.absolute_greyscale, mask=absolute(self.mask) if self.mask else None,
            healpix_order=self.healpix_order, offset_range=self.offset_range, offset_step=self.offset_step,
            max_iterations=self.iterations, seed=self.seed, precision=self.precision, memory_gb=self.memory,
            image_memory_gb=self.image_memory,
            tau2_fudge=self.tau2_fudge, limit_resolution=self.limit_resolution_estep, local_sigma=self.local_search,
            classes=len(self.reference) if self.classes is None else self.classes,
        )  # fmt: skip
        references = [absolute(path) for path in self.reference]
        return ClassifyJob(
            particles=absolute(self.particles), reference=references[0], further=references[1:], out=self.out, config=config,
            folder=absolute(self.folder) if self.folder else None, skip_bad=self.skip_bad, ignore_contrast=self.ignore_contrast,
            overwrite=self.overwrite, device=self.computing.device, threads=self.computing.threads,
        )  # fmt: skip
