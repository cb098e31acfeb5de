"""How long each form of the shared transform takes on this machine: a dozen probes, once, kept in the user's cache.

What is kept belongs to a kind of device, a number of ranks and of computers. The lead's figures are the ones that all ranks use,
so that they choose alike.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from verglas.core.memory import usable_device_memory
from verglas.core.rows import packed_sphere
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import FORMS, Form
from verglas.errors import OutputError
from verglas.io.atomic import atomic_path
from verglas.maximization.slabs import Slabs
from verglas.maximization.transform_costs import Costs, Shape, Way, fitted
from verglas.maximization.transforms import SharedTransform

# Box, padding, share of the shells: what is probed, in three forms (a dozen), both ways. Only larger ones keep a GPU busy.
PROBES = {
    "cpu": [(24, 2.0, 1.0), (40, 2.0, 0.6), (48, 1.5, 1.0), (64, 2.0, 1.0)],
    "cuda": [(128, 2.0, 1.0), (160, 2.0, 0.6), (192, 1.5, 1.0), (288, 2.0, 1.0)],
}
SHARING: tuple[Form, ...] = ("transposed", "stride")  # in which no rank has all voxels
REPEATS = 3
WORTH_ASKING = {"cpu": 96, "cuda": 400}  # px of a box: below it every form takes some ms; probes took 9 s of a run on four H200
FORMAT = 2


def form_for(slabs: Slabs, box: int, size: int, wanted: int, element: int = 4) -> Form:
    """The form in which a map of N^3 comes quickest to all ranks: as the environment says (`Ways.transform`), else by the model,
    among those that half of the free memory of every rank's GPU holds.

    element: bytes of a real number. All ranks ask alike. The first time on a machine takes some seconds.
    """
    ranks, device = slabs.ranks, slabs.whole.device
    if ranks.ways.transform is not None:
        return ranks.ways.transform
    if box < WORTH_ASKING[device.type]:
        return "transposed"
    room = -usable_device_memory(device) / 2 if device.type == "cuda" else -float("inf")
    least = -float(ranks.greatest(torch.tensor([room], dtype=torch.float64), "room for transforms"))
    forms = SHARING if slabs.maps_on_host else FORMS
    return costs_here(ranks, device).choice(Shape.of(slabs, box, size, wanted), "to map", element, least, forms)


def form_from_map(slabs: Slabs, box: int, size: int, element: int = 4) -> Form:
    """The quickest form on the way from a map of which no rank has all voxels in the end: as the environment says, else by the
    model. The one in which every rank transforms everything takes too much memory."""
    ranks = slabs.ranks
    if ranks.ways.transform is not None:
        return ranks.ways.transform
    if box < WORTH_ASKING[slabs.whole.device.type]:
        return "transposed"
    shape = Shape.of(slabs, box, size, box)
    return costs_here(ranks, slabs.whole.device).choice(shape, "from map", element, forms=SHARING)


def costs_here(ranks: Ranks, device: torch.device) -> Costs:
    """What the forms cost on these ranks: measured before, or now."""
    found = _known.get(name_of(ranks, device))
    if found is None:
        kept = ranks.agreed(read(name_of(ranks, device)) if ranks.is_lead else None, "costs of transforms")
        found = kept or ranks.agreed(fitted(measured(ranks, device)), "costs of transforms")
        if kept is None and ranks.is_lead:
            write(name_of(ranks, device), found)
        _known[name_of(ranks, device)] = found
    return found


_known: dict[str, Costs] = {}  # in this process


def measured(ranks: Ranks, device: torch.device) -> list[tuple[Shape, Way, Form, float]]:
    """(shape, way, form, seconds of the slowest rank) of the probes."""
    found: list[tuple[Shape, Way, Form, float]] = []
    for box, padding, share in PROBES[device.type]:
        size = int(box * padding)
        whole = packed_sphere(float(int(share * size / 2)), device)
        slabs = Slabs.of(whole, padding, box, ranks)
        if slabs is None:
            continue
        shape = Shape.of(slabs, box, size, box)
        for form in FORMS:
            there, back = both_ways(SharedTransform(slabs, box, size, form))
            found.append((shape, "to map", form, seconds(there, ranks, device)))
            found.append((shape, "from map", form, seconds(back, ranks, device)))
    return found


def both_ways(one: SharedTransform) -> tuple[Callable[[], object], Callable[[], object]]:
    """What makes a map of voxels, until all ranks have it, and what makes voxels of a map; both of noise."""
    slabs, wanted = one.slabs, range(one.box)
    device = slabs.whole.device
    mine_V2 = torch.randn(slabs.rows.count, 2, device=device)
    map_ZYX = torch.randn(one.box, one.box, one.box, device=device)

    def there() -> Tensor:
        part = one.to_map(one.grid().filler(mine_V2, slabs.rows), mine_V2.dtype, wanted)
        return one.whole(part, wanted, None)

    return there, lambda: one.from_map(map_ZYX)


def seconds(work: Callable[[], object], ranks: Ranks, device: torch.device, repeats: int = REPEATS) -> float:
    """Of the quickest of some times, the first left out, on the slowest rank."""
    best = float("inf")
    for _ in range(1 + repeats):
        ranks.meet("probes of transforms")
        _finished(device)
        began = time.perf_counter()
        work()
        _finished(device)
        took = torch.tensor([time.perf_counter() - began], dtype=torch.float64)
        best = min(best, float(ranks.greatest(took, "times of probes"))) if _ else best
    return best


def _finished(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def name_of(ranks: Ranks, device: torch.device) -> str:
    """Device, ranks, computers, version of PyTorch: what figures are kept under."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{_processor()}, {torch.get_num_threads()} threads"
    hosts = -(-ranks.size // max(1, ranks.local_size))
    return f"{kind}; {ranks.size} ranks on {hosts} computers; torch {torch.__version__}"


@lru_cache(maxsize=1)
def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cache_file() -> Path:
    """Where figures are kept: in $XDG_CACHE_HOME, or ~/.cache; RuntimeError for a user without a home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "verglas" / "transforms.json"


def read(name: str) -> Costs | None:
    """What is kept under a name; None if there is nothing, or nothing that can be read."""
    with suppress(OSError, RuntimeError, ValueError, KeyError, TypeError):
        content = json.loads(cache_file().read_text(encoding="utf-8"))
        return Costs(content[name]["coefficients"]) if content["format"] == FORMAT else None
    return None


def write(name: str, costs: Costs) -> None:
    """Keep figures beside those of other machines. A cache that cannot be written to is done without: they are measured again."""
    content = {"format": FORMAT}
    with suppress(OSError, RuntimeError, OutputError):
        path = cache_file()
        with suppress(OSError, ValueError):
            there = json.loads(path.read_text(encoding="utf-8"))
            content = there if there.get("format") == FORMAT else content
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path, True) as new:
            new.write_text(json.dumps(content | {name: {"coefficients": costs.coefficients}}, indent=1) + "\n", encoding="utf-8")
