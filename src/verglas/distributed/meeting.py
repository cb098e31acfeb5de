"""How the processes of a run find one another: once in the life of a process, whatever commands it runs then.

A group that is taken down cannot be made again in the same processes (the agent's store still holds where they were), so it
stays until they end.
"""

from __future__ import annotations

import atexit
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from verglas.distributed.place import LeadMissing, Place
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.ways import Ways
from verglas.errors import VerglasError

MEETING = timedelta(minutes=5)  # from the first process at the meeting point to the last one
PATIENCE = timedelta(minutes=10)  # a collective that takes longer is taken to hang; the slowest wait is for files
_RUNS = count()  # in this process: all ranks run the same ones in the same order


@contextmanager
def joined(place: Place | None, device: torch.device) -> Iterator[Ranks]:
    """The ranks of one run, for as long as the `with`; place None: this process is alone. device: what it computes on.

    VerglasError if they do not all come, or if two would compute on the same GPU.
    """
    if place is None:
        yield ALONE
        return
    if not dist.is_initialized():
        cuda = device.type == "cuda"
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=meet(place, device), rank=place.rank, world_size=place.size,
            timeout=PATIENCE, device_id=device if cuda else None,
        )  # fmt: skip
        atexit.register(dist.destroy_process_group)
    store = dist.PrefixStore(f"verglas/{next(_RUNS)}", dist.distributed_c10d._get_default_store())
    try:
        yield Ranks(place.rank, place.size, place.local_size, store, ways=Ways.of(os.environ))
    except BaseException:
        atexit.unregister(dist.destroy_process_group)  # the others may be waiting in the middle of something
        raise


def meet(place: Place, device: torch.device) -> dist.Store:
    """The store that all ranks share, when all of them are there."""
    host, port = place.meeting or (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, else the lead holds it
    point = f"{host}:{port}"
    try:
        found = dist.TCPStore(
            host, port, place.size, place.rank == 0 and not of_agent, MEETING, wait_for_workers=False, multi_tenant=True
        )
    except dist.DistError as error:
        raise LeadMissing(
            f"Nobody answered at {point}, where the {place.size} processes (ranks) of this run are to meet "
            f"({str(error).splitlines()[0].rstrip('.')}). {WAYS_TO_MEET}"
        ) from error
    keys = [f"here/{rank}" for rank in range(place.size)]
    store = dist.PrefixStore(f"start/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", found)
    store.set(keys[place.rank], whereabouts(device))
    try:
        store.wait(keys, MEETING)
        check_apart([store.get(key).decode() for key in keys])
    except dist.DistError as error:
        missing = [str(rank) for rank, key in enumerate(keys) if place.rank == 0 and not store.check([key])]
        raise VerglasError(
            f"{len(missing)} of the {place.size} processes (ranks) of this run did not come to {point} within "
            f"{MEETING.total_seconds():g} s: {', '.join(missing)}. {WAYS_TO_MEET}"
        ) from error
    return store


WAYS_TO_MEET = (
    "All have to be started, by the same command; other hosts must be able to reach that one by this name and port, which "
    "MASTER_ADDR and MASTER_PORT change under srun (docs/clusters.md)."
)


def whereabouts(device: torch.device) -> str:
    """What tells the places of work apart: host, and GPU if there is one."""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid if device.type == 'cuda' else ''}".strip()


def check_apart(places: list[str]) -> None:
    """VerglasError if two ranks compute on the same GPU, which NCCL does not do. places: `whereabouts` of all ranks."""
    for rank, place in enumerate(places):
        first = places.index(place)
        if first != rank and " " in place:
            host = place.partition(" ")[0]
            raise VerglasError(
                f"Ranks {first} and {rank} would compute on the same GPU of {host}. Start one process per GPU that they see "
                "(--gpus N, torchrun --nproc-per-node N, srun --ntasks-per-node N --gpus-per-node N)."
            )
