"""Where the images of a refinement stay, and how much memory they may take there."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from verglas.refinement.config import RefineConfig
from verglas.refinement.costs import GB
from verglas.refinement.plan_sizes import Machine, Problem, operand_bytes

Home = Literal["device", "host", "disk"]
# Of images in the memory of the host while they are streamed, where nobody says less: two batches.
STREAMED_BYTES = {"cpu": 0.26 * GB, "cuda": 1.0 * GB}


@dataclass(frozen=True)
class Residency:
    """home: the memory of the device that computes (a CPU's is that of the host, too), of the host of a GPU, or the files.

    image_bytes: of a pixel there, None: as in the files; 2 where the files hold float32: rescaled and rounded (particles/
    resident.py). budget: bytes of images that two batches may hold, in the files' type; streamed images take no more memory of
    the host. room: bytes free for images of other ranks' particles that come later. scratch: folder that
    they are copied to first, None: they are not. reason: why this was chosen.
    """

    home: Home = "device"
    image_bytes: int | None = None
    budget: float = math.inf
    reason: str = "all images are in the memory of the device that computes"
    room: float = math.inf
    scratch: Path | None = None

    @property
    def streams(self) -> bool:
        """Whether batches are handed out by an `ImageStream`."""
        return self.home != "device"

    @property
    def rounded(self) -> bool:
        """Whether images are kept in half precision, rescaled."""
        return self.home == "device" and self.image_bytes == 2

    def copied_to(self, scratch: Path) -> Residency:
        """The same with all images copied to a folder first."""
        return replace(self, scratch=scratch, reason=f"{self.reason}; copied to {scratch} first")

    def place(self, device: torch.device) -> torch.device | None:
        """The memory that images stay in; None: their files."""
        if self.home == "disk":
            return None
        return device if self.home == "device" else torch.device("cpu")


def images_at_once(budget: float, image_bytes: int) -> int:
    """The largest batch of images of so many bytes: two fit the budget."""
    return sys.maxsize if budget == math.inf else max(1, int(budget / 2 / image_bytes))


def residences(problem: Problem, config: RefineConfig, machine: Machine) -> list[Residency]:
    """Where images may stay, best first: on the device, there in half precision if the operands are, on the host of a GPU, on
    disk. What takes more than `config.image_memory_gb` is left out."""
    allowed = math.inf if config.image_memory_gb is None else config.image_memory_gb * GB
    whole, name = problem.n_particles * problem.one_image, "device" if machine.kind == "cuda" else "host"
    budget, halved = min(allowed, STREAMED_BYTES[machine.kind]), whole * 2 / problem.image_bytes
    found = []
    if whole <= allowed:
        found.append(Residency(reason=f"all images ({whole / GB:.2f} GB) stay in the memory of the {name}"))
    if machine.kind == "cuda" and problem.image_bytes > 2 and operand_bytes(config, "cuda") == 2 and halved <= allowed:
        text = f"all images ({halved / GB:.2f} GB) stay in the memory of the device as float16: as float32 they do not fit"
        found.append(Residency("device", 2, reason=text))
    why = "they do not fit" if whole <= allowed else f"--image-memory is {allowed / GB:.3g} GB"
    ahead = f"images ({whole / GB:.2f} GB) are {{}} batch by batch, at most {budget / GB:.3g} GB at once"
    if machine.kind == "cuda" and whole + budget <= allowed:
        text = f"{ahead.format('copied from the memory of the host')}: they do not fit the device"
        found.append(Residency("host", None, budget, text))
    found.append(Residency("disk", None, budget, f"{ahead.format('read from their files')}: {why}"))
    return found
