"""verglas classify3d: particles and one or several references in, classes out. Options; the work is in classify3d_run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, absolute
from verglas.cli.run_options import KnownPoses
from verglas.errors import InputError
from verglas.refinement.config import ClassifyConfig, Start

if TYPE_CHECKING:
    from verglas.cli.classify3d_run import ClassifyJob


@dataclass(kw_only=True)
class References:
    """What stands before the options that all runs share."""

    reference: Annotated[list[Path], arg(metavar="MAP ...", help_behavior_hint="(required)")] = field(default_factory=list)
    """One rough map for all classes, or one for each, protein bright; or a STAR file that lists them (rlnReferenceImage). Maps of
    another box or pixel size than the particles' are resampled; all must be alike."""
    classes: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: one per reference)")] = None
    """Number of classes."""


@dataclass(kw_only=True)
class Classify3d(KnownPoses, References):
    """Sort particles into classes, each with a map of its own, while their poses are searched.

    All particles are compared with all references; no half-sets, fixed sampling, as RELION's Class3D. With one reference for
    several classes there is one class until the poses have settled; then the particles are divided where they differ most, and
    classes and poses go on together. Writes run_itNNN_data.star (rlnClassNumber),
    _model.star, _sampling.star, _optimiser.star and run_itNNN_classNNN.mrc of every iteration, which RELION reads;
    report.html shows how it goes. Poses in the particles' file are used with --local-search,
    --relax-sym, --skip-align and --skip-rotate only.

    A run that was stopped goes on with --continue DIR.

    Example: verglas classify3d --particles particles.star --reference start.mrc --classes 4 --diameter 170 --out classes
    """

    # Not `--start`: torchrun would take that, also behind `-m verglas`, for one of its own options, cut short.
    start: Annotated[Start, arg(name="begin", metavar="settle|random")] = ClassifyConfig.start
    """How several classes begin from one reference. settle: see above; a class of particles that fit nothing then takes all of
    those. random: divided at random in the second iteration, as RELION does."""
    focus_mask: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: all of the particle)")] = None
    """Map with values 0..1 where the classes may differ: outside it all have the same map, their mean."""
    iterations: Annotated[int, arg(metavar="N")] = ClassifyConfig.max_iterations
    """How many are made."""
    tau2_fudge: Annotated[float, arg(metavar="T")] = ClassifyConfig.tau2_fudge
    """Weight of the data against the prior: more gives finer maps, and more noise in them."""
    limit_resolution_estep: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: no limit)")] = None
    """Compare the images up to this resolution only; maps may still get finer."""
    local_search: Annotated[float, arg(metavar="DEGREES")] = ClassifyConfig.local_sigma
    """Search near the poses of the particles only: standard deviation about them, cut at three. 0: all poses."""
    skip_align: Flag = False
    """Search nothing: particles keep the poses and offsets that they came with. Much faster."""
    skip_rotate: Flag = False
    """Search offsets only: particles keep the orientations that they came with."""

    def run(self) -> None:
        """Check the options, then classify, or go on with a stopped run."""
        from verglas.cli.classify3d_run import Classification, ClassifyJob

        Classification.of(self, ClassifyJob).finish()

    def job(self) -> ClassifyJob:
        """The options in the terms of the engine, paths absolute; InputError if a required one is missing."""
        from verglas.cli.classify3d_run import ClassifyJob
        from verglas.cli.references import listed_maps

        self.require("particles", "reference", "diameter", "out")
        references = listed_maps([absolute(path) for path in self.reference])
        if self.skip_align and self.skip_rotate:
            raise InputError("--skip-align", "given together with --skip-rotate", "one of them")
        config = ClassifyConfig(
            classes=len(references) if self.classes is None else self.classes, max_iterations=self.iterations,
            align="none" if self.skip_align else "offsets" if self.skip_rotate else "all",
            start=self.start, focus_mask=absolute(self.focus_mask) if self.focus_mask else None,
            tau2_fudge=self.tau2_fudge, limit_resolution=self.limit_resolution_estep, local_sigma=self.local_search,
            **self.config_options(),
        )  # fmt: skip
        return ClassifyJob(references=references, config=config, **self.job_options())
