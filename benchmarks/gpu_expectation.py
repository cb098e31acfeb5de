"""Rates and accuracy of `shift`, `compare`, `spectra` and `collect` on a GPU: `python -m benchmarks.gpu_expectation [--sweep]`.

Random data, ragged lists as they come in a refinement: each particle has groups of eight neighbouring slices around a
direction of its own, and a run of shifts. Times count everything a caller waits for (work lists included); medians of
device-event times. Errors are against float64 references of the same rounded operands, over the first particles.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
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

SHIFTS, CHECKED = 84, 3  # shifted images of a particle; particles whose results are checked


@dataclass(frozen=True)
class Case:
    """Sizes of one benchmark: typical number of slices of a particle, most shifts of a particle."""

    name: str
    coefficients: int
    rows: int
    particles: int
    slices: int
    shifts: int
    dtype: torch.dtype = torch.float16


CASES = [
    Case("early, wide posteriors", 608, 300_000, 2500, 1000, 84),
    Case("global search, 128 px", 6432, 60_000, 512, 400, 84),
    Case("sharp posteriors, 128 px", 6432, 60_000, 2500, 24, 12),
    Case("K not a multiple of 8", 6427, 60_000, 512, 400, 84),
    Case("single precision", 6432, 30_000, 128, 400, 84, torch.float32),
]
COMPARE_TILES = [
    Tile(128, 128, 64, 8, 3), Tile(128, 128, 32, 8, 3), Tile(128, 128, 32, 8, 4), Tile(128, 128, 64, 16, 3),
    Tile(64, 128, 64, 8, 3), Tile(64, 128, 64, 4, 3), Tile(64, 128, 32, 4, 4), Tile(128, 64, 64, 8, 3), Tile(64, 64, 64, 4, 4),
]  # fmt: skip


def make_blocks(case: Case) -> Blocks:
    """Lists of log-normal length around case.slices, groups of eight rows near a random row, ascending."""
    generator = torch.Generator("cuda").manual_seed(case.coefficients)
    random = partial(torch.randn, device="cuda", generator=generator)
    groups_B = (case.slices / 8 * torch.exp(0.7 * random(case.particles))).clamp(1, min(500, case.rows // 16)).long()
    owner = torch.repeat_interleave(torch.arange(case.particles, device="cuda"), groups_B)
    centre_B = torch.rand(case.particles, device="cuda", generator=generator) * (case.rows // 8)
    group = (centre_B[owner] + 2 * groups_B[owner] * random(len(owner))).long() % (case.rows // 8)
    ordered = (owner * case.rows + group).sort().values
    slices = ((ordered % case.rows)[:, None] * 8 + torch.arange(8, device="cuda")).flatten()
    m_B = 4 * torch.randint(1, case.shifts // 4 + 1, (case.particles,), device="cuda", generator=generator)
    shift_owner = torch.repeat_interleave(torch.arange(case.particles, device="cuda"), m_B)
    shift_ptr, slice_ptr = (torch.cat([n.new_zeros(1), n.cumsum(0)]) for n in (m_B, 8 * groups_B))
    return Blocks.build(slice_ptr, slices, shift_ptr, torch.arange(len(shift_owner), device="cuda") - shift_ptr[shift_owner])


def first_particles(blocks: Blocks, count: int) -> Blocks:
    """The lists of the first particles alone."""
    n, m = int(blocks.slice_ptr_B1[count]), int(blocks.shift_ptr_B1[count])
    lists = blocks.slice_ptr_B1[: count + 1], blocks.slice_N[:n], blocks.shift_ptr_B1[: count + 1], blocks.shift_M[:m]
    return Blocks.build(*lists)


def make_posterior(blocks: Blocks) -> Tensor:
    """A tenth of the slices and a third of the shifts of a particle have weight."""
    _, a, t = blocks.sample_indices()
    used_N, used_M = (torch.rand(len(one), device="cuda") for one in (blocks.slice_N, blocks.shift_M))
    return torch.rand(len(a), device="cuda").pow(4) * (used_N[a] < 0.1) * (used_M[t] < 0.33)


@dataclass
class Data:
    """Random operands of a case, made once."""

    case: Case
    blocks: Blocks
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
    k, blocks = case.coefficients, make_blocks(case)
    x_K, y_K = (torch.randint(-64, 65, (k,), dtype=torch.int32, device="cuda") for _ in "xy")
    image_B2K, shift_T2 = torch.randn(case.particles, 2, k, device="cuda"), 5 * torch.randn(SHIFTS, 2, device="cuda")
    shifted = shift(image_B2K, shift_T2, x_K, y_K, 128, case.dtype)
    slices = torch.randn(case.rows, 2, k, device="cuda", dtype=case.dtype)
    weight, shell_K = torch.rand(case.particles, k, device="cuda"), torch.randint(0, 65, (k,), device="cuda")
    posterior = make_posterior(blocks)
    return Data(case, blocks, posterior, image_B2K, shifted, weight, slices, x_K, y_K, shell_K, shift_T2)


def errors(data: Data) -> dict[str, float]:
    """Relative errors (root mean square) of the four kernels over the first particles."""
    few = first_particles(data.blocks, CHECKED)
    shifted, weight, p = data.shifted_BT2K[:CHECKED], data.weight_BK[:CHECKED], data.posterior_N[: few.samples]
    used, row_N = few.slice_N.long().unique(return_inverse=True)
    few, slices, shell_K = replace(few, slice_N=row_N.int()), data.slices_U2K[used], data.shell_K
    exact_shifted, exact_weight, exact_slices = shifted.double(), weight.double(), slices.double()
    turned = shift_reference(data.image_B2K[:CHECKED].double(), data.shift_T2, data.x_K, data.y_K, 128, torch.float64)
    score = compare_reference(exact_shifted, exact_weight, exact_slices, few)
    shells = spectra_reference(p.double(), exact_shifted, exact_weight, exact_slices, few, shell_K, 65)
    tables = [torch.zeros_like(exact_slices), torch.zeros_like(exact_slices[:, 0])]
    collect_reference(p.double(), exact_shifted, exact_weight, few, *tables)
    own = [table.float().zero_() for table in tables]
    collect(p, shifted, weight, few, own[0], own[1])
    cross_and_power = spectra(p, shifted, weight, slices, few, shell_K, 65)
    return {
        "shift": relative(shifted, turned), "compare": relative(compare(shifted, weight, slices, few), score),
        "spectra": max(relative(one, other) for one, other in zip(cross_and_power, shells, strict=True)),
        "collect": max(relative(one, other) for one, other in zip(own, tables, strict=True)),
    }  # fmt: skip


def times(data: Data) -> dict[str, float]:
    """Seconds of the four kernels over the whole case."""
    case, blocks, p = data.case, data.blocks, data.posterior_N
    shifted, weight, slices = data.shifted_BT2K, data.weight_BK, data.slices_U2K
    turn = partial(shift, data.image_B2K, data.shift_T2, data.x_K, data.y_K, 128, case.dtype)
    taken = {"shift": seconds(turn), "compare": seconds(partial(compare, shifted, weight, slices, blocks))}
    taken["spectra"] = seconds(partial(spectra, p, shifted, weight, slices, blocks, data.shell_K, 65))
    tables = torch.zeros(case.rows, 2, case.coefficients, device="cuda"), torch.zeros(case.rows, case.coefficients, device="cuda")
    taken["collect"] = seconds(partial(collect, p, shifted, weight, blocks, *tables))
    return taken


def measure(case: Case) -> dict[str, float | str]:
    """One row of the table."""
    data = make_data(case)
    taken, blocks, k, width = times(data), data.blocks, case.coefficients, case.dtype.itemsize
    active = torch.zeros(len(blocks.slice_N), device="cuda")
    active.index_add_(0, blocks.sample_indices()[1], data.posterior_N)
    pairs = int((active > 0).sum())
    row: dict[str, float | str] = {"case": case.name, "samples": blocks.samples, "slices": len(blocks.slice_N), "active": pairs}
    row |= {f"{name} ms": 1e3 * value for name, value in taken.items()}
    row |= {f"{name} error": value for name, value in errors(data).items()}
    row["shift GB/s"] = data.shifted_BT2K.numel() * width / taken["shift"] / 1e9
    row["compare T/s"] = blocks.samples * k / taken["compare"] / 1e12
    row["compare gather GB/s"] = len(blocks.slice_N) * 2 * k * width / taken["compare"] / 1e9
    row["spectra gather GB/s"] = pairs * 2 * k * width / taken["spectra"] / 1e9
    row["collect add GB/s"] = pairs * 3 * k * 4 / taken["collect"] / 1e9
    return row


@contextmanager
def tile_of_compare(tile: Tile) -> Iterator[None]:
    """Every program of `compare` cut this way."""
    kept = compare_kernel.SLICE_LIMITS, compare_kernel.SLICE_BLOCKS, compare_kernel.SHIFT_BLOCKS, compare_kernel.tile_for
    compare_kernel.SLICE_LIMITS, compare_kernel.SLICE_BLOCKS = (1 << 62,), (tile.slices,)
    compare_kernel.SHIFT_BLOCKS, compare_kernel.tile_for = (tile.shifts,), lambda slices, shifts, single: tile
    try:
        yield
    finally:
        (compare_kernel.SLICE_LIMITS, compare_kernel.SLICE_BLOCKS, compare_kernel.SHIFT_BLOCKS, compare_kernel.tile_for) = kept


def sweep(case: Case) -> None:
    """`compare` with each cut, every particle with 84 shifts and a multiple of 128 slices: no tile is at a disadvantage."""
    data = make_data(replace(case, particles=256))
    n = case.slices // 128 * 128 + 128
    lists = [torch.arange(257, device="cuda") * size for size in (n, SHIFTS)]
    slices = torch.randint(0, case.rows - n, (256, 1), device="cuda") + torch.arange(n, device="cuda")
    blocks = Blocks.build(lists[0], slices.flatten(), lists[1], torch.arange(SHIFTS, device="cuda").repeat(256))
    work = partial(compare, data.shifted_BT2K, data.weight_BK, data.slices_U2K, blocks)
    for tile in COMPARE_TILES:
        with tile_of_compare(tile):
            try:
                print(f"{tile}: {blocks.samples * case.coefficients / seconds(work) / 1e12:.1f} T/s", flush=True)
            except Exception as fault:  # a cut that does not fit this GPU is a finding, not an end
                print(f"{tile}: {type(fault).__name__} {str(fault)[:100]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--sweep", action="store_true", help="also time `compare` for each way to cut it")
    arguments = parser.parse_args()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; T/s: coefficients compared, {SHIFTS} shifted images per particle", flush=True)
    torch.manual_seed(1)
    if arguments.sweep:
        for case in CASES[:2]:
            print(f"compare, {case.name}")
            sweep(case)
    table = []
    for case in CASES:
        table.append(measure(case))
        print(json.dumps({name: round(value, 9) if isinstance(value, float) else value for name, value in table[-1].items()}),
              flush=True)  # fmt: skip
    print(f"{'':26s}{'shift':>18s}{'compare':>22s}{'spectra':>22s}{'collect':>22s}   errors")
    for row in table:
        cells = [f"{row[f'{name} ms']:9.2f} ms {row[rate]:5.{digits}f} {unit}" for name, rate, unit, digits in (
            ("shift", "shift GB/s", "GB/s", 0), ("compare", "compare T/s", "T/s", 1),
            ("spectra", "spectra gather GB/s", "GB/s", 0), ("collect", "collect add GB/s", "GB/s", 0))]  # fmt: skip
        faults = " ".join(f"{row[f'{name} error']:.0e}" for name in ("shift", "compare", "spectra", "collect"))
        print(f"{row['case']:26s}" + " |".join(cells) + "   " + faults)
    if arguments.out:
        arguments.out.write_text(json.dumps({"device": device, "torch": torch.__version__, "table": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
