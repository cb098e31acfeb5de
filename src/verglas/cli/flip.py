"""`verglas flip`: the other hand, of maps and poses at once. Option declarations; torch is imported in `run`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from verglas.cli.common import Flag
from verglas.errors import InputError


@dataclass(kw_only=True)
class Flip:
    """Flip the hand of maps and of the poses that belong to them.

    Images do not tell the hand of a particle: both mirror images of a map explain them equally well. Once you see that yours
    is the wrong one (left-handed helices, at about 4 Å or better) this mirrors maps (x -> -x) and turns poses so that they show
    the mirrored map: refinement can go on from there. Half-maps and masks go along as --maps. Files keep their names.

    Example: verglas flip --maps fine/run_class001.mrc fine/run_half*_unfil.mrc --particles fine/run_data.star --out flipped
    """

    maps: Annotated[tuple[Path, ...], arg(metavar="MAP ...")] = ()
    """Maps to mirror."""
    particles: Annotated[Path | None, arg(metavar="STAR", help_behavior_hint="(default: none)")] = None
    """Particles whose poses go with the maps."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""

    def run(self) -> None:
        """Mirror everything into the run folder."""
        if not self.maps and self.particles is None:
            raise InputError("--maps", "neither maps nor --particles given", "something to flip")
        check_names(self.maps)
        from dataclasses import replace

        import torch

        from verglas.io.mrc import read_map, write_map
        from verglas.io.runfolder import RunFolder
        from verglas.particles.frames import mirrored_poses
        from verglas.particles.table import ParticleTable
        from verglas.postprocess.mapops import flip_hand

        with RunFolder.create(self.out, "flip", self, self.overwrite) as run:
            run.provenance(device="cpu", precision="as the files")
            for path in self.maps:
                source = read_map(path)
                mirrored_ZYX = flip_hand(torch.tensor(source.data_ZYX)).numpy()
                write_map(run.path(path.name), replace(source, data_ZYX=mirrored_ZYX))
            run.figure("maps", len(self.maps))
            if self.particles is not None:
                table = mirrored_poses(ParticleTable.read(self.particles)).named_from(self.out)
                table.write(run.path(star_name(self.particles)))
                run.figure("particles", len(table))
            run.log("Mirrored x -> -x. For point groups other than I3 and I4, which become each other, the axes stay.")


def check_names(maps: Sequence[Path]) -> None:
    """InputError if two of the maps would get the same name in the folder, or one has a name of no map."""
    from verglas.io.mrc import MAP_SUFFIXES

    names = [path.name for path in maps]
    for path in maps:
        if path.suffix.lower() not in MAP_SUFFIXES:
            raise InputError(path, f"the ending {path.suffix!r}", f"one of {', '.join(MAP_SUFFIXES)}")
        if names.count(path.name) > 1:
            raise InputError(path, "two maps of this name", "names that differ: files keep theirs in --out")


def star_name(particles: Path) -> str:
    """Name of the particles' STAR file in the output: its own (a .cs file becomes STAR)."""
    return f"{particles.stem}.star"
