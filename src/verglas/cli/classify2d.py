"""verglas classify2d: particles in, class averages and a selection out. Options; the work is in classify2d_run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag
from verglas.cli.run_options import ParticleOptions
from verglas.errors import InputError
from verglas.refinement.config import Classify2dConfig

if TYPE_CHECKING:
    from verglas.cli.classify2d_run import Classify2dJob


@dataclass(kw_only=True)
class Classify2d(ParticleOptions):
    """Sort particles into classes by their views, and select the good ones.

    All particles are compared with all class averages, turned and shifted; no reference is needed. It starts from one
    average of random particles, and the largest classes are divided until there are all; in the first part of a run, classes that
    die out or show what others show are given up and the largest divided instead, later ones stay empty.

    Writes run_itNNN_classes.mrcs, _data.star (rlnClassNumber), _model.star, _sampling.star and _optimiser.star of every
    iteration, which RELION reads; at the end class_ranking.star, class_averages.png (the best first) and
    particles_selected.star. report.html shows how it goes.

    A run that was stopped goes on with --continue DIR.

    Example: verglas classify2d --particles particles.star --classes 50 --diameter 200 --out class2d
    """

    classes: Annotated[int, arg(metavar="K")] = Classify2dConfig.classes
    """Number of classes, 1 to 500."""
    iterations: Annotated[int, arg(metavar="N")] = Classify2dConfig.max_iterations
    """How many are made."""
    gradient: Flag = False
    """Look at batches of particles until the last few iterations, which see all of them (until then a particle that no batch
    has held stands in class 1). Default where each class has particles enough for it; the log says which it is."""
    em: Flag = False
    """Look at all particles in every iteration (expectation-maximization)."""
    batch: Annotated[int, arg(metavar="N")] = Classify2dConfig.batch
    """Particles of the gradient's first batches for each class; the last have three times as many."""
    tau2_fudge: Annotated[float, arg(metavar="T")] = Classify2dConfig.tau2_fudge
    """Weight of the data against the prior: more gives finer averages, and more noise in them."""
    psi_step: Annotated[float, arg(metavar="DEGREES")] = Classify2dConfig.psi_step
    """Step of the coarse search over in-plane angles, halved by oversampling."""
    initial_resolution: Annotated[float, arg(metavar="Å")] = Classify2dConfig.initial_resolution
    """The random averages at the start are low-passed to this."""
    no_centring: Flag = False
    """Leave averages where they are, instead of moving the centre of mass of their positive pixels to the centre."""
    select: Annotated[str, arg(metavar="RULE")] = "auto"
    """What goes to particles_selected.star: auto (each particle is judged by its class, by a quick map made of the classes with a
    score of at least 0.7, and by its distance from the centre), or whole classes: score>=X, or numbers such as 1,4,7-9."""

    def run(self) -> None:
        """Check the options, then classify, or go on with a stopped run."""
        from verglas.cli.classify2d_run import Classification2d, Classify2dJob

        Classification2d.of(self, Classify2dJob).finish()

    def job(self) -> Classify2dJob:
        """The options in the terms of the engine, paths absolute; InputError if a required one is missing."""
        from verglas.cli.classify2d_run import Classify2dJob

        self.require("particles", "diameter", "out")
        if self.gradient and self.em:
            raise InputError("--gradient", "given together with --em", "one of them")
        config = Classify2dConfig(
            classes=self.classes, max_iterations=self.iterations, tau2_fudge=self.tau2_fudge, psi_step=self.psi_step,
            initial_resolution=self.initial_resolution, centre=not self.no_centring, select=self.select,
            gradient=True if self.gradient else False if self.em else None, batch=self.batch, **self.config_options(),
        )  # fmt: skip
        return Classify2dJob(config=config, **self.job_options())
