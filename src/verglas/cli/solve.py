"""verglas solve: from particles alone to a map. Options; the work is in solve_run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, SharedComputing, absolute, refuse_beside_continue, started_again
from verglas.errors import InputError, VerglasError

if TYPE_CHECKING:
    from verglas.cli.solve_run import SolveJob


@dataclass(kw_only=True)
class Solve:
    """From particles alone, junk included, to a map with an honest resolution.

    No reference, no symmetry, no clean data are needed.

    2-D classes, choice of the good ones, a first model, its symmetry, 3-D classes, refinement, post-processing and local
    resolution follow each other, each as the verglas command of that name in a folder of its own below --out. report.html
    tells what came out, with pictures, and decisions.json what was decided and why. Particles that show nothing give no map:
    the program says so and ends with code 2.

    Any stage can be run again with other options (its folder's config.json holds its command line; add --overwrite). Then,
    or after a stop, --continue DIR does what is missing or older than what it is made from.

    Example: verglas solve --particles particles.star --diameter 180 --out solved
    """

    particles: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """Particles with CTF, .star or .cs; poses in it are not used."""
    diameter: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(required)")] = None
    """Of the particle with some room around it."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """Folder to be made."""
    continue_from: Annotated[Path | None, arg(name="continue", metavar="DIR", help_behavior_hint="(default: a new run)")] = None
    """Go on with a run that was stopped, or one of whose stages was run again."""
    sym: Annotated[str, arg(metavar="auto|GROUP")] = "auto"
    """Point group; auto: what the first model shows."""
    classes2d: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: by the number of particles)")] = None
    """Number of 2-D classes."""
    classes3d: Annotated[int | None, arg(metavar="K", help_behavior_hint="(default: by the number of particles)")] = None
    """Number of 3-D classes; 1: no 3-D classification."""
    seed: int = 0
    """Of all random choices."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the STAR file's)")] = None
    """What image names are relative to, if not the STAR file's folder (or the current one)."""
    ignore_contrast: Flag = False
    """Go on even if images look inverted (protein dark)."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    elastic: Flag = False
    """Go on by itself after a lost process: with --gpus up to three times, on the GPUs that are left. Whoever starts the same
    command again (torchrun --max-restarts, sbatch --requeue) goes on with the run in --out, if its options are these."""
    computing: SharedComputing = field(default_factory=SharedComputing)

    def run(self) -> None:
        """Check the options, then solve, or go on. VerglasError if no map came of it."""
        from verglas.cli.solve_run import continued_job, solve, was_begun

        if self.continue_from is not None:
            refuse_beside_continue(self)
            job, resumed = continued_job(self.continue_from, self.computing.device, self.computing.threads), True
        else:
            job = self.job()
            resumed = started_again(self.elastic) and was_begun(job)
        story = solve(job, resumed)
        if story is not None and "nothing" in story.facts:
            raise VerglasError(f"No map. {story.facts['nothing']} What was done is told in {job.out / 'report.html'}.")

    def job(self) -> SolveJob:
        """The options, paths absolute; InputError if a required one is missing."""
        from verglas.cli.solve_run import SolveJob

        for name in ("particles", "diameter", "out"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}", "not given", "it, for a new run", "Or go on with a run: --continue DIR.")
        assert self.particles and self.out and self.diameter is not None
        return SolveJob(
            particles=absolute(self.particles), diameter=self.diameter, out=absolute(self.out), sym=self.sym,
            classes2d=self.classes2d, classes3d=self.classes3d, seed=self.seed,
            folder=absolute(self.folder) if self.folder else None, ignore_contrast=self.ignore_contrast,
            overwrite=self.overwrite, device=self.computing.device, threads=self.computing.threads,
        )  # fmt: skip
