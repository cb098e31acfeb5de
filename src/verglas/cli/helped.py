"""--cpu-ranks: processes on CPU cores beside the GPUs of a run, started and ended with it. Imports nothing heavy."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from verglas.distributed.place import place_of

if TYPE_CHECKING:
    from verglas.refinement.driver import Session


@contextmanager
def with_helpers(session: Session, asked: str, say: Callable[[str], None]) -> Iterator[Session]:
    """The session with its helpers, as --cpu-ranks asks for, until the `with` ends; all ranks call it."""
    if asked == "0":
        yield session
        return
    from verglas.refinement.helpers import Helpers, helpers_of_host, threads_beside

    ranks, place, cores = session.on.ranks, place_of(os.environ), len(os.sched_getaffinity(0))
    here = helpers_of_host(asked, session.on.device.type == "cuda", cores, ranks.local_size)
    if max(ranks.everyones(here)) == 0:
        say(f"--cpu-ranks auto: of {cores} cores too few are left beside the GPUs, or there is no GPU.")
        yield session
        return
    threads = threads_beside(cores, ranks.local_size, here)
    mine = len(range(place.local if place else 0, here, ranks.local_size))
    say(f"CPU helpers: {here} of {threads} threads, where that pays.")
    with Helpers.beside(session.data, session.config, ranks, mine, threads) as helpers:
        yield replace(session, on=replace(session.on, helpers=helpers))


def helped(session: Session) -> dict[str, Any]:
    """What helpers did in an iteration, for its record; empty without any."""
    found = session.on.helpers.record()
    return {} if found is None else {"helpers": found}
