"""Kernels of a reconstruction on a GPU, compiled in threads while images are read: together they take some seconds, once."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from threading import Thread
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from verglas.maximization.reconstruct import Geometry


def of_device(device: torch.device) -> None:
    """What PyTorch does first in any reconstruction, with next to nothing: its kernels are loaded by their first use. Returns at
    once: it passes while packages are imported."""
    _begin(partial(first_steps, device))


def first_steps(device: torch.device) -> None:
    """The list of bricks of a small volume, and slices of two small images."""
    import torch

    from verglas.core.fourier import half_plane_pixels
    from verglas.core.rows import packed_sphere
    from verglas.kernels.backproject.bricks import prepare
    from verglas.kernels.weigh import GroupTables, ImageFactors, weigh_reference

    prepare(packed_sphere(8.0, device))
    pixels, fourier_BYX = half_plane_pixels(16, 8, device), torch.fft.rfft2(torch.zeros(2, 16, 16, device=device), norm="forward")
    phase_K = torch.zeros(len(pixels.x_K), device=device)
    tables = GroupTables(pixels, phase_K.repeat(3, 1), phase_K, None)
    weigh_reference(fourier_BYX, tables, ImageFactors(torch.zeros(2, 2), torch.zeros(2, 4)))


def of_adding(geometry: Geometry, device: torch.device, fewest: int) -> None:
    """What adds slices to sums, whose data and weights lie together or apart. fewest: slices in a call; where these are too few
    for bricks, Triton's atomics will add them, which take seconds to import and to compile. Returns at once."""
    from verglas.kernels.backproject.bricks import kernels, too_few

    rows = geometry.rows()
    wide = rows.start_ZY.element_size() == 8

    def atomics() -> None:
        from verglas.kernels.backproject.triton import ready

        ready(device, wide)

    samples = fewest * round(math.pi / 2 * geometry.radius**2)  # half a disk
    both = [partial(kernels, device, wide, apart) for apart in (False, True)]
    _begin(*both, *([atomics] if too_few(samples, rows.count) else []))


def of_solving(
    geometry: Geometry, device: torch.device, exact: bool, granted: float | None = None, apart: bool = False
) -> None:
    """What makes maps of sums. granted: of `gridding.even_out`; apart: one map at a time (`in_rounds`). Returns at once."""
    import torch

    from verglas.maximization import shells
    from verglas.maximization.gridding import residues_of
    from verglas.projection.axes import Axes, kernel, serves
    from verglas.projection.volume import padded_size

    rows, size = geometry.rows(device), padded_size(geometry.box, geometry.padding)
    wide = int(rows.start_ZY.dtype == torch.int64)
    work: list[Callable[[], object]] = [lambda: shells.kernel("shell_sums", device, (f"WIDE={wide}",), 0)]
    if serves(geometry.box, size, device, torch.float32):
        axes, kind = Axes(geometry.box, size, device), "PLAIN" if apart else "APART" if exact else "TOGETHER"
        work.append(lambda: kernel("to_y", device, axes.defines(bool(wide), kind), 0))
        work.append(lambda: kernel("to_x", device, axes.defines(False), 0))
    if apart:
        work += [partial(shells.kernel, name, device, (f"WIDE={wide}",), 0) for name in ("divide_voxels", "add_prior")]
    if exact:
        work.append(lambda: residues_of(rows, 4, 1, granted)[1])
    _begin(*work)


def _begin(*work: Callable[[], object]) -> None:
    def one(do: Callable[[], object]) -> None:
        with suppress(Exception):  # whoever needs the kernel will meet the error, and say what it means
            do()

    for do in work:
        Thread(target=one, args=(do,), daemon=True).start()
