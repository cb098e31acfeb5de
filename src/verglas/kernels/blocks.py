"""Ragged lists of what is compared: for each particle some slices and some shifts, every pair of them one sample."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor


def owner(ptr_B1: Tensor, count: int | None = None) -> Tensor:
    """Which run of a CSR list each element belongs to: [0, 0, 1, 1, 1, ...], int64. count: of elements; known, nothing waits for
    a GPU."""
    counts = ptr_B1[1:] - ptr_B1[:-1]
    return torch.repeat_interleave(torch.arange(len(counts), device=ptr_B1.device), counts, output_size=count)


@dataclass(frozen=True)
class Blocks:
    """CSR lists of B particles. Sample (slice a, shift t) of particle i is number value_ptr[i] + a * n_shifts(i) + t.

    slice_ptr_B1, shift_ptr_B1, value_ptr_B1: int64 [B + 1]; slice_N: int32, rows of the slice table (ascending within a
    particle); shift_M: int32, which of the shifts; count: of all samples, None where the host does not know it.
    """

    slice_ptr_B1: Tensor
    slice_N: Tensor
    shift_ptr_B1: Tensor
    shift_M: Tensor
    value_ptr_B1: Tensor
    count: int | None = None

    @classmethod
    def build(
        cls, slice_ptr_B1: Tensor, slice_N: Tensor, shift_ptr_B1: Tensor, shift_M: Tensor, count: int | None = None
    ) -> Blocks:
        """Blocks of these lists; the numbering of the samples follows."""
        sizes = (slice_ptr_B1[1:] - slice_ptr_B1[:-1]) * (shift_ptr_B1[1:] - shift_ptr_B1[:-1])
        value_ptr = torch.cat([sizes.new_zeros(1), sizes.cumsum(0)])
        return cls(slice_ptr_B1.long(), slice_N.int(), shift_ptr_B1.long(), shift_M.int(), value_ptr, count)

    def to(self, device: torch.device | str) -> Blocks:
        """The same on a device."""
        return Blocks(
            self.slice_ptr_B1.to(device), self.slice_N.to(device), self.shift_ptr_B1.to(device), self.shift_M.to(device),
            self.value_ptr_B1.to(device), self.count,
        )  # fmt: skip

    @property
    def particles(self) -> int:
        return len(self.slice_ptr_B1) - 1

    @cached_property
    def samples(self) -> int:
        """Number of samples. Where `count` does not tell, the first question waits for a GPU."""
        return int(self.value_ptr_B1[-1]) if self.count is None else self.count

    def shape(self, particle: int) -> tuple[int, int]:
        """(number of slices, number of shifts) of a particle."""
        slices = int(self.slice_ptr_B1[particle + 1] - self.slice_ptr_B1[particle])
        return slices, int(self.shift_ptr_B1[particle + 1] - self.shift_ptr_B1[particle])

    def lists(self, particle: int) -> tuple[Tensor, Tensor, slice]:
        """(its slices [n], its shifts [m], where its n * m samples lie), for plain references and tests."""
        slices = self.slice_N[self.slice_ptr_B1[particle] : self.slice_ptr_B1[particle + 1]].long()
        shifts = self.shift_M[self.shift_ptr_B1[particle] : self.shift_ptr_B1[particle + 1]].long()
        return slices, shifts, slice(int(self.value_ptr_B1[particle]), int(self.value_ptr_B1[particle + 1]))

    def ranges(self, first: int, last: int) -> tuple[slice, slice, slice]:
        """Where particles first..last-1 are in slice_N, in shift_M and among the samples; the first question waits for a GPU."""
        a, b, c, d, e, f = self._pointers_3B1[:, [first, last]].flatten().tolist()
        return slice(a, b), slice(c, d), slice(e, f)

    @cached_property
    def _pointers_3B1(self) -> Tensor:
        """The three lists of pointers in the memory of the host."""
        return torch.stack([self.slice_ptr_B1, self.shift_ptr_B1, self.value_ptr_B1]).cpu()

    def part(self, first: int, last: int, ranges: tuple[slice, slice, slice] | None = None) -> Blocks:
        """The lists of particles first..last-1 alone (views); ranges: theirs, if they are known."""
        slices, shifts, values = ranges or self.ranges(first, last)
        window = slice(first, last + 1)
        return Blocks(
            self.slice_ptr_B1[window] - slices.start, self.slice_N[slices], self.shift_ptr_B1[window] - shifts.start,
            self.shift_M[shifts], self.value_ptr_B1[window] - values.start, values.stop - values.start,
        )  # fmt: skip

    def with_rows(self, images: Tensor) -> tuple[Tensor, Blocks]:
        """(rows [R, 2, K] of shifted images, blocks whose shift_M are rows of it).

        images: [B, T, 2, K], all shifts of all particles, shift_M one of them; or [M, 2, K], those of the lists alone, in order.
        """
        if images.dim() == 3:
            row_M = torch.arange(len(self.shift_M), dtype=torch.int32, device=images.device)
        else:
            row_M = self.shift_M + owner(self.shift_ptr_B1, len(self.shift_M)).int() * images.shape[1]
            images = images.flatten(0, 1)
        return images, replace(self, shift_M=row_M)

    def sample_indices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(particle, position in slice_N, position in shift_M) of every sample, int64 [samples] each."""
        particle = owner(self.value_ptr_B1, self.samples)
        within = torch.arange(self.samples, device=particle.device) - self.value_ptr_B1[particle]
        shifts = (self.shift_ptr_B1[1:] - self.shift_ptr_B1[:-1])[particle]
        a = torch.div(within, shifts, rounding_mode="floor")
        return particle, self.slice_ptr_B1[particle] + a, self.shift_ptr_B1[particle] + within - a * shifts


@dataclass(frozen=True)
class Wanted:
    """Which samples are asked for, by their parents: pairs with kept_N = -inf may be left out (their values mean nothing).

    parents: Blocks of the parents, kept_N: one number per parent sample; each slice has slices_each children, each shift
    shifts_each.
    """

    parents: Blocks
    kept_N: Tensor
    slices_each: int
    shifts_each: int
