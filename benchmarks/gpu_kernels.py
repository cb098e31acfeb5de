"""Rates and accuracy of `project` and `backproject` on a GPU: `python -m benchmarks.gpu_kernels [--out record.json]`.

Rates count everything a caller waits for (ordering the slices included), on random data, inputs in no order: uniformly
random orientations, and clusters of 512 within 3 degrees, shuffled. Medians of device-event times.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.kernels.backproject import backproject, choose_backproject
from verglas.kernels.backproject.reference import backproject_reference
from verglas.kernels.project.cells import project_cells
from verglas.kernels.project.reference import project_reference
from verglas.maximization.accumulate import Accumulator
from verglas.projection.volume import FourierVolume

SLICES = {64: 131072, 128: 32768, 256: 8192}


def seconds(work: Callable[[], object], repeats: int = 7) -> float:
    """Median time of `work` on the device, after two warm-up runs."""
    work()
    work()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e-3)
    return sorted(times)[repeats // 2]


def poses(n: int, clustered: bool, generator: torch.Generator) -> torch.Tensor:
    """Uniformly random rotations, or shuffled clusters of 512 within 3 degrees of a common one; [n, 3, 3] float64."""
    if not clustered:
        return random_rotations(n, generator)
    axis = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator, dtype=torch.float64), dim=1)
    turn = axis * torch.deg2rad(3 * torch.rand(n, 1, generator=generator, dtype=torch.float64) ** (1 / 3))
    zero = torch.zeros(n, dtype=torch.float64)
    x, y, z = turn.unbind(1)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], 1).view(n, 3, 3)
    turned = torch.linalg.matrix_exp(skew) @ random_rotations(n // 512, generator).repeat_interleave(512, 0)
    return turned[torch.randperm(n, generator=generator)]


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def rates(box: int, clustered: bool) -> dict[str, float | int | str]:
    """G samples/s and relative errors at one box, padding 2."""
    generator = torch.Generator().manual_seed(box)
    pixels = half_plane_pixels(box, device="cuda")
    coordinates, n = pixels.coordinates_K3(), SLICES[box]
    real_map = torch.randn(box, box, box, generator=generator).cuda()
    exact_volume = FourierVolume.from_map(real_map, dtype=torch.float64)
    volume, rows = FourierVolume.from_map(real_map, dtype=torch.float16), exact_volume.rows
    sampling = (2 * poses(n, clustered, generator).transpose(1, 2)).float().cuda().contiguous()
    samples = n * pixels.count
    few = slice(0, 64)
    expected = project_reference(exact_volume.values, rows, sampling[few].double(), coordinates.double())
    assert volume.cells is not None
    project_error = relative(project_cells(volume.cells, sampling[few], coordinates), expected)
    slices = torch.empty(n, 2, pixels.count, dtype=torch.float16, device="cuda")
    project_time = seconds(partial(project_cells, volume.cells, sampling, coordinates, None, slices))
    del volume, exact_volume, slices
    data = torch.randn(n, 2, pixels.count, device="cuda")
    weight = torch.rand(n, pixels.count, device="cuda")
    exact = torch.zeros(rows.count, 4, dtype=torch.float64, device="cuda")
    some = slice(0, n // 8)  # enough for the same kernel as all of them
    for part in torch.arange(n)[some].split(512):
        slices = [values[part].double() for values in (data, weight, sampling)]
        backproject_reference(exact, rows, *slices, coordinates.double())
    accumulator = torch.zeros(rows.count, 4, device="cuda")
    backproject(accumulator, rows, data[some], weight[some], sampling[some], coordinates)
    backproject_error = relative(accumulator, exact)
    del exact
    backproject_time = seconds(partial(backproject, accumulator, rows, data, weight, sampling, coordinates), 5)
    return {
        "box": box, "orientations": "clusters" if clustered else "random", "slices": n,
        "project G/s": samples / project_time / 1e9, "project error": project_error,
        "backproject G/s": samples / backproject_time / 1e9, "backproject error": backproject_error,
    }  # fmt: skip


def long_accumulation(slices: float = 1e8, box: int = 64, batch: int = 16384) -> dict[str, float]:
    """Worst relative error of any shell after `slices` slices of skewed weights, half of them from one preferred view.

    The same batch is added again and again, so the exact sum is a multiple of one batch summed in float64.
    """
    generator = torch.Generator().manual_seed(5)
    accumulator = Accumulator(box, device="cuda")
    pixels = half_plane_pixels(box, device="cuda")
    coordinates = pixels.coordinates_K3()
    rotation = torch.cat([poses(batch // 2, False, generator), poses(512, True, generator).repeat(batch // 1024, 1, 1)])
    scale = torch.exp(1.5 * torch.randn(batch, 1, generator=generator)).cuda()
    weight = scale * torch.rand(batch, pixels.count, device="cuda") ** 2
    data = weight[:, None] * torch.tensor([1.0, -0.5], device="cuda")[:, None]
    exact = torch.zeros(accumulator.rows.count, 4, dtype=torch.float64, device="cuda")
    sampling = 2 * rotation.transpose(1, 2).cuda()
    for part in torch.arange(batch).split(512):
        backproject_reference(exact, accumulator.rows, data[part].double(), weight[part].double(), sampling[part], coordinates)
    repeats = round(slices / batch)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(repeats):
        accumulator.add(data, weight, rotation, coordinates)
    end.record()
    end.synchronize()
    total = accumulator.total()
    sums, weights = total[:, :2], total[:, 2:3]
    radius = accumulator.rows.coordinates_V3().float().norm(dim=1)
    shell = (radius / 2 + 0.5).long()
    worst = {}
    for name, actual, expected in (("data", sums, exact[:, :2]), ("weight", weights, exact[:, 2:3])):
        error = torch.bincount(shell, (actual - repeats * expected).square().sum(1))
        power = torch.bincount(shell, (repeats * expected).square().sum(1))
        worst[name] = float((error / power).sqrt()[: box // 2 + 1].max())
    return {"slices": repeats * batch, "worst data": worst["data"], "worst weight": worst["weight"],
            "seconds": begin.elapsed_time(end) * 1e-3}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--slices", type=float, default=1e8, help="slices of the long accumulation")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, padding 2, float16 volume and slices, float32 sums")
    choice = choose_backproject("cuda", torch.float32)
    print(f"backproject: {choice.name} ({choice.reason})")
    table = [rates(box, clustered) for box in SLICES for clustered in (False, True)]
    for row in table:
        rate_and_error = "{:.1f} G/s, error {:.1e}".format
        print(f"{row['box']:4d} px {row['orientations']:9s} {row['slices']:6d} slices |",
              "project", rate_and_error(row["project G/s"], row["project error"]), "| backproject",
              rate_and_error(row["backproject G/s"], row["backproject error"]))  # fmt: skip
    long = long_accumulation(arguments.slices)
    print(f"{long['slices']:.3g} slices of 64 px accumulated in {long['seconds']:.1f} s: worst relative error of a shell "
          f"{long['worst data']:.1e} (data), {long['worst weight']:.1e} (weight)")  # fmt: skip
    if arguments.out:
        record = {"device": device, "torch": torch.__version__, "rates": table, "long accumulation": long}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
