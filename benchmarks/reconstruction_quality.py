"""Mean FSC with the truth of maps from known poses: plain and exact gridding, least squares, and RELION where it is installed.

python -m benchmarks.reconstruction_quality --box 128 --images 1000 [--device cpu] [--model FILE]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from verglas.cli.main import main as verglas
from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc
from verglas.io.mrc import Stack, StackWriter, read_map
from verglas.particles.table import ParticleTable

OURS = {"plain": [], "exact": ["--gridding", "exact"], "cg": ["--solver", "cg"]}
THEIRS = {"plain of RELION": ["--skip_gridding"], "exact of RELION": []}


def one_stack(folder: Path) -> None:
    """all.star and all.mrcs, float32, as RELION 3.1 reads them."""
    table = ParticleTable.read(folder / "truth.star")
    group, n = table.groups[0], len(table)
    with StackWriter(folder / "all.mrcs", n, (group.box, group.box), group.pixel_size) as stack:
        for first in range(0, n, 256):
            stack.append(Stack.open(folder / "particles.mrcs").read(slice(first, min(n, first + 256))))
    frame = table.frame.assign(rlnImageName=[f"{i + 1:06d}@all.mrcs" for i in range(n)])
    replace(table, frame=frame, folder=folder).write(folder / "all.star")


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
        verglas(["simulate", *map(str, words), "--device", options.device, "--out", str(folder)])
        one_stack(folder)
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
            verglas([*command, "--device", options.device])
            judge(name, out / "map.mrc", started)
        for name, words in THEIRS.items() if shutil.which("relion_reconstruct") else ():
            started = time.perf_counter()
            command = ["relion_reconstruct", "--i", "all.star", "--o", "theirs.mrc", "--ctf", *words]
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            judge(name, folder / "theirs.mrc", started)
    print(f"{options.images} images of {options.box} px, SNR {options.snr:g}, {options.device}", *lines, sep="\n")


if __name__ == "__main__":
    main()
