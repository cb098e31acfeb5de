"""The same work in several processes at once, each of which saves its answer."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

PATIENCE = 120.0  # s


def answers_of(work: Callable[..., None], size: int, folder: Path, *more: Any) -> list[Any]:
    """What work(rank, size, folder, *more) saves as rank{rank}.pt of the folder, of all ranks. work: of a module's top level."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    processes = [context.Process(target=work, args=(rank, size, folder, *more)) for rank in range(size)]
    for one in processes:
        one.start()
    try:
        for one in processes:
            one.join(PATIENCE)
            assert one.exitcode == 0
    finally:
        for one in processes:
            one.kill()
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(size)]
