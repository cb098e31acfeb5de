"""Which benchmarks there are: what each measures, on what, for how long, and what it promises."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal


@dataclass(frozen=True)
class Bar:
    """A promise. row: its letter in docs/performance.md; figures: name of the figure that must keep it, * standing for anything
    (of several, the worst counts); limit: the largest (<=) or smallest (>=) value; text: what it is, for people."""

    row: str
    text: str
    figures: str
    comparison: Literal["<=", ">="]
    limit: float
    unit: str = ""

    def measured(self, figures: Mapping[str, float]) -> float | None:
        """The worst figure that the promise is about; None if there is none, NaN if one is NaN."""
        found = [value for name, value in figures.items() if fnmatchcase(name, self.figures)]
        if not found or any(math.isnan(value) for value in found):
            return math.nan if found else None
        return max(found) if self.comparison == "<=" else min(found)

    def kept(self, value: float) -> bool:
        """Whether a value keeps the promise; NaN never does."""
        return value <= self.limit if self.comparison == "<=" else value >= self.limit

    @property
    def promise(self) -> str:
        """'≤ 0.8 s'."""
        return f"{'≤' if self.comparison == '<=' else '≥'} {self.limit:g} {self.unit}".strip()


@dataclass(frozen=True)
class Benchmark:
    """A module run as `python -m benchmarks.MODULE WORDS --out FIGURES.json`, and the promises that its figures keep.

    group: cpu and gpu are what `make bench` and `make bench-gpu` run, long is run by name only; seconds: what it takes, about;
    words: further arguments, where {data} is the folder of real inputs ($VERGLAS_SHARED/data) and {work} a scratch folder;
    needs: files below {data}, programs or packages without which it is left out; repeat: whole runs, of which medians count.
    """

    name: str
    about: str
    group: Literal["cpu", "gpu", "long"]
    device: Literal["cpu", "gpu"]
    seconds: float
    module: str
    words: tuple[str, ...] = ()
    bars: tuple[Bar, ...] = ()
    files: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    repeat: int = 1

    @property
    def rows(self) -> str:
        """Letters of the promises, 'a b'."""
        return " ".join(dict.fromkeys(bar.row for bar in self.bars))


ROWS = ("start", "a", "b", "c", "d", "e", "f", "g", "h", "i", "i2", "j", "k", "l", "m", "n", "o", "p", "q", "r", "s")
C1 = "models/6wg6_C1.npz"
MODEL = ("--model", "{data}/" + C1, "--work", "{work}")
EMPIAR = ("models/5a1a_D2.npz", "empiar10028_ctf/defocus_u_v_angle_105247.npy")
LARGE = ("--model", "{data}/" + EMPIAR[0], "--defocus", "{data}/" + EMPIAR[1], "--work", "{work}")
BETAGAL = ("betagal_tutorial/particles_1391_no_poses.star", "maps/relion_tests_ref_model_betagal_10017.mrc")

FAR_STAR, NEAR_STAR = "ptycho/siemens-star-small.npz.bz2", "ptycho/PETRAIII_P25_Near_Field_Ptycho.cxi"

BENCHMARKS: tuple[Benchmark, ...] = (
    Benchmark(
        "startup", "`verglas --help`, `refine --help`, imports", "cpu", "cpu", 15, "startup",
        bars=(Bar("start", "verglas refine --help, whole process", "refine --help s", "<=", 0.5, "s"),),
    ),
    Benchmark(
        "cpu_kernels", "projection and backprojection beside torch-projectors", "cpu", "cpu", 45, "cpu_kernels",
        packages=("torch_projectors",),
    ),
    Benchmark(
        "cpu_likelihood", "sums of squared differences, beside loops and matrix products", "cpu", "cpu", 60, "cpu_likelihood",
        bars=(
            Bar("k", "1,000 images x 10,000 projections: times faster than the first loop", "ratio to the first loop", ">=", 15),
            Bar("k", "the same: times faster than the loop tuned for SIMD", "ratio to the tuned loop", ">=", 2.5),
            Bar("k", "the same: share of the fastest float32 product", "share of the fastest product", ">=", 0.7),
            Bar("k", "the same: largest error over the spread of the scores", "error of the spread", "<=", 1e-5),
            Bar("l", "one pair, 1,638,400 coefficients, 100,000 factors", "factors s", "<=", 0.5, "s"),
            Bar("l", "the same: relative difference to summing", "factors relative difference", "<=", 1e-9),
        ),
    ),
    Benchmark(
        "reconstruct_vs_relion", "whole reconstructions beside relion_reconstruct", "long", "cpu", 400, "reconstruct_vs_relion",
        programs=("relion_reconstruct",),
    ),
    Benchmark(
        "streaming", "an iteration with a tenth of the images in memory, cold page cache", "long", "cpu", 1800, "streaming",
        ("--keep", "{work}"),
        bars=(
            Bar("m", "20,000 x 128 px, 131 MB of images: times the slower of disk and compute", "streamed ratio", "<=", 1.15),
        ),
    ),
    Benchmark(
        "refine_small", "a whole refinement of 300 x 32 px, made-up molecule, without RELION", "cpu", "cpu", 60, "refine_small",
        ("--work", "{work}"),
    ),
    Benchmark(
        "refine_vs_relion", "whole refinements beside relion_refine_mpi: real D2, simulated C1", "long", "cpu", 7200,
        "refine_vs_relion", ("--data", "{data}", "--work", "{work}"), files=(*BETAGAL, C1), programs=("relion_refine_mpi",),
        bars=(
            Bar("j", "1,391 x 64 px, D2, real: times faster than RELION 3.1.3", "D2 ratio", ">=", 20),
            Bar("j", "1,000 x 64 px, C1, simulated: times faster than RELION 3.1.3", "C1 ratio", ">=", 20),
        ),
    ),
    Benchmark(
        "gpu_iteration", "steady iterations at fixed sampling, 10,000 x 128 px", "gpu", "gpu", 100, "gpu_iteration", MODEL,
        files=(C1,),
        bars=(
            Bar("a", "steady iteration, 10,000 x 128 px, K=1, order 2", "K=1 order 2 s", "<=", 0.8, "s"),
            Bar("a", "the same, order 3", "K=1 order 3 s", "<=", 1.0, "s"),
            Bar("b", "the same, K=4, order 2", "K=4 order 2 s", "<=", 1.0, "s"),
            Bar("i2", "a with 11 GB of GPU memory: times the time without", "K=1 order * capped ratio", "<=", 1.3),
        ),
    ),
    Benchmark(
        "gpu_kernels", "projection and backprojection at 64, 128, 256 px", "gpu", "gpu", 60, "gpu_kernels",
        bars=tuple(
            Bar("h", f"backprojection, {box} px, random and in clusters", f"rates / {box} * / backproject G/s", ">=", rate, "G/s")
            for box, rate in ((64, 20), (128, 15), (256, 10))
        ),
    ),
    Benchmark(
        "gpu_coarse", "the coarse search: products, reduction, posterior, lists", "gpu", "gpu", 40, "gpu_coarse",
        bars=(
            *(Bar("f", f"coarse search, K = {k:,}: share of product rate", f"table / {k} * / share of best product", ">=", 0.6)
              for k in (6427, 1060)),
            Bar(
                "f", "coarse search, K = 265: share of the bound (products or one read)", "table / 265 * / share of bound", ">=",
                0.6,
            ),
        ),
    ),
    Benchmark(
        "gpu_scores", "slices cut and multiplied with images, at 64, 128, 256 px", "gpu", "gpu", 60, "gpu_scores",
        bars=tuple(
            Bar("g", f"slices with their products, {box} px, T = 32, 128", f"rates / {box} [rc]* / G/s", ">=", rate, "G/s")
            for box, rate in ((64, 90), (128, 75), (256, 50))
        ),
    ),
    Benchmark(
        "gpu_refine", "whole auto-refinement, 5,000 x 128 px: cold, cached, with 11 GB", "gpu", "gpu", 150, "gpu_refine", MODEL,
        files=(C1,),
        bars=(
            Bar("c", "auto-refine 5,000 x 128 px, whole process, kernels cached", "cached s", "<=", 25, "s"),
            Bar("c", "the same, cold", "cold s", "<=", 45, "s"),
            Bar("i", "c: share of the time in which the GPU computes", "busy share", ">=", 0.85),
            Bar("i2", "c with 11 GB of GPU memory: times the time without", "capped ratio", "<=", 1.3),
        ),
    ),
    Benchmark(
        "gpu_classes", "3-D classification, K=4, 10,000 x 128 px, 5 iterations: cold, cached", "gpu", "gpu", 60, "gpu_classes",
        MODEL, files=(C1,),
        bars=(Bar("n", "classification, K=4, 5 iterations, 10,000 x 128 px, whole process, cached", "cached s", "<=", 10, "s"),),
    ),
    Benchmark(
        "abinitio_gpu", "first models, K=3, 50,000 x 128 px of three structures", "gpu", "gpu", 120, "abinitio_gpu",
        ("--models", "{data}/models", "--work", "{work}"), files=(C1, "models/5a1a_D2.npz", "models/1oel_C7.npz"),
        bars=(Bar("o", "first models, K=3, 50,000 x 128 px, whole process, cached", "whole s", "<=", 120, "s"),),
    ),
    Benchmark(
        "gpu_class2d", "2-D classification, 100,000 x 128 px, K=200, 25 iterations: EM and the gradient", "gpu", "gpu", 200,
        "class2d", ("gpu", *MODEL), files=(C1,),
        bars=(
            Bar("p", "2-D classes, 100,000 x 128 px, K=200, 25 passes, whole process", "EM whole s", "<=", 120, "s"),
            Bar("p", "the same by the gradient", "gradient whole s", "<=", 120, "s"),
        ),
    ),
    Benchmark(
        "gpu_large", "auto-refinement at EMPIAR-10028's size, 105,247 x 360 px", "long", "gpu", 900, "gpu_large",
        ("all", *LARGE), files=EMPIAR,
        bars=(
            Bar("d", "auto-refine 105,247 x 360 px, whole process, cold page cache", "whole s", "<=", 600, "s"),
            Bar("i", "d: share of the time in which the GPU computes", "busy share", ">=", 0.85),
        ),
    ),
    Benchmark(
        "gpu_large_kinds", "the same, iterations of each kind timed and summed", "long", "gpu", 400, "gpu_large",
        ("kinds", *LARGE), files=EMPIAR,
        bars=(Bar("d", "the same, iterations of each kind times their counts", "summed s", "<=", 600, "s"),),
    ),
    Benchmark(
        "gpu_classify", "3-D classification of the same set: K=6, 25 iterations, order 2", "long", "gpu", 500, "gpu_large",
        ("all", "--job", "classify", *LARGE), files=EMPIAR,
        bars=(Bar("e", "classification, K=6, 25 iterations, 105,247 x 360 px, whole process", "whole s", "<=", 300, "s"),),
    ),
    Benchmark(
        "ptychography", "ptychography: simulated star, engines from a wrong probe, positions 3.5 px off", "long", "cpu", 900,
        "ptychography", ("star", "probe", "positions", "--passes", "64"),
    ),
    Benchmark(
        "ptychography far field", "the real far-field star, error of three engines after 12 passes", "long", "cpu", 200,
        "ptychography", ("real", "--scan", "{data}/" + FAR_STAR, "--passes", "12"), files=(FAR_STAR,),
    ),
    Benchmark(
        "ptychography near field", "the real near-field star, the same", "long", "cpu", 100, "ptychography",
        ("real", "--scan", "{data}/" + NEAR_STAR, "--focus", "3.65e-3", "--passes", "12"), files=(NEAR_STAR,),
    ),
    Benchmark(
        "ptychography precision", "simulated star, 100 x 64 px, 32 passes: single and float16 beside double", "long", "cpu",
        100, "ptychography_gpu", ("truth", "--positions", "100", "--window", "64", "--device", "cpu"),
    ),
    Benchmark(
        "ptychography one GPU", "PtyGer's test: kernels beside double precision, passes beside transforms, precision", "long",
        "gpu", 200, "ptychography_gpu", ("batches", "check", "passes", "truth"),
    ),
    Benchmark(
        "ptychography peers", "the same beside pty-chi and tike, where they are installed: time to an error", "long", "gpu", 150,
        "ptychography_peers", ("--passes", "15"),
    ),
    Benchmark(
        "ptychography scaling", "ptychography on several GPUs: same result, strong scaling, memory", "long", "gpu", 60,
        "ptychography_scaling",
    ),
    Benchmark(
        "scaling", "several GPUs: same sums, strong and weak scaling, communication, whole runs", "long", "gpu", 900, "scaling",
        MODEL, files=(C1,),
        bars=(
            Bar("q", "iterations from one state on several GPUs and on one: difference of sums, worst shell",
                "same iterations, * ranks and *, largest difference of a shell", "<=", 1e-4),
            Bar("q", "the same: share of particles with the same pose",
                "same iterations, * ranks and *, smallest share of same poses", ">=", 0.999),
            Bar("r", "strong scaling, whole run, start apart: efficiency", "whole, * efficiency, without start", ">=", 0.85),
            Bar("r", "the same, expectation", "whole, * efficiency, expectation", ">=", 0.92),
            Bar("r", "weak scaling, iterations: efficiency", "weak, * efficiency, iterations", ">=", 0.95),
            Bar("s", "share of an iteration in which sending is not hidden, the worst", "* worst share of sending, not hidden",
                "<=", 0.05),
            Bar("s", "bytes that a rank sends: times the least possible", "* worst bytes of least", "<=", 1.2),
        ),
    ),
)  # fmt: skip


def find(name: str) -> Benchmark:
    """The benchmark of a name; KeyError names all."""
    for one in BENCHMARKS:
        if one.name == name:
            return one
    raise KeyError(f"no benchmark {name!r}; there are {', '.join(one.name for one in BENCHMARKS)}")


def bars() -> list[tuple[Bar, Benchmark]]:
    """All promises in the order of their rows."""
    pairs = [(bar, one) for one in BENCHMARKS for bar in one.bars]
    return sorted(pairs, key=lambda pair: ROWS.index(pair[0].row))
