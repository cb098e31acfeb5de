"""--gpus: the same command once per GPU of this computer, started by torchrun's own launcher."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable

from verglas.distributed.beat import LOST
from verglas.distributed.place import place_of
from verglas.errors import InputError
from verglas.io.progress import say

RESTARTS = 3  # of a run that is to go on by itself


def gpus_wanted(gpus: str) -> tuple[int, str | None]:
    """(how many, CUDA_VISIBLE_DEVICES or None for the first ones) of 'all', '4' or '0,2', of the visible ones: in a job of Slurm
    its own. InputError if they are not there, or if srun started several processes already."""
    import torch

    if place_of(os.environ) is not None:
        raise InputError("--gpus", f"'{gpus}' beside several processes of srun", "one of the two",
                         "Let srun start one process per GPU, without --gpus, or one in all (--ntasks 1).")  # fmt: skip
    there = torch.cuda.device_count()
    if gpus == "all":
        count, visible = there, None
    elif "," in gpus:
        numbers = [one.strip() for one in gpus.split(",") if one.strip()]
        if not numbers or not all(one.isdigit() for one in numbers) or len(set(numbers)) < len(numbers):
            raise InputError("--gpus", f"'{gpus}'", "all, a number, or numbers of GPUs such as 0,1")
        count, visible = len(numbers), ",".join(visible_names(numbers))
        if max(map(int, numbers)) >= there:
            raise InputError("--gpus", f"'{gpus}'", f"numbers below {there}, which is how many GPUs PyTorch finds here")
    elif gpus.isdigit():
        count, visible = int(gpus), None
    else:
        raise InputError("--gpus", f"'{gpus}'", "all, a number, or numbers of GPUs such as 0,1")
    if not 1 <= count <= there:
        raise InputError("--gpus", f"'{gpus}'", f"at most {there}, which is how many GPUs PyTorch finds here",
                         "Leave it out to compute in this process.")  # fmt: skip
    return count, visible


def visible_names(numbers: list[str]) -> list[str]:
    """What CUDA calls the GPUs of these numbers, if only some of the computer's are visible."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return [visible[int(one)] if int(one) < len(visible) and visible != [""] else one for one in numbers]


def launch(gpus: str, command: list[str], elastic: bool = False) -> int:
    """Run `verglas COMMAND` with one process per GPU; the exit code. elastic: when a process was lost, start it again (it goes on
    by itself), up to `RESTARTS` times, on as many GPUs as there are then."""
    count, visible = gpus_wanted(gpus)
    if visible is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = visible

    def left() -> int:
        import torch

        return min(count, torch.cuda.device_count())

    return run(left, command, RESTARTS if elastic else 0)


def run(processes: Callable[[], int], command: list[str], restarts: int) -> int:
    """Run `verglas COMMAND` in so many processes of this computer, and again after one was lost. processes: asked before each."""
    count = processes()
    while (code := run_once(count, command)) == LOST and restarts > 0 and (count := processes()) > 0:
        restarts -= 1
        say(f"Going on by itself in {count} processes; after that, up to {restarts} times more.")
    return code


def run_once(processes: int, command: list[str]) -> int:
    """The exit code of the process that failed first, `LOST` if it was killed; 0 if none did."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // processes)))
    if os.environ.get("VERGLAS_DEBUG") != "1":
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the processes say themselves what is wrong
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, run_id="verglas", rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", "verglas", *command)
    except ChildFailedError as error:
        rank, first = min(error.failures.items(), key=lambda failed: how_early(failed[1].timestamp, failed[1].exitcode))
        if first.exitcode > 0:
            return int(first.exitcode)
        say(f"The process of rank {rank} ({first.pid}) was ended by {first.signal_name()}.")
        return LOST
    except SignalException as stop:
        return 128 + int(stop.sigval)
    return 0


def how_early(second: int, code: int) -> tuple[bool, int, int]:
    """Orders failures of processes: the one that ended the run comes first. Within a second a killed one (code below 0) is before
    those that miss it; one ended by SIGTERM was most likely ended by the launcher, as another one had failed."""
    return code == -signal.SIGTERM, second, code
