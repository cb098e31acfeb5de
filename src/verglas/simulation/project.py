"""Projections of a map at the poses of a particle file, with origins, CTF and white noise if asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft2
from verglas.errors import InputError
from verglas.io.mrc import read_map
from verglas.io.runfolder import RunFolder
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.particles.table import ParticleTable
from verglas.simulation.imaging import HalfPlane, Transfer
from verglas.simulation.model import MapModel
from verglas.simulation.noise import WhiteNoise
from verglas.simulation.signal import MapTransforms, SliceSource
from verglas.simulation.writer import Delivery, check_disk, write_stack


class Options(Protocol):
    """What `project` needs to know; the command's option dataclass has it."""

    map: Path
    particles: Path
    ctf: bool
    white_noise: float
    box: int | None
    pixel: float | None
    float16: bool
    seed: int


@dataclass(frozen=True)
class Projected:
    """What was made, for the report: the new table (image names changed), the map [Z, Y, X] and its pixel size in Å."""

    table: ParticleTable
    map_ZYX: np.ndarray
    pixel_size: float


def project(options: Options, run: RunFolder, device: torch.device, reason: str) -> Projected:
    """Project into the run folder: projections.mrcs (one per optics group if there are several) and projections.star."""
    source_map = read_map(options.map)
    table = ParticleTable.read(options.particles)
    groups = output_groups(table, source_map.box, options)
    size = 2 if options.float16 else 4
    pixels = sum(int((table.group_index_B == g).sum()) * group.box**2 for g, group in enumerate(groups))
    check_disk(run.out.parent, pixels * size + 1000 * len(table) + 2**24)
    model = MapModel(options.map.name, torch.tensor(source_map.data_ZYX), source_map.pixel_size)
    transforms = MapTransforms.of([model], min(group.pixel_size for group in groups), device)
    for notice in table.notices:
        run.log(notice)
    run.provenance(device, kernels=transforms.volumes[0].kernel, precision="float32", reason=reason)
    names = np.empty(len(table), object)
    with run.progress("Projecting", total=len(table), unit="images") as bar:
        for number, group in enumerate(groups):
            index_B = torch.from_numpy(np.flatnonzero(table.group_index_B == number))
            if len(index_B) == 0:
                continue
            name = "projections.mrcs" if len(groups) == 1 else f"projections_group{number + 1:02d}.mrcs"
            images = projector(table, transforms, group, options, device)
            write_stack(run.path(name), group, index_B, images, Delivery(device, options.float16), bar.advance)
            names[index_B.numpy()] = [f"{i:06d}@{name}" for i in range(1, len(index_B) + 1)]
    made = replace(table.with_columns(rlnImageName=names), optics_frame=optics_of(table, groups))
    made.write(run.path("projections.star"))
    run.figure("images", len(table))
    run.figure("optics_groups", len(groups))
    return Projected(made, source_map.data_ZYX, source_map.pixel_size)


def optics_of(table: ParticleTable, groups: list[OpticsGroup]) -> pd.DataFrame:
    """The optics table with the boxes and pixel sizes of the new images (several groups may share one of its rows)."""
    by_number = {group.number: group for group in groups}
    rows = [by_number.get(number) for number in table.optics_frame["rlnOpticsGroup"]]
    frame = table.optics_frame[[row is not None for row in rows]].reset_index(drop=True)
    used = [row for row in rows if row is not None]
    return frame.assign(rlnImageSize=[g.box for g in used], rlnImagePixelSize=[g.pixel_size for g in used])


def output_groups(table: ParticleTable, map_box: int, options: Options) -> list[OpticsGroup]:
    """Optics groups of the images to be made: box and pixel size as asked, else the table's, else the map's box."""
    groups = []
    for group in table.groups:
        box, pixel_size = options.box or group.box or map_box, options.pixel or group.pixel_size
        if box % 2 or box < 8:
            raise InputError("--box" if options.box else f"{table.source}, optics group {group.name}", f"{box} px",
                             "an even box of at least 8 px", "Give it with --box.")  # fmt: skip
        if not pixel_size > 0:
            raise InputError("--pixel" if options.pixel else f"{table.source}, optics group {group.name}",
                             f"pixel size {pixel_size:g} Å", "a size above 0 Å", "Give it with --pixel.")  # fmt: skip
        groups.append(replace(group, box=box, pixel_size=pixel_size))
    return groups


def projector(
    table: ParticleTable, transforms: MapTransforms, group: OpticsGroup, options: Options, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """Function that makes the images [B, box, box] of particles by their rows (CPU) in the table.

    With --ctf: P CTF exp(i odd aberrations), or P CTF^2 where the group's images are premultiplied by their CTF.
    """
    plane = HalfPlane.of(group, device)
    source, transfer = SliceSource(transforms, plane, 0.0), Transfer.of(plane)
    rotation_B33, origin_B2 = table.rotations(), table.origins()
    ctf: CtfParameters | None = table.ctf() if options.ctf else None
    white = WhiteNoise(options.seed, device)
    if group.ctf_premultiplied:
        transfer = replace(transfer, odd_YX=None)

    def images(index_B: Tensor) -> Tensor:
        signal_BYX = source(rotation_B33[index_B].to(device), torch.zeros(len(index_B), dtype=torch.long, device=device))
        ctf_BYX = transfer.ctf_BYX(ctf[index_B].to(device)) if ctf is not None else None
        if ctf_BYX is not None and group.ctf_premultiplied:
            ctf_BYX = ctf_BYX.square()
        image_BYX = centred_irfft2(transfer.image(signal_BYX, origin_B2[index_B].to(device), ctf_BYX), group.box)
        if options.white_noise > 0:
            image_BYX += options.white_noise * white(index_B, group.box)
        return image_BYX

    return images
