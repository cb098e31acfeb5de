"""What each rank has worked on: particles, its own and others', and the seconds it took."""

from __future__ import annotations

import socket
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch


@dataclass
class Work:
    """Of one rank since this was last read. owned: particles whose images it keeps; worked: particles it went through (one may
    come up several times in an iteration); helped: those of them that others own; seconds: of computing for them; reading: those
    without anything to compute, as images were not there."""

    host: str = field(default_factory=socket.gethostname)
    device: str = "cpu"
    owned: int = 0
    worked: int = 0
    helped: int = 0
    seconds: float = 0.0
    reading: float = 0.0

    @classmethod
    def on(cls, device: torch.device) -> Work:
        """Of a rank that computes there."""
        return cls(device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type)

    def add(self, rows: int, own: bool, seconds: float, reading: float) -> None:
        """A block is done."""
        self.worked, self.helped = self.worked + rows, self.helped + rows * (not own)
        self.seconds, self.reading = self.seconds + seconds, self.reading + reading

    def read(self) -> dict[str, Any]:
        """All since the last reading, in terms of JSON."""
        found = asdict(replace(self, seconds=round(self.seconds, 3), reading=round(self.reading, 3)))
        self.worked, self.helped, self.seconds, self.reading = 0, 0, 0.0, 0.0
        return found
