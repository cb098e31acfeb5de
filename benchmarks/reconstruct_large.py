"""`verglas reconstruct` at large boxes, whole processes: seconds of each stage, peak memory of the GPU, agreement with the truth.

python -m benchmarks.reconstruct_large --boxes 200 400 --work DIR [--gridding plain exact] [--images 1000] [--times 2]
    [--half-maps] [--profile]
Images are projections of 40 Gaussian blobs in closed form, with CTF, noise of the signal's variance, and origins, float16. Every
process starts anew; the first of them compiles kernels ("cold"), unless others did before. Words after -- go to
`verglas reconstruct`. Of each process: seconds from its start to the first event of the run, of the run, and to its
end. Python's packages are as pip installs them, compiled to bytecode: where they are not, a process that is not timed compiles
them into the work folder (--bytecode as-it-is: they stay so). --profile: where the time goes (`benchmarks.timeline`).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from importlib.util import cache_from_source
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import verglas
from verglas.core.rotations import euler_from_matrix, random_rotations
from verglas.io.mrc import StackWriter, read_map
from verglas.particles.table import ParticleTable
from verglas.simulation.imaging import HalfPlane, Transfer

BLOBS, WIDTH, REACH = 40, 1.5, 0.28  # how many, their standard deviation in px, distance from the centre in boxes
OPTICS = """
data_optics

loop_
_rlnOpticsGroup #1
_rlnOpticsGroupName #2
_rlnVoltage #3
_rlnSphericalAberration #4
_rlnAmplitudeContrast #5
_rlnImagePixelSize #6
_rlnImageSize #7
_rlnImageDimensionality #8
1 one 300 2.7 0.1 1.0 {box} 2

data_particles

loop_
_rlnImageName #1
_rlnAngleRot #2
_rlnAngleTilt #3
_rlnAnglePsi #4
_rlnOriginXAngst #5
_rlnOriginYAngst #6
_rlnDefocusU #7
_rlnDefocusV #8
_rlnDefocusAngle #9
_rlnOpticsGroup #10
"""


def blobs(box: int) -> Tensor:
    """Places (x, y, z) from the centre, px [A, 3]."""
    rng = torch.Generator().manual_seed(1)
    direction_A3 = torch.nn.functional.normalize(torch.randn(BLOBS, 3, generator=rng), dim=1)
    return direction_A3 * (REACH * box) * torch.rand(BLOBS, 1, generator=rng) ** (1 / 3)


def lines(place_BA: Tensor, box: int) -> Tensor:
    """Gaussians along an axis [B, A, N]."""
    axis = torch.arange(box, device=place_BA.device) - box // 2
    return (-(axis - place_BA[..., None]).square() / (2 * WIDTH**2)).exp_()


def write_table(folder: Path, box: int, images: int) -> ParticleTable:
    """Random poses, defoci and origins."""
    rng = np.random.default_rng(2)
    angles = euler_from_matrix(random_rotations(images, torch.Generator().manual_seed(3))).numpy()
    origins, defocus = rng.normal(0, 2, (images, 2)), rng.uniform(8000, 22000, images)
    rows = [
        f"{i + 1}@particles.mrcs {a:.5f} {b:.5f} {c:.5f} {x:.4f} {y:.4f} {d:.1f} {d - 200:.1f} 30.0 1"
        for i, ((a, b, c), (x, y), d) in enumerate(zip(angles, origins, defocus, strict=True))
    ]
    star = folder / "truth.star"
    star.write_text(OPTICS.format(box=box) + "\n".join(rows) + "\n")
    return ParticleTable.read(star)


def simulate(folder: Path, box: int, images: int, device: str) -> None:
    """particles.mrcs and truth.star."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = write_table(folder, box, images)
    transfer = Transfer.of(HalfPlane.of(table.groups[0], torch.device(device)))
    rotation_B33, origin_B2, ctf, at_A3 = table.rotations(), table.origins(), table.ctf(), blobs(box).double()
    noise = torch.Generator(device).manual_seed(4)
    with StackWriter(folder / "particles.mrcs", images, (box, box), 1.0, "float16") as stack:
        for first in range(0, images, 50):
            part = slice(first, min(first + 50, images))
            place_BA3 = (at_A3 @ rotation_B33[part].double().transpose(1, 2)).float().to(device)
            y_BAN, x_BAN = lines(place_BA3[..., 1], box), lines(place_BA3[..., 0], box)
            signal_BYX = torch.fft.rfft2(y_BAN.transpose(1, 2) @ x_BAN)
            seen = transfer.image(signal_BYX, origin_B2[part].to(device), transfer.ctf_BYX(ctf[part].to(device)))
            image_BYX = torch.fft.irfft2(seen, s=(box, box))
            image_BYX /= image_BYX.std((1, 2), keepdim=True)
            image_BYX += torch.randn(image_BYX.shape, generator=noise, device=device)
            moments = image_BYX.min(), image_BYX.max(), image_BYX.sum(), image_BYX.square().sum()
            smallest, largest, total, squares = torch.stack(moments).tolist()
            stack.append_measured(image_BYX.half().cpu().numpy(), (smallest, largest, total, squares))


def agreement(path: Path, box: int, device: str) -> float:
    """Correlation of a map with the blobs."""
    at_A3, sums = blobs(box).to(device), torch.zeros(5, dtype=torch.float64)
    found_ZYX = torch.from_numpy(read_map(path).data_ZYX.copy())
    z_NA, y_AN, x_AN = lines(at_A3[:, 2], box).T, lines(at_A3[:, 1], box), lines(at_A3[:, 0], box)
    for first in range(0, box, 16):
        truth = torch.einsum("za,ay,ax->zyx", z_NA[first : first + 16], y_AN, x_AN)
        found = found_ZYX[first : first + 16].to(device)
        moments = (truth, found, truth * truth, found * found, truth * found)
        sums += torch.stack([one.sum(dtype=torch.float64) for one in moments]).cpu()
    t, f, tt, ff, tf = (sums / box**3).tolist()
    return (tf - t * f) / math.sqrt((tt - t * t) * (ff - f * f))


def reconstruct(folder: Path, box: int, gridding: str, options: argparse.Namespace, turn: int) -> None:
    """One process; prints a line of seconds and memory, and a line of stages."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    halves = "--half-maps" if options.half_maps else "--no-half-maps"
    words = ["reconstruct", "--particles", str(folder / "truth.star"), "--out", str(out), halves,
             "--gridding", gridding, "--device", options.device, *options.words]  # fmt: skip
    begin, begun = time.perf_counter(), time.time()
    command = [sys.executable, "-m", "benchmarks.timeline" if options.profile else "verglas", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=options.environment)
    took = time.perf_counter() - begin
    if done.returncode:
        print(f"{box} px, {gridding}: failed after {took:.1f} s\n{done.stdout[-1500:]}{done.stderr[-1500:]}", flush=True)
        return
    peak = json.loads((out / "result.json").read_text())["figures"].get("memory_peak", {}).get("value", math.nan)
    dense = peak * 1e9 / (8 * (2 * box) ** 2 * (box + 1))
    shares = f"{100 * peak / (11e-9 * (2 * box) ** 3):.1f} % of RELION's formula, {dense:.2f} of a dense half cube"
    of_formula = f"{peak:.2f} GB ({shares})"
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    before = (out / "config.json").stat().st_mtime - begun  # written when the run begins
    run = events[-1]["seconds"]
    print(f"{box} px, {gridding}, process {turn}: {took:.2f} s ({before:.2f} to the start of the run, {run:.2f} of the run, "
          f"{took - before - run:.2f} to the end), peak of the GPU {of_formula}, "
          f"correlation with the truth {agreement(out / 'map.mrc', box, options.device):.4f}", flush=True)  # fmt: skip
    for event in events:
        if event["event"] == "stage":
            print(f"    at {event['seconds']:.2f} s: {event['stage']} {event['took']:.2f} s", flush=True)
    for line in (out / "run.log").read_text().splitlines():
        if "memory" in line:
            print("   ", line, flush=True)
    if options.profile:
        print(done.stdout, flush=True)


def with_bytecode(work: Path, device: str) -> dict[str, str]:
    """The environment of a process whose packages are compiled to bytecode; makes what is missing in `work`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    if all(Path(cache_from_source(module.__file__)).exists() for module in (torch, verglas)):
        return environment
    environment["PYTHONPYCACHEPREFIX"] = str(work / "bytecode")
    if (work / "bytecode").exists():
        return environment
    small = work / "small"
    simulate(small, 64, 100, device)
    words = ["reconstruct", "--particles", str(small / "truth.star"), "--out", str(small / "run"), "--device", device]
    aside = environment | {"XDG_CACHE_HOME": str(small / "cache")}  # kernels and fonts are for the first timed one
    subprocess.run([sys.executable, "-m", "verglas", *words, "--half-maps"], env=aside, check=True, capture_output=True)
    return environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--boxes", type=int, nargs="+", default=[200, 400])
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--gridding", nargs="+", default=["exact", "plain"])
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--bytecode", choices=["kept", "as-it-is"], default="kept")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--half-maps", action="store_true")
    arguments = sys.argv[1:]
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    options = parser.parse_args(arguments[:cut])
    options.words = arguments[cut + 1 :]
    options.environment = with_bytecode(options.work, options.device) if options.bytecode == "kept" else None
    for box in options.boxes:
        begin = time.perf_counter()
        folder = options.work / f"blobs{box}x{options.images}"
        if not (folder / "truth.star").exists():
            simulate(folder, box, options.images, options.device)
            print(f"{box} px: {options.images} images simulated in {time.perf_counter() - begin:.1f} s", flush=True)
        for gridding in options.gridding:
            for turn in range(1, options.times + 1):
                reconstruct(folder, box, gridding, options, turn)
        if len(options.boxes) > 1:
            shutil.rmtree(folder)  # room for the next one


if __name__ == "__main__":
    main()
