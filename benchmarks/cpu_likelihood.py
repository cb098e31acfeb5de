"""`verglas.likelihood` on the CPU: `python -m benchmarks.cpu_likelihood [--threads 2] [--turns 5] [--out FILE]`.

Many images against many projections (1,000 x 10,000, 1,600 coefficients, complex64 in, preparation of operands counted), beside
(i) the loop as one writes it first and (ii) the same tuned for SIMD, both in Numba on all threads, and beside the fastest
float32 matrix product found in this process. Then one pair under many factors. Programs take turns and the fastest turn of
each counts, since other work on the machine only ever adds time. Ends with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import torch

from benchmarks.figures import publish
from benchmarks.registry import find
from verglas.likelihood import _float32_products, scaled_differences, squared_differences

IMAGES, PROJECTIONS, COEFFICIENTS = 1000, 10000, 1600
POSES = 32  # of a block of the tuned loop: 410 kB, in the second-level cache while all images pass
f = np.float32


@numba.njit(parallel=True)
def first_loop(image, projection, contrast, weight, out):
    """The formula, contiguous complex64, strict arithmetic."""
    for i in numba.prange(len(image)):
        for o in range(len(projection)):
            total = f(0)
            for k in range(image.shape[1]):
                rest = image[i, k] - contrast[i, k] * projection[o, k]
                total += weight[i, k] * (rest.real * rest.real + rest.imag * rest.imag)
            out[i, o] = total


@numba.njit(fastmath=True, boundscheck=False)
def four_poses(x, y, c, w, p0, q0, p1, q1, p2, q2, p3, q3, out):
    """Four projections for each load of the image."""
    s0 = s1 = s2 = s3 = f(0)
    for k in range(np.uintp(len(x))):
        xk, yk, ck, wk = x[k], y[k], c[k], w[k]
        a0, b0, a1, b1 = xk - ck * p0[k], yk - ck * q0[k], xk - ck * p1[k], yk - ck * q1[k]
        a2, b2, a3, b3 = xk - ck * p2[k], yk - ck * q2[k], xk - ck * p3[k], yk - ck * q3[k]
        s0, s1 = s0 + wk * (a0 * a0 + b0 * b0), s1 + wk * (a1 * a1 + b1 * b1)
        s2, s3 = s2 + wk * (a2 * a2 + b2 * b2), s3 + wk * (a3 * a3 + b3 * b3)
    out[0], out[1], out[2], out[3] = s0, s1, s2, s3


@numba.njit(fastmath=True, boundscheck=False)
def eight_poses(x, y, c, w, p, q, out):
    """Eight projections for each load of the image: as many sums as pay before registers run out."""
    s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = f(0)
    p0, p1, p2, p3, p4, p5, p6, p7 = p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]
    q0, q1, q2, q3, q4, q5, q6, q7 = q[0], q[1], q[2], q[3], q[4], q[5], q[6], q[7]
    for k in range(np.uintp(len(x))):
        xk, yk, ck, wk = x[k], y[k], c[k], w[k]
        a0, b0, a1, b1 = xk - ck * p0[k], yk - ck * q0[k], xk - ck * p1[k], yk - ck * q1[k]
        a2, b2, a3, b3 = xk - ck * p2[k], yk - ck * q2[k], xk - ck * p3[k], yk - ck * q3[k]
        a4, b4, a5, b5 = xk - ck * p4[k], yk - ck * q4[k], xk - ck * p5[k], yk - ck * q5[k]
        a6, b6, a7, b7 = xk - ck * p6[k], yk - ck * q6[k], xk - ck * p7[k], yk - ck * q7[k]
        s0, s1 = s0 + wk * (a0 * a0 + b0 * b0), s1 + wk * (a1 * a1 + b1 * b1)
        s2, s3 = s2 + wk * (a2 * a2 + b2 * b2), s3 + wk * (a3 * a3 + b3 * b3)
        s4, s5 = s4 + wk * (a4 * a4 + b4 * b4), s5 + wk * (a5 * a5 + b5 * b5)
        s6, s7 = s6 + wk * (a6 * a6 + b6 * b6), s7 + wk * (a7 * a7 + b7 * b7)
    out[0], out[1], out[2], out[3], out[4], out[5], out[6], out[7] = s0, s1, s2, s3, s4, s5, s6, s7


@numba.njit(parallel=True, fastmath=True, boundscheck=False)
def tuned_loop(x, y, p, q, c, w, each, out):
    """A block of projections stays in the cache while all images of a thread pass; `each` projections per load."""
    half = (len(x) + 1) // 2
    for task in numba.prange(2 * (len(p) // POSES)):
        first, begin = task // 2 * POSES, task % 2 * half
        for i in range(begin, min(begin + half, len(x))):
            for o in range(first, first + POSES, each):
                if each == 4:
                    four_poses(x[i], y[i], c[i], w[i], p[o], q[o], p[o + 1], q[o + 1], p[o + 2], q[o + 2], p[o + 3], q[o + 3],
                               out[i, o : o + 4])  # fmt: skip
                else:
                    eight_poses(x[i], y[i], c[i], w[i], p[o : o + 8], q[o : o + 8], out[i, o : o + 8])


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def product_rates() -> dict[str, Callable[[], object]]:
    """Float32 products of the same size, one with each way to hand over the operands, 2 K + K deep."""
    image, projection = torch.randn(IMAGES, 3 * COEFFICIENTS), torch.randn(PROJECTIONS, 3 * COEFFICIENTS)
    transposed, out = projection.T.contiguous(), torch.empty(IMAGES, PROJECTIONS)

    def fast(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with _float32_products(torch.device("cpu")):
                work()

        return run

    return {
        "oneDNN, a b^T": fast(lambda: torch.mm(image, projection.T, out=out)),
        "oneDNN, a b": fast(lambda: torch.mm(image, transposed, out=out)),
        "torch's default, a b^T": lambda: torch.mm(image, projection.T, out=out),
        "numpy, a b": lambda: np.matmul(image.numpy(), transposed.numpy(), out=out.numpy()),
    }


def many(turns: int) -> dict[str, float]:
    """Row k: prints rates, ratios and the error; its figures."""
    generator = torch.Generator().manual_seed(1)
    image, projection = (torch.randn(n, COEFFICIENTS, dtype=torch.complex64, generator=generator) for n in (IMAGES, PROJECTIONS))
    contrast = torch.sin(torch.linspace(0, 40, COEFFICIENTS) * (0.5 + torch.rand(IMAGES, 1, generator=generator)))
    weight = torch.rand(IMAGES, COEFFICIENTS, generator=generator)
    parts = [part.contiguous().numpy() for part in (image.real, image.imag, projection.real, projection.imag, contrast, weight)]
    few, poses = IMAGES // 10, PROJECTIONS // 10  # the first loop on a hundredth of the pairs: minutes otherwise
    plain = (image[:few].numpy(), projection[:poses].numpy(), contrast[:few].numpy(), weight[:few].numpy())
    looped, first_out = np.zeros((IMAGES, PROJECTIONS), np.float32), np.zeros((few, poses), np.float32)
    whole = PROJECTIONS // POSES * POSES  # what the blocked loop covers
    pairs = {"(i)": few * poses, "(ii) 4 poses": IMAGES * whole, "(ii) 8 poses": IMAGES * whole}
    works: dict[str, Callable[[], object]] = {
        "verglas": lambda: squared_differences(image, projection, contrast, weight),
        "(i)": lambda: first_loop(*plain, first_out),
        "(ii) 4 poses": lambda: tuned_loop(*parts, 4, looped),
        "(ii) 8 poses": lambda: tuned_loop(*parts, 8, looped),
        **product_rates(),
    }
    for work in works.values():
        work()
    best = dict.fromkeys(works, float("inf"))
    for _ in range(turns):
        for name, work in works.items():
            best[name] = min(best[name], seconds(work))
    rate = {name: pairs.get(name, IMAGES * PROJECTIONS) * COEFFICIENTS / best[name] / 1e9 for name in works}
    for name in works:
        floating = f", {6 * rate[name]:.0f} GFLOP/s" if name == "verglas" or name not in pairs else ""
        print(f"{name:24s} {best[name]:7.3f} s, {rate[name]:6.2f}e9 coefficients of pairs/s{floating}")
    ours = rate["verglas"]
    tuned, product = max(rate["(ii) 4 poses"], rate["(ii) 8 poses"]), max(rate[name] for name in product_rates())
    images = (image[:few].to(torch.complex128), contrast[:few].double(), weight[:few].double())
    some = projection[:poses].to(torch.complex128)
    exact = torch.stack([(w * (x - c * some).abs().square()).sum(1) for x, c, w in zip(*images)])
    error = float((squared_differences(image, projection, contrast, weight)[:few, :poses] - exact).abs().max() / exact.std())
    print(f"ratio to (i) {ours / rate['(i)']:.1f} (bar 15), to (ii) {ours / tuned:.2f} (bar 2.5), share of the fastest product "
          f"{ours / product:.2f} (bar 0.7), largest error {error:.1e} of the spread (bar 1e-5)")  # fmt: skip
    return {"many s": best["verglas"], "ratio to the first loop": ours / rate["(i)"], "ratio to the tuned loop": ours / tuned,
            "share of the fastest product": ours / product, "error of the spread": error}  # fmt: skip


def one(turns: int, n_coefficients: int = 1_638_400, n_factors: int = 100_000) -> dict[str, float]:
    """Row l: prints seconds and the largest relative difference to summing 9 of the factors; its figures."""
    generator = torch.Generator().manual_seed(2)
    projection, noise = torch.randn(2, n_coefficients, dtype=torch.complex128, generator=generator)
    contrast, weight = torch.rand(2, n_coefficients, dtype=torch.float64, generator=generator)
    image = 1.3 * contrast * projection + 1e-5 * noise  # at the factor 1.3 the difference nearly vanishes
    factors = torch.cat([torch.linspace(0, 2.6, n_factors - 5), 1.3 + torch.logspace(-8, -2, 5)]).double()
    fastest = min(seconds(lambda: scaled_differences(image, projection, contrast, weight, factors)) for _ in range(turns))
    found = scaled_differences(image, projection, contrast, weight, factors)
    worst = 0.0
    for n in [0, 777, n_factors // 2, n_factors - 6, *range(n_factors - 5, n_factors)]:
        exact = (weight * (image - factors[n] * contrast * projection).abs().square()).sum()
        worst = max(worst, abs(float(found[n] / exact) - 1))
    print(f"{n_coefficients:,} coefficients, {n_factors:,} factors: {fastest:.3f} s (bar 0.5), "
          f"largest relative difference {worst:.1e} (bar 1e-9)")  # fmt: skip
    return {"factors s": fastest, "factors relative difference": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    numba.set_num_threads(options.threads)
    figures = one(options.turns) | many(options.turns)
    publish(figures, options.out)
    values = [(bar, bar.measured(figures)) for bar in find("cpu_likelihood").bars]
    raise SystemExit(0 if all(value is not None and bar.kept(value) for bar, value in values) else 1)


if __name__ == "__main__":
    main()
