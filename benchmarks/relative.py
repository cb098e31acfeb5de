"""Small measures that several benchmarks print."""

from __future__ import annotations

import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import packed_sphere


def adjoint_difference(box: int, n_slices: int = 8) -> float:
    """|<A x, y> - <x, A' y>| / (|A x| |y|) of the CPU kernels in float64, padding 2."""
    from verglas.kernels.backproject.cpu import backproject_cpu
    from verglas.kernels.project.cpu import project_cpu

    generator = torch.Generator().manual_seed(7)
    rows, coordinates = packed_sphere(float(box)), half_plane_pixels(box).coordinates_K3(torch.float64)
    sampling = 2 * random_rotations(n_slices, generator).transpose(1, 2)
    x = torch.randn(rows.count, 2, generator=generator, dtype=torch.float64)
    image = project_cpu(x, rows, sampling, coordinates)
    y = torch.randn(image.shape, generator=generator, dtype=torch.float64)
    back = torch.zeros(rows.count, 4, dtype=torch.float64)
    backproject_cpu(back, rows, y, None, sampling, coordinates)
    return float(abs((image * y).sum() - (x * back[:, :2]).sum()) / (image.norm() * y.norm()))
