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
