"""How ranks do what they could do in more than one way: switches in the environment, for measuring what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from verglas.errors import InputError

PREFIX = "VERGLAS_"


@dataclass(frozen=True)
class Ways:
    """share_solving: each rank adds up and solves its slab of a map; else all do everything. overlap: the sums of one half-set
    travel while the particles of the next one are worked on (of shared solving only)."""

    share_solving: bool = True
    overlap: bool = True

    @classmethod
    def of(cls, environment: Mapping[str, str], device: str = "cpu") -> Ways:
        """As VERGLAS_SHARE_SOLVING and so on say, 0 or 1. InputError for other values.

        On GPUs 0 unless they say otherwise: there, only sums that all add up have been seen to work (through NCCL, two H200).
        """
        said, usual = {}, "0" if device == "cuda" else "1"
        for one in fields(cls):
            name = PREFIX + one.name.upper()
            value = environment.get(name, usual)
            if value not in ("0", "1"):
                raise InputError(name, f"'{value}' in the environment", "0 or 1", "Leave it out to use what is best.")
            said[one.name] = value == "1"
        return cls(**said)
