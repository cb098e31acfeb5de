"""`project` and `backproject` on the CPU beside torch-projectors (0.13.1, built from source), same tensors, one process.

`python -m benchmarks.cpu_kernels [--threads 2]`. Rates are stored half-plane pixels a second (76 % of them lie inside the
circle). The two programs take turns; the ratio is the median of ratios of neighbouring runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.figures import publish
from benchmarks.relative import adjoint_difference
from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.projection.volume import FourierVolume, pack
from verglas.testing.dense import padded_transform


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def compare(ours: Callable[[], object], theirs: Callable[[], object], turns: int) -> tuple[float, float, float]:
    """(median seconds of ours, of theirs, median ratio theirs / ours) over alternating runs after one warm-up each."""
    ours()
    theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(turns)]
    mine, other = zip(*pairs)
    return statistics.median(mine), statistics.median(other), statistics.median(o / m for m, o in pairs)


def run(box: int, n_slices: int, turns: int) -> dict[str, float]:
    """One box at padding 2: project, backproject, and how far each pair is from being adjoint. Rates of ours, and ratios."""
    import torch_projectors

    from verglas.kernels.backproject.cpu import backproject_cpu
    from verglas.kernels.project.cpu import project_cpu

    generator = torch.Generator().manual_seed(box)
    volume = torch.randn(box, box, box, generator=generator)
    rotation = random_rotations(n_slices, generator).float()
    transform = padded_transform(volume, 2 * box)  # the same coefficients go to both programs
    fourier_volume = FourierVolume.from_map(volume)
    values, rows = pack(transform, fourier_volume.rows), fourier_volume.rows
    pixels = half_plane_pixels(box)
    coordinates = pixels.coordinates_K3()
    sampling = (2 * rotation.transpose(1, 2)).contiguous()
    # Their point convention is (R^T v) for a matrix R, so they get the transpose; leading axes are batch and pose.
    theirs_volume, theirs_rotation = transform[None], rotation.transpose(1, 2).contiguous()[None]

    def project_theirs() -> torch.Tensor:
        return torch_projectors.project_3d_to_2d_forw(theirs_volume, theirs_rotation, output_shape=(box, box), oversampling=2.0)

    stored = n_slices * box * (box // 2 + 1)
    mine, other, ratio = compare(lambda: project_cpu(values, rows, sampling, coordinates), project_theirs, turns)
    found = {f"{box} px project M/s": stored / mine / 1e6, f"{box} px project ratio": ratio}
    slices = project_cpu(values, rows, sampling, coordinates)
    match = pixels.gather(project_theirs()[0])
    inside = (pixels.shell_K < box // 2 - 1).nonzero().squeeze(1)
    ours = torch.complex(slices[:, 0], slices[:, 1])[:, inside]
    same = (ours - match[:, inside]).norm() / ours.norm()
    print(f"{box:4d} px project:     verglas {stored / mine / 1e6:6.1f} M/s, torch-projectors {stored / other / 1e6:6.1f} M/s, "
          f"ratio {ratio:.1f}; difference of the slices {same:.1e}")  # fmt: skip
    accumulator = torch.zeros(rows.count, 4)
    weight = torch.rand(n_slices, pixels.count, generator=generator)
    images, weights = pixels.scatter(torch.complex(slices[:, 0], slices[:, 1]))[None], pixels.scatter(weight)[None]

    def backproject_theirs() -> object:
        return torch_projectors.backproject_2d_to_3d_forw(images, theirs_rotation, weights=weights, oversampling=2.0)

    mine, other, ratio = compare(
        lambda: backproject_cpu(accumulator, rows, slices, weight, sampling, coordinates), backproject_theirs, turns
    )
    print(f"{box:4d} px backproject: verglas {stored / mine / 1e6:6.1f} M/s, torch-projectors {stored / other / 1e6:6.1f} M/s, "
          f"ratio {ratio:.1f}")  # fmt: skip
    found |= {f"{box} px backproject M/s": stored / mine / 1e6, f"{box} px backproject ratio": ratio}
    left, right = inner(project_theirs(), images[0]), inner(transform, first_of(backproject_theirs()))
    theirs = abs(left - right) / float(project_theirs().norm() * images.norm())
    ours = adjoint_difference(box)
    print(f"{box:4d} px <Ax,y> - <x,A'y>, relative: verglas {ours:.1e} (in float64), torch-projectors {theirs:.1e}")
    return found


def inner(a: torch.Tensor, b: torch.Tensor) -> float:
    """Real inner product of stored complex arrays, in float64."""
    return float((torch.view_as_real(a).double() * torch.view_as_real(b.reshape(a.shape)).double()).sum())


def first_of(result: object) -> torch.Tensor:
    """The data volume: backprojection with weights returns (data, weights)."""
    return result[0] if isinstance(result, tuple) else result  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    import numba

    torch.set_num_threads(arguments.threads)
    numba.set_num_threads(arguments.threads)
    found: dict[str, float] = {}
    for box, n_slices in ((64, 512), (128, 256)):
        found |= run(box, n_slices, arguments.turns)
    publish(found, arguments.out)


if __name__ == "__main__":
    main()
