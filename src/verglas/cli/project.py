"""verglas project: projections of a map at given poses. Option declarations; torch is imported in `run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Computing, Flag, check_seed
from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.io.runfolder import RunFolder
    from verglas.simulation.project import Projected


@dataclass(kw_only=True)
class Project:
    """Project a map at the poses and origins of a particle file.

    Writes projections.mrcs (one stack per optics group if there are several) and projections.star: the particle file with
    its images replaced.

    Example: verglas project --map map.mrc --particles run_data.star --out projections --ctf
    """

    map: Annotated[Path, arg(metavar="FILE")]
    """Map to project, .mrc or .map; its box and pixel size need not be those of the images."""
    particles: Annotated[Path, arg(metavar="FILE")]
    """STAR or .cs file with poses, origins and, for --ctf, CTF values."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    ctf: Flag = False
    """Multiply by each particle's CTF, with the aberrations and beam tilt of its optics group."""
    white_noise: Annotated[float, arg(metavar="SIGMA")] = 0.0
    """Standard deviation of white noise to be added, grey values."""
    box: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: that of the optics group)")] = None
    """Edge of the images."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: that of the optics group)")] = None
    """Pixel size of the images."""
    float16: Flag = False
    """Write stacks as float16 (MRC mode 12), half the size; RELION reads it from version 4 on."""
    seed: int = 0
    """Seed of the noise."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Project into a run folder and write the report."""
        if self.white_noise < 0:
            raise InputError("--white-noise", f"{self.white_noise:g}", "0 or more")
        check_seed(self.seed)
        device, reason = self.computing.start()  # first, as it imports PyTorch while the GPU wakes
        from verglas.io.runfolder import RunFolder
        from verglas.simulation.project import project

        with RunFolder.create(self.out, "project", self, self.overwrite) as run:
            write_report_of(project(self, run, device, reason), run)


def write_report_of(made: Projected, run: RunFolder) -> None:
    """report.html: the map and where it was looked at."""
    from verglas.report import KeyFigures, Orientations, Slices, write_report
    from verglas.report.sections import Section

    sections: list[Section] = [
        KeyFigures("What was made", run.figures),
        Slices("The map", made.map_ZYX, made.pixel_size),
        Orientations("Viewing directions", made.table.rotations().numpy()),
    ]
    write_report(run.path("report.html"), "Projections", sections, run.facts())
