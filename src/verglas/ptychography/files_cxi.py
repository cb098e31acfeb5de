"""CXI files (cxidb.org, version 1.x), NeXus ptychography (NXcxi_ptycho), and other NeXus files with a detector and a sample.

CXI: entry_1/data_1 holds patterns and `translation`, metres, of the **sample** in the laboratory (x, y, z); so the beam moves the
other way over it. The columns of detector_1/basis_vectors are the directions of the pattern's rows and columns. A mask of CXI is
0 where a pixel is good. Energies are joules unless `units` says otherwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from verglas.errors import InputError
from verglas.ptychography.raw import ENERGIES, LENGTHS, RawScan, array_of, as_stack, number, same_size, text_of

if TYPE_CHECKING:
    import h5py

TRANSLATIONS = ("data_1/translation", "sample_1/geometry_1/translation", "instrument_1/detector_1/translation")
PATTERNS = ("data_1/data", "instrument_1/detector_1/data")
ENERGY = ("instrument_1/beam_1/incident_beam_energy", "instrument_1/beam_1/energy", "instrument_1/source_1/energy")
SIGNAL_BIT = 0x1000  # CXI_PIXEL_HAS_SIGNAL: set by some programs on good pixels


def is_cxi(file: h5py.File) -> bool:
    """Whether the names are those of CXI."""
    return any(f"entry_1/{name}" in file for name in PATTERNS)


def read_cxi(file: h5py.File) -> RawScan:
    """The scan of entry_1."""
    path, entry = Path(file.filename), file["entry_1"]
    detector = entry.get("instrument_1/detector_1", entry)
    patterns_BYX = as_stack(_patterns(_first(entry, PATTERNS, path), path), path)
    translation_B3 = np.asarray(_first(entry, TRANSLATIONS, path)[()], float)
    translation_B3 = translation_B3.reshape(-1, translation_B3.shape[-1])
    edge_y, edge_x = (number(detector, name, units=LENGTHS, unit="m") for name in ("y_pixel_size", "x_pixel_size"))
    if edge_y and edge_x and not np.isclose(edge_y, edge_x):
        raise InputError(path, f"detector pixels of {edge_y:g} x {edge_x:g} m", "square pixels")
    raw = RawScan(path, "CXI", patterns_BYX, _along_detector(translation_B3, detector), detector_pixel=edge_y)
    raw.distance = number(detector, "distance", units=LENGTHS, unit="m")
    raw.energy = number(entry, *ENERGY, units=ENERGIES, unit="j")
    raw.near_field = text_of(entry.attrs.get("propagation", "")) == "near"
    raw.mask_YX = _mask(detector, patterns_BYX.shape[1:])
    if "background" in detector:
        raw.background_YX = np.asarray(detector["background"][()], float)
    if "source_1/illumination" in entry.get("instrument_1", {}):
        raw.probe = np.asarray(entry["instrument_1/source_1/illumination"][()])
    corners = translation_B3.shape[-1] == 3 and np.ptp(translation_B3[:, 2]) > 0
    raw.notes += ["the sample also moves along the beam, which is not followed"] if corners else []
    return raw


def _first(entry: h5py.Group, names: tuple[str, ...], path: Path) -> h5py.Dataset | h5py.Group:
    for name in names:
        if entry.get(name) is not None:
            return entry[name]
    raise InputError(path, f"{entry.name} has none of {', '.join(names)}", "patterns and translations as CXI has them")


def _patterns(found: h5py.Dataset | h5py.Group, path: Path) -> np.ndarray:
    """A dataset, or a group with one dataset for each pattern or each part of the scan."""
    if hasattr(found, "dtype"):
        return array_of(found)
    return same_size([array_of(found[name]) for name in sorted(found)], path)


def _along_detector(translation_B3: np.ndarray, detector: h5py.Group) -> np.ndarray:
    """Where the beam is on the sample, m, along the rows and columns of the pattern [B, 2]."""
    basis_32 = np.array([[0.0, -1.0], [-1.0, 0.0], [0.0, 0.0]])  # of CXI: seen along the beam, y up, rows from the top
    if "basis_vectors" in detector:
        found = np.asarray(detector["basis_vectors"][()], float).reshape(-1, *detector["basis_vectors"].shape[-2:])[0]
        basis_32 = found if found.shape == (3, 2) else found.T
    unit_32 = basis_32 / np.linalg.norm(basis_32, axis=0)
    return -translation_B3 @ unit_32[: translation_B3.shape[-1]]


def _mask(detector: h5py.Group, shape: tuple[int, ...]) -> np.ndarray | None:
    if "mask" not in detector:
        return None
    bits_YX = np.asarray(detector["mask"][()]).astype(np.int64)
    if bits_YX.ndim == 3:  # one for each pattern: bad in one is bad in all
        bits_YX = np.bitwise_or.reduce(bits_YX, axis=0)
    return (bits_YX & ~SIGNAL_BIT) == 0


def is_nexus(file: h5py.File) -> bool:
    """Whether there is a NeXus detector with a stack of patterns."""
    return _detector(file) is not None


def read_nexus(file: h5py.File) -> RawScan:
    """A scan of any NeXus file: the first NXdetector with a stack, sample_x / sample_y (or x / y) of sample or data groups."""
    path, detector = Path(file.filename), _detector(file)
    assert detector is not None
    raw = RawScan(path, "NeXus", as_stack(array_of(detector["data"]), path), _motors(file, path))
    raw.distance = number(detector, "distance", units=LENGTHS, unit="m")
    raw.detector_pixel = number(detector, "y_pixel_size", "x_pixel_size", units=LENGTHS, unit="m")
    for group in _groups(file, "NXbeam", "NXmonochromator", "NXsource"):
        raw.energy = raw.energy or number(group, "incident_energy", "incident_beam_energy", "energy", units=ENERGIES, unit="ev")
    if "pixel_mask" in detector:
        raw.mask_YX = np.asarray(detector["pixel_mask"][()]).reshape(-1, *raw.patterns_BYX.shape[1:])[0] == 0
    return raw


def _groups(file: h5py.File, *classes: str) -> list[h5py.Group]:
    found: list[h5py.Group] = []

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        if text_of(item.attrs.get("NX_class", "")) in classes:
            found.append(item)

    file.visititems(visit)
    return found


def _detector(file: h5py.File) -> h5py.Group | None:
    fit = [one for one in _groups(file, "NXdetector") if getattr(one.get("data"), "ndim", 0) >= 3]
    return fit[0] if fit else None


def _motors(file: h5py.File, path: Path) -> np.ndarray:
    """Positions of the beam, m, (y, x): the sample's motors with the other sign."""
    for group in _groups(file, "NXtransformations", "NXsample", "NXdata", "NXpositioner"):
        for names in (("sample_y", "sample_x"), ("SampleY_value", "SampleX_value"), ("y", "x")):
            if all(getattr(group.get(name), "size", 0) > 1 for name in names):
                pair = [np.asarray(group[name][()], float).ravel() for name in names]
                scales = [LENGTHS.get(text_of(group[name].attrs.get("units", "m")).lower(), 1.0) for name in names]
                return -np.stack([one * scale for one, scale in zip(pair, scales)], 1)
    found = "no positions of the sample (sample_y, sample_x or y, x)"
    raise InputError(path, found, "a NeXus sample, data or positioner group with them")
