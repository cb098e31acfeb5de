"""verglas abinitio: particles in, first models out. Options; the work is in abinitio_run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Suppress, arg

from verglas.cli.run_options import RunOptions
from verglas.refinement.config import AbInitioConfig

if TYPE_CHECKING:
    from verglas.cli.abinitio_run import AbInitioJob


@dataclass(kw_only=True)
class AbInitio(RunOptions):
    """Make first models from particles alone, from random starts.

    A stochastic gradient with small batches, coarse images first; then a few iterations with all particles. Everything is
    searched without symmetry; at the end the axes of --sym are looked for in each map, and the map is turned onto them. With
    --sym auto the maps say what point group that is.
    Particles that show nothing give a map, too: the starts then differ, and a warning says so.
    The hand of a map made so is left to chance: `verglas map --flip-hand` mirrors it. Writes the files of `verglas classify3d`
    after each round, and initial_model.mrc, the map of the largest class, at the end. Poses in the file are not used.

    A run that was stopped goes on with --continue DIR.

    Example: verglas abinitio --particles particles.star --diameter 170 --classes 3 --out first
    """

    classes: Annotated[int, arg(metavar="K")] = AbInitioConfig.classes
    """Number of maps, which compete for the particles."""
    sym: Annotated[str, arg(metavar="auto|GROUP")] = AbInitioConfig.symmetry
    """Point group: Cn, Dn, T, O, I (= I2), I1, I2, I3, I4; auto: the one that the maps of all large classes show by then."""
    restarts: Annotated[int, arg(metavar="N")] = AbInitioConfig.restarts
    """Independent random starts; the best one goes on. How much their maps agree is reported: hardly at all on noise. 1 is
    faster and tells nothing of that."""
    initial_resolution: Annotated[float, arg(metavar="Å")] = AbInitioConfig.initial_resolution
    """Of the images at the start, or a fifth of the diameter, whichever is coarser."""
    final_resolution: Annotated[float, arg(metavar="Å")] = AbInitioConfig.final_resolution
    """Of the images at the end, or a fourteenth of the diameter, whichever is coarser."""
    steps: Annotated[int, arg(metavar="N")] = AbInitioConfig.steps
    """Of the gradient, made in rounds of ten."""
    batch: Annotated[int, arg(metavar="N")] = AbInitioConfig.batch
    """Particles of the first steps, for each class; the last take three times as many."""
    full_iterations: Annotated[int, arg(metavar="N")] = AbInitioConfig.full_iterations
    """With all particles after the gradient, and as many again with --sym."""
    tau2_fudge: Annotated[float, arg(metavar="T")] = AbInitioConfig.tau2_fudge
    """Weight of the data against the prior: more gives finer maps, and more noise in them."""
    absolute_greyscale: Suppress[bool] = False  # there are no references

    def run(self) -> None:
        """Check the options, then search, or go on with a stopped run."""
        from verglas.cli.abinitio_run import AbInitioJob, FirstModels

        FirstModels.of(self, AbInitioJob).finish()

    def job(self) -> AbInitioJob:
        """The options in the terms of the engine, paths absolute; InputError if a required one is missing."""
        from verglas.cli.abinitio_run import AbInitioJob
        from verglas.core.symmetry_names import normalise_name

        self.require("particles", "diameter", "out")
        auto = self.sym.lower() == "auto"
        config = AbInitioConfig(
            classes=self.classes, restarts=self.restarts, final_resolution=self.final_resolution, steps=self.steps,
            batch=self.batch, full_iterations=self.full_iterations, tau2_fudge=self.tau2_fudge,
            find_symmetry=auto, **self.config_options() | {"symmetry": "C1" if auto else normalise_name(self.sym)},
        )  # fmt: skip
        return AbInitioJob(config=config, **self.job_options())
