"""Files of verglas reconstruct: maps, and curves of half maps."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch

from verglas.io.mrc import Moments, moments_of, write_planes
from verglas.io.mrc_header import MODE_OF_DTYPE, make_header
from verglas.io.runfolder import RunFolder
from verglas.maximization.reconstruction import Reconstruction


def note_resolution(result: Reconstruction, run: RunFolder) -> None:
    """Write the curves of half maps, and say the resolution."""
    if result.half_maps is None:
        return
    result.save_curves(run.path("fsc.csv"))
    for masked, name in ((False, "resolution_unmasked"), (True, "resolution_masked")):
        run.figure(name, round(result.resolution(masked=masked), 3), "Å")
        limit = "the pixel size" if result.radius == result.box // 2 else "--max-resolution"
        at_limit = f" (limited by {limit})" if result.reaches_last_shell(masked) else ""
        where = "within the mask" if masked else "whole box"
        run.log(f"resolution at FSC 0.143, {where}: {result.resolution(masked=masked):.2f} Å{at_limit}")


def save(result: Reconstruction, run: RunFolder) -> None:
    """Write the maps."""
    maps = {"map.mrc": result.map_ZYX, "map_wiener.mrc": result.wiener_ZYX}
    if result.half_maps is not None:
        maps |= {"half1.mrc": result.half_maps[0], "half2.mrc": result.half_maps[1]}
    for name, tensor in maps.items():
        if tensor is not None:
            header = make_header((result.box,) * 3, MODE_OF_DTYPE["float32"], result.pixel_size, False)
            write_planes(run.path(name), header, partial(planes_on_host, tensor.detach()))


def planes_on_host(map_ZYX: torch.Tensor, part: slice) -> tuple[np.ndarray, Moments]:
    """Planes of a map, wherever it is, as float32, and their moments, which a GPU takes sooner than the host."""
    some_ZYX = map_ZYX[part].float()
    if some_ZYX.device.type == "cpu":
        data_ZYX = np.asarray(some_ZYX.numpy(), "<f4")
        return data_ZYX, moments_of(data_ZYX)
    held_ZYX = torch.empty(some_ZYX.shape, pin_memory=True)  # kept by PyTorch for the next planes
    held_ZYX.copy_(some_ZYX, non_blocking=True)
    moments = moments_on_device(some_ZYX)  # waits for the planes, too
    return np.asarray(held_ZYX.numpy(), "<f4"), moments


def moments_on_device(map_ZYX: torch.Tensor) -> Moments:
    """As `moments_of`."""
    total, length = map_ZYX.sum(dtype=torch.float64), torch.linalg.vector_norm(map_ZYX, dtype=torch.float64)
    smallest, largest, total, length = torch.stack([*map_ZYX.aminmax(), total, length]).tolist()
    return smallest, largest, total, length**2
