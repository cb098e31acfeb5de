"""Where the images of a table are: names `000012@folder/stack.mrcs`, 1-based, and the folder they are relative to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verglas.errors import InputError


@dataclass(frozen=True)
class ImageLocations:
    """Image b is number image_index_B[b] (0-based) of the file paths[stack_index_B[b]]."""

    paths: list[Path]
    stack_index_B: np.ndarray
    image_index_B: np.ndarray

    def in_file_order(self, row_B: np.ndarray) -> np.ndarray:
        """The rows by file, and by place in it."""
        return row_B[np.lexsort((self.image_index_B[row_B], self.stack_index_B[row_B]))]

    def name(self, row: int) -> str:
        """Image of a row as people and STAR files call it."""
        return f"{self.image_index_B[row] + 1:06d}@{self.paths[self.stack_index_B[row]]}"


def parse_image_names(names: Sequence[str], where: Path | str) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(distinct stack names, position in them [B], 0-based image number [B]); a name without @ is the first image of its file.

    Raises InputError for numbers that are no whole number or below 1.
    """
    stacks: dict[str, int] = {}
    stack_index_B = np.empty(len(names), np.int64)
    image_index_B = np.empty(len(names), np.int64)
    for row, name in enumerate(names):
        number, at, stack = name.partition("@")
        if not at:
            number, stack = "1", name
        if not (number.isascii() and number.isdigit() and int(number) >= 1) or not stack:
            raise InputError(where, f"image name '{name}' in row {row + 1}", "NNNNNN@stack.mrcs with NNNNNN from 1")
        image_index_B[row] = int(number) - 1
        stack_index_B[row] = stacks.setdefault(stack, len(stacks))
    return list(stacks), stack_index_B, image_index_B


def image_folder(stacks: Sequence[str], star_folder: Path) -> Path:
    """The folder that relative stack names start from: the first that holds the first stack.

    Tried in turn: the folder of the file that names them, the working folder, then the folders above the file (RELION
    names images from the project folder, above Refine3D/job012/). If none has it, the folder of the file.
    """
    if stacks:
        for folder in (star_folder, Path.cwd(), *star_folder.resolve().parents):
            if (folder / stacks[0]).is_file():
                return folder
    return star_folder


def looked_in(path: Path, folder: Path) -> str:
    """For error messages: where a missing stack was looked for."""
    return f"{path} (relative names start from {folder})" if path.is_relative_to(folder) else str(path)
