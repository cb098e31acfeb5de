"""The coarse search on a GPU: `python -m benchmarks.gpu_coarse [--out record.json]`.

36,864 orientations x 21 or 29 shifts at three numbers of coefficients K, random slices in families of 16 that correlate by
0.94, images with one slice at one shift and white noise. `strength` is sum |P|^2: the larger, the sharper the posterior; the
mean number of significant samples is printed. Everything a caller waits for is timed (bias, products, scores, reduction,
posterior, significance, lists), as the median of device-event times, and given as a share of bounds from rates of the same run:
the products at the rate of the library's float16 product (of this shape, written in half precision; of the best shape, 8,192
cubed), and the larger of the latter and one read of the operands out of memory, as in benchmarks/floors.py.

One read alone bounds nothing: at K = 265 and 512 particles the operands are 51 MB, 17 us at 3 TB/s, and their products take 33
times that at the best rate that the tensor cores reach. No method that multiplies them all can take less than the products.
Scores that would have to be written and read again count for nothing in either bound: they need not leave the registers.
Flops are those of K coefficients, not of the zeros that fill rows up to a multiple of 8.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.floors import Ceilings, ceilings
from benchmarks.gpu_kernels import seconds
from verglas.expectation.ragged import every
from verglas.kernels.coarse import Orientations, Power, coarse
from verglas.kernels.coarse import triton as kernels
from verglas.kernels.keep import keep
from verglas.kernels.significant import significant

ORIENTATIONS, FAMILY, CORRELATION, FRACTION = 36_864, 16, 0.97, 0.999
FEW = 8  # particles that the plain torch passes are timed on, and whose errors are taken


@dataclass(frozen=True)
class Case:
    """Sizes of one row: coefficients, particles, shifts, sum |P|^2."""

    coefficients: int
    particles: int
    shifts: int
    strength: float


SHARP, FLAT, FLATTEST = 400.0, 60.0, 15.0
CASES = [
    Case(6427, 128, 21, SHARP), Case(6427, 512, 21, SHARP), Case(6427, 128, 29, SHARP), Case(1060, 256, 21, SHARP),
    Case(1060, 1024, 21, SHARP), Case(1060, 256, 29, SHARP), Case(265, 512, 21, SHARP), Case(265, 2048, 21, SHARP),
    Case(265, 512, 29, SHARP), Case(1060, 256, 21, FLAT), Case(265, 512, 21, FLAT), Case(265, 256, 21, FLATTEST),
]  # fmt: skip


def make(case: Case) -> tuple[Tensor, Tensor, Tensor, Orientations]:
    """(images, weights, log offsets, orientations), rows of a multiple of 16 numbers."""
    torch.manual_seed(case.coefficients)
    count, length = -(-case.coefficients // 8) * 8, 2 * case.coefficients
    mean = torch.randn(ORIENTATIONS // FAMILY, length, device="cuda")
    slices = torch.zeros(ORIENTATIONS, 2 * count, dtype=torch.float16, device="cuda")
    for first in range(0, ORIENTATIONS, 4096):
        rows = slice(first, first + 4096)
        own = torch.randn(4096, length, device="cuda") * math.sqrt(1 - CORRELATION**2)
        own += CORRELATION * mean[first // FAMILY : (first + 4096) // FAMILY].repeat_interleave(FAMILY, 0)
        slices[rows, :length] = own * math.sqrt(case.strength / length)
    images = torch.zeros(case.particles, case.shifts, 2 * count, device="cuda")
    images[..., :length] = torch.randn(case.particles, case.shifts, length, device="cuda")
    shown = torch.randint(0, ORIENTATIONS, (case.particles,), device="cuda")
    images[torch.arange(case.particles), torch.randint(0, case.shifts, (case.particles,))] += slices[shown].float()
    weight = 0.8 + 0.4 * torch.rand(case.particles, count, device="cuda")
    power = Power.split(slices.view(ORIENTATIONS, 2, count).float().square().sum(1))
    prior, log_offset = 0.3 * torch.randn(ORIENTATIONS, device="cuda"), -torch.rand(case.particles, case.shifts, device="cuda")
    return images.half(), weight, log_offset, Orientations(slices, power, prior)


def all_scores(images: Tensor, weight: Tensor, log_offset: Tensor, orientations: Orientations) -> Tensor:
    """[B, T, O] as they were made before: two products of torch and the priors, in float32."""
    cross = torch.mm(images.flatten(0, 1), orientations.slices_OL.T, out_dtype=torch.float32).unflatten(0, images.shape[:2])
    cross += (orientations.log_prior_O - 0.5 * (weight @ orientations.power.whole().float().T))[:, None]
    return cross.add_(log_offset[:, :, None])


def errors(images: Tensor, weight: Tensor, log_offset: Tensor, orientations: Orientations) -> dict[str, float]:
    """Against float64 of the same rounded operands: largest error of a kept log weight and of log_sum, nats; sets that differ."""
    inputs = images[:FEW], weight[:FEW], log_offset[:FEW], orientations, FRACTION
    (kept, found), (right_kept, right) = coarse(*inputs), coarse(*inputs, "reference")
    values, right_values = (one.value_N[one.value_N > -math.inf].sort().values for one in (kept, right_kept))
    same = len(values) == len(right_values)
    return {
        "value error": float((values - right_values).abs().max()) if same else math.nan,
        "log_sum error": float((found.log_sum_B - right.log_sum_B).abs().max()),
        "counts off": float((found.count_B - right.count_B).abs().sum()),
    }


def passes(score_BTO: Tensor, implementation: str) -> float:
    """Seconds of `significant` and `keep` over scores in memory."""
    n, shifts, count = score_BTO.shape
    blocks, score_N = every(n, count, shifts, score_BTO.device), score_BTO.flatten()

    def work() -> None:
        found = significant(score_N, blocks.value_ptr_B1, FRACTION, implementation)
        keep(score_N, blocks, found.threshold_B, True, implementation)

    return seconds(work, 3)


def measure(case: Case, rates: Ceilings) -> dict[str, float | str]:
    """One row of the table."""
    inputs = make(case)
    images, orientations = inputs[0], inputs[3]
    rows, flops = images.flatten(0, 1), 4.0 * case.coefficients * case.particles * case.shifts * ORIENTATIONS
    product = seconds(partial(torch.mm, rows, orientations.slices_OL.T))
    row: dict[str, float | str] = {"K": f"{case.coefficients}" if case.strength == SHARP else f"flat {case.coefficients}"}
    row |= {"B": case.particles, "T": case.shifts, "strength": case.strength}
    row |= {"product ms": 1e3 * product, "product TFLOP/s": flops / product / 1e12}
    taken, limit = seconds(partial(coarse, *inputs, FRACTION)), kernels.FUSED_LENGTH
    kernels.FUSED_LENGTH = 0 if kernels.fuses(images) else 10**9
    row |= {"coarse ms": 1e3 * taken, "the other way ms": 1e3 * seconds(partial(coarse, *inputs, FRACTION))}
    kernels.FUSED_LENGTH = limit
    row |= {"share of product": product / taken, "share of best product": flops / rates.products / taken}
    read = 2.0 * (rows.numel() + orientations.slices_OL.numel()) / rates.memory
    row |= {"one read ms": 1e3 * read, "share of bound": max(read, flops / rates.products) / taken}
    row["significant"] = float(coarse(*inputs, FRACTION)[1].count_B.double().mean())
    row |= errors(*inputs)
    few = all_scores(*(one[:FEW] for one in inputs[:3]), orientations)
    row |= {f"{name} passes, us a particle": 1e6 * passes(few, name) / FEW for name in ("reference", "triton")}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    arguments = parser.parse_args()
    rates = ceilings()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}; best product {rates.products / 1e12:.0f} TFLOP/s", flush=True)
    table = []
    for case in CASES:
        table.append(measure(case, rates))
        words = (f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in table[-1].items())
        print(" ".join(words), flush=True)
        torch.cuda.empty_cache()
    if arguments.out:
        record = {"device": device, "torch": torch.__version__, "best product": rates.products, "table": table}
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
