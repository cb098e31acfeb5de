"""Small made-up ptychographic worlds for tests: random objects and probes, every part of the model there."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.ptychography.reference import pattern_reference
from verglas.ptychography.scan import Geometry, Reconstruction, Scan

# kind, slices, object modes, probe modes, modes of the probe's change, binning
CASES = {
    "far": ("far", 1, 1, 1, 0, 1),
    "far, modes": ("far", 1, 2, 3, 0, 1),
    "far, changing probe": ("far", 1, 1, 2, 2, 1),
    "far, three slices": ("far", 3, 1, 2, 1, 1),
    "far, binned": ("far", 1, 1, 1, 0, 2),
    "near": ("near", 1, 1, 1, 0, 1),
    "near, everything": ("near", 2, 2, 2, 1, 2),
}


@dataclass(frozen=True)
class World:
    """A reconstruction and counts that do not fit it exactly; counts and background in the order of the FFT."""

    geometry: Geometry
    found: Reconstruction
    counts_BYX: Tensor
    mask_YX: Tensor


def geometry_of(kind: str, slices: int, binning: int) -> Geometry:
    distances = (2e-4,) * (slices - 1)
    if kind == "near":
        return Geometry("near", 1e-10, 4e-3, 2e-7 * binning, distances, binning)
    return Geometry("far", 1e-10, 2.0, 75e-6, distances, binning)


def world(case: str, whole: bool = False, positions: int = 4, window: tuple[int, int] = (12, 10)) -> World:
    """whole: positions are whole pixels."""
    kind, slices, objects, probes, eigens, binning = CASES[case]
    draw = torch.Generator().manual_seed(sum(map(ord, case)))
    geometry = geometry_of(kind, slices, binning)

    def field(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.complex128)

    def numbers(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=draw, dtype=torch.float64)

    shape = (window[0] // binning, window[1] // binning)
    position_B2 = 7 * numbers(positions, 2) + 1
    found = Reconstruction(
        object_OLYX=1 + 0.3 * field(objects, slices, window[0] + 10, window[1] + 10),
        probe_MYX=3 * field(probes, *window),
        positions_B2=position_B2.round() if whole else position_B2,
        scale_B=0.8 + 0.4 * numbers(positions),
        background_YX=1 + numbers(*shape),
        eigen_KYX=field(eigens, *window) if eigens else None,
        opr_BK=numbers(positions, eigens) - 0.5 if eigens else None,
        pixel=geometry.object_pixel(shape),
    )
    other = replace(found, object_OLYX=found.object_OLYX + 0.2 * field(*found.object_OLYX.shape))
    # The reference gives far patterns in the order of the FFT; their background is given in the detector's.
    counts = torch.stack([pattern_reference(other, geometry, b) for b in range(positions)])
    mask = torch.rand(shape, generator=draw) > 0.1
    return World(geometry, found, counts, mask)


def smooth(*shape: int, seed: int, width: float) -> Tensor:
    """Real, smooth random images of mean 0 and standard deviation 1; width: px of a blob."""
    draw = torch.Generator().manual_seed(seed)
    frequency = [torch.fft.fftfreq(n, dtype=torch.float64) for n in shape[-2:]]
    low_pass = torch.exp(-0.5 * (2 * torch.pi * width) ** 2 * (frequency[0][:, None] ** 2 + frequency[1] ** 2))
    image = torch.fft.ifft2(torch.fft.fft2(torch.randn(shape, generator=draw, dtype=torch.float64)) * low_pass).real
    return (image - image.mean()) / image.std()


def defocused_spot(window: int, width: float, curvature: float) -> Tensor:
    """[Y, X] Gaussian of `width` px with a curved phase."""
    at = torch.arange(window, dtype=torch.float64) - window // 2
    square = at[:, None] ** 2 + at[None, :] ** 2
    return torch.exp(-square / (2 * width**2)).to(torch.complex128) * torch.exp(1j * curvature * square)


def made_up(window: int = 32, side: int = 7, step: float = 3.3, counts: float = 1e5, seed: int = 0) -> Reconstruction:
    """A truth to be found: smooth object with absorption and phase, curved probe, positions on a grid with jitter."""
    draw = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(*[torch.arange(side, dtype=torch.float64)] * 2) * step
    position_B2 = grid + torch.rand(side**2, 2, generator=draw, dtype=torch.float64) + 2
    edge = int(side * step) + window + 6
    phase, absorption = smooth(edge, edge, seed=seed + 1, width=1.5), smooth(edge, edge, seed=seed + 2, width=1.5)
    object_YX = torch.exp(0.4j * phase - 0.1 * (absorption - absorption.min()))
    probe_YX = defocused_spot(window, window / 7, 0.03)
    probe_YX = probe_YX * (counts / probe_YX.abs().square().sum()).sqrt()
    return Reconstruction(
        object_YX[None, None], probe_YX[None], position_B2, torch.ones(side**2, dtype=torch.float64),
        torch.zeros(window, window, dtype=torch.float64),
    )  # fmt: skip


def displaced(truth: Reconstruction) -> Tensor:
    """[B, 2] its positions, those of a corner (about 9) moved together by 9 px."""
    near_B = (truth.positions_B2 - truth.positions_B2[0]).norm(dim=1) < 9
    return truth.positions_B2 + near_B[:, None] * torch.tensor([-7.0, -6.0], dtype=torch.float64)


def scan_of(truth: Reconstruction, geometry: Geometry | None = None, seed: int | None = None) -> Scan:
    """Its patterns in the detector's order, with counting noise where a seed is given, and a probe that is not quite right."""
    geometry = geometry or Geometry()
    patterns = torch.stack([pattern_reference(truth, geometry, b) for b in range(len(truth.positions_B2))])
    if geometry.kind == "far":
        patterns = torch.fft.fftshift(patterns, (1, 2))
    if seed is not None:
        patterns = torch.poisson(patterns, generator=torch.Generator().manual_seed(seed))
    window = truth.probe_MYX.shape[-1]
    guess = defocused_spot(window, window / 6, 0.025)
    return Scan(patterns.float(), truth.positions_B2, geometry, probe_MYX=guess[None])
