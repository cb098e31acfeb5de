"""From images to a map at large boxes: backprojection of 1,000 images, then plain and exact gridding; seconds and peak memory.

python -m benchmarks.gridding --boxes 200 400 [--device cuda] [--images 1000] [--strides 3 9 15] [--parts]
Images are noise: times depend on none of it. The floor of exact gridding is what must be read and written however it is computed
by transforms, at the rate of a copy: in each of ten iterations two transforms of three passes and one product over half of the
grid (the other half is its mirror image), and one quotient of all voxels.
--strides: times of the weights alone with so many; --parts: of each kernel of one residue, with lines
of the axes cut in several ways; --profile: what the weights of each box take on the host and on the GPU.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import torch

from verglas.core.fourier import half_plane_pixels
from verglas.core.rotations import random_rotations
from verglas.core.rows import RowTable, packed_sphere
from verglas.kernels.fold.residue import AXES, PASSES, Cut, served
from verglas.kernels.nvrtc import NvrtcError
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.device_memory import DeviceMemory
from verglas.maximization.gridding import ITERATIONS, blob_factor, even_out, grid_for
from verglas.maximization.solve import SolvedSums, gather_sums
from verglas.maximization.stride import StrideConvolution
from verglas.projection.volume import padded_size

CUTS = {  # other (lines, threads, blocks of a multiprocessor) than the usual ones, of the axes z, y and x
    0: [(8, 512, 2), (4, 256, 4), (8, 256, 3), (4, 128, 6), (2, 128, 6)],
    1: [(4, 448, 2), (4, 384, 2), (4, 256, 4), (2, 256, 4), (4, 448, 1)],
    2: [(1, 96, 8), (1, 96, 10), (2, 192, 4), (1, 64, 10), (1, 128, 6), (8, 384, 2)],
}


def seconds(work: Callable[[], object], device: str, repeats: int = 2) -> float:
    """The quickest of some; on a CPU, processor time."""
    best = math.inf
    for _ in range(repeats):
        wait(device)
        start = now(device)
        work()
        wait(device)
        best = min(best, now(device) - start)
    return best


def now(device: str) -> float:
    return time.perf_counter() if device == "cuda" else time.process_time()


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_rate(device: str) -> float:
    """Bytes read and written per second by a copy."""
    source = torch.ones(2**28 if device == "cuda" else 2**24, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), device, 3)


def add(sums: Accumulator, images: int) -> None:
    """Backproject images of noise, in batches."""
    device = sums.running_V4.device
    pixels = half_plane_pixels(sums.box)
    coordinates_K3 = pixels.coordinates_K3(torch.float32).to(device)
    batch = max(1, min(images, 2**27 // pixels.count))
    data_B2K = torch.randn(batch, 2, pixels.count, device=device)
    weight_BK = torch.rand(batch, pixels.count, device=device)
    rotation_B33 = random_rotations(images, torch.Generator().manual_seed(0))
    for first in range(0, images, batch):
        some_B33 = rotation_B33[first : first + batch]
        sums.add(data_B2K[: len(some_B33)], weight_BK[: len(some_B33)], some_B33, coordinates_K3)


def measure(box: int, images: int, device: str, rate: float, profile: bool) -> None:
    """Print one line, and what exact gridding predicts for its memory. profile: and where the time of the weights goes."""
    forget_peak(device)
    sums = Accumulator(box, device=device)
    adding = seconds(lambda: add(sums, images), device, 1)
    solved = gather_sums([sums], consume=True)
    peaks = [peak(device)]
    forget_peak(device)
    plain = seconds(solved.map, device)
    peaks.append(peak(device))
    forget_peak(device)
    gridding = time_weights(solved, device, profile)
    forget_peak(device)
    exact = seconds(replace(solved, exact=True).map, device)
    peaks.append(peak(device))
    predicted = DeviceMemory.of(box, solved.radius, solved.padding, exact=True)
    floor = floor_bytes(solved.rows) / rate
    relion = 11 * (2 * box) ** 3
    print(
        f"{box} px: {images} images added {adding:.3f} s, map plain {plain:.4f} s, exact {exact:.4f} s, of which weights "
        f"{gridding:.4f} s (floor {floor:.4f} s, {100 * floor / gridding:.0f} %)\n"
        f"  peak adding {peaks[0]:.2f} GB (predicted {predicted.adding / 1e9:.2f}), plain {peaks[1]:.2f}, exact {peaks[2]:.2f} "
        f"(weights {predicted.evening / 1e9:.2f}, "
        f"map {predicted.mapping / 1e9:.2f}); {100 * max(peaks) * 1e9 / relion:.0f} % of RELION's; "
        f"in use on the GPU {in_use(device):.2f} GB",
        flush=True,
    )  # fmt: skip


def time_weights(solved: SolvedSums, device: str, profile: bool) -> float:
    """Seconds of the iterations alone, of weights that may be even already."""
    product_V, size = solved.weight_V.clone(memory_format=torch.contiguous_format), padded_size(solved.box, solved.padding)
    work = partial(even_out, product_V, solved.rows, size, solved.padding)
    took = seconds(work, device, 3)
    if profile:
        with torch.profiler.profile() as found:
            work()
            wait(device)
        for order in ("self_cuda_time_total", "self_cpu_time_total"):
            print(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40), flush=True)
        times = [1000 * seconds(partial(work, iterations=turns), device, 3) for turns in (0, 1, 2, 5, 10)]
        print("  ms of 0, 1, 2, 5, 10 iterations:", " ".join(f"{one:.2f}" for one in times), flush=True)
    return took


def floor_bytes(rows: RowTable) -> float:
    """What ten iterations must move (see above), in single precision."""
    size = grid_for(rows.radius)
    return ITERATIONS * 4 * ((2 * 3 + 1) * 2 * size**3 / 2 + 3 * rows.count)


def measure_strides(box: int, strides: list[int], device: str, parts: bool) -> None:
    """Times of one convolution with so many strides; parts: of each pass, for residue 0."""
    rows = packed_sphere(float(box), device)
    size = grid_for(rows.radius)
    values_V = torch.rand(rows.count, device=device)
    for number in strides:
        if size % number:
            continue
        forget_peak(device)
        convolution = StrideConvolution(rows, size, blob_factor(2.0, values_V), number)
        out_V = torch.empty_like(values_V)
        took = seconds(partial(convolution, values_V, out_V), device)
        print(f"  {box} px, {number} strides of {size}: {took:.4f} s a convolution, peak {peak(device):.2f} GB", flush=True)
        if parts:
            print("   ", time_kernels(convolution, values_V, out_V, device), flush=True)


def time_kernels(convolution: StrideConvolution, values_V: torch.Tensor, out_V: torch.Tensor, device: str) -> str:
    """Seconds of the kernels of one residue (kernels/fold/residue.cu) and, of each axis, with other cuts of its lines."""
    rows, size, number = convolution.rows, convolution.size, convolution.strides
    way = served(rows, size // number, size, values_V)
    if way is None:
        return "not served by kernels of a residue"
    phase_Z2, part, steps = torch.rand(rows.edge, 2, device=device), way.part(), {}
    copied = 1000 * seconds(partial(part.copy_, torch.empty_like(part)), device)
    cuts = {kernel: cuts_of(AXES[kernel], size // number, size) for kernel in PASSES}
    with ThreadPoolExecutor(8) as pool:  # compiled side by side, and measured one after another
        for kernel, some in cuts.items():
            pool.map(partial(way.load, kernel, mirror=way.mirror(0)), some)
    for kernel in PASSES:
        run, took = partial(way.one, kernel, values_V, part, convolution.factor, phase_Z2, 1, out_V, fresh=True), []
        for cut in cuts[kernel]:
            try:
                took.append(f"{cut.lines} x {cut.threads} ({cut.blocks}) {1000 * seconds(partial(run, cut), device):.2f}")
            except NvrtcError as error:
                took.append(f"{cut.lines} x {cut.threads} ({cut.blocks}) {str(error)[:60]}")
        steps[kernel] = "; ".join(took)
    lines = "\n".join(f"      {name}: {took}" for name, took in steps.items())
    return f"part of {part.nbytes / 1e9:.2f} GB, a copy of it {copied:.2f} ms; lines x threads (blocks), ms:\n{lines}"


def cuts_of(phase: int, planes: int, size: int) -> list[Cut]:
    """The usual cut of an axis, and others that fit into the memory of a multiprocessor."""
    usual = Cut.of(phase, planes, size)
    others = (replace(usual, lines=n, threads=threads, blocks=blocks) for n, threads, blocks in CUTS[phase])
    return [usual, *(cut for cut in others if cut.shared * cut.blocks <= 220_000 and cut.threads <= cut.lines * cut.length)]


def forget_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak(device: str) -> float:
    """GB that PyTorch had allocated at most."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else math.nan


def in_use(device: str) -> float:
    """GB of the GPU in use now, by everybody, what PyTorch keeps included."""
    if device != "cuda":
        return math.nan
    free, total = torch.cuda.mem_get_info()
    return (total - free) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, nargs="+", default=[200, 300, 400])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--strides", type=int, nargs="*", default=[])
    parser.add_argument("--parts", action="store_true")
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    rate = copy_rate(options.device)
    print(f"copies move {rate / 1e12:.2f} TB/s")
    for box in options.boxes:
        try:
            if options.strides:
                measure_strides(box, options.strides, options.device, options.parts)
            else:
                measure(box, options.images, options.device, rate, options.profile)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            print(f"{box} px: {str(error)[:300]}", flush=True)
        if options.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
