"""One iteration of `relion_refine` (3.1.3, `--iter 1 --perturb 0`) and of verglas on the same particles, number by number.

    python -m benchmarks.first_iteration_vs_relion --particles P.star --reference R.mrc --symmetry D2 --diameter 180
        --initial-resolution 40

Copies the particles to a temporary folder, runs both programs and prints a table; exit code 1 if a promised row fails. Without
--reference the particles are reconstructed with the poses they have: the reference is then on the images' grey scale. Poses,
offsets and norms of the file are forgotten unless --keep-poses is given. --local DEGREES searches around the poses of the
file, --correlate scores by correlation (--firstiter_cc), --scales fits a scale to each micrograph.
"""  # fmt: skip

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.relion_iteration import Case, RelionRun, prepare, run_relion
from benchmarks.relion_rules import relion_rules
from verglas.core.masks import soft_sphere
from verglas.core.rotations import angular_distance
from verglas.core.shells import fsc
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import Map, read_map, write_map
from verglas.maximization.reference import initial_reference, same_pixel_size
from verglas.particles.table import ParticleTable
from verglas.projection.volume import gridding_correction
from verglas.refinement.config import RefineConfig
from verglas.refinement.single import OneIteration, one_iteration

SAME_ANGLE, SAME_OFFSET = 0.01, 0.01  # degrees, Å: files round to 1e-6
NOT_SMALLER = 1 + 1e-6  # a header's pixel size that is rounded down, be it by 1e-8, makes RELION add a shell to the images
DEVIATIONS = {
    "always": [
        "RELION 3.1 keeps a noise spectrum per group of particles (by default micrographs), verglas per optics group: both are "
        "given the same groups here.",
        "RELION adds offsets in px to offsets in Å in the prior of offsets; verglas counts in Å, but follows RELION here "
        "(relion_offset_prior).",
        "RELION 3.1 takes the first reference as not corrected for the CTF unless told; told here (--ctf_corrected_ref).",
        "RELION 3.1 iterates its gridding weights by default, later versions and verglas do not: --skip_gridding here.",
        "RELION divides voxels at the very radius of the sums without a prior, and rounding decides which pixels of slices count "
        "there; verglas leaves those voxels out. They are taken out of RELION's map for the FSC, but not in the row below it.",
        "RELION's windowed transforms lack the row y = -size/2, so the last shell's weights differ by a few per cent.",
        "RELION computes in double precision, verglas in single.",
    ],
    "scales": ["RELION fits the scales of micrographs to the origin of the transforms, too, which scores leave out; verglas not.",
               "Which shells scales are fitted to: RELION weights the groups' first noise by particles, verglas equally."],
    "local": ["RELION measures the in-plane angle of a local search as a difference of psi (with symmetry: of the first mate's), "
              "verglas from the shortest turn of one view onto the other (with symmetry: of every mate). The rows above are with "
              "RELION's rule in verglas but for those that say otherwise."],
    "correlate": ["RELION's correlation counts the column x = 0 twice, and the origin; verglas's counts every coefficient once, "
                  "without the origin. The rows above are with RELION's rule in verglas but for those that say otherwise."],
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table. promised: the smallest value that passes (largest, if `below`); None: for information."""

    name: str
    measured: float
    promised: float | None = None
    below: bool = False
    note: str = ""

    @property
    def passed(self) -> bool:
        if self.promised is None:
            return True
        return self.measured <= self.promised if self.below else self.measured >= self.promised

    def text(self) -> str:
        sign = "<=" if self.below else ">="
        promised = f"{sign} {self.promised:g}" if self.promised is not None else ""
        verdict = ("pass" if self.passed else "FAIL") if promised else ""
        return f"{self.name:58s} {promised:>9s}  {self.measured:11.6g}  {verdict:4s}  {self.note}".rstrip()


def compare(table: ParticleTable, ours: OneIteration, theirs: RelionRun, case: Case) -> list[Row]:
    """All rows. Promised for one global iteration; after correlation, noise, norm and likelihood are not updated by either."""
    rows = [Row("current size, px, difference", abs(ours.before.current_size - int(str(theirs.general["rlnCurrentImageSize"]))),
                0, True, f"{ours.before.current_size} px"), *noise_rows(table, ours, theirs)]  # fmt: skip
    if not case.correlate:
        norm = relative(ours.poses.norm_B, theirs.numbers("rlnNormCorrection"))
        rows.append(Row("rlnNormCorrection, largest relative difference", norm, 0.01, True))
    rows += pose_rows(ours, theirs)
    if not case.correlate:
        pairs = {
            "rlnMaxValueProbDistribution": ours.poses.pmax_B,
            "rlnNrOfSignificantSamples": ours.poses.significant_B.double(),
            "rlnLogLikeliContribution": ours.poses.log_likelihood_B,
        }
        for label, value in pairs.items():
            expected = theirs.numbers(label)
            means = f"means {float(value.mean()):.6g} and {float(expected.mean()):.6g}"
            rows.append(Row(f"{label}, correlation", correlation(value, expected), 0.99, note=means))
    if case.scales and not case.correlate:
        scale = torch.tensor([theirs.scale[name] for name in ours.before.micrographs], dtype=torch.float64)
        rows.append(Row("rlnGroupScaleCorrection, largest relative difference", relative(ours.model.scale_M, scale),
                        note=f"from {float(scale.min()):.3f} to {float(scale.max()):.3f}"))  # fmt: skip
    sigma = float(str(theirs.general["rlnSigmaOffsetsAngst"]))
    rows.append(Row("rlnSigmaOffsetsAngst, relative difference", abs(ours.model.offset_sigma / sigma - 1)))
    return [*rows, *map_rows(ours, theirs, case)]


def noise_rows(table: ParticleTable, ours: OneIteration, theirs: RelionRun) -> list[Row]:
    """Noise before and after: largest relative difference over groups and shells."""
    names = [group.name for group in table.groups]
    rows = []
    pairs = [("before", ours.before.halves[0].sigma2_noise_GS, theirs.noise_before),
             ("after", ours.model.sigma2_noise_GS, theirs.noise)]  # fmt: skip
    for when, sigma2_GS, expected in pairs:
        worst = max(relative(sigma2_GS[i], expected[name]) for i, name in enumerate(names) if name in expected)
        rows.append(Row(f"noise spectra {when}, largest relative difference", worst, 0.01, True, f"{len(expected)} group(s)"))
    return rows


def pose_rows(ours: OneIteration, theirs: RelionRun) -> list[Row]:
    """Share of particles with the same best pose; one that agrees after oversampling agrees before it, too."""
    mates = symmetry_matrices(ours.config.symmetry)
    turned = torch.stack([angular_distance(ours.poses.rotation_B33 @ mate, theirs.rotations()) for mate in mates]).amin(0)
    moved = (ours.poses.origin_B2 - theirs.origins()).norm(dim=1)
    same = (turned < SAME_ANGLE) & (moved < SAME_OFFSET)
    near = (turned < ours.before.schedule.angular_step) & (moved < 1.5 * ours.before.schedule.offset_step)
    return [
        Row("best pose (fine orientation and offset) equal, share", float(same.double().mean()), 0.98),
        Row("best pose closer than a coarse step, share", float(near.double().mean())),
    ]


def map_rows(ours: OneIteration, theirs: RelionRun, case: Case) -> list[Row]:
    """FSC of the maps to the current size, and the spectra of the model."""
    radius, box = ours.plan.model_grid.radius, ours.before.box
    found = ours.solve()
    map_ZYX, mask_ZYX = found.map_ZYX.double(), soft_sphere(box, box / 2 - 4, 3)
    last = ours.before.shell_of(case.config.initial_resolution) - 1 if case.correlate else radius  # low-passed after correlation
    same = without_edge(theirs.map_ZYX, map_ZYX, radius, case.config.padding) if not case.correlate else theirs.map_ZYX
    raw_S = fsc(map_ZYX, theirs.map_ZYX)[1 : last + 1]
    curve_S = fsc(map_ZYX * mask_ZYX, same * mask_ZYX)[1 : last + 1]
    rows = [
        Row("FSC of the maps, lowest to the current size", float(curve_S.min()), None if case.correlate else 0.999,
            note=f"shells 1-{last}"),
        Row("  with RELION's unregularised voxels at the radius", float(raw_S.min()),
            note=f"{at_least(raw_S, 0.999)} shells above 0.999"),
        Row("grey scale of the maps, ratio", float((map_ZYX * same).sum() / same.square().sum())),
    ]  # fmt: skip
    if case.correlate:  # RELION's spectra are of the filtered map then
        return rows
    model = theirs.model["model_class_1"]
    spectra = {"rlnReferenceTau2": found.tau2_S, "rlnReferenceSigma2": found.sigma2_S, "rlnSsnrMap": found.ssnr_S}
    for label, value in spectra.items():
        expected = torch.from_numpy(model[label].to_numpy("float64").copy())
        edge = float(value[radius] / expected[radius] - 1) if float(expected[radius]) else 0.0
        rows.append(Row(f"{label}, largest relative difference", relative(value[1:radius], expected[1:radius]),
                        note=f"last shell {edge:+.4f}"))  # fmt: skip
    return rows


def without_edge(map_ZYX: Tensor, near_ZYX: Tensor, radius: int, padding: float) -> Tensor:
    """RELION's map without the voxels at exactly `radius`: waves fitted to its difference from a map that lacks them.

    Least squares within the sphere where neither program fades the map out, before the gridding correction. With padding 2
    those voxels lie at integer frequencies of the map, too: a square sum divisible by 4 has even terms only.
    """
    box = map_ZYX.shape[0]
    correction = gridding_correction(box, padding, map_ZYX.device).double()
    inside_ZYX = (soft_sphere(box, box / 2 - 4, 3) >= 1).double()
    difference = (map_ZYX - near_ZYX) * correction * inside_ZYX
    wave_K3 = waves_at(radius)
    axis = (torch.arange(box, dtype=torch.float64) - box // 2) * (2 * math.pi / box)
    x_KX, y_KX, z_KX = (
        torch.polar(torch.ones(len(wave_K3), box, dtype=torch.float64), wave_K3[:, i, None] * axis) for i in range(3)
    )
    normal, right = torch.zeros(2 * len(wave_K3), 2 * len(wave_K3), dtype=torch.float64), torch.zeros(2 * len(wave_K3)).double()
    for z in range(box):
        plane = ((z_KX[:, z, None] * y_KX)[:, :, None] * x_KX[:, None]).flatten(1)
        real = torch.cat([plane.real, plane.imag])
        normal += (real * inside_ZYX[z].flatten()) @ real.T
        right += real @ difference[z].flatten()
    found = torch.linalg.lstsq(normal, right[:, None]).solution[:, 0]
    factor_K = torch.complex(found[: len(wave_K3)], -found[len(wave_K3) :])
    edge_ZYX = torch.einsum("k,kz,ky,kx->zyx", factor_K, z_KX, y_KX, x_KX).real
    return map_ZYX - edge_ZYX / correction


def waves_at(radius: int) -> Tensor:
    """Integer (x, y, z) with x^2 + y^2 + z^2 = radius^2, one of each Friedel pair, float64 [K, 3]."""
    axis = torch.arange(-radius, radius + 1)
    wave_P3 = torch.cartesian_prod(axis, axis, axis)
    wave_K3 = wave_P3[wave_P3.square().sum(1) == radius**2]
    first = (wave_K3 * torch.tensor([radius * radius * 9, radius * 3, 1])).sum(1)  # the sign of the first that is not 0
    return wave_K3[first > 0].double()


def relative(value: Tensor, expected: Tensor) -> float:
    """Largest |value / expected - 1| where something is expected."""
    known = expected != 0
    return float((value.double()[known] / expected[known] - 1).abs().max()) if bool(known.any()) else math.nan


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's; 1 for two equal constants."""
    if float(a.std()) == 0 and float(b.std()) == 0:
        return 1.0 if torch.allclose(a.double(), b) else 0.0
    return float(np.corrcoef(a.double().numpy(), b.numpy())[0, 1])


def at_least(curve_S: Tensor, bar: float) -> int:
    """Shells before the first one below `bar`."""
    low = (curve_S < bar).nonzero()
    return int(low[0]) if len(low) else len(curve_S)


def first_iterations(table: ParticleTable, reference: Map, folder: Path, case: Case, keep_poses: bool) -> list[Row]:
    """Run both programs in `folder` and compare."""
    copy = prepare(table, folder, keep_poses, case.scales)
    group = copy.groups[0]
    if reference.box != group.box or not same_pixel_size(reference.pixel_size, group.pixel_size, group.box):
        values, _ = initial_reference(reference, group.box, group.pixel_size, 2 * group.pixel_size)
        reference = Map(values.numpy(), group.pixel_size)
    write_map(folder / "reference.mrc", Map(reference.data_ZYX, group.pixel_size * NOT_SMALLER))
    theirs = run_relion(folder, case, copy)
    begin = time.perf_counter()
    ours = one_iteration(copy, read_map(folder / "reference.mrc"), case.config, case.local_sigma)
    seconds = time.perf_counter() - begin
    own_rows = []
    if case.correlate or case.local_sigma:
        own_rows = [replace(row, name=f"by verglas's rules: {row.name}", promised=None) for row in pose_rows(ours, theirs)]
        with relion_rules():
            ours = one_iteration(copy, read_map(folder / "reference.mrc"), case.config, case.local_sigma)
    rows = [*compare(copy, ours, theirs, case), *own_rows]
    times = f"verglas {seconds:.1f} s in this process, relion_refine {theirs.seconds:.1f} s with {case.threads} thread(s)"
    return [*rows, Row("time of RELION over that of verglas", theirs.seconds / seconds, note=times)]


def reconstruct(particles: Path, symmetry: str, folder: Path) -> Path:
    """Map of particles with poses."""
    words = [str(Path(sys.executable).with_name("verglas")), "reconstruct", "--particles", str(particles), "--sym", symmetry,
             "--no-half-maps", "--out", str(folder)]  # fmt: skip
    subprocess.run(words, check=True, capture_output=True)
    return folder / "map.mrc"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--particles", type=Path, required=True)
    parser.add_argument("--reference", type=Path, help="map; left out: reconstructed from the poses of the particles")
    parser.add_argument("--symmetry", default="C1")
    parser.add_argument("--diameter", type=float, required=True, help="Å")
    parser.add_argument("--initial-resolution", type=float, required=True, help="Å, low pass of the reference")
    parser.add_argument("--healpix-order", type=int, default=2)
    parser.add_argument("--limit", type=int, help="use that many particles, drawn at random")
    parser.add_argument("--keep-poses", action="store_true", help="start from offsets and norms of the file")
    parser.add_argument("--local", type=float, default=0.0, metavar="DEGREES", help="local search around the poses of the file")
    parser.add_argument("--correlate", action="store_true", help="score by correlation")
    parser.add_argument("--scales", action="store_true", help="fit a scale to each micrograph")
    parser.add_argument("--threads", type=int, default=1, help="of relion_refine")
    parser.add_argument("--precision", default="single", choices=["single", "double"])
    words = parser.parse_args()
    config = RefineConfig(
        diameter=words.diameter, symmetry=words.symmetry, initial_resolution=words.initial_resolution,
        healpix_order=words.healpix_order, absolute_greyscale=not words.correlate, correct_scale=words.scales,
        relion_offset_prior=True, precision=words.precision,
    )  # fmt: skip
    case = Case(config, words.local, words.scales, words.threads)
    table = ParticleTable.read(words.particles)
    if words.limit:
        table = table.subset(words.limit, 0)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        reference = words.reference or reconstruct(words.particles, words.symmetry, folder / "reconstruction")
        rows = first_iterations(table, read_map(reference), folder, case, words.keep_poses or words.local > 0)
    print(f"{len(table)} particles; first iteration of verglas beside relion_refine --iter 1 --perturb 0\n")
    print(f"{'':58s} {'promised':>9s}  {'measured':>11s}")
    print("\n".join(row.text() for row in rows))
    kinds = ["always"] + ["scales"] * words.scales + ["local"] * (words.local > 0) + ["correlate"] * words.correlate
    print("\nMeant deviations:\n" + "\n".join(f"- {text}" for kind in kinds for text in DEVIATIONS[kind]))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
