"""How ranks do what they could do in more than one way: switches in the environment, for measuring what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from verglas.errors import InputError

PREFIX = "VERGLAS_"


@dataclass(frozen=True)
class Ways:
    """share_solving: each rank adds up and solves its slab of a map; else all do everything. overlap: the sums of one half-set
    travel while the particles of the next one are worked on (None: not between GPUs, where sending takes some ms, and takes
    multiprocessors from computing); compress: they travel in half the bytes (None: between several hosts, if that is measured to
    be quicker). The latter two of shared solving only. ahead: a GPU of several ranks, too, begins a batch before the last one is
    finished (alone it always does)."""

    share_solving: bool = True
    overlap: bool | None = None
    compress: bool | None = None
    ahead: bool = False  # four GPUs stood still in their second iteration with it: benchmarks/NOTES.md

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Ways:
        """As VERGLAS_SHARE_SOLVING and so on say, 0 or 1; what is best if they say nothing. InputError for other values."""
        said = {}
        for one in fields(cls):
            name = PREFIX + one.name.upper()
            value = environment.get(name)
            if value is None:
                continue
            if value not in ("0", "1"):
                raise InputError(name, f"'{value}' in the environment", "0 or 1", "Leave it out to use what is best.")
            said[one.name] = value == "1"
        return cls(**said)
