"""Where a process stands among those of its run, as torchrun or srun say in the environment. Imports nothing heavy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from verglas.errors import VerglasError

LAST_WORDS = 5.0  # seconds that the first process has to say why it ends
FIRST_PORT, PORTS = 20000, 20000  # of meeting points that are made up from a job's number


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
    """This process's place as torchrun or srun say in the environment; None where it stands alone."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = Place(
            int(environment["RANK"]), int(environment["WORLD_SIZE"]), int(environment.get("LOCAL_RANK", 0)),
            int(environment.get("LOCAL_WORLD_SIZE", 1)),
        )  # fmt: skip
        return place if place.size > 1 else None
    if int(environment.get("SLURM_STEP_NUM_TASKS", 1)) > 1:  # set by srun only, not in the batch script around it
        job = int(environment.get("SLURM_JOB_ID", 0))
        host = environment.get("MASTER_ADDR") or first_host(environment["SLURM_STEP_NODELIST"])
        port = int(environment.get("MASTER_PORT", FIRST_PORT + job % PORTS))
        tasks = re.match(r"\d+", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        return Place(
            int(environment["SLURM_PROCID"]), int(environment["SLURM_STEP_NUM_TASKS"]), int(environment["SLURM_LOCALID"]),
            int(tasks[0]) if tasks else 1, (host, port),
        )  # fmt: skip
    return None


def first_host(nodes: str) -> str:
    """First name of a list as Slurm writes it: 'gpu[07-09,12],login1' -> 'gpu07'."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\])?", nodes)
    if match is None:
        raise VerglasError(f"SLURM_STEP_NODELIST is '{nodes}', which names no host. Set MASTER_ADDR to the first one.")
    return match[1] + (match[2] or "")
