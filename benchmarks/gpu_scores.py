"""Slices cut from a volume and multiplied with shifted images on a GPU: `python -m benchmarks.gpu_scores [--out record.json]`.

`project_cells` into a table, then `compare`, as the engine does. Padding 2, all coefficients of the disc, float16 operands, T
shifted images of each particle; orientations uniformly random or in shuffled clusters of 512 within 3 degrees, one image set for
all; or a cluster of 512 for each particle, as in local searches. Rates count slice samples: orientations x coefficients, putting
them into order included. Errors are of scores against float64, relative to their spread. Medians of device-event times.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_kernels import SLICES, poses, seconds
from verglas.core.fourier import half_plane_pixels
from verglas.kernels.blocks import Blocks
from verglas.kernels.compare import compare
from verglas.kernels.compare.reference import compare_reference
from verglas.kernels.project.cells import project_cells
from verglas.kernels.project.reference import project_reference
from verglas.projection.volume import FourierVolume

CLUSTER = 512
CHECKED = 64  # slices whose scores are compared with float64


def lists(slices: int, particles: int, images: int) -> Blocks:
    """Slices shared out evenly, and all images of each particle."""
    slice_ptr = torch.arange(particles + 1, device="cuda") * (slices // particles)
    shift_ptr = torch.arange(particles + 1, device="cuda") * images
    shift_M = torch.arange(images, device="cuda").repeat(particles)
    return Blocks.build(slice_ptr, torch.arange(slices, device="cuda"), shift_ptr, shift_M)


def rate(volume: FourierVolume, sampling_R33: Tensor, particles: int, images: int) -> dict[str, float]:
    """G samples/s and the error of the scores."""
    assert volume.cells is not None
    pixels, n = half_plane_pixels(volume.box, device="cuda"), len(sampling_R33)
    # Aligned with repeats of the origin, which does not count.
    coordinates_K3 = torch.nn.functional.pad(pixels.coordinates_K3(), (0, 0, 0, -pixels.count % 16))
    count = len(coordinates_K3)
    factor_K = coordinates_K3.ne(0).any(1) / volume.values.std()
    shifted = torch.randn(particles, images, 2, count, dtype=torch.float16, device="cuda")
    weight = torch.rand(particles, count, device="cuda")
    table, blocks = torch.empty(n, 2, count, dtype=torch.float16, device="cuda"), lists(n, particles, images)

    def work() -> Tensor:
        project_cells(volume.cells, sampling_R33, coordinates_K3, factor_K, table)  # type: ignore[arg-type]
        return compare(shifted, weight, table, blocks, implementation="triton")

    last = min(CHECKED, n // particles)  # slices of the first particle
    slices = project_reference(volume.values.double(), volume.rows, sampling_R33[:last].double(), coordinates_K3.double())
    expected = compare_reference(shifted[:1].double(), weight[:1].double(), slices * factor_K, lists(last, 1, images))
    error = float((work()[: len(expected)] - expected).abs().max() / expected.std())
    return {"G/s": n * pixels.count / seconds(work, 5) / 1e9, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, padding 2, float16 cells, images and slices")
    table = []
    for box, n in SLICES.items():
        torch.manual_seed(box)
        volume = FourierVolume.from_map(torch.randn(box, box, box, device="cuda"), dtype=torch.float16)
        generator = torch.Generator().manual_seed(box)
        make = partial(poses, generator=generator)
        own = torch.cat([make(CLUSTER, True) for _ in range(n // CLUSTER)])
        for name, rotations, particles in (
            ("random", make(n, False), 1), ("clusters", make(n, True), 1), ("own clusters", own, n // CLUSTER),
        ):  # fmt: skip
            sampling = (2 * rotations.transpose(1, 2)).float().cuda().contiguous()
            for images in (32, 128):
                row = {"box": box, "orientations": name, "images": images, **rate(volume, sampling, particles, images)}
                table.append(row)
                print(f"{box:4d} px {name:12s} T {images:3d} | {row['G/s']:6.1f} G/s, error {row['error']:.1e}", flush=True)
    if arguments.out:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rates": table}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
