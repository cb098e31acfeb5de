"""Times and accuracy of `shift`, `compare`, `spectra` and `collect` on a GPU: `python -m benchmarks.gpu_expectation [--sweep]`.

Random data, ragged lists of the lengths that refinements of 5,000 x 128 px and 1,000 x 360 px had: children in groups of eight
slices and four shifts, or the orientations of a local search; what gets weight in lists of its own. Times count everything
a caller waits for (work lists included); medians of device-event times. Errors are against float64 references of the same
rounded operands, over the first particles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu_kernels import relative, seconds
from verglas.kernels.blocks import Blocks
from verglas.kernels.collect import collect
from verglas.kernels.collect.reference import collect_reference
from verglas.kernels.compare import compare
from verglas.kernels.compare import triton as compare_kernel
from verglas.kernels.compare.reference import compare_reference
from verglas.kernels.shift import shift
from verglas.kernels.shift.reference import shift_reference
from verglas.kernels.spectra import spectra
from verglas.kernels.spectra.reference import spectra_reference
from verglas.kernels.tasks import Tile

NAMES = ("shift", "compare", "spectra", "collect")
CHECKED = 3  # particles whose results are checked


@dataclass(frozen=True)
class Case:
    """Sizes of one benchmark, as refinements have them. slices, shifts: of a particle, mean; images: shifted images that each
    has; kept: slices and shifts of a particle that get weight, mean (None: a coarse pass, which is only compared); spread:
    of the logarithm of the number of slices.
    """

    name: str
    coefficients: int
    rows: int
    particles: int
    slices: float
    shifts: float
    images: int
    kept: tuple[float, float] | None
    spread: float = 0.7
    dtype: torch.dtype = torch.float16


CASES = [
    Case("fine, order 3, 128 px", 3200, 294_912, 2500, 10, 7, 52, (1.3, 3.0)),
    Case("fine, last, 128 px", 6432, 77_000, 2500, 31, 6, 36, (16, 2.7)),
    Case("fine, last, 360 px", 50_896, 10_800, 500, 22, 5.4, 36, (10, 2.8)),
    Case("fine, early, wide posteriors", 608, 294_912, 2500, 1000, 60, 84, (100, 28)),
    Case("local, order 5, 128 px", 3616, 408_000, 2500, 178, 9, 9, None, 0.03),
    Case("local, last, 360 px", 50_896, 17_800, 100, 178, 9, 9, None, 0.03),
    Case("strong coefficients", 120, 408_000, 2500, 178, 9, 9, None, 0.03, torch.float32),
    Case("K not a multiple of 8", 6427, 77_000, 512, 31, 6, 36, (16, 2.7)),
    Case("single precision", 6432, 30_000, 128, 31, 6, 36, (16, 2.7), 0.7, torch.float32),
]
COMPARE_TILES = [
    Tile(slices, shifts, step, warps, stages)
    for slices, shifts in ((16, 16), (64, 16), (128, 16), (64, 32), (64, 64), (64, 128), (128, 128))
    for step, warps, stages in ((64, 4, 3), (128, 4, 2), (128, 4, 3), (64, 8, 3))
]


def make_blocks(case: Case, slices: float, shifts: float, each: tuple[int, int], seed: int) -> Blocks:
    """Lists of log-normal length in groups of siblings (each: how many), a particle's rows from a place of its own on."""
    generator = torch.Generator("cuda").manual_seed(seed)
    random = partial(torch.randn, case.particles, device="cuda", generator=generator)
    places = case.rows // each[0]
    groups_B = (slices / each[0] * torch.exp(case.spread * random() - case.spread**2 / 2)).round().clamp(1, places // 4).long()
    owner = torch.repeat_interleave(torch.arange(case.particles, device="cuda"), groups_B)
    first_B = (torch.arange(case.particles, device="cuda") * (places - int(groups_B.max()))) // case.particles
    within = torch.arange(len(owner), device="cuda") - (groups_B.cumsum(0) - groups_B)[owner]
    rows = ((first_B[owner] + within)[:, None] * each[0] + torch.arange(each[0], device="cuda")).flatten()
    m_B = (shifts / each[1] * torch.exp(0.5 * random() - 0.125)).round().clamp(1, case.images // each[1]).long() * each[1]
    if case.kept is None:
        m_B = torch.full_like(m_B, case.images)
    shift_owner = torch.repeat_interleave(torch.arange(case.particles, device="cuda"), m_B)
    shift_ptr, slice_ptr = (torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (m_B, each[0] * groups_B))
    return Blocks.build(slice_ptr, rows, shift_ptr, torch.arange(len(shift_owner), device="cuda") - shift_ptr[shift_owner])


def first_particles(blocks: Blocks, count: int) -> Blocks:
    """The lists of the first particles alone."""
    n, m = int(blocks.slice_ptr_B1[count]), int(blocks.shift_ptr_B1[count])
    lists = blocks.slice_ptr_B1[: count + 1], blocks.slice_N[:n], blocks.shift_ptr_B1[: count + 1], blocks.shift_M[:m]
    return Blocks.build(*lists)


@dataclass
class Data:
    """Random operands of a case, made once."""

    case: Case
    blocks: Blocks
    kept: Blocks | None
    posterior_N: Tensor
    image_B2K: Tensor
    shifted_BT2K: Tensor
    weight_BK: Tensor
    slices_U2K: Tensor
    x_K: Tensor
    y_K: Tensor
    shell_K: Tensor
    shift_T2: Tensor


def make_data(case: Case) -> Data:
    """Images of unit variance, integer frequencies in a 128 px box, 65 shells."""
    k, blocks = case.coefficients, make_blocks(case, case.slices, case.shifts, (8, 4) if case.kept else (1, 1), 1)
    kept = make_blocks(case, *case.kept, (1, 1), 2) if case.kept else None
    x_K, y_K = (torch.randint(-64, 65, (k,), dtype=torch.int32, device="cuda") for _ in "xy")
    image_B2K, shift_T2 = torch.randn(case.particles, 2, k, device="cuda"), 5 * torch.randn(case.images, 2, device="cuda")
    shifted = shift(image_B2K, shift_T2, x_K, y_K, 128, case.dtype)
    slices = torch.empty(case.rows, 2, k, device="cuda", dtype=case.dtype)
    for part in slices.split(max(1, 2**28 // k)):
        part.normal_()
    weight, shell_K = torch.rand(case.particles, k, device="cuda"), torch.randint(0, 65, (k,), device="cuda")
    posterior = torch.rand(kept.samples if kept else 0, device="cuda").pow(4)
    return Data(case, blocks, kept, posterior, image_B2K, shifted, weight, slices, x_K, y_K, shell_K, shift_T2)


def few_of(data: Data, blocks: Blocks) -> tuple[Blocks, Tensor]:
    """The first particles' lists, and the rows of the slice table that they name, renumbered."""
    few = first_particles(blocks, CHECKED)
    used, row_N = few.slice_N.long().unique(return_inverse=True)
    return replace(few, slice_N=row_N.int()), data.slices_U2K[used]


def errors(data: Data) -> dict[str, float]:
    """Relative errors (root mean square) of the four kernels over the first particles."""
    shifted, weight = data.shifted_BT2K[:CHECKED], data.weight_BK[:CHECKED]
    turned = shift_reference(data.image_B2K[:CHECKED].double(), data.shift_T2, data.x_K, data.y_K, 128, torch.float64)
    few, slices = few_of(data, data.blocks)
    score = compare_reference(shifted.double(), weight.double(), slices.double(), few)
    found = {"shift": relative(shifted, turned), "compare": relative(compare(shifted, weight, slices, few), score)}
    if data.kept is None:
        return found
    few, slices = few_of(data, data.kept)
    p = data.posterior_N[: few.samples]
    exact = shifted.double(), weight.double()
    shells = spectra_reference(p.double(), *exact, slices.double(), few, data.shell_K, 65)
    tables = [torch.zeros_like(slices, dtype=torch.float64), torch.zeros_like(slices[:, 0], dtype=torch.float64)]
    collect_reference(p.double(), *exact, few, *tables)
    own = [table.float().zero_() for table in tables]
    collect(p, shifted, weight, few, own[0], own[1])
    cross_and_power = spectra(p, shifted, weight, slices, few, data.shell_K, 65)
    found["spectra"] = max(relative(one, other) for one, other in zip(cross_and_power, shells, strict=True))
    return found | {"collect": max(relative(one, other) for one, other in zip(own, tables, strict=True))}


def works(data: Data) -> dict[str, Callable[[], object]]:
    """What is timed: the four kernels over the whole case."""
    case, p = data.case, data.posterior_N
    shifted, weight, slices = data.shifted_BT2K, data.weight_BK, data.slices_U2K
    made: dict[str, Callable[[], object]] = {
        "shift": partial(shift, data.image_B2K, data.shift_T2, data.x_K, data.y_K, 128, case.dtype),
        "compare": partial(compare, shifted, weight, slices, data.blocks),
    }
    if data.kept is not None:
        used, row_N = data.kept.slice_N.long().unique(return_inverse=True)
        tables = (torch.zeros(len(used), 2, case.coefficients, device="cuda"),
                  torch.zeros(len(used), case.coefficients, device="cuda"))  # fmt: skip
        made["spectra"] = partial(spectra, p, shifted, weight, slices, data.kept, data.shell_K, 65)
        made["collect"] = partial(collect, p, shifted, weight, replace(data.kept, slice_N=row_N.int()), *tables)
    return made


def measure(case: Case) -> dict[str, float | str]:
    """One row of the table."""
    data = make_data(case)
    blocks, kept, k, width = data.blocks, data.kept, case.coefficients, case.dtype.itemsize
    row: dict[str, float | str] = {"case": case.name, "samples": blocks.samples, "slices": len(blocks.slice_N)}
    row |= {f"{name} ms": 1e3 * seconds(work) for name, work in works(data).items()}
    row |= {f"{name} error": value for name, value in errors(data).items()}
    images = len(blocks.shift_M) * 2 * k * width
    moved = {"shift": data.shifted_BT2K.numel() * width, "compare": len(blocks.slice_N) * 2 * k * width + images}
    if kept is not None:
        row["pairs"] = len(kept.slice_N)
        images = len(kept.shift_M) * 2 * k * width
        moved |= {"spectra": len(kept.slice_N) * 2 * k * width + images, "collect": len(kept.slice_N) * 3 * k * 4 + images}
    row |= {f"{name} GB/s": value / float(row[f"{name} ms"]) / 1e6 for name, value in moved.items()}
    row["compare T/s"] = blocks.samples * k / float(row["compare ms"]) / 1e9
    return row


def sweep(case: Case) -> None:
    """`compare` with each way to cut it, fastest first."""
    data, kept = make_data(case), compare_kernel.tile_for
    work, found = works(data)["compare"], []
    for tile in COMPARE_TILES:
        if case.dtype == torch.float32:
            tile = replace(tile, coefficients=tile.coefficients // 2)
        compare_kernel.tile_for = lambda sizes, single, tile=tile: tile
        try:
            found.append((seconds(work), str(tile)))
        except Exception as fault:  # a cut that does not fit this GPU is a finding, not an end
            found.append((float("inf"), f"{tile}: {type(fault).__name__}"))
        finally:
            compare_kernel.tile_for = kept
    print(f"compare, {case.name}: as it is {1e3 * seconds(work):.2f} ms")
    for taken, text in sorted(found)[:8]:
        print(f"  {1e3 * taken:.2f} ms {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--sweep", action="store_true", help="also time `compare` for each way to cut it")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; GB/s: of what has to be read and written", flush=True)
    torch.manual_seed(1)
    if arguments.sweep:
        for case in CASES[:6]:
            sweep(case)
    table = []
    for case in CASES:
        table.append(measure(case))
        print(json.dumps({name: round(value, 9) if isinstance(value, float) else value for name, value in table[-1].items()}),
              flush=True)  # fmt: skip
    print(f"{'':30s}" + "".join(f"{name:>22s}" for name in NAMES) + "   errors")
    for row in table:
        cells = [f"{row[f'{name} ms']:8.2f} ms {row[f'{name} GB/s']:5.0f} GB/s" if f"{name} ms" in row else "" for name in NAMES]
        faults = " ".join(f"{row[f'{name} error']:.0e}" for name in NAMES if f"{name} ms" in row)
        print(f"{row['case']:30s}" + "".join(f"{cell:>22s}" for cell in cells) + "   " + faults)
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
