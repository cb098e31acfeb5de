"""Truth and start maps of a simulation, and maps made of atoms."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from verglas.core.fourier import centred_irfft3, centred_rfft3, signed_frequencies
from verglas.errors import InputError
from verglas.optics.group import OpticsGroup
from verglas.simulation.model import AtomModel, MapModel, Model
from verglas.simulation.nufft import atom_map

POWER_MAY_BE_LOST = 0.02  # of a map's power, outside the images' box


def truth_map(model: Model, box: int, pixel_size: float, bfactor: float) -> Tensor:
    """The model on a grid [Z, Y, X] whose sums along z are the images: same grey values, damped by exp(-B s^2 / 4)."""
    if isinstance(model, AtomModel):
        return atom_map(model.xyz_N3, model.weight_N, box, pixel_size, bfactor)
    # A projection sums voxels of the map's own size; on this grid fewer or more of them lie along z.
    map_ZYX = resampled(model, box, pixel_size) * (pixel_size / model.pixel_size)
    return map_ZYX if bfactor == 0 else damped(map_ZYX, pixel_size, bfactor)


def map_of_atoms(model: AtomModel, groups: list[OpticsGroup], bfactor: float) -> MapModel:
    """Atoms as a map that serves the images of all groups: the finest pixel, the widest box, damped by exp(-B s^2 / 4)."""
    pixel_size = min(group.pixel_size for group in groups)
    edge = max(group.box * group.pixel_size for group in groups)
    box = 2 * math.ceil(edge / pixel_size / 2 - 1e-6)
    return MapModel(model.name, truth_map(model, box, pixel_size, bfactor), pixel_size, model.notes)


def low_pass_bfactor(resolution: float) -> float:
    """B in Å^2 of the Gaussian low pass whose amplitude is one half at `resolution` Å (a Gaussian, so that nothing rings)."""
    return 4 * math.log(2) * resolution**2


def damped(map_ZYX: Tensor, pixel_size: float, bfactor: float) -> Tensor:
    """A map times exp(-B s^2 / 4)."""
    box = map_ZYX.shape[0]
    return centred_irfft3(centred_rfft3(map_ZYX) * torch.exp(-bfactor / 4 * s2_of_half_volume(box, pixel_size)), box)


def s2_of_half_volume(box: int, pixel_size: float) -> Tensor:
    """Squared frequency in 1/Å^2 on the stored half [Z, Y, X/2+1] of a transform."""
    s2_Z = (signed_frequencies(box).float() / (box * pixel_size)).square()
    return s2_Z[:, None, None] + s2_Z[None, :, None] + s2_Z[None, None, : box // 2 + 1]


def resampled(model: MapModel, box: int, pixel_size: float) -> Tensor:
    """The map on another grid [Z, Y, X], centres kept, same grey values: band-limited interpolation, zero outside the map.

    Exact for what both grids can hold; coarser grids cut at their Nyquist frequency.
    """
    old = model.map_ZYX.shape[-1]
    if old == box and abs(pixel_size / model.pixel_size - 1) < 1e-5:
        return model.map_ZYX
    weight_NM = dirichlet_matrix(old, box, pixel_size / model.pixel_size)
    out = torch.einsum("ax,zyx->zya", weight_NM, model.map_ZYX.double())
    out = torch.einsum("by,zya->zba", weight_NM, out)
    return torch.einsum("cz,zba->cba", weight_NM, out).float().contiguous()


def dirichlet_matrix(old: int, new: int, step: float) -> Tensor:
    """Trigonometric interpolation along one axis [new, old]: new samples `step` old pixels apart about the same centre."""
    position_N = (torch.arange(new, dtype=torch.float64) - new // 2) * step + old // 2
    highest = min(old // 2 - 1, math.ceil(old / (2 * step)) - 1)
    distance_NM = position_N[:, None] - torch.arange(old, dtype=torch.float64)
    frequency_K = torch.arange(1, highest + 1, dtype=torch.float64)
    weight_NM = torch.ones_like(distance_NM)
    for k in frequency_K:
        weight_NM += 2 * torch.cos(2 * math.pi * k / old * distance_NM)
    inside_N = (position_N > -0.5) & (position_N < old - 0.5)
    return weight_NM / old * inside_N[:, None]


def check_fits(models: list[Model], groups: list[OpticsGroup]) -> list[str]:
    """Warnings for models that nearly fill the images; InputError where they do not fit into them."""
    warnings = []
    for group in groups:
        edge = group.box * group.pixel_size
        for model in models:
            if isinstance(model, MapModel):
                _check_map_fits(model, group)
            elif model.diameter > edge:
                needed = 2 * math.ceil(model.diameter * 1.25 / group.pixel_size / 2)
                raise InputError("--box", f"{group.box} px of {group.pixel_size:g} Å are {edge:.0f} Å, but {model.name} is "
                                 f"{model.diameter:.0f} Å across", "images wider than the model",
                                 f"Use --box {needed}, or larger pixels.")  # fmt: skip
            elif model.diameter > 0.8 * edge:
                warnings.append(f"{model.name} is {model.diameter:.0f} Å across and nearly fills the images of {edge:.0f} Å; "
                                "offsets and the CTF carry signal over the edge.")  # fmt: skip
    return list(dict.fromkeys(warnings))


def _check_map_fits(model: MapModel, group: OpticsGroup) -> None:
    edge, own = group.box * group.pixel_size, model.map_ZYX.shape[-1] * model.pixel_size
    if own <= edge * (1 + 1e-5):
        return
    keep = 2 * int(edge / model.pixel_size / 2)
    start = (model.map_ZYX.shape[-1] - keep) // 2
    kept_ZYX = model.map_ZYX[(slice(start, start + keep),) * 3].numpy()
    lost = 1 - np.square(kept_ZYX, dtype=np.float64).sum() / np.square(model.map_ZYX.numpy(), dtype=np.float64).sum()
    if lost > POWER_MAY_BE_LOST:
        raise InputError("--box", f"{group.box} px of {group.pixel_size:g} Å are {edge:.0f} Å, and {lost:.0%} of the power of "
                         f"{model.name} ({own:.0f} Å) lies outside", "images that hold the particle",
                         f"Use --box {2 * math.ceil(own / group.pixel_size / 2)}, or larger pixels.")  # fmt: skip
