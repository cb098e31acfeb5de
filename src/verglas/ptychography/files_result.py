"""Reconstructions as HDF5 files that follow CXI: written whole or not at all, with how they were made; and read again.

/reconstruction holds the arrays as `Reconstruction` names them; /entry_1/image_1/data, where CXI has its images, is a link to the
object. Attributes of /reconstruction: pixel_m (y, x; absent if unknown), origin_px, and `provenance`, the text of a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import verglas
from verglas.errors import InputError
from verglas.io.atomic import atomic_path
from verglas.io.provenance import plain
from verglas.ptychography.raw import open_hdf5
from verglas.ptychography.scan import Reconstruction

CXI_VERSION = 160
GROUP = "reconstruction"
NEEDED = ("object", "probe", "positions_px", "intensity", "background", "error")
ARRAYS = {  # name in the file -> (field, axes)
    "object": ("object_OLYX", "mode:slice:y:x"),
    "probe": ("probe_MYX", "mode:y:x"),
    "positions_px": ("positions_B2", "position:row column"),
    "intensity": ("scale_B", "position"),
    "background": ("background_YX", "y:x"),
    "probe_changes": ("eigen_KYX", "mode:y:x"),
    "probe_change_weights": ("opr_BK", "position:mode"),
}


def write_result(
    path: Path, found: Reconstruction, provenance: Mapping[str, Any], overwrite: bool = False,
    further: Mapping[str, Mapping[str, np.ndarray]] | None = None,
) -> None:  # fmt: skip
    """Write a reconstruction; further: groups of other arrays. OutputError if it cannot be written; then nothing has changed."""
    with atomic_path(path, overwrite) as part, h5py.File(part, "w") as file:
        file["cxi_version"], file["number_of_entries"] = CXI_VERSION, 1
        group = file.create_group(GROUP)
        for name, (attribute, axes) in ARRAYS.items():
            array = getattr(found, attribute)
            if array is not None:
                group[name] = array.detach().cpu().numpy()
                group[name].attrs["axes"] = axes
        group["error"] = np.array(found.error_P, float)
        group.attrs["origin_px"] = found.origin_2
        group.attrs["provenance"] = json.dumps(plain(provenance), ensure_ascii=False)
        for name, arrays in (further or {}).items():
            beside = file.create_group(name)
            for key, array in arrays.items():
                beside[key] = array
        entry = file.create_group("entry_1")
        entry["program_name"] = f"verglas {verglas.__version__}"
        image = entry.create_group("image_1")
        image["data"] = h5py.SoftLink(f"/{GROUP}/object")
        image["data_type"], image["data_space"], image["is_fft_shifted"] = "transmission", "real", 0
        if found.pixel is not None:
            group.attrs["pixel_m"] = found.pixel
            image["image_size"] = np.array([edge * one for edge, one in zip(found.object_OLYX.shape[-2:], found.pixel)])


def read_result(path: Path) -> tuple[Reconstruction, dict[str, Any]]:
    """A file that `write_result` wrote: the reconstruction on the CPU, and how it was made. InputError for any other file."""
    with open_hdf5(path) as file:
        group = file.get(GROUP)
        missing = [name for name in NEEDED if group is None or name not in group]
        if group is None or missing:
            raise InputError(
                path,
                f"it holds no {missing[0]} under /{GROUP}",
                "a reconstruction that `verglas ptycho` wrote",
                "Name the result.cxi of a run, or the truth.cxi of a simulation.",
            )
        found = {field: torch.from_numpy(np.asarray(group[name][()])) for name, (field, _) in ARRAYS.items() if name in group}
        pixel, origin = group.attrs.get("pixel_m"), group.attrs["origin_px"]
        provenance = json.loads(group.attrs["provenance"])
        errors = tuple(float(one) for one in group["error"][()])
    return Reconstruction(
        **found,
        origin_2=(float(origin[0]), float(origin[1])),
        pixel=None if pixel is None else (float(pixel[0]), float(pixel[1])),
        error_P=errors,
    ), provenance


def is_result(path: Path) -> bool:
    """Whether a file holds a reconstruction (or a truth) rather than a scan."""
    if not path.is_file() or not h5py.is_hdf5(path):
        return False
    with open_hdf5(path) as file:
        return GROUP in file
