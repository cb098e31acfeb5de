"""Transforms of maps by way of a file: planes first, then the third axis for some rows of all planes at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import signed_frequencies
from verglas.core.masks import soft_sphere
from verglas.core.shells import correlation, friedel_weight_X
from verglas.io.mrc_parts import map_in_parts, read_planes
from verglas.projection.volume import gridding_correction, padded_size

ROWS_AT_ONCE = 8  # of all planes, that are transformed along z together; more are read at a time where memory allows
SHARE_FOR_ROWS = 0.25  # of the memory; the system keeps parts of files in what is left
PLANES_AT_ONCE = 4

MaskPart = Callable[[slice], Tensor]
"""Planes of a mask [z, N, N]."""


class PlanesOnDisk:
    """Complex numbers [Z, Y, X] in a file without a name in `folder`, written by planes, read by rows.

    A context manager: the file is gone at its end, and with the process.
    """

    def __init__(self, folder: Path, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> PlanesOnDisk:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def put(self, first: int, planes_zYX: Tensor) -> None:
        """Planes first, first + 1, ...: complex64."""
        self._file.seek(8 * first * self.shape[1] * self.shape[2])
        planes_zYX.contiguous().numpy().tofile(self._file)

    def rows(self, at_once: int = ROWS_AT_ONCE) -> Iterator[tuple[slice, Tensor]]:
        """(which rows along y, these of all planes [Z, y, X]) of runs of rows; the longer, the fewer pieces are read."""
        count, height, width = self.shape
        for first in range(0, height, at_once):
            part = slice(first, min(first + at_once, height))
            values_ZyX = np.empty((count, part.stop - first, width), np.complex64)
            for z, rows_yX in enumerate(values_ZyX):
                self._file.seek(8 * (z * height + first) * width)
                if self._file.readinto(rows_yX.view(np.uint8).data) != rows_yX.nbytes:
                    raise OSError(f"plane {z} of a temporary file cannot be read back")
            yield part, torch.from_numpy(values_ZyX)


def central(values: Tensor, dim: int, count: int) -> Tensor:
    """The `count` nearest to the origin, which is the first of a transform, along an axis; negative coordinates first."""
    size, half = values.shape[dim], count // 2
    return torch.cat([values.narrow(dim, size - half, half), values.narrow(dim, 0, count - half)], dim)


def plane_pairs(fourier_PYX: Tensor, box: int, first_is_zero: bool) -> Tensor:
    """Planes z >= 0 of a real map's half transform after the transforms back along y and x, complex [z, N, N].

    fourier_PYX: [2 z, P, columns x >= 0]: the planes z, then their partners -z, which have what lacks at x < 0. first_is_zero:
    the first plane is z = 0, its own partner, whose second place is empty. Lines that hold nothing are not transformed.
    """
    size, columns = fourier_PYX.shape[1:]
    along_y = central(torch.fft.ifft(fourier_PYX, dim=1), 1, box)
    here, partner = along_y.chunk(2)
    if first_is_zero:
        partner[0] = here[0]
    whole_zYX = here.new_zeros(len(here), box, size)
    whole_zYX[..., :columns] = here
    whole_zYX[..., size - columns + 1 :] = partner[..., 1:].flip(-1).conj()
    return central(torch.fft.ifft(whole_zYX, dim=2), 2, box)


def write_map(
    planes: PlanesOnDisk, path: Path, scale: tuple[float, float], memory: float, advance: Callable[[int], None]
) -> None:
    """The map of planes z >= 0 that `plane_pairs` gave, corners filled and gridding corrected, as `solve.SolvedSums.map`.

    scale: padding, pixel size in Å; memory: bytes that may be taken, for longer rows of pieces that are read and written.
    """
    count, box = planes.shape[:2]
    (padding, pixel_size), total, weight = scale, 0.0, 0.0
    of_row = 8 * count * box + 4 * box**2
    at_once = max(1, int(SHARE_FOR_ROWS * memory / (of_row * ROWS_AT_ONCE))) * ROWS_AT_ONCE
    with map_in_parts(path, box, pixel_size, overwrite=True) as file:
        for part, values_ZyX in planes.rows(min(box, at_once)):
            real_ZyX = torch.empty(box, values_ZyX.shape[1], box)
            for first in range(part.start, part.stop, ROWS_AT_ONCE):
                some = slice(first, min(first + ROWS_AT_ONCE, part.stop))
                place = slice(some.start - part.start, some.stop - part.start)
                real_yXZ = _along_z(values_ZyX[:, place], padded_size(box, padding))
                outside_yXZ = 1 - _sphere(box, some)  # the same along every axis
                total += float((real_yXZ * outside_yXZ).sum(dtype=torch.float64))
                weight += float(outside_yXZ.sum(dtype=torch.float64))
                real_ZyX[:, place] = real_yXZ.permute(2, 0, 1)
                advance(len(real_yXZ))
            file.put_rows(part.start, real_ZyX.numpy())
        mean = total / max(weight, 1e-12)

        def corrected(part: slice, values_zYX: np.ndarray) -> np.ndarray:
            inside_zYX = _sphere(box, part)
            filled_zYX = torch.from_numpy(values_zYX).mul_(inside_zYX).add_(1 - inside_zYX, alpha=mean)
            return filled_zYX.div_(gridding_correction(box, padding, part=part)).numpy()

        file.change_planes(corrected)


def _along_z(values_ZyX: Tensor, size: int) -> Tensor:
    """Rows of the map, z last: [y, N, N]."""
    box = values_ZyX.shape[2]
    lines_yXZ = values_ZyX.permute(1, 2, 0).contiguous()
    return central(torch.fft.irfft(lines_yXZ, n=size, dim=2), 2, box).mul_(box**2)


def _sphere(box: int, part: slice) -> Tensor:
    return soft_sphere(box, box / 2, 3, part=part)


def fsc_of_files(paths: tuple[Path, Path], box: int, mask: MaskPart | None, folder: Path) -> Tensor:
    """Fourier shell correlation of two maps that `write_map` wrote, as `core.shells.fsc` of both times a mask."""
    shape = (box, box, box // 2 + 1)
    with PlanesOnDisk(folder, shape) as first, PlanesOnDisk(folder, shape) as second:
        for path, planes in zip(paths, (first, second), strict=True):
            _transform_planes(path, planes, mask)
        weight_X, sums_3S = friedel_weight_X(box), torch.zeros(3, box // 2 + 1, dtype=torch.float64)
        for (part, a_ZyX), (_, b_ZyX) in zip(first.rows(), second.rows(), strict=True):
            a, b = torch.fft.fft(a_ZyX, dim=0), torch.fft.fft(b_ZyX, dim=0)
            shell = _shells(box, part)
            products = (a.real * b.real + a.imag * b.imag, a.abs().square(), b.abs().square())
            for sums_S, product in zip(sums_3S, products, strict=True):
                found_S = torch.bincount(shell.flatten(), (product.double() * weight_X).flatten(), box // 2 + 1)
                sums_S += found_S[: len(sums_S)]
    return correlation(*sums_3S)


def _transform_planes(path: Path, planes: PlanesOnDisk, mask: MaskPart | None) -> None:
    box = planes.shape[0]
    for start in range(0, box, PLANES_AT_ONCE):
        part = slice(start, min(start + PLANES_AT_ONCE, box))
        values_zYX = torch.from_numpy(read_planes(path, box, part).astype(np.float32, copy=False))
        if mask is not None:
            values_zYX = values_zYX * mask(part)
        planes.put(start, torch.fft.rfft2(values_zYX, norm="forward"))


def _shells(box: int, rows: slice) -> Tensor:
    """Shells of some rows along y of a half transform [N, y, N/2 + 1]."""
    axis, x = signed_frequencies(box).double(), torch.arange(box // 2 + 1)
    return (axis[:, None, None] ** 2 + axis[rows, None] ** 2 + x**2).sqrt_().add_(0.5).long()
