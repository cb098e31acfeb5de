"""Counts ready to be fitted, in the precision of the file until they are used: on the device in the order of the FFT, or in host
memory, from where they travel block by block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fft import fftshift, ifftshift

from verglas.errors import InputError
from verglas.ptychography.scan import Scan
from verglas.ptychography.share import Share
from verglas.ptychography.streaming import Blocks

AT_ONCE = 256  # patterns


@dataclass(frozen=True)
class Counts:
    """stored_BYX: counts of any type, of this rank's positions, on the device or as `blocks` bring them there; weight_YX: 1 for
    good pixels, 0 for bad ones; total: of all counts in good pixels, of all ranks; far: whether `blocks` are of a far field."""

    stored_BYX: Tensor
    weight_YX: Tensor
    total: float
    blocks: Blocks | None = None
    far: bool = False

    @staticmethod
    def of(scan: Scan, like: Tensor, share: Share, resident: bool = True) -> Counts:
        """Patterns of `scan` on the device of `like`; resident False: in host memory. InputError for negative counts, or none at
        all, in good pixels."""
        mask_YX = torch.ones(scan.shape, dtype=torch.bool) if scan.mask_YX is None else scan.mask_YX.bool().cpu()
        weight_YX = to_fft_order(mask_YX, scan).to(like.device, like.dtype)
        if resident:
            counts = Counts(to_fft_order(_signed(scan.patterns_BYX), scan).to(like.device), weight_YX, 0.0)
        else:
            blocks = Blocks(_signed(scan.patterns_BYX.cpu()), like.device)
            counts = Counts(blocks.host_BYX, weight_YX, 0.0, blocks, scan.geometry.kind == "far")
        total, least = 0.0, 0.0
        for rows_B in counts.walk(torch.arange(len(scan), device=like.device), AT_ONCE):
            batch_BYX = counts.rows(rows_B)
            total += float(batch_BYX.sum(dtype=torch.float64))
            least = min(least, float(batch_BYX.min()))
        if least < 0:
            raise InputError(scan.name, f"counts down to {least:g}", "no negative counts", "Subtract less, or mask these pixels.")
        total = share.sum_of(total)
        if not 0 < total < float("inf"):
            raise InputError(scan.name, f"{total:g} counts in all good pixels", "light", "Look at the mask and the patterns.")
        return replace(counts, total=total)

    def __len__(self) -> int:
        return len(self.stored_BYX)

    def mean(self, share: Share) -> Tensor:
        """[Y, X] float64 mean pattern of all ranks."""
        sum_YX = torch.zeros_like(self.weight_YX, dtype=torch.float64)
        for rows_B in self.walk(torch.arange(len(self), device=sum_YX.device), AT_ONCE):
            sum_YX += self.rows(rows_B).double().sum(0)
        return share.total(sum_YX)[0] / share.positions

    def walk(self, rows_B: Tensor, size: int) -> Iterator[Tensor]:
        """The rows in pieces of `size`, of which `rows` and `stored` are quick while they are the last that was handed out."""
        yield from rows_B.split(size) if self.blocks is None else self.blocks.walk(rows_B, size)

    def expect(self, several: Sequence[Tensor]) -> None:
        """Rows that will be walked through one after the other."""
        if self.blocks is not None:
            self.blocks.expect(several)

    def stored(self, rows_B: Tensor) -> tuple[Tensor, Tensor]:
        """(counts as they are stored, on the device, in the order of the FFT; which of them are those of the rows)."""
        if self.blocks is None:
            return self.stored_BYX, rows_B
        some_BYX = self.blocks.patterns(rows_B)
        shifted_BYX = ifftshift(some_BYX, (1, 2)) if self.far else some_BYX
        return shifted_BYX, torch.arange(len(rows_B), device=rows_B.device)

    def rows(self, rows_B: Tensor) -> Tensor:
        """[B, Y, X] counts of some positions, in the precision of the fit, 0 in bad pixels (detectors write -1 or NaN there)."""
        stored_BYX, index_B = self.stored(rows_B)
        some_BYX = stored_BYX[index_B]
        if some_BYX.dtype == torch.int16:
            some_BYX = some_BYX.view(torch.uint16)
        return torch.nan_to_num(some_BYX.to(self.weight_YX.dtype), 0.0, 0.0, 0.0) * self.weight_YX


def _signed(patterns: Tensor) -> Tensor:
    """Few operations know uint16: such patterns travel as int16 of the same bits; others that are int16 as int32."""
    if patterns.dtype == torch.uint16:
        return patterns.view(torch.int16)
    return patterns.int() if patterns.dtype == torch.int16 else patterns


def to_fft_order(image: Tensor, scan: Scan) -> Tensor:
    """From the detector's order to that in which waves are computed; the same in the near field."""
    return ifftshift(image, (-2, -1)) if scan.geometry.kind == "far" else image


def to_detector_order(image: Tensor, scan: Scan) -> Tensor:
    """The inverse of `to_fft_order`."""
    return fftshift(image, (-2, -1)) if scan.geometry.kind == "far" else image
