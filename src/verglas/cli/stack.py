"""`verglas stack`: particle images merged and rewritten. Option declarations; torch is imported in `run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Computing, Flag, check_seed
from verglas.errors import InputError

if TYPE_CHECKING:
    import torch

    from verglas.io.runfolder import RunFolder
    from verglas.particles.rewrite import Changes
    from verglas.particles.table import ParticleTable

STACK_SUFFIXES = (".mrcs", ".mrc", ".st")


@dataclass(kw_only=True)
class Stack:
    """Merge, downsample, recentre, normalise or invert particle images.

    Several inputs become one set with one optics table. Changes are made in this order: recentre, downsample, normalise,
    invert. Origins are in Å, so downsampling leaves them alone. Writes particles.star and particles.mrcs (one stack for
    every box and pixel size, if there are several); images are named relative to that folder.

    Example: verglas stack --particles day1.star day2.star --out merged --box 128 --recentre --float16
    """

    particles: Annotated[tuple[Path, ...], arg(metavar="FILE ...")]
    """STAR files, .cs files, or plain image stacks (.mrcs)."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: where they are found)")] = None
    """What relative image names start from."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    box: Annotated[int | None, arg(metavar="PX", help_behavior_hint="(default: as it is)")] = None
    """Downsample to this even box by cropping in Fourier space."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: as it is)")] = None
    """Downsample to the even box whose pixel size comes nearest."""
    recentre: Flag = False
    """Move images by the whole pixels of their origins (vacated pixels are 0); origins keep the rest."""
    normalise: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: off)")] = None
    """Background outside this diameter to mean 0 and deviation 1, after subtracting a plane."""
    invert: Flag = False
    """Change the sign of every pixel."""
    float16: Flag = False
    """Write half precision: half the size."""
    float32: Flag = False
    """Write single precision (the default)."""
    subset: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: all)")] = None
    """Take this many particles at random."""
    seed: int = 0
    """Of the random choice."""
    pixel_size: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: the headers')")] = None
    """Pixel size of plain stacks, instead of what their headers say."""
    skip_bad: Flag = False
    """Leave out images that are constant or not finite (reads everything once more)."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Read the tables, stream the images, write stack and STAR into a run folder."""
        self.check()
        device, reason = self.computing.start()  # first, as it imports PyTorch while the GPU wakes
        from verglas.io.runfolder import RunFolder
        from verglas.particles.rewrite import Changes

        changes = Changes(self.recentre, self.box, self.pixel, self.normalise, self.invert)
        with RunFolder.create(self.out, "stack", self, self.overwrite) as run:
            run.provenance(device=device, kernels="torch FFT", precision="float32", reason=reason)
            table = self.gather(run)
            self.write(table, changes, device, run)

    def check(self) -> None:
        """Raise InputError for options that make no sense together, before anything heavy is loaded."""
        check_seed(self.seed)
        if self.float16 and self.float32:
            raise InputError("--float16", "given together with --float32", "one of the two")
        if self.box is not None and self.pixel is not None:
            raise InputError("--box", "given together with --pixel", "one of the two")
        if self.box is not None and (self.box < 2 or self.box % 2):
            raise InputError("--box", f"{self.box} px", "an even number of pixels, at least 2")
        for name in ("pixel", "normalise", "pixel_size", "subset"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise InputError(f"--{name.replace('_', '-')}", f"{value:g}", "a value above 0")

    def gather(self, run: RunFolder) -> ParticleTable:
        """All particles of all inputs that are to be written."""
        from verglas.particles.merge import merge_tables
        from verglas.particles.rewrite import find_bad_images
        from verglas.particles.table import ParticleTable

        tables = [
            ParticleTable.from_stacks([path], self.pixel_size)
            if path.suffix.lower() in STACK_SUFFIXES
            else ParticleTable.read(path, self.folder)
            for path in self.particles
        ]
        for notice in (notice for table in tables for notice in table.notices):
            run.log(notice)
        table = tables[0]
        if len(tables) > 1:
            table, notices = merge_tables(tables)
            for notice in notices:
                run.log(notice)
        run.figure("particles_read", len(table))
        if self.subset is not None:
            table = table.subset(self.subset, self.seed)
        if self.skip_bad:
            with run.progress("Checking images", len(table), "images") as bar:
                bad = find_bad_images(table, bar.advance)
            for image in bad:
                run.log(f"left out {image.name}: {image.reason}")
            run.figure("images_left_out", len(bad))
            table = table.without([image.row for image in bad])
        return table

    def write(self, table: ParticleTable, changes: Changes, device: torch.device, run: RunFolder) -> None:
        """Stack, STAR, figures and report."""
        from verglas.particles.rewrite import follows_micrograph, rewrite

        if self.recentre and "rlnCoordinateX" in table.frame.columns and not follows_micrograph(table):
            run.log("rlnCoordinateX/Y still name the old box centres: the optics table has no rlnMicrographPixelSize")
        with run.progress("Writing images", len(table), "images") as bar:
            new = rewrite(table, run.path("particles.star").parent, changes, self.dtype, device, bar.advance)
        new.write(run.path("particles.star"))
        run.figure("particles", len(new))
        run.figure("optics_groups", len(new.optics_frame))
        run.figure("box", new.groups[0].box, "px")
        run.figure("pixel_size", new.groups[0].pixel_size, "Å")
        write_report_of(new, run)

    @property
    def dtype(self) -> str:
        return "float16" if self.float16 else "float32"


def write_report_of(table: ParticleTable, run: RunFolder) -> None:
    """report.html: key figures, optics groups, and what the columns tell of defocus and offsets."""
    from verglas.report import Histogram, KeyFigures, Table, write_report
    from verglas.report.sections import Section

    rows = [[g.number, g.name, g.box, round(g.pixel_size, 4), g.voltage_kv, g.cs_mm] for g in table.groups]
    header = ["Group", "Name", "Box / px", "Pixel size / Å", "Voltage / kV", "Cs / mm"]
    sections: list[Section] = [KeyFigures("What was written", run.figures), Table("Optics groups", rows, header)]
    if "rlnDefocusU" in table.frame.columns:
        sections.append(Histogram("Defocus", table.frame["rlnDefocusU"].to_numpy(), "defocus U / Å"))
    if "rlnOriginXAngst" in table.frame.columns:
        sections.append(Histogram("Offsets left", table.origins().norm(dim=1).numpy(), "length of the origin / Å"))
    write_report(run.path("report.html"), "Particle stack", sections, run.facts())
