"""Where a process stands among those of its run, as torchrun or srun say in the environment. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from verglas.errors import InputError, VerglasError

LAST_WORDS = 5.0  # seconds that the first process has to say why it ends
FIRST_PORT, PORTS = 20000, 20000  # of meeting points that are made up from a job's number
PORT_MOST = 2**16 - 1
BY_HAND = "torchrun and srun set these variables of the environment: start verglas through one of them, or remove them."


class LeadMissing(VerglasError):
    """Nobody is at the place where the processes of a run are to meet; so each of them has to say it."""


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run. local: among the local_size of its host; meeting: host and port of the first
    rank's store, None if there is one already (torchrun)."""

    rank: int
    size: int
    local: int
    local_size: int = 1
    meeting: tuple[str, int] | None = None


def place_of(environment: Mapping[str, str]) -> Place | None:
    """This process's place as torchrun or srun say in the environment; None where it stands alone. InputError where what they say
    is not whole or makes no sense."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, size = _number(environment, "RANK"), _number(environment, "WORLD_SIZE", least=1)
        if size == 1:
            return None
        local, beside = _number(environment, "LOCAL_RANK", 0), _number(environment, "LOCAL_WORLD_SIZE", 1, least=1)
        return _checked("RANK", Place(rank, size, local, beside))
    size = _number(environment, "SLURM_STEP_NUM_TASKS", 1, least=1)  # set by srun only, not in the batch script around it
    if size == 1:
        return None
    rank, local = _number(environment, "SLURM_PROCID"), _number(environment, "SLURM_LOCALID")
    job = _number(environment, "SLURM_JOB_ID", 0)
    host = environment.get("MASTER_ADDR") or first_host(environment.get("SLURM_STEP_NODELIST", ""))
    port = _number(environment, "MASTER_PORT", FIRST_PORT + job % PORTS, least=1, most=PORT_MOST)
    tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return _checked("SLURM_PROCID", Place(rank, size, local, int(tasks[0]) if tasks else 1, (host, port)))


def meeting_point(environment: Mapping[str, str]) -> tuple[str, int]:
    """Host and port where torchrun's processes meet."""
    host, port = environment.get("MASTER_ADDR"), _number(environment, "MASTER_PORT", least=1, most=PORT_MOST)
    if not host:
        raise InputError("MASTER_ADDR", "not set", "the host where the processes meet", BY_HAND)
    return host, port


def _number(environment: Mapping[str, str], name: str, absent: int | None = None, least: int = 0, most: int | None = None) -> int:
    """A whole number of the environment; `absent` where it is not set, unless it has to be."""
    text = environment.get(name, "" if absent is None else str(absent))
    if not (text.isascii() and text.isdecimal() and least <= int(text) <= (most or int(text))):
        limits = f"from {least} to {most}" if most else f"of {least} or more"
        raise InputError(name, f"'{text}'" if text else "not set", f"a whole number {limits}", BY_HAND)
    return int(text)


def _checked(name: str, place: Place) -> Place:
    if place.rank >= place.size:
        raise InputError(name, f"{place.rank} of {place.size} processes", f"at most {place.size - 1}", BY_HAND)
    return place


def first_host(nodes: str) -> str:
    """First name of a list as Slurm writes it: 'gpu[07-09,12],login1' -> 'gpu07'."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    if match is None:
        raise VerglasError(f"SLURM_STEP_NODELIST is '{nodes}', which names no host. Set MASTER_ADDR to the first one.")
    return match[1] + (match[2] or "")
