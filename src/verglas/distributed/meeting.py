"""How the processes of a run find one another: once in the life of a process, whatever commands it runs then.

A group that is taken down cannot be made again in the same processes (the agent's store still holds where they were), so it
stays until they end.
"""

from __future__ import annotations

import atexit
import os
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

from verglas.distributed.beat import patience_of
from verglas.distributed.coding import link_is_slow
from verglas.distributed.links import Links
from verglas.distributed.place import LeadMissing, Place, meeting_point
from verglas.distributed.pulse import Pulse
from verglas.distributed.ranks import ALONE, Ranks
from verglas.distributed.ways import Ways
from verglas.distributed.work import Work
from verglas.errors import VerglasError

MEETING = timedelta(minutes=5)  # from the first process at the meeting point to the last one
LONGEST = timedelta(hours=6)  # of a collective; ranks that do not get on are found sooner (verglas.distributed.pulse)
LOOK = 0.05  # s between two looks for processes that are not there yet
_RUNS = count()  # in this process: all ranks run the same ones in the same order
_pulse: Pulse | None = None  # of this process, once it has met the others
_links: Links | None = None  # of its GPU


@contextmanager
def joined(place: Place | None, device: torch.device) -> Iterator[Ranks]:
    """The ranks of one run, for as long as the `with`; place None: this process is alone. device: what it computes on.

    VerglasError if they do not all come, or if two would compute on the same GPU. When one is lost, all end.
    """
    if place is None:
        yield ALONE
        return
    if _pulse is None:
        _begin(place, device)
    assert _pulse is not None
    store = dist.PrefixStore(f"verglas/{next(_RUNS)}", dist.distributed_c10d._get_default_store())
    _pulse.rest(False)
    behind = None if device.type == "cuda" else dist.new_group(timeout=LONGEST)  # NCCL has nothing else to send meanwhile
    ways = Ways.of(os.environ)
    if ways.overlap is None:
        ways = replace(ways, overlap=device.type != "cuda")
    ranks = Ranks(
        place.rank, place.size, place.local_size, store, ways=ways, work=Work.on(device), pulse=_pulse, behind=behind,
        links=_links,
    )  # fmt: skip
    try:
        if ranks.ways.compress is None and place.size > place.local_size:  # within a host links are quick
            ranks.connected(device)
            ranks = replace(ranks, ways=replace(ranks.ways, compress=link_is_slow(ranks, device)))
        yield ranks
    except BaseException as error:
        _pulse.last_words(error)
        raise
    _pulse.rest(True)  # what a script does between two runs, or after them, may take its time


def _begin(place: Place, device: torch.device) -> None:
    """Meet the others, and make one group of all."""
    global _pulse, _links
    patience, cuda = patience_of(os.environ), device.type == "cuda"
    store, own, lead_holds_it = meet(place, device)
    pulse = Pulse(place.rank, place.size, own, patience, lead_holds_it)
    pulse.start()
    os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"  # else NCCL aborts processes before it is told who was lost
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")  # messages begin before blocks of kernels that wait for a place
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=place.rank, world_size=place.size, timeout=LONGEST,
            device_id=device if cuda else None,
        )  # fmt: skip
    except RuntimeError:
        pulse.wait_for_end(pulse.judge.silence)
        raise
    _pulse = pulse
    if cuda:
        _links = Links(device, place.size)
    atexit.register(_part_of_script)


def part(code: int = 0) -> bool:
    """Tell the others that this process ends, with that exit code. Returns whether it has ever met them."""
    if _pulse is not None and not _pulse.over:
        if code:
            _pulse.last_words(SystemExit(code))
        else:
            _pulse.leave()
    return _pulse is not None


def _part_of_script() -> None:
    """`part` when Python ends. The groups' threads are waited for: one that lets go of its last message later, when Python's
    objects are gone, aborts the process."""
    part()
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()


def meet(place: Place, device: torch.device) -> tuple[dist.Store, dist.Store, bool]:
    """Two connections to the store that all ranks share, when all are there; whether it is the lead's, and ends with it."""
    host, port = place.meeting or meeting_point(os.environ)
    lead_holds_it = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun does
    point = f"{host}:{port}"
    try:
        found, again = (
            dist.TCPStore(host, port, place.size, serves, MEETING, wait_for_workers=False, multi_tenant=True)
            for serves in (lead_holds_it and place.rank == 0, False)
        )
        name = name_of_start(found, place.rank)
    except dist.DistError as error:
        raise LeadMissing(
            f"Nobody answered at {point}, where the {place.size} processes (ranks) of this run are to meet "
            f"({str(error).splitlines()[0].rstrip('.')}). {WAYS_TO_MEET}"
        ) from error
    keys = [f"here/{rank}" for rank in range(place.size)]
    store = dist.PrefixStore(name, found)
    store.set(keys[place.rank], whereabouts(device))
    missing = missing_after_answers(found, name, keys) if place.rank == 0 else []
    if missing:
        raise VerglasError(
            f"{len(missing)} of the {place.size} processes (ranks) of this run did not come to {point} within "
            f"{MEETING.total_seconds():g} s: {', '.join(map(str, missing))}. {WAYS_TO_MEET}"
        )
    try:
        store.wait(keys, MEETING)
    except dist.DistError as error:
        raise VerglasError(f"Not all processes (ranks) of this run came to {point}.") from error
    check_apart([store.get(key).decode() for key in keys])
    return store, dist.PrefixStore(name, again), lead_holds_it


def name_of_start(store: dist.Store, rank: int) -> str:
    """A name that all ranks of this start know, and no earlier one did: torchrun keeps its store when it starts them again, with
    all that those before left in it. Each says hello by a word never used before; the lead answers each by the name."""
    mine = uuid.uuid4().hex
    if rank == 0:
        return mine
    store.set(f"hello/{rank}", mine)
    store.wait([f"answer/{mine}"], MEETING)
    return store.get(f"answer/{mine}").decode()


def missing_after_answers(store: dist.Store, name: str, keys: list[str]) -> list[int]:
    """Answer every rank's hello by the name of this start until all are there; those that are not when time is up."""
    until, missing = time.monotonic() + MEETING.total_seconds(), list(range(1, len(keys)))
    while missing and time.monotonic() < until:
        for rank in missing:
            if store.check([f"hello/{rank}"]):
                store.set(f"answer/{store.get(f'hello/{rank}').decode()}", name)
        time.sleep(LOOK)
        missing = [rank for rank in missing if not store.check([f"{name}/{keys[rank]}"])]
    return missing


WAYS_TO_MEET = (
    "All have to be started, by the same command; other hosts must be able to reach that one by this name and port, which "
    "MASTER_ADDR and MASTER_PORT change under srun (docs/clusters.md)."
)


def whereabouts(device: torch.device) -> str:
    """What tells the places of work apart: host, and GPU if there is one."""
    return f"{socket.gethostname()} {torch.cuda.get_device_properties(device).uuid if device.type == 'cuda' else ''}".strip()


def check_apart(places: list[str]) -> None:
    """VerglasError if two ranks compute on the same GPU, which NCCL does not do, or only some on one. places: `whereabouts` of
    all ranks."""
    without = [rank for rank, place in enumerate(places) if " " not in place]
    if 0 < len(without) < len(places):
        raise VerglasError(
            f"Rank {without[0]} ({places[without[0]]}) would compute on a CPU, others on GPUs. Start one process per GPU; "
            "--cpu-ranks N lets CPU cores help beside them."
        )
    for rank, place in enumerate(places):
        first = places.index(place)
        if first != rank and " " in place:
            host = place.partition(" ")[0]
            raise VerglasError(
                f"Ranks {first} and {rank} would compute on the same GPU of {host}. Start one process per GPU that they see "
                "(--gpus N, torchrun --nproc-per-node N, srun --ntasks-per-node N --gpus-per-node N)."
            )
