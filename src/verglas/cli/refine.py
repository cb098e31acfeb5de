"""verglas refine: particles and a rough reference in, poses and the final map out. Options; the work is in refine_run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, absolute
from verglas.cli.run_options import KnownPoses
from verglas.refinement.config import RefineConfig

if TYPE_CHECKING:
    from verglas.cli.refine_run import RefineJob


@dataclass(kw_only=True)
class OneReference:
    """What stands before the options that all runs share."""

    reference: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(required)")] = None
    """A rough map, protein bright. Another box or pixel size is brought to the particles'."""


@dataclass(kw_only=True)
class Refine(KnownPoses, OneReference):
    """Refine poses and map from particles and a rough reference, by itself, to convergence.

    Gold-standard auto-refinement of two independent half-sets, as RELION's --auto_refine --split_random_halves: global
    searches that become finer, then local ones, until neither the resolution nor the poses improve; then all particles
    make one map. Writes run_itNNN_data.star, _model.star, _sampling.star, _optimiser.star and both half maps of every
    iteration; at the end run_class001.mrc, run_half1_class001_unfil.mrc, run_half2_class001_unfil.mrc and run_data.star,
    which `verglas postprocess` and RELION read. report.html shows how it goes, iteration by iteration. Poses in the
    particles' file are used with --relax-sym or --healpix-order 4 and more only, half-sets (rlnRandomSubset) are kept.

    A run that was stopped goes on with --continue DIR.

    Example: verglas refine --particles particles.star --reference start.mrc --sym C1 --diameter 170 --out refine
    """

    solvent_corrected_fsc: Flag = RefineConfig.solvent_corrected_fsc
    """Take the FSC within the mask, corrected by phase randomisation; needs --mask."""
    max_iterations: Annotated[int, arg(metavar="N")] = RefineConfig.max_iterations
    """After so many iterations, make the final one even without convergence."""

    def run(self) -> None:
        """Check the options, then refine to the end, or go on with a stopped run."""
        from verglas.cli.refine_run import RefineJob, Refinement

        Refinement.of(self, RefineJob).run()

    def job(self) -> RefineJob:
        """The options in the terms of the engine, paths absolute; InputError if a required one is missing."""
        from verglas.cli.refine_run import RefineJob

        self.require("particles", "reference", "diameter", "out")
        assert self.reference is not None
        config = RefineConfig(
            solvent_corrected_fsc=self.solvent_corrected_fsc, max_iterations=self.max_iterations, **self.config_options()
        )
        return RefineJob(reference=absolute(self.reference), config=config, **self.job_options())
