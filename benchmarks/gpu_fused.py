"""Slices cut from a volume and multiplied with shifted images on a GPU: `python -m benchmarks.gpu_fused [--out record.json]`.

`match` (fused) beside `project_cells` into a table followed by `compare`. Padding 2, all coefficients of the disc, float16
operands, T shifted images of each particle; orientations uniformly random or in shuffled clusters of 512 within 3 degrees, one
image set for all (sorting included); or a cluster of 512 for each particle, as in local searches. Rates count slice samples:
orientations x coefficients. Errors are of scores against float64, relative to their spread. Medians of device-event times.
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
from verglas.kernels.match import Source, match
from verglas.kernels.match.reference import match_reference
from verglas.kernels.project.cells import project_cells
from verglas.kernels.project.triton import visiting_order
from verglas.projection.volume import FourierVolume, in_half

CLUSTER = 512


def source_of(box: int) -> Source:
    """A random volume, coefficients of the disc (aligned with repeats of the origin, which does not count)."""
    pixels = half_plane_pixels(box, device="cuda")
    coordinates_K2 = torch.nn.functional.pad(pixels.coordinates_K3()[:, :2], (0, 0, 0, -pixels.count % 16))
    volume = FourierVolume.from_map(torch.randn(box, box, box, device="cuda"), dtype=torch.float16)
    factor_K = coordinates_K2.ne(0).any(1) / volume.values.std()
    half_V2, scale = in_half(volume.values)
    return Source(half_V2, volume.rows, scale, volume.cells, coordinates_K2, factor_K)


def lists(order_R: Tensor, particles: int, images: int) -> Blocks:
    """Orientations shared out evenly, in this order, and all images of each particle."""
    device = order_R.device
    slice_ptr = torch.arange(particles + 1, device=device) * (len(order_R) // particles)
    shift_ptr = torch.arange(particles + 1, device=device) * images
    return Blocks.build(slice_ptr, order_R, shift_ptr, torch.arange(images, device=device).repeat(particles))


def rates(source: Source, sampling_R33: Tensor, particles: int, images: int) -> dict[str, float]:
    """G samples/s of both ways and the error of the fused one."""
    coordinates_K2, n = source.coordinates_K2, len(sampling_R33)
    count, coordinates_K3 = len(coordinates_K2), torch.nn.functional.pad(coordinates_K2, (0, 1))
    samples = n * int(source.factor_K.ne(0).sum() + 1)
    shifted = torch.randn(particles, images, 2, count, dtype=torch.float16, device="cuda")
    weight = torch.rand(particles, count, device="cuda")
    in_order = torch.arange(n, device="cuda", dtype=torch.int32)

    def fused() -> Tensor:
        order_R = visiting_order(sampling_R33) if particles == 1 else in_order
        return match(source, sampling_R33, shifted, weight, lists(order_R, particles, images), "triton")

    table = torch.empty(n, 2, count, dtype=torch.float16, device="cuda")

    def apart() -> Tensor:
        project_cells(source.cells, sampling_R33, coordinates_K3, source.factor_K, table)  # type: ignore[arg-type]
        return compare(shifted, weight, table, lists(in_order, particles, images), implementation="triton")

    few = lists(visiting_order(sampling_R33) if particles == 1 else in_order, particles, images).part(0, 1)
    last = min(64, n // particles)
    some = Blocks.build(few.slice_ptr_B1.clamp_max(last), few.slice_N[:last], few.shift_ptr_B1, few.shift_M)
    expected = match_reference(source, sampling_R33, shifted[:1], weight[:1].double(), some)
    error = float((fused()[: len(expected)] - expected).abs().max() / expected.std())
    return {"fused G/s": samples / seconds(fused, 5) / 1e9, "apart G/s": samples / seconds(apart, 5) / 1e9, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, padding 2, float16 volume, images and slices")
    table = []
    for box, n in SLICES.items():
        torch.manual_seed(box)
        source = source_of(box)
        generator = torch.Generator().manual_seed(box)
        make = partial(poses, generator=generator)
        apart = torch.cat([make(CLUSTER, True) for _ in range(n // CLUSTER)])
        for name, rotations, particles in (
            ("random", make(n, False), 1), ("clusters", make(n, True), 1), ("own clusters", apart, n // CLUSTER),
        ):  # fmt: skip
            sampling = (2 * rotations.transpose(1, 2)).float().cuda().contiguous()
            for images in (32, 128):
                row = {"box": box, "orientations": name, "images": images, **rates(source, sampling, particles, images)}
                table.append(row)
                print(f"{box:4d} px {name:12s} T {images:3d} | fused {row['fused G/s']:6.1f} G/s, error {row['error']:.1e} |",
                      f"project, then compare {row['apart G/s']:6.1f} G/s", flush=True)  # fmt: skip
    if arguments.out:
        record = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "rates": table}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
