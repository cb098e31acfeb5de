"""What a reconstruction keeps in a device's memory, and where its patterns stay.

Patterns that fit beside all else stay on the device as they were stored. Others stay in host memory and travel block by block in
every pass (`streaming.py`). Conjugate gradients without fused kernels keep the coefficients of all intensities along a step where
they fit, else they look at several lengths at once. Difference maps cannot do without all exit waves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from verglas.core.memory import free_device_memory, size_text
from verglas.errors import InputError
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.scan import Scan

GB = 1e9
SPARE = 0.9  # of free memory that is planned with
WORK = 2.0 * GB  # the least that chunks of positions should have for their waves
ARRAYS = {"cg": 12, "dm": 7, "raar": 7}  # as large as a rank's object that are there at once
OTHER_ARRAYS = 9


@dataclass(frozen=True)
class Needs:
    """Bytes on one device. patterns: as stored; object: all arrays of its size; exits: waves of all positions (dm, raar); line:
    coefficients of all intensities along a step (cg)."""

    patterns: int
    object: int
    exits: int
    line: int

    @classmethod
    def of(cls, scan: Scan, options: PtychoOptions, object_pixels: int, positions: int | None = None) -> Needs:
        """object_pixels: of the rank's part; positions: of the rank, those of the scan by default."""
        count = len(scan) if positions is None else positions
        real = 8 if options.double else 4
        planes = options.object_modes * (len(scan.geometry.slice_distances) + 1)
        window, pattern = math.prod(scan.window), math.prod(scan.shape)
        arrays = ARRAYS.get(options.engine, OTHER_ARRAYS)
        exits = count * options.object_modes * options.probe_modes * window * 2 * real if options.engine in ("dm", "raar") else 0
        degrees = 2 * (len(scan.geometry.slice_distances) + 2 + bool(options.opr_modes)) + 1 + options.fit_scale
        line = count * pattern * degrees * real if options.engine == "cg" else 0
        stored = scan.patterns_BYX.element_size()
        return cls(count * pattern * stored, arrays * planes * object_pixels * 2 * real, exits, line)

    @property
    def text(self) -> str:
        """'patterns 8.39 GB, object 4.7 GB'."""
        parts = {"patterns": self.patterns, "object": self.object, "exit waves": self.exits}
        return ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)


@dataclass(frozen=True)
class Kept:
    """Where things stay. patterns: on the device; line: coefficients of all intensities too; text: what and why."""

    patterns: bool
    line: bool
    text: str


def kept(needs: Needs, device: torch.device, limit: float = 0.0) -> Kept:
    """What stays on the device, by its free memory. limit: GB for patterns, 0: none. InputError for what cannot fit."""
    on_gpu = device.type == "cuda"
    free = SPARE * free_device_memory(device) if on_gpu else math.inf
    where = f"GPU's memory ({size_text(free)} of it can be used)" if on_gpu else "memory"
    fixed = needs.object + needs.exits
    if fixed + WORK > free:
        fix = "Share the work among more GPUs (--gpus), or take --engine cg, lsq or rpie, which keep no exit waves."
        raise InputError("ptycho reconstruct", f"{needs.text} in the {where}", "object and exit waves, and 2 GB to spare", fix)
    allowed = limit * GB or math.inf
    patterns = needs.patterns <= allowed and fixed + WORK + needs.patterns <= free
    line = fixed + WORK + needs.line + (needs.patterns if patterns else 0) <= free and patterns
    if patterns:
        text = f"{needs.text} stay in the {where}"
    else:
        why = f"--pattern-memory is {limit:g} GB" if needs.patterns > allowed else f"they do not fit in the {where}"
        text = f"{needs.text}; patterns stay in the host's memory and travel block by block in every pass: {why}"
    return Kept(patterns, line, text)
