"""Images read into memory once, to stay there: straight into the tensor on a CPU, through two pinned buffers on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from verglas.particles.files import ImageFiles, unusable

CHUNK_BYTES = 2**26  # read at once


def read_all(
    files: ImageFiles, row_n: np.ndarray, device: torch.device, rescale: bool = False,
    advance: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Images [n, Y, X] of rows of one optics group, in the order given (the files' is read fastest), and None.

    rescale: where images are float32, (image - mean) / deviation in float16 (rounded by 2^-12 of a value at most) instead, and
    deviation and mean [n, 2]. advance: is told how many images were read. Raises InputError for images that cannot be used.
    """
    group = int(files.table.group_index_B[row_n[0]])
    box, dtype = files.box_of_group[group], files.dtype_of_group[group]
    rescale = rescale and dtype == torch.float32
    image_nYX = _empty((len(row_n), box, box), torch.float16 if rescale else dtype, device)
    scale_n2 = torch.empty(len(row_n), 2, device=device) if rescale else None
    bad_n = torch.zeros(len(row_n), dtype=torch.bool, device=device)
    direct = device.type == "cpu" and not rescale
    for part, own_BYX in _chunks(files, row_n, image_nYX if direct else None, device):
        bad_n[part] = unusable(own_BYX)
        if scale_n2 is not None:
            own_BYX, scale_n2[part] = rescaled(own_BYX)
        if not direct:
            image_nYX[part] = own_BYX
        if advance is not None:
            advance(part.stop - part.start)
    if bool(bad_n.any()):
        files.refuse(row_n[bad_n.cpu().numpy()])
    return image_nYX, scale_n2


def _chunks(
    files: ImageFiles, row_n: np.ndarray, straight_nYX: Tensor | None, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """(places, images on the device in the files' type), read straight into an array or through two buffers: while one is
    copied to a GPU, the other is filled."""
    group = int(files.table.group_index_B[row_n[0]])
    box, dtype = files.box_of_group[group], files.dtype_of_group[group]
    n, size, cuda = len(row_n), max(1, CHUNK_BYTES // (box**2 * dtype.itemsize)), device.type == "cuda"
    buffers = [torch.empty(min(size, n), box, box, dtype=dtype, pin_memory=cuda) for _ in range(2 if straight_nYX is None else 0)]
    copied: list[torch.cuda.Event | None] = [None, None]
    for number, start in enumerate(range(0, n, size)):
        part, turn = slice(start, min(start + size, n)), number % 2
        event = copied[turn]
        if event is not None:
            event.synchronize()  # what was in the buffer has left it
        read_BYX = straight_nYX[part] if straight_nYX is not None else buffers[turn][: part.stop - start]
        files.read(row_n[part], read_BYX.numpy())
        there_BYX = read_BYX.to(device, non_blocking=True)
        if cuda:
            copied[turn] = event = torch.cuda.Event()
            event.record()
        yield part, there_BYX


def _empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An array whose memory is not touched; numpy's costs fewer page faults than torch's on a CPU."""
    if device.type == "cpu":
        return torch.from_numpy(np.empty(shape, torch.empty(0, dtype=dtype).numpy().dtype))
    return torch.empty(shape, dtype=dtype, device=device)


def rescaled(image_BYX: Tensor) -> tuple[Tensor, Tensor]:
    """(image - mean) / deviation of every image [B, Y, X] in float32, and (deviation, mean) [B, 2]."""
    deviation_B, mean_B = torch.std_mean(image_BYX, dim=(1, 2))
    deviation_B = deviation_B.clamp_min(1e-30)
    normal_BYX = (image_BYX - mean_B[:, None, None]) / deviation_B[:, None, None]
    return normal_BYX, torch.stack([deviation_B, mean_B], -1)
