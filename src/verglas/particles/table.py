"""The particles of a data set: one row each, with its image, optics group, pose and CTF.

The pandas frame keeps every column of the file under RELION's label; the methods hand out what the rest of verglas
computes with, in its own units: rotation matrices, Å, tensors.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.core.rotations import matrix_from_euler
from verglas.errors import InputError
from verglas.io.mrc import Stack
from verglas.io.star import StarBlock, read_star, write_star
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.particles.halves import half_sets
from verglas.particles.images import ImageLocations, image_folder, parse_image_names
from verglas.particles.optics_table import OVERRIDES, assign_groups, groups_from_frame, with_optics_table

POSE_LABELS = ("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")


@dataclass(frozen=True, eq=False)  # the same one is equal to itself alone: so that what follows from it may be kept
class ParticleTable:
    """frame: one row per particle; optics_frame: one row per optics group; folder: what image paths are relative to;
    source: the file it came from, for messages; extra_blocks: other tables of that file, written back as they are;
    notices: what a user should know about how the file was read.

    The frames are not to be changed in place: derive a new table with `select` or `with_columns`.
    """

    frame: pd.DataFrame
    optics_frame: pd.DataFrame
    folder: Path
    source: Path
    extra_blocks: dict[str, StarBlock] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @classmethod
    def read(cls, path: Path | str, folder: Path | str | None = None, passthrough: Sequence[Path] = ()) -> ParticleTable:
        """Read a particle file: STAR of RELION 3.0 to 5, or cryoSPARC .cs (with its passthrough files). Images are not opened.

        folder: what relative image paths start from; left out, see `verglas.particles.images.image_folder`.
        Raises InputError if the file holds no particles or its optics groups make no sense.
        """
        path = Path(path)
        blocks, notices = _read_cs(path, passthrough) if path.suffix.lower() == ".cs" else (read_star(path), ())
        frame, optics, extra = _particles_and_optics(blocks, path)
        if folder is None:
            folder = image_folder([str(frame["rlnImageName"].iloc[0]).rpartition("@")[2]], path.parent)
        table = cls(frame, optics, Path(folder), path, extra, notices)._with_box_sizes()
        table._assigned  # noqa: B018  optics groups are checked at the door
        return table

    @classmethod
    def from_stacks(cls, paths: list[Path], pixel_size: float | None = None) -> ParticleTable:
        """All images of plain stacks, without microscope settings; pixel_size (Å) replaces what the headers say."""
        names: list[str] = []
        optics, group_of_image = [], []
        for number, path in enumerate(paths, 1):
            stack = Stack.open(path)
            size = pixel_size or stack.pixel_size
            if not size > 0:
                raise InputError(path, "voxel size 0", "a size above 0 Å in the header", "Give it with --pixel-size.")
            absolute = path.resolve()
            names += [f"{i:06d}@{absolute}" for i in range(1, stack.n + 1)]
            group_of_image += [number] * stack.n
            optics.append({"rlnOpticsGroupName": f"opticsGroup{number}", "rlnOpticsGroup": number, "rlnImagePixelSize": size,
                           "rlnImageSize": stack.box_yx[1], "rlnImageDimensionality": 2})  # fmt: skip
        frame = pd.DataFrame({"rlnImageName": names, "rlnOpticsGroup": group_of_image})
        table = cls(frame, pd.DataFrame(optics), Path.cwd(), paths[0])
        table._assigned  # noqa: B018
        return table

    def write(self, path: Path | str, overwrite: bool = False) -> None:
        """Write STAR 3.1; image names stay as they are, relative to `folder`."""
        blocks = {
            "optics": StarBlock.table("optics", self.optics_frame),
            "particles": StarBlock.table("particles", self.frame),
        }
        write_star(Path(path), blocks | self.extra_blocks, overwrite=overwrite)

    def __len__(self) -> int:
        return len(self.frame)

    def select(self, index_or_mask: np.ndarray | slice) -> ParticleTable:
        """Rows by position or by a boolean mask, in the order given."""
        rows = self.frame[index_or_mask] if _is_mask(index_or_mask) else self.frame.iloc[index_or_mask]
        return replace(self, frame=rows.reset_index(drop=True))

    def subset(self, n: int, seed: int) -> ParticleTable:
        """`n` particles drawn at random (all, if there are no more), in the order of the file."""
        chosen = np.random.default_rng(seed).permutation(len(self))[:n]
        return self.select(np.sort(chosen))

    def without(self, rows: Sequence[int]) -> ParticleTable:
        """All rows but these positions; InputError if none is left."""
        keep_B = np.ones(len(self), bool)
        keep_B[list(rows)] = False
        if not keep_B.any():
            raise InputError(self.source, "every image is bad", "at least one good image", "Look at the stacks.")
        return self.select(keep_B)

    def with_columns(self, **columns: object) -> ParticleTable:
        """A table with these particle columns added or replaced."""
        return replace(self, frame=self.frame.assign(**columns))

    def without_columns(self, *labels: str) -> ParticleTable:
        """A table without these particle columns, as far as there are any."""
        return replace(self, frame=self.frame.drop(columns=list(labels), errors="ignore"))

    def require(self, *labels: str) -> None:
        """InputError naming every one of `labels` that the particles do not have."""
        missing = [label for label in labels if label not in self.frame.columns]
        if missing:
            columns, them = ("column", "it") if len(missing) == 1 else ("columns", "them")
            raise InputError(f"{self.source}, particles", f"no {columns} {', '.join(missing)}",
                             fix=f"Use the output of a job that determines {them}.")  # fmt: skip

    @property
    def groups(self) -> list[OpticsGroup]:
        return self._assigned[0]

    @property
    def group_index_B(self) -> np.ndarray:
        """Position of each particle's optics group in `groups`, int64."""
        return self._assigned[1]

    @cached_property
    def _assigned(self) -> tuple[list[OpticsGroup], np.ndarray]:
        return assign_groups(self.frame, groups_from_frame(self.optics_frame, self.source), self.source)

    @cached_property
    def _locations(self) -> ImageLocations:
        self.require("rlnImageName")
        stacks, stack_index_B, image_index_B = parse_image_names(self.frame["rlnImageName"].tolist(), self.source)
        return ImageLocations([self.folder / stack for stack in stacks], stack_index_B, image_index_B)

    def image_locations(self) -> ImageLocations:
        """Stack paths, and for every particle the stack's position among them and the 0-based image number in it."""
        return self._locations

    def named_from(self, folder: Path) -> ParticleTable:
        """The particles as a file in `folder` has to name them; self if its names lead to the first stack from there, too.

        Nothing is changed either where that stack is not to be found now.
        """
        where = self.image_locations()
        stack, first = where.paths[where.stack_index_B[0]], self.frame["rlnImageName"].iloc[0].rpartition("@")[2]
        found = image_folder([first], folder) / first
        if not stack.is_file() or (found.is_file() and found.samefile(stack)):
            return self
        relative = [os.path.relpath(path.resolve(), folder.resolve()) for path in where.paths]
        numbers = zip(where.image_index_B.tolist(), where.stack_index_B.tolist())
        names = [f"{image + 1:06d}@{relative[number]}" for image, number in numbers]
        return replace(self.with_columns(rlnImageName=names), folder=folder)

    def rotations(self) -> Tensor:
        """RELION's A (object to image frame), float64 [B, 3, 3]."""
        self.require(*POSE_LABELS)
        return matrix_from_euler(*(self.numbers(label) for label in POSE_LABELS))

    def origins(self) -> Tensor:
        """Shift (x, y) in Å that centres each image, float64 [B, 2]; 0 where the file has none."""
        return torch.stack([self._origin("X"), self._origin("Y")], -1)

    def _origin(self, axis: str) -> Tensor:
        if f"rlnOrigin{axis}Angst" in self.frame.columns:
            return self.numbers(f"rlnOrigin{axis}Angst")
        pixel_B = torch.tensor([group.pixel_size for group in self.groups], dtype=torch.float64)[self.group_index_B]
        return self.numbers(f"rlnOrigin{axis}", default=0.0) * pixel_B

    def ctf(self) -> CtfParameters:
        """CTF parameters in float64; missing: defocus V = U, angle, phase shift and B-factor 0, scale 1.

        Raises InputError without rlnDefocusU, or where voltage, Cs or amplitude contrast are not known.
        """
        self.require("rlnDefocusU")
        for label, name in OVERRIDES.items():
            if any(np.isnan(getattr(group, name)) for group in self.groups):
                raise InputError(f"{self.source}, data_optics", f"no column {label}", "it, to compute the CTF", "Add it.")
        u_B = self.numbers("rlnDefocusU")
        v_B = self.numbers("rlnDefocusV") if "rlnDefocusV" in self.frame.columns else u_B
        self._check_any_contrast(u_B, v_B)
        bfactor_B, scale_B = self.numbers("rlnCtfBfactor", 0.0), self.numbers("rlnCtfScalefactor", 1.0)
        has_envelope = bool((bfactor_B != 0).any() or (scale_B != 1).any())
        angle_B, shift_B = self.numbers("rlnDefocusAngle", 0.0), self.numbers("rlnPhaseShift", 0.0)
        return CtfParameters(u_B, v_B, angle_B, shift_B, bfactor_B, scale_B, has_envelope)

    def _check_any_contrast(self, u_B: Tensor, v_B: Tensor) -> None:
        flat_G = torch.tensor([abs(g.cs_mm) + abs(g.amplitude_contrast) < 1e-6 for g in self.groups], dtype=torch.bool)
        dark_B = (u_B.abs() + v_B.abs() < 1e-6) & flat_G[self.group_index_B]
        if dark_B.any():
            row = int(dark_B.nonzero()[0])
            raise InputError(
                f"{self.source}, particle {row + 1}", "defocus, Cs and amplitude contrast are all 0", "a CTF that is not 0",
                "Estimate the CTF first.",
            )  # fmt: skip

    def half_sets(self, seed: int) -> np.ndarray:
        """1 or 2 for every particle [B]; see `verglas.particles.halves.half_sets`."""
        return half_sets(self.frame, seed, self.source)

    def numbers(self, label: str, default: float | None = None) -> Tensor:
        """A column as float64 [B]; `default` where the file has none. InputError for what is no finite number."""
        if label not in self.frame.columns and default is not None:
            return torch.full((len(self),), default, dtype=torch.float64)
        try:
            values = self.frame[label].to_numpy(np.float64)
        except ValueError as error:
            raise InputError(f"{self.source}, {label}", f"values that are no numbers ({error})", "numbers") from error
        if not np.isfinite(values).all():
            row = int(np.flatnonzero(~np.isfinite(values))[0])
            raise InputError(f"{self.source}, {label}", f"{values[row]} in row {row + 1}", "finite numbers")
        return torch.from_numpy(values.copy())

    def _with_box_sizes(self) -> ParticleTable:
        """rlnImageSize of each group read from the first image's header, where the file does not say and the image is there."""
        if "rlnImageSize" in self.optics_frame.columns or "rlnOpticsGroup" not in self.frame.columns:
            return self
        first = self.frame.drop_duplicates("rlnOpticsGroup").set_index("rlnOpticsGroup")["rlnImageName"]
        paths = {number: self.folder / name.rpartition("@")[2] for number, name in first.items()}
        boxes = {number: Stack.open(path).box_yx[1] for number, path in paths.items() if path.is_file()}
        sizes = [boxes.get(number, 0) for number in self.optics_frame["rlnOpticsGroup"]]
        return replace(self, optics_frame=self.optics_frame.assign(rlnImageSize=sizes)) if all(sizes) else self


def _is_mask(index: np.ndarray | slice) -> bool:
    return not isinstance(index, slice) and np.asarray(index).dtype == bool


def _read_cs(path: Path, passthrough: Sequence[Path]) -> tuple[dict[str, StarBlock], tuple[str, ...]]:
    from verglas.io.cryosparc import read_cs

    read = read_cs(path, passthrough)
    return read.blocks(), tuple(read.notices)


def _particles_and_optics(blocks: dict[str, StarBlock], path: Path) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, StarBlock]]:
    """(particles, optics, the other blocks); a file without optics table is brought to today's layout."""
    tables = {name: block.frame for name, block in blocks.items() if block.is_loop}
    with_images = [name for name, frame in tables.items() if "rlnImageName" in frame.columns]
    name = "particles" if "particles" in tables else next(iter(with_images), None)
    if name is None:
        raise InputError(path, "no table of particles in it", "a loop with rlnImageName", "Give the particles' STAR file.")
    frame = tables[name]
    if "rlnImageName" not in frame.columns:
        raise InputError(f"{path}, particles", "no column rlnImageName", "the image of every particle", "Add it.")
    if len(frame) == 0:
        raise InputError(path, "0 particles", "at least one")
    extra = {other: block for other, block in blocks.items() if other not in ("optics", name)}
    if "optics" in blocks:
        optics = blocks["optics"]
        return frame, optics.frame if optics.is_loop else pd.DataFrame([optics.values]), extra
    return *with_optics_table(frame, path), extra
