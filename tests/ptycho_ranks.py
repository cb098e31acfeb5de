"""Reconstructions by several processes of this computer, which talk through gloo; started from a server that has imported all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from forked import PATIENCE, answers_of
from verglas.distributed.ranks import Ranks
from verglas.distributed.ways import Ways
from verglas.kernels import farfield
from verglas.ptychography import reconstruct as reconstruction
from verglas.ptychography import share as shares
from verglas.ptychography.collect import bytes_of, whole
from verglas.ptychography.costs import Costs
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.reconstruct import PassDone, reconstruct
from verglas.ptychography.scan import Scan


def found_by(scan: Scan, cases: Sequence[dict[str, Any]], size: int, folder: Path) -> list[dict[str, Any]]:
    """What `size` processes find, one answer for each case: options of a reconstruction, and `whole` (each keeps the whole
    object), `overlap`, `kernels` (those of far fields), `halo` (px about what moving positions see), `after` (a pass to go on
    from)."""
    parts = answers_of(_rank, size, folder, scan, list(cases))
    return [{"done": several[0]["done"], "parts": several} for several in zip(*parts, strict=True)]


def _rank(rank: int, size: int, folder: Path, scan: Scan, cases: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "meeting"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE))
    ranks = Ranks(rank, size, size, behind=dist.new_group())
    answers = [_answer(ranks, scan, dict(case)) for case in cases]
    torch.save(answers, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def _answer(ranks: Ranks, scan: Scan, case: dict[str, Any]) -> dict[str, Any]:
    ranks = replace(ranks, ways=Ways(overlap=case.pop("overlap", True)))
    costs = Costs(0.0, 0.0, -1.0 if case.pop("whole", False) else 1.0)  # so that the larger object is chosen, or not
    missing = None if case.pop("kernels", False) else "not asked for"
    farfield.why_not = lambda device, dtype, window: missing
    reconstruction.measured = lambda ranks, device: costs  # type: ignore[assignment]
    shares.MOVING_HALO = case.pop("halo", shares.MOVING_HALO)
    after: PassDone | None = case.pop("after", None)
    passes = list(reconstruct(scan, PtychoOptions(**case), "cpu", after, ranks))
    first, last = passes[0], passes[-1]
    assert first.share is not None and last.share is not None
    share = last.share
    return {
        "done": whole(last), "object": last.found.object_OLYX, "box": share.tile.box, "cell": share.tile.cell,
        "rows": share.rows_B, "plan": last.plan, "bytes": bytes_of(last.found, last.memory),
        "sent": set(ranks.meter.read()), "followed": first.share.tiles != share.tiles,
    }  # fmt: skip
