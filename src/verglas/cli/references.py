"""Reference maps as a user names them: files, or STAR files that list them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.io.mrc import Map

LABEL = "rlnReferenceImage"


def listed_maps(paths: list[Path]) -> list[Path]:
    """The maps, those of STAR files (a model.star, say) in the order of their lists, in place of the file.

    Names in a STAR file start from the working folder, as RELION's do, or else from the file's own.
    """
    found: list[Path] = []
    for path in paths:
        found += _of_star(path) if path.suffix == ".star" else [path]
    return found


def _of_star(path: Path) -> list[Path]:
    from verglas.io.star import read_star

    for block in read_star(path).values():
        frame = block.frame
        if frame is not None and LABEL in frame.columns and len(frame):
            return [name.absolute() if name.exists() else path.parent / name for name in map(Path, frame[LABEL])]
    raise InputError(path, f"no list of maps ({LABEL})", "a STAR file with that column", "Or name the maps themselves.")


def check_alike(paths: list[Path], references: list[Map]) -> None:
    """InputError, with both sizes, unless all maps have one box and pixel size: maps of a list belong together."""
    first = references[0]
    for path, other in zip(paths[1:], references[1:]):
        if other.box != first.box or abs(other.pixel_size / first.pixel_size - 1) > 1e-3:
            raise InputError(path, f"{other.box} px of {other.pixel_size:.4g} Å",
                             f"{first.box} px of {first.pixel_size:.4g} Å, as {paths[0].name}",
                             "Bring the maps to one grid with `verglas map`.")  # fmt: skip
