"""Particles of large boxes in seconds: `python -m benchmarks.large_set --box 1024 --n 500 --out DIR`.

A particle of random points within four tenths of the box, blurred by a pixel, whose map the GPU makes (that of atoms takes a CPU
a minute at 800 px); images are `verglas simulate`'s, slices of that map with CTF and noise. Writes its star files and truth.mrc.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from verglas.cli.main import main as verglas
from verglas.io.mrc import Map, write_map
from verglas.simulation import simulate as simulation
from verglas.simulation.model import MapModel

POINTS, BLUR = 20_000, 1.0  # of the particle; px


def particle(box: int, pixel_size: float, device: torch.device) -> MapModel:
    """The map of the particle."""
    generator = torch.Generator().manual_seed(box)
    at_N3 = torch.randn(POINTS, 3, generator=generator)
    at_N3 *= 0.38 * box * torch.rand(POINTS, 1, generator=generator) ** (1 / 3) / at_N3.norm(dim=1, keepdim=True)
    z, y, x = (at_N3.round().long() + box // 2).unbind(1)
    map_ZYX = torch.zeros(box, box, box, device=device)
    map_ZYX.view(-1).index_add_(0, ((z * box + y) * box + x).to(device), torch.ones(POINTS, device=device))
    fourier = torch.fft.rfftn(map_ZYX)
    for axis, count in enumerate(fourier.shape):
        frequency = torch.fft.fftfreq(box, device=device)[:count].abs() if axis == 2 else torch.fft.fftfreq(box, device=device)
        shape = [1] * 3
        shape[axis] = count
        fourier *= torch.exp(-2 * (torch.pi * BLUR * frequency) ** 2).view(shape)
    return MapModel("points", torch.fft.irfftn(fourier, s=map_ZYX.shape).cpu(), pixel_size)


def large_set(folder: Path, n: int, box: int, pixel_size: float, device: str) -> None:
    """Simulate into `folder`, unless the set is there."""
    if (folder / "particles.star").exists():
        return
    begin = time.perf_counter()
    kept = simulation.read_models, simulation.write_maps
    made = particle(box, pixel_size, torch.device(device))

    def truth_alone(models: Any, maker: Any, bfactor: float, start_resolution: float, run: Any) -> list[Any]:
        scaled = made.map_ZYX * maker.scale
        write_map(run.path("truth.mrc"), Map(scaled.numpy(), pixel_size, labels=("truth",)))
        return []

    simulation.read_models, simulation.write_maps = (lambda *given: [made]), truth_alone  # type: ignore[assignment]
    try:
        words = ["--n", str(n), "--box", str(box), "--pixel", f"{pixel_size:g}", "--snr", "0.2", "--seed", "1", "--float16"]
        code = verglas(["simulate", *words, "--method", "slices", "--device", device, "--out", str(folder)])
    finally:
        simulation.read_models, simulation.write_maps = kept
    if code:
        raise SystemExit(code)
    if device == "cuda":
        torch.cuda.empty_cache()
    print(f"simulated {n} x {box} px in {time.perf_counter() - begin:.1f} s", flush=True)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--box", type=int, default=1024)
    parser.add_argument("--pixel", type=float, default=0.4, help="Å")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    large_set(given.out, given.n, given.box, given.pixel, given.device)


if __name__ == "__main__":
    main()
