"""How ranks do what they could do in more than one way: switches in the environment, for measuring what each is worth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from verglas.errors import InputError

PREFIX = "VERGLAS_"
Form = Literal["replicated", "transposed", "stride"]  # of the transforms that ranks share: verglas.maximization.transforms
FORMS: tuple[Form, ...] = get_args(Form)


@dataclass(frozen=True)
class Ways:
    """share_solving: each rank adds up and solves its slab of a map; else all do everything. overlap: the sums of one half-set
    travel while the particles of the next one are worked on (None: not between GPUs, where sending takes some ms, and takes
    multiprocessors from computing); compress: they travel in half the bytes (None: between several hosts, if that is measured to
    be quicker); transform: the form of shared transforms (None: the quickest here). The latter three of shared solving only.
    share_volumes: in `refine` ranks have layers of references and sums (None: where the plan says that whole ones do not fit).
    ahead: a GPU of several ranks, as one alone, begins a batch before the last one is finished. apart: as far as it
    can be each rank works on one half-set alone (`Shares`); else all work on both, and `overlap` counts there. solvers: where
    they are apart, one rank solves for each half-set's map (None: in small boxes)."""

    share_solving: bool = True
    overlap: bool | None = None
    compress: bool | None = None
    transform: Form | None = None
    share_volumes: bool | None = None
    apart: bool = True
    solvers: bool | None = None
    ahead: bool = True

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Ways:
        """As VERGLAS_SHARE_SOLVING and so on say, 0 or 1 (VERGLAS_TRANSFORM: a form); what is best if they say nothing.
        InputError for other values."""
        said: dict[str, Any] = {}
        for one in fields(cls):
            name = PREFIX + one.name.upper()
            value = environment.get(name)
            if value is None:
                continue
            allowed = FORMS if one.name == "transform" else ("0", "1")
            if value not in allowed:
                raise InputError(name, f"'{value}' in the environment", " or ".join(allowed), "Leave it out to use what is best.")
            said[one.name] = value if one.name == "transform" else value == "1"
        if said.get("share_volumes") and not said.get("share_solving", True):
            raise InputError(PREFIX + "SHARE_VOLUMES", "1", "0 where VERGLAS_SHARE_SOLVING is 0", "Leave either out.")
        return cls(**said)
