"""ptypy's data files (.ptyd): chunks/N/{data, positions, weights, indices}, with geometry in meta and info.

Positions are metres, (y, x), of the beam on the object; energies keV; weights are 0 where a pixel is bad.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from verglas.errors import InputError
from verglas.ptychography.raw import RawScan, array_of, as_stack, number, same_size, text_of

if TYPE_CHECKING:
    import h5py

PLACES = ("meta", "info")


def is_ptyd(file: h5py.File) -> bool:
    """Whether there are ptypy's chunks."""
    return "chunks" in file and len(file["chunks"]) > 0


def read_ptyd(file: h5py.File) -> RawScan:
    """All chunks in the order of their patterns."""
    path = Path(file.filename)
    chunks = [file["chunks"][name] for name in sorted(file["chunks"], key=lambda name: (len(name), name))]
    for chunk in chunks:
        if "data" not in chunk or "positions" not in chunk:
            raise InputError(
                path, f"{chunk.name} lacks data or positions", "both in every chunk", "The writer may have been stopped."
            )
    patterns_BYX = same_size([as_stack(array_of(chunk["data"]), path) for chunk in chunks], path)
    position_B2 = np.concatenate([np.asarray(chunk["positions"][()], float).reshape(-1, 2) for chunk in chunks])
    raw = RawScan(path, "ptypy", patterns_BYX, position_B2)
    groups = [file[name] for name in PLACES if name in file]
    for group in groups:
        energy = number(group, "energy")
        raw.energy = raw.energy or (1e3 * energy if energy else None)
        raw.distance = raw.distance or number(group, "distance")
        raw.detector_pixel = raw.detector_pixel or number(group, "psize")
        raw.near_field |= "propagation" in group and text_of(group["propagation"][()]).startswith("near")
    raw.mask_YX = _mask(file, chunks, patterns_BYX.shape[1:])
    return raw


def _mask(file: h5py.File, chunks: list[h5py.Group], shape: tuple[int, ...]) -> np.ndarray | None:
    """Pixels with weight in every pattern."""
    found = [np.asarray(chunk["weights"][()]) for chunk in chunks if "weights" in chunk and chunk["weights"].size]
    found += [np.asarray(file[f"{name}/weight2d"][()]) for name in (*PLACES, "common") if f"{name}/weight2d" in file]
    masks = [(one.reshape(-1, *shape) > 0).all(0) for one in found if one.shape[-2:] == shape]
    return np.logical_and.reduce(masks) if masks else None
