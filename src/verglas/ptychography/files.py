"""From a file to a `Scan`: finds the format, settles units, axes and the order of the detector, and has it checked."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import torch

from verglas.errors import InputError
from verglas.ptychography import checks
from verglas.ptychography.files_arrays import read_npz, read_plain_hdf5
from verglas.ptychography.files_cxi import is_cxi, is_nexus, read_cxi, read_nexus
from verglas.ptychography.files_ptyd import is_ptyd, read_ptyd
from verglas.ptychography.raw import LENGTHS, RawScan, open_hdf5
from verglas.ptychography.read_options import ReadOptions
from verglas.ptychography.scan import Geometry, Scan

MAPPED_TYPES = (np.uint16, np.float32)  # that engines take as they lie in the file
NPZ = (".npz", ".npz.bz2", ".npz.gz", ".npz.xz")


def read_scan(path: Path, options: ReadOptions | None = None) -> tuple[Scan, list[str]]:
    """The scan in a file and what a person should know of it. InputError for what cannot be reconstructed."""
    return scan_of(read_raw(path), options or ReadOptions())


def read_raw(path: Path) -> RawScan:
    """A file as it is, whatever its format. InputError if there is no scan in it."""
    if path.name.lower().endswith(NPZ):
        if not path.is_file():
            raise InputError(path, "it is a folder" if path.is_dir() else "there is no such file", "a scan")
        return read_npz(path)
    with open_hdf5(path) as file:
        for fits, read in ((is_cxi, read_cxi), (is_ptyd, read_ptyd), (is_nexus, read_nexus)):
            if fits(file):
                return read(file)
        return read_plain_hdf5(file)


def scan_of(raw: RawScan, options: ReadOptions) -> tuple[Scan, list[str]]:
    """Units, axes and order settled as the options or the file say; checked. Returns the scan and notices."""
    notices = list(raw.notes)
    patterns_BYX, position_B2 = _cut(raw, options)
    geometry = _geometry(raw, options)
    mask_YX = _mask(raw, options)
    shape = patterns_BYX.shape[1:]
    pixel = geometry.object_pixel((shape[0], shape[1]))
    position_B2 = _in_pixels(raw, options, position_B2, pixel)
    patterns_BYX, mask_YX = checks.counts(raw.path, patterns_BYX, mask_YX, options.clip_negative, notices)
    background_YX = None if raw.background_YX is None else np.broadcast_to(np.squeeze(raw.background_YX), shape)
    if geometry.kind == "far":
        order = checks.direct_beam(raw.path, patterns_BYX, mask_YX, raw.direct_beam, options.direct_beam, notices)
        if order == "corner":
            patterns_BYX = np.fft.fftshift(patterns_BYX, axes=(1, 2))
            mask_YX, background_YX = (None if one is None else np.fft.fftshift(one) for one in (mask_YX, background_YX))
    good_B = checks.positions(raw.path, position_B2, (shape[0], shape[1]), options.skip_isolated, notices)
    if not good_B.all():
        patterns_BYX, position_B2 = patterns_BYX[good_B], position_B2[good_B]
    scan = Scan(
        torch.from_numpy(_storable(patterns_BYX)),
        torch.from_numpy(position_B2),
        geometry,
        _tensor(mask_YX),
        _tensor(background_YX, np.float32),
        _modes(raw.path, raw.probe, (shape[0], shape[1])),
        _object(raw, notices),
        name=raw.path.name,
    )
    checks.object_holds(raw.path, scan)
    return scan, notices


def _cut(raw: RawScan, options: ReadOptions) -> tuple[np.ndarray, np.ndarray]:
    """Patterns and positions [B, 2], the first ones only if asked for; as many of each."""
    patterns_BYX, position_BC, first = raw.patterns_BYX, raw.position_BC, options.first
    if first is not None:
        if not 2 <= first <= min(len(patterns_BYX), len(position_BC)):
            raise InputError("--first", str(first), f"2 to {min(len(patterns_BYX), len(position_BC))}")
        patterns_BYX, position_BC = patterns_BYX[:first], position_BC[:first]
    if len(patterns_BYX) != len(position_BC):
        fewer = min(len(patterns_BYX), len(position_BC))
        raise InputError(
            raw.path,
            f"{len(patterns_BYX)} patterns and {len(position_BC)} positions",
            "as many of each",
            f"If the scan was cut short, take what there is: --first {fewer}.",
        )
    if not np.isfinite(position_BC).all():
        row = int(np.flatnonzero(~np.isfinite(position_BC).all(1))[0])
        raise InputError(raw.path, f"position {row} is not a number", "finite positions", f"Use those before it: --first {row}.")
    columns = _axes(options.position_axes or raw.position_axes)
    if any(column >= position_BC.shape[1] for column, _ in columns):
        raise InputError("--position-axes", options.position_axes, f"axes of {position_BC.shape[1]} columns")
    return patterns_BYX, np.stack([sign * position_BC[:, column].astype(float) for column, sign in columns], 1)


def _axes(text: str) -> list[tuple[int, int]]:
    """'-xy' -> for rows, then columns: (which column of the file, sign)."""
    signed = re.findall(r"(-?)([yx])", text)
    if "".join(a + b for a, b in signed) != text or sorted(axis for _, axis in signed) != ["x", "y"]:
        expected = "y and x in the order of the columns, each perhaps with '-', as in yx or x-y"
        raise InputError("--position-axes", f"'{text}'", expected)
    found = {axis: (column, -1 if minus else 1) for column, (minus, axis) in enumerate(signed)}
    return [found["y"], found["x"]]


def _wavelength(raw: RawScan, options: ReadOptions) -> float | None:
    """m; None: nobody says."""
    if options.wavelength is not None:
        if options.energy is not None:
            raise InputError("--wavelength", f"{options.wavelength:g} nm beside --energy", "one of them")
        if not options.wavelength > 0:
            raise InputError("--wavelength", f"{options.wavelength:g} nm", "above 0")
        return 1e-9 * options.wavelength
    energy = 1e3 * options.energy if options.energy is not None else raw.energy
    if energy is not None and not energy > 0:
        fix = "Give it with --energy (keV), or --wavelength (nm)."
        raise InputError(raw.path, f"photon energy of {energy:g} eV", "above 0", fix)
    return None if energy is None else Geometry.wavelength_of(energy)


def _geometry(raw: RawScan, options: ReadOptions) -> Geometry:
    wavelength = _wavelength(raw, options)
    distance = options.distance if options.distance is not None else raw.distance
    pixel = 1e-6 * options.detector_pixel if options.detector_pixel is not None else raw.detector_pixel
    near = options.near_field or raw.near_field
    if options.focus is not None:
        if not near:
            raise InputError("--focus", f"{options.focus:g} m in a far field", "--near-field beside it")
        if wavelength is None or distance is None or pixel is None:
            raise InputError(
                raw.path,
                "energy, distance or detector pixel missing",
                "all three for a near field",
                "Give --energy (or --wavelength), --distance and --detector-pixel.",
            )
        return Geometry.cone(wavelength, options.focus, distance, pixel)
    return Geometry("near" if near else "far", wavelength, distance, pixel)


def _mask(raw: RawScan, options: ReadOptions) -> np.ndarray | None:
    mask_YX = raw.mask_YX
    if options.mask is not None:
        try:
            mask_YX = np.load(options.mask) != 0
        except (OSError, ValueError) as error:
            raise InputError(options.mask, f"it cannot be read ({error})", "a mask as .npy") from error
    if mask_YX is not None and mask_YX.shape != raw.patterns_BYX.shape[1:]:
        where = options.mask or raw.path
        raise InputError(where, f"mask of {list(mask_YX.shape)} px", f"{list(raw.patterns_BYX.shape[1:])} px, as the patterns")
    return mask_YX


def _in_pixels(raw: RawScan, options: ReadOptions, position_B2: np.ndarray, pixel: tuple[float, float] | None) -> np.ndarray:
    unit = raw.position_unit if options.position_unit == "auto" else options.position_unit
    if unit == "px":
        return position_B2
    if pixel is None:
        raise InputError(
            raw.path,
            f"positions in {unit}, but the pixel of the object is not known",
            "energy, distance and detector pixel",
            "Give --energy, --distance and --detector-pixel; or --position-unit px.",
        )
    return position_B2 * LENGTHS[unit] / np.array(pixel)


def _storable(patterns_BYX: np.ndarray) -> np.ndarray:
    """float32 or uint16: whole numbers up to 65,535 as uint16, which takes half the memory."""
    if patterns_BYX.dtype in MAPPED_TYPES:
        return patterns_BYX
    if patterns_BYX.dtype.kind in "iub" and patterns_BYX.max() <= np.iinfo(np.uint16).max:
        return patterns_BYX.astype(np.uint16)
    return patterns_BYX.astype(np.float32)


def _tensor(array_YX: np.ndarray | None, kind: type = bool) -> torch.Tensor | None:
    return None if array_YX is None else torch.from_numpy(np.ascontiguousarray(array_YX, kind))


def _modes(path: Path, probe: np.ndarray | None, shape: tuple[int, int]) -> torch.Tensor | None:
    """Probe of any number of axes -> [M, Y, X]; InputError if it has another size than the patterns."""
    if probe is None:
        return None
    if probe.ndim < 2 or probe.shape[-2:] != shape:
        raise InputError(
            path,
            f"probe of shape {list(probe.shape)}",
            f"{list(shape)} px, as the patterns",
            "Crop, pad or leave it out (then one is made from the patterns).",
        )
    return torch.from_numpy(np.ascontiguousarray(probe.reshape(-1, *shape), np.complex64))


def _object(raw: RawScan, notices: list[str]) -> torch.Tensor | None:
    """Object of up to four axes -> [modes, slices, Y, X], if the positions are in its pixels."""
    if raw.object is None or raw.object.ndim < 2:
        return None
    if raw.position_unit != "px" or raw.position_BC.min() < -1:
        notices.append("the file's object is not used: where it lies among the positions is not known")
        return None
    edges = [1] * (4 - raw.object.ndim) + list(raw.object.shape)
    return torch.from_numpy(np.ascontiguousarray(raw.object.reshape(edges[-4:]), np.complex64))
