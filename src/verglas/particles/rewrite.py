"""Write the images of a table anew, changed: recentred, downsampled, normalised, inverted. Streaming: memory is bounded."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.io.mrc import StackWriter
from verglas.particles.loader import BadImage, ImageBatch, ImageLoader
from verglas.particles.preprocess import normalise_background, resample, shift_whole_pixels, whole_pixels
from verglas.particles.table import ParticleTable

BATCH_BYTES = 8e6  # more falls out of the processor's caches
SHIFTED_WITH_THE_IMAGE = ("rlnOrigin{}Angst", "rlnOrigin{}PriorAngst")


@dataclass(frozen=True)
class Changes:
    """What to do to every image, in this order. box: px, by Fourier crop; pixel: Å, gives the nearest even box instead;
    normalise: diameter in Å outside which the background gets mean 0 and deviation 1."""

    recentre: bool = False
    box: int | None = None
    pixel: float | None = None
    normalise: float | None = None
    invert: bool = False


@dataclass(frozen=True)
class Field:
    """Box (px) and pixel size (Å) of the images of an optics group."""

    box: int
    pixel_size: float


def changed_field(old: Field, changes: Changes, where: str) -> Field:
    """Field after the changes; the field of view stays, so the pixel size follows from the even box."""
    box = changes.box or old.box
    if changes.pixel:
        box = 2 * round(old.box * old.pixel_size / changes.pixel / 2)
    if box % 2 or not 2 <= box <= old.box:
        raise InputError(
            where, f"{box} px asked for, images have {old.box} px at {old.pixel_size:g} Å", "an even box that is not larger",
            "Choose another --box or --pixel.",
        )  # fmt: skip
    return Field(box, old.box * old.pixel_size / box)


def find_bad_images(table: ParticleTable, advance: Callable[[int], None]) -> list[BadImage]:
    """Read everything once and list the images that are constant or not finite."""
    loader = ImageLoader(table, batch_size=_batch_size(table), skip_bad=True)
    for batch in loader:
        advance(len(batch))
    return loader.bad


def rewrite(
    table: ParticleTable, folder: Path, changes: Changes, dtype: str, device: torch.device, advance: Callable[[int], None]
) -> ParticleTable:
    """Write the changed images into stacks in `folder`, one per box and pixel size; returns the table that names them.

    Rows keep their order. Raises InputError for bad images (see `find_bad_images`) and boxes that do not fit.
    """
    loader = ImageLoader(table, batch_size=_batch_size(table), device=device)
    new_field = {}
    for index, box in loader.box_of_group.items():
        group = table.groups[index]
        new_field[index] = changed_field(Field(box, group.pixel_size), changes, f"optics group '{group.name}'")
    field_B = [new_field[index] for index in table.group_index_B.tolist()]
    shift_B2 = _shifts(table) if changes.recentre else None
    name_of, position_B = _stack_names(field_B)
    with ExitStack() as stacks:
        writers = {}
        for field, name in name_of.items():
            writer = StackWriter(folder / name, field_B.count(field), (field.box, field.box), field.pixel_size, dtype)
            writers[field] = stacks.enter_context(writer)
        for batch in loader:
            images_BYX = _changed(batch, changes, new_field[batch.group_index], shift_B2, device)
            writers[new_field[batch.group_index]].append(images_BYX.cpu().numpy())
            advance(len(batch))
    names = [f"{position + 1:06d}@{name_of[field]}" for position, field in zip(position_B, field_B)]
    return _described(table, names, new_field, shift_B2, folder)


def _batch_size(table: ParticleTable) -> int:
    largest = max(group.box or 512 for group in table.groups)
    return int(np.clip(BATCH_BYTES / (4 * largest**2), 1, 512))


def _shifts(table: ParticleTable) -> Tensor:
    """Whole pixels (x, y) by which each image is moved, int64 [B, 2]."""
    pixel_B1 = torch.tensor([group.pixel_size for group in table.groups], dtype=torch.float64)[table.group_index_B][:, None]
    return whole_pixels(table.origins() / pixel_B1, 1.0)


def _stack_names(field_B: list[Field]) -> tuple[dict[Field, str], list[int]]:
    """(file name of each field, position of each image in its file)."""
    counts: dict[Field, int] = {}
    position_B = []
    for field in field_B:
        position_B.append(counts.get(field, 0))
        counts[field] = position_B[-1] + 1
    alone = len(counts) == 1
    return {field: "particles.mrcs" if alone else f"particles_{i}.mrcs" for i, field in enumerate(counts, 1)}, position_B


def _changed(batch: ImageBatch, changes: Changes, field: Field, shift_B2: Tensor | None, device: torch.device) -> Tensor:
    """Changed images of a batch in the order of their rows."""
    images_BYX = batch.image_BYX.to(device)
    if shift_B2 is not None:
        images_BYX = shift_whole_pixels(images_BYX, shift_B2[batch.index_B])
    if field.box != images_BYX.shape[-1]:
        images_BYX = resample(images_BYX, field.box)
    if changes.normalise is not None:
        radius = 0.5 * changes.normalise / field.pixel_size
        if radius > 0.5 * field.box:
            raise InputError(
                "--normalise", f"{changes.normalise:g} Å", f"less than the images' {field.box * field.pixel_size:g} Å"
            )
        images_BYX = normalise_background(images_BYX, radius)
    if (np.diff(batch.index_B) < 0).any():
        images_BYX = images_BYX[torch.from_numpy(np.argsort(batch.index_B, kind="stable")).to(device)]
    return -images_BYX if changes.invert else images_BYX


def _described(
    table: ParticleTable, names: list[str], new_field: dict[int, Field], shift_B2: Tensor | None, folder: Path
) -> ParticleTable:
    """The table with new image names, the remainders of the origins, and the optics table brought up to date."""
    by_number = {table.groups[index].number: field for index, field in new_field.items()}
    optics = table.optics_frame[table.optics_frame["rlnOpticsGroup"].isin(list(by_number))].reset_index(drop=True)
    fields = [by_number[number] for number in optics["rlnOpticsGroup"]]
    optics = optics.assign(rlnImagePixelSize=[f.pixel_size for f in fields], rlnImageSize=[f.box for f in fields])
    frame = table.frame.assign(rlnImageName=names)
    if shift_B2 is not None:
        frame = _recentred_columns(table, frame, shift_B2)
    return replace(table, frame=frame, optics_frame=optics, folder=folder)


def _recentred_columns(table: ParticleTable, frame: pd.DataFrame, shift_B2: Tensor) -> pd.DataFrame:
    """Origins and their priors less the shift; micrograph coordinates follow where the micrographs' pixel size is known."""
    pixel_B = np.array([group.pixel_size for group in table.groups])[table.group_index_B]
    shift_angstrom_B2 = shift_B2.numpy() * pixel_B[:, None]
    frame = frame.drop(columns=["rlnOriginX", "rlnOriginY"], errors="ignore")
    frame = frame.assign(rlnOriginXAngst=table.origins()[:, 0].numpy(), rlnOriginYAngst=table.origins()[:, 1].numpy())
    for axis, moved_B in zip("XY", shift_angstrom_B2.T):
        for label in (pattern.format(axis) for pattern in SHIFTED_WITH_THE_IMAGE):
            if label in frame.columns:
                frame[label] = frame[label] - moved_B
    if follows_micrograph(table):
        pixel_of = table.optics_frame.set_index("rlnOpticsGroup")["rlnMicrographPixelSize"]
        micrograph_pixel_B = frame["rlnOpticsGroup"].map(pixel_of).to_numpy(np.float64)
        for axis, moved_B in zip("XY", shift_angstrom_B2.T):
            frame[f"rlnCoordinate{axis}"] = frame[f"rlnCoordinate{axis}"] - moved_B / micrograph_pixel_B
    return frame


def follows_micrograph(table: ParticleTable) -> bool:
    """Whether recentring can carry rlnCoordinateX/Y along."""
    return "rlnCoordinateX" in table.frame.columns and "rlnMicrographPixelSize" in table.optics_frame.columns
