"""Scans as CXI files, written batch by batch: more patterns than the memory holds may pass through."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import h5py
import numpy as np

from verglas.io.atomic import atomic_path
from verglas.ptychography.files_result import CXI_VERSION
from verglas.ptychography.raw import ELECTRON_VOLT
from verglas.ptychography.scan import PLANCK_TIMES_LIGHT, Geometry


def write_scan(
    path: Path, geometry: Geometry, position_B2: np.ndarray, batches: Iterable[np.ndarray], kind: type,
    probe_MYX: np.ndarray | None = None, done: Callable[[int], None] = lambda count: None,
) -> None:  # fmt: skip
    """Write a scan with a known geometry as CXI; its patterns lie in one piece, so that readers can map them.

    position_B2: px, as `Scan` has them; batches: patterns [b, Y, X] in the same order, the direct beam in the middle, of type
    `kind`; done: told of each batch's size.
    """
    with atomic_path(path) as part, h5py.File(part, "w") as file:
        file["cxi_version"], file["number_of_entries"] = CXI_VERSION, 1
        entry = file.create_group("entry_1")
        entry.attrs["propagation"] = geometry.kind
        data: h5py.Dataset | None = None
        start = 0
        for batch_BYX in batches:
            if data is None:
                data = entry.create_dataset("instrument_1/detector_1/data", (len(position_B2), *batch_BYX.shape[1:]), kind)
                _instrument(entry, geometry, position_B2, (batch_BYX.shape[1], batch_BYX.shape[2]))
            data[start : start + len(batch_BYX)] = batch_BYX
            start += len(batch_BYX)
            done(len(batch_BYX))
        if probe_MYX is not None:
            entry["instrument_1/source_1/illumination"] = probe_MYX.astype(np.complex64)
        entry["data_1/data"] = h5py.SoftLink("/entry_1/instrument_1/detector_1/data")
        entry["data_1/translation"] = h5py.SoftLink("/entry_1/sample_1/geometry_1/translation")


def _instrument(entry: h5py.Group, geometry: Geometry, position_B2: np.ndarray, shape: tuple[int, int]) -> None:
    """Detector, source, and translations of the sample: rows of the pattern run down (-y), columns to -x, as CXI has it."""
    pixel = geometry.object_pixel(shape)
    assert pixel and geometry.wavelength and geometry.distance and geometry.detector_pixel
    detector, source = entry["instrument_1/detector_1"], entry.create_group("instrument_1/source_1")
    edge = geometry.detector_pixel
    for name, value in (("distance", geometry.distance), ("x_pixel_size", edge), ("y_pixel_size", edge)):
        detector[name] = value
        detector[name].attrs["units"] = "m"
    detector["basis_vectors"] = np.array([[0.0, -edge], [-edge, 0.0], [0.0, 0.0]])
    source["wavelength"], source["energy"] = geometry.wavelength, PLANCK_TIMES_LIGHT / geometry.wavelength * ELECTRON_VOLT
    source["energy"].attrs["units"] = "J"
    metres_B2 = position_B2 * np.array(pixel)  # the sample moves against the beam: twice the sign is none
    translation_B3 = np.stack([metres_B2[:, 1], metres_B2[:, 0], np.zeros(len(metres_B2))], 1)
    entry["sample_1/geometry_1/translation"] = translation_B3
    entry["sample_1/geometry_1/translation"].attrs["units"] = "m"
