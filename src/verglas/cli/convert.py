"""verglas convert: between cryoSPARC and STAR, from old STAR to new, and between float16 and float32 images."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from verglas.cli.common import Flag
from verglas.errors import InputError, OutputError

if TYPE_CHECKING:
    from collections.abc import Callable

    from verglas.io.mrc import Stack
    from verglas.particles.table import ParticleTable

Figures = dict[str, tuple[object, str]]


@dataclass(kw_only=True)
class Convert:
    """Convert particle files between cryoSPARC and RELION, and images between float16 and float32.

    The suffixes of the two files say what is wanted:

      .cs -> .star     poses, CTF, half-sets, optics groups; what RELION does
                       not know is kept as cs_ columns
      .star -> .cs     the way back; particles lose nothing
      .star -> .star   RELION 3.0 becomes 3.1 (optics table, origins in Å)
      .mrcs -> .mrcs   and .mrc, .map: with --float32 or --float16

    With --float32 or --float16 a particle file gets its images copied into one
    new stack beside it.

    Example: verglas convert particles.star --out particles_f32.star --float32
    """

    source: Positional[Annotated[Path, arg(metavar="FILE")]]
    """.star, .cs, .mrc, .mrcs or .map (maps also .gz, .bz2)"""
    out: Annotated[Path, arg(metavar="FILE|DIR")]
    """What to write; a folder (a name without suffix) gets particles.star, and particles.mrcs if images are copied."""
    float32: Flag = False
    """Write the images as float32 (RELION 3.1 reads no float16)."""
    float16: Flag = False
    """Write the images as float16: half the disk space."""
    passthrough: Annotated[tuple[Path, ...], arg(metavar="FILE", help_behavior_hint="(default: none)")] = ()
    """cryoSPARC passthrough files of the same job; joined by uid."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: where they are found)")] = None
    """What relative image names start from."""
    keep_y: Flag = False
    """Do not flip micrograph y coordinates between cryoSPARC (from the bottom) and RELION (from the top)."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: as the file says)")] = None
    """Pixel size of a map or stack whose header does not give it."""
    overwrite: Flag = False
    """Replace --out if it exists."""

    def run(self) -> None:
        """Find out what is asked for, do it, write result.json."""
        from verglas.io.describe import kind_of_file

        started = time.time()
        kind = kind_of_file(self.source)
        if self.float16 and self.float32:
            raise InputError("--float16 --float32", "both given", "one of them")
        if self.passthrough and kind != "cs":
            raise InputError("--passthrough", f"given for {self.source}", "a .cs file to complete")
        if kind in ("map", "stack"):
            self._finish(self.out, self._convert_images(), started)
        elif self.out.suffix == "":
            self._into_folder(kind)
        else:
            from verglas.io.progress import say

            self._finish(self.out, self._convert_particles(kind, self.out, say), started)

    @property
    def _dtype(self) -> Literal["float32", "float16"] | None:
        return "float16" if self.float16 else "float32" if self.float32 else None

    def _finish(self, out: Path, figures: Figures, started: float) -> None:
        from verglas.io.progress import say
        from verglas.io.runfolder import write_result_json

        write_result_json(out, "convert", self, figures, seconds=time.time() - started)
        say(f"{out}: " + ", ".join(f"{name.replace('_', ' ')} {value} {unit}".strip() for name, (value, unit) in figures.items()))

    def _into_folder(self, kind: str) -> None:
        from verglas.io.runfolder import RunFolder
        from verglas.report import KeyFigures, write_report

        with RunFolder.create(self.out, "convert", self, self.overwrite) as run:
            for name, (value, unit) in self._convert_particles(kind, run.path("particles.star"), run.log).items():
                run.figure(name, value, unit)  # type: ignore[arg-type]
            write_report(run.path("report.html"), "Converted particles", [KeyFigures("Result", run.figures)], run.facts())

    def _convert_particles(self, kind: str, out: Path, say: Callable[[str], None]) -> Figures:
        """Particle file to particle file `out`; notices go to `say`."""
        from verglas.io.atomic import check_target
        from verglas.io.cryosparc import write_cs

        suffix = out.suffix.lower()
        if suffix not in (".star", ".cs"):
            raise InputError(f"--out {out}", f"a {suffix} file cannot be made of particles", ".star, .cs or a folder")
        check_target(out, self.overwrite)
        table, notices = self._read_particles(kind)
        figures: Figures = {"particles": (len(table), ""), "optics_groups": (len(table.groups), "")}
        if self._dtype is not None:
            table, figures["stacks"] = self._copy_images(table, out, self._dtype)
        elif (renamed := table.named_from(out.parent)) is not table:
            table = renamed
            notices.append("Relative image names were changed to start from the folder of the new file.")
        if suffix == ".star":
            table.write(out, self.overwrite)
        else:
            notices += write_cs(out, table.frame, table.optics_frame, self.overwrite, not self.keep_y)
        for notice in notices:
            say(notice)
        return figures

    def _read_particles(self, kind: str) -> tuple[ParticleTable, list[str]]:
        from verglas.io.cryosparc import read_cs
        from verglas.particles.images import image_folder
        from verglas.particles.table import ParticleTable

        if kind == "star":
            return ParticleTable.read(self.source, self.folder), []
        read = read_cs(self.source, self.passthrough, not self.keep_y)
        first = read.particles["rlnImageName"].iloc[0].partition("@")[2]
        folder = self.folder or image_folder([first], self.source.parent)
        return ParticleTable(read.particles, read.optics, folder, self.source), read.notices

    def _copy_images(self, table: ParticleTable, out: Path, dtype: str) -> tuple[ParticleTable, tuple[int, str]]:
        """The images in a new stack beside `out`; returns the table that names them, and how many stacks there are."""
        import dataclasses

        import numpy as np

        from verglas.io.progress import progress
        from verglas.io.restack import Images, copy_images

        where = table.image_locations()
        pixel_B = np.array([group.pixel_size for group in table.groups])[table.group_index_B]
        images = Images(where.paths, where.stack_index_B, where.image_index_B, pixel_B)
        with progress("Copying images", len(table), "images") as bar:
            names, stacks = copy_images(images, out.with_suffix(".mrcs"), dtype, self.overwrite, bar.advance)
        renamed = table.with_columns(rlnImageName=names)
        return dataclasses.replace(renamed, folder=out.parent), (stacks, dtype)

    def _convert_images(self) -> Figures:
        """A map or stack to another mode."""
        from verglas.io.describe import MAPS, STACKS
        from verglas.io.mrc import Map, Stack, read_map, write_map

        suffix = self.out.suffix.lower()
        if self._dtype is None:
            raise InputError(f"convert {self.source}", "no kind of numbers given", "--float32 or --float16")
        if suffix not in MAPS | STACKS:
            raise InputError(f"--out {self.out}", f"{suffix or 'no suffix'}", ".mrc or .map for a map, .mrcs for a stack")
        if self.out.resolve() == self.source.resolve():
            raise OutputError(f"{self.out} is the file to be read. Give another name.")
        if suffix in STACKS:
            return self._convert_stack(Stack.open(self.source))
        source = read_map(self.source, cubic=False, pixel_size=self.pixel)
        write_map(self.out, Map(source.data_ZYX, source.pixel_size, source.origin, source.labels), self.overwrite, self._dtype)
        return {"box": (" x ".join(map(str, reversed(source.data_ZYX.shape))), "px"), "pixel_size": (source.pixel_size, "Å")}

    def _convert_stack(self, stack: Stack) -> Figures:
        from verglas.io.mrc import StackWriter
        from verglas.io.progress import progress

        pixel = stack.pixel_size if self.pixel is None else self.pixel
        if not pixel > 0:
            raise InputError(self.source, "voxel size 0", "a size above 0 Å", "Give it with --pixel.")
        batch = max(1, 2**25 // (stack.box_yx[0] * stack.box_yx[1]))
        with (
            StackWriter(self.out, stack.n, stack.box_yx, pixel, self._dtype or "float32", self.overwrite) as writer,
            progress("Converting", stack.n, "images") as bar,
        ):
            for start in range(0, stack.n, batch):
                images_BYX = stack.read(slice(start, start + batch))
                writer.append(images_BYX)
                bar.advance(len(images_BYX))
        return {"images": (stack.n, ""), "pixel_size": (pixel, "Å")}
