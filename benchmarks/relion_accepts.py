"""RELION 3.1 at work on what `verglas refine` left: is it accepted, and does RELION find the same resolution?

    python -m benchmarks.relion_accepts [--run DIR] [--project DIR]

--run: the folder of a finished refinement; without it, a small set is simulated and refined first. --project: the folder from
which the run was started, where names in its STAR files begin (default: here). RELION reads stacks of float32 named .mrcs.
All programs get the files as they are; what they write goes to a temporary folder. Exit code 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.first_iteration_vs_relion import Row
from benchmarks.kill_and_continue import Case, words_of
from verglas.cli.refine_watch import read_history
from verglas.core.masks import soft_sphere
from verglas.core.rotations import angular_distance
from verglas.core.shells import fsc
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import read_star
from verglas.particles.table import ParticleTable

LONGEST = 1200.0  # s of one program
MPI = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3"]


class Refused(Exception):
    """A program did not succeed; its last words."""


@dataclass(frozen=True)
class Refined:
    """A finished run. out: its folder; project: where names start; scratch: for what the other programs write. Å, px, degrees."""

    out: Path
    project: Path
    scratch: Path
    diameter: float
    symmetry: str
    resolution: float
    box: int
    pixel: float
    order: int
    fsc_S: np.ndarray

    @classmethod
    def read(cls, out: Path, project: Path, scratch: Path) -> Refined:
        """The run in `out`; InputError or KeyError if it is not a finished one."""
        facts = json.loads((out / "result.json").read_text())
        config, figures = facts["options"]["config"], facts["figures"]
        last = read_history(out / "events.jsonl", figures["iterations"]["value"])[-1]
        return cls(out, project, scratch, config["diameter"], config["symmetry"], last["resolution"], figures["box"]["value"],
                   last["pixel_size"], last["healpix_order"], np.array(last["fsc"]))  # fmt: skip

    def shell(self, resolution: float) -> float:
        """Å -> shells."""
        return self.box * self.pixel / resolution

    def program(self, *words: object) -> None:
        """Run a program in the project; Refused if it fails."""
        command = [str(word) for word in words]
        environment = os.environ | {"TMPDIR": str(self.scratch)}  # MPI programs started at once fall over a shared one
        done = subprocess.run(command, cwd=self.project, env=environment, capture_output=True, text=True, timeout=LONGEST,
                              check=False)  # fmt: skip
        if done.returncode:
            raise Refused(f"{' '.join(command)}\n{done.stdout[-800:]}{done.stderr[-1500:]}")

    def verglas(self, *words: object) -> None:
        """Run a command of verglas in the project."""
        self.program(sys.executable, "-m", "verglas", *words)

    def particles(self) -> ParticleTable:
        return ParticleTable.read(self.out / "run_data.star", self.project)

    def same_shell(self, program: str, resolution: float, ours: float | None = None) -> Row:
        """Row: how many shells RELION's resolution is from ours, that of the refinement if no other is given."""
        ours = self.resolution if ours is None else ours
        difference = abs(self.shell(resolution) - self.shell(ours))
        return Row(f"{program}: resolution, shells apart", difference, 1.0, True, f"{resolution:.4g} Å, ours {ours:.4g} Å")


def postprocess_rows(run: Refined) -> list[Row]:
    """relion_postprocess on the unfiltered half maps in a soft sphere, beside the run's own FSC and `verglas postprocess`."""
    mask = run.scratch / "mask.mrc"
    write_map(mask, Map(soft_sphere(run.box, run.diameter / 2 / run.pixel, 5.0).numpy(), run.pixel))
    halves = [run.out / f"run_half{number}_class001_unfil.mrc" for number in (1, 2)]
    run.program("relion_postprocess", "--i", halves[0], "--i2", halves[1], "--mask", mask, "--o", run.scratch / "post",
                "--angpix", run.pixel)  # fmt: skip
    run.verglas("postprocess", "--half1", halves[0], "--half2", halves[1], "--mask", mask, "--out", run.scratch / "ours")
    theirs, ours = (read_star(run.scratch / name) for name in ("post.star", "ours/postprocess.star"))
    rows = []
    for name, label in CURVES.items():
        one_S, other_S = (star["fsc"].frame[label].to_numpy() for star in (theirs, ours))
        rows.append(Row(f"relion_postprocess: {name} FSC beside verglas postprocess", float(np.abs(one_S - other_S).max()),
                        1e-3, True))  # fmt: skip
    unmasked_S = theirs["fsc"].frame[CURVES["unmasked"]].to_numpy()
    apart = float(np.abs(unmasked_S - run.fsc_S).max())
    rows.append(Row("relion_postprocess: unmasked FSC beside the run's", apart, note="which knows no gridding, and no corners"))
    first, second = (run.box * run.pixel / crossing(curve_S) for curve_S in (unmasked_S, run.fsc_S))
    rows.append(run.same_shell("relion_postprocess: unmasked FSC above 0.143", first, second))
    found, expected = (float(str(star["general"].values["rlnFinalResolution"])) for star in (theirs, ours))
    return [*rows, run.same_shell("relion_postprocess", found, expected)]


def crossing(fsc_S: np.ndarray) -> int:
    """Last shell before the curve first falls below 0.143."""
    return int(np.append(np.flatnonzero(fsc_S < 0.143), len(fsc_S))[0]) - 1


CURVES = {
    "unmasked": "rlnFourierShellCorrelationUnmaskedMaps",
    "masked": "rlnFourierShellCorrelationMaskedMaps",
    "corrected": "rlnFourierShellCorrelationCorrected",
}


def refine_rows(run: Refined) -> list[Row]:
    """One iteration of RELION, local about our poses.

    Promised is the resolution from our half-sets and our map low-passed to its resolution. For information: from the map
    low-passed to 1.5 times that, where all agreement of the halves beyond comes from this one iteration, begun with a first
    guess of the noise; and relion_refine with all particles together, whose resolution no half-sets keep honest.
    """
    step = 60.0 / 2**run.order
    words = ["--i", run.out / "run_data.star", "--ref", run.out / "run_class001.mrc", "--ctf", "--ctf_corrected_ref"]
    words += ["--particle_diameter", run.diameter, "--sym", run.symmetry, "--healpix_order", run.order, "--oversampling", 1]
    words += ["--offset_range", 3, "--offset_step", 2, "--zero_mask", "--flatten_solvent", "--norm", "--scale", "--pad", 2]
    words += ["--random_seed", 1]
    together = ["--iter", 1, "--sigma_ang", f"{step:g}", "--ini_high", 2 * run.pixel, "--tau2_fudge", 1, "--K", 1]
    split = ["--auto_refine", "--split_random_halves", "--auto_iter_max", 1, "--auto_local_healpix_order", run.order]
    split += ["--low_resol_join_halves", 40, "--ini_high"]
    rows = []
    for name, title, command, promised in (
        ("halves", "relion_refine_mpi", [*MPI, "relion_refine_mpi", *words, *split, run.resolution], 1.0),
        ("coarser", "relion_refine_mpi, coarser map", [*MPI, "relion_refine_mpi", *words, *split, 1.5 * run.resolution], None),
        ("together", "relion_refine", ["relion_refine", *words, *together], None),
    ):
        run.program(*command, "--o", run.scratch / name)
        model = run.scratch / f"{name}_it001{'' if name == 'together' else '_half1'}_model.star"
        found = float(str(read_star(model)["model_general"].values["rlnCurrentResolution"]))
        rows.append(replace(run.same_shell(title, found), promised=promised))
        rows.append(pose_row(run, title, run.scratch / f"{name}_it001_data.star", step))
    return rows


def pose_row(run: Refined, program: str, path: Path, step: float) -> Row:
    """How far RELION's iteration turned the particles: less than its own grid's coarse step, for most of them."""
    ours, theirs = run.particles(), ParticleTable.read(path, run.project)
    place = {name: row for row, name in enumerate(theirs.frame["rlnImageName"])}
    theirs = theirs.select(np.array([place[name] for name in ours.frame["rlnImageName"]]))
    mates = symmetry_matrices(run.symmetry)
    turned_B = torch.stack([angular_distance(ours.rotations() @ mate, theirs.rotations()) for mate in mates]).amin(0)
    return Row(f"{program}: median angle to our poses, degrees", float(turned_B.median()), step, True)


def reconstruct_rows(run: Refined) -> list[Row]:
    """relion_reconstruct from our poses beside our map, to the run's resolution."""
    out = run.scratch / "reconstructed.mrc"
    run.program("relion_reconstruct", "--i", run.out / "run_data.star", "--o", out, "--ctf", "--sym", run.symmetry)
    ours, theirs = (torch.tensor(read_map(path).data_ZYX) for path in (run.out / "run_class001.mrc", out))
    last = int(run.shell(run.resolution))
    return [
        Row("relion_reconstruct: mean FSC with our map to its resolution", float(fsc(ours, theirs)[1 : last + 1].mean()), 0.98)
    ]


def ctf_refine_rows(run: Refined) -> list[Row]:
    """relion_ctf_refine (beam tilt) from our particles and RELION's post-processing of our half maps."""
    run.program("relion_ctf_refine", "--i", run.out / "run_data.star", "--f", run.scratch / "post.star", "--o",
                run.scratch / "ctf", "--fit_beamtilt", "--kmin_tilt", 1.5 * run.resolution)  # fmt: skip
    written = ParticleTable.read(run.scratch / "ctf/particles_ctf_refine.star", run.project)
    return [Row("relion_ctf_refine: share of particles written", len(written) / len(run.particles()), 1.0)]


def convert_rows(run: Refined) -> list[Row]:
    """run_data.star to cryoSPARC's .cs and back: largest change of a pose, of the CTF, of half-sets."""
    there, back = run.scratch / "particles.cs", run.scratch / "back.star"
    run.verglas("convert", run.out / "run_data.star", "--out", there)
    run.verglas("convert", there, "--out", back)
    ours, theirs = run.particles(), ParticleTable.read(back, run.project)
    turned = float(angular_distance(ours.rotations(), theirs.rotations()).max())
    moved = float((ours.origins() - theirs.origins()).abs().max())
    rows = [Row("verglas convert to .cs and back: angles, degrees", turned, 1e-3, True),
            Row("verglas convert to .cs and back: origins, Å", moved, 1e-3, True)]  # fmt: skip
    for label, bound in (("rlnDefocusU", 0.01), ("rlnRandomSubset", 0.0)):
        change = np.abs(ours.frame[label].to_numpy(float) - theirs.frame[label].to_numpy(float)).max()
        rows.append(Row(f"verglas convert to .cs and back: {label}", float(change), bound, True))
    return rows


PARTS = (postprocess_rows, refine_rows, reconstruct_rows, ctf_refine_rows, convert_rows)


def examine(run: Refined) -> bool:
    """Print all rows; whether all pass."""
    print(f"{run.out}: {len(run.particles())} particles, box {run.box} px, {run.resolution:.4g} Å, {run.symmetry}")
    passed = True
    for part in PARTS:
        begin = time.monotonic()
        try:
            rows = part(run)
        except Refused as error:
            print(f"FAIL  {error}")
            passed = False
            continue
        for row in rows:
            print(row.text())
            passed &= row.passed
        print(f"  ({time.monotonic() - begin:.1f} s)", flush=True)
    return passed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--project", type=Path, default=Path("."))
    options = parser.parse_args()
    if shutil.which("relion_refine_mpi") is None:
        raise SystemExit("RELION is not installed: nothing to show")
    with tempfile.TemporaryDirectory() as name:
        folder, out, project = Path(name), options.run, options.project
        if out is None:
            case = Case(words_of(argparse.Namespace(particles=None), folder), folder, "cpu", 1)
            print(f"a small set refined in {case.finish('refined'):.0f} s")
            out, project = case.out("refined"), folder / "refined"
        (folder / "relion").mkdir()
        passed = examine(Refined.read(out.absolute(), project.absolute(), folder / "relion"))
    raise SystemExit(not passed)


if __name__ == "__main__":
    main()
