"""Mean FSC with the truth of maps from known poses: plain and exact gridding, least squares, and RELION where it is installed.

python -m benchmarks.reconstruction_quality --box 128 --images 1000 [--device cpu] [--model FILE]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch

from verglas.cli.main import main as verglas
from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc
from verglas.io.mrc import read_map
from verglas.particles.table import ParticleTable
from verglas.testing.for_relion import as_one_stack

OURS = {"plain": [], "exact": ["--gridding", "exact"], "cg": ["--solver", "cg"]}
THEIRS = {"plain of RELION": ["--skip_gridding"], "exact of RELION": []}


def run(words: list[str]) -> None:
    """A command of verglas; ends with its exit code if that says that something was wrong."""
    if code := verglas(words):
        raise SystemExit(code)


def main() -> None:
    """Simulate, reconstruct in each way, print seconds and mean FSC up to Nyquist in a sphere of 0.4 boxes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--box", type=int, default=128)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--pixel", type=float, default=1.5)
    parser.add_argument("--snr", type=float, default=0.1)
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or Path(scratch)) / "set"
        words = ["--n", options.images, "--box", options.box, "--pixel", options.pixel, "--snr", options.snr, "--seed", 1]
        words += ["--model", options.model] if options.model else []
        run(["simulate", *map(str, words), "--device", options.device, "--out", str(folder)])
        as_one_stack(ParticleTable.read(folder / "truth.star"), folder)
        truth = torch.from_numpy(read_map(folder / "truth.mrc").data_ZYX.copy())
        mask = soft_sphere(options.box, 0.4 * options.box, 3)
        lines = []

        def judge(name: str, path: Path, started: float) -> None:
            found = torch.from_numpy(read_map(path).data_ZYX.copy())
            curve_S = fsc(found * mask, truth * mask)[1 : options.box // 2]
            lines.append(f"{name:16s} mean FSC {float(curve_S.mean()):.5f}, {time.perf_counter() - started:.1f} s")

        for name, words in OURS.items():
            started, out = time.perf_counter(), folder / name
            command = ["reconstruct", "--particles", str(folder / "all.star"), "--no-half-maps", "--out", str(out), *words]
            run([*command, "--device", options.device])
            judge(name, out / "map.mrc", started)
        for name, words in THEIRS.items() if shutil.which("relion_reconstruct") else ():
            started = time.perf_counter()
            command = ["relion_reconstruct", "--i", "all.star", "--o", "theirs.mrc", "--ctf", *words]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            judge(name, folder / "theirs.mrc", started)
    print(f"{options.images} images of {options.box} px, SNR {options.snr:g}, {options.device}", *lines, sep="\n")


if __name__ == "__main__":
    main()
