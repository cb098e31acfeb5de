"""What several commands share: option types and groups, choice of the device, number of threads. Imports nothing heavy."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from verglas.core.imports import import_triton, importing
from verglas.errors import InputError

if TYPE_CHECKING:
    import torch

    from verglas.distributed.place import Place
    from verglas.distributed.ranks import Ranks

DeviceChoice = Annotated[Literal["auto", "cpu", "cuda"], tyro.conf.arg(metavar="auto|cpu|cuda")]
Flag = tyro.conf.FlagCreatePairsOff[bool]  # a switch that is off by default, without its --no- twin in the help
Threads = Annotated[int | None, tyro.conf.arg(metavar="N", help_behavior_hint="(default: all)")]

REGISTRY = tyro.constructors.ConstructorRegistry()  # of readers of options beside tyro's own


@REGISTRY.primitive_rule
def number_or_nothing(what: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Options of type `float | None` and `int | None`, which are left out or given as numbers; tyro by itself would take the word
    None, too, and tell in eight lines of what it tried with a word that is neither."""
    number = {float | None: float, int | None: int}.get(what.type)
    if number is None:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1, metavar=number.__name__.upper(), instance_from_str=lambda words: number(words[0]),
        is_instance=lambda value: value is None or isinstance(value, int | float), str_from_instance=lambda value: [str(value)],
    )  # fmt: skip


@dataclass(kw_only=True)
class Computing:
    """Where the work runs."""  # use: `computing: Computing = field(default_factory=Computing)`

    device: DeviceChoice = "auto"
    """auto takes the GPU if there is one."""
    threads: Threads = None
    """CPU threads."""

    def start(self) -> tuple[torch.device, str]:
        """Set the threads, then choose the device; returns (device, reason)."""
        wake_gpu(self.device)
        set_threads(self.threads)
        return resolve_device(self.device)


@dataclass(kw_only=True)
class SharedComputing(Computing):
    """Where the work runs, of commands whose work several processes share."""

    gpus: Annotated[str | None, tyro.conf.arg(metavar="all|N|0,1", help_behavior_hint="(default: one)")] = None
    """How many GPUs of this computer share the work, or which ones. On several computers: torchrun or srun (docs/clusters.md)."""


@dataclass(kw_only=True)
class HelpedComputing(SharedComputing):
    """Where the work runs, of commands that CPU cores can help with beside GPUs."""

    cpu_ranks: Annotated[str, tyro.conf.arg(metavar="N|auto")] = "0"
    """Processes of each computer that work on particles on CPU cores beside the GPUs. They get what they are back with before the
    GPUs are done, or nothing. auto: one, if there are cores enough."""


@contextmanager
def ranks_here(choice: Literal["auto", "cpu", "cuda"]) -> Iterator[tuple[Ranks, torch.device, str]]:
    """(the processes of this run, the device of this one, why that one), as torchrun or srun say in the environment."""
    from verglas.distributed.meeting import joined
    from verglas.distributed.place import place_of

    place = place_of(os.environ)
    device, reason = resolve_device(choice, place)
    with joined(place, device) as ranks:
        yield ranks, device, f"{reason}; {ranks.size} processes share the work" if ranks.size > 1 else reason


def gpu_likely(choice: Literal["auto", "cpu", "cuda"]) -> bool:
    """Whether a GPU will compute, as far as can be told before PyTorch is imported: the driver is there, and none said no."""
    if choice == "cpu":
        return False
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False  # said by `resolve_device`
    return True


def wake_gpu(choice: Literal["auto", "cpu", "cuda"]) -> None:
    """Have the CUDA driver make its context on the first GPU, in a thread, while PyTorch is imported."""
    if "RANK" in os.environ or "SLURM_PROCID" in os.environ or not gpu_likely(choice):  # one of several takes a GPU of its own
        return

    def wake() -> None:
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), 0) == 0:
            driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)

    Thread(target=wake, daemon=True).start()


def wake_triton(device: torch.device) -> None:
    """Import Triton in a thread, while images are read."""
    if device.type == "cuda":
        Thread(target=import_triton, daemon=True).start()


def resolve_device(choice: Literal["auto", "cpu", "cuda"], place: Place | None = None) -> tuple[torch.device, str]:
    """Choose where to compute; returns (device, why). place: of this process among those of its run, which share the GPUs of a
    host. Raises InputError if 'cuda' is asked for and there is none."""
    import torch

    if choice == "cpu":
        return torch.device("cpu"), "asked for with --device cpu"
    if torch.cuda.is_available():
        reason = "asked for with --device cuda" if choice == "cuda" else "a GPU is there (--device auto)"
        device = torch.device("cuda")
        if place is not None:
            device, reason = torch.device("cuda", place.local % torch.cuda.device_count()), f"{reason}, one process on each"
            torch.cuda.set_device(device)
        # makes the context while others are imported
        Thread(target=torch.cuda.synchronize, args=(device,), daemon=True).start()
        return device, reason
    absent = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
    if choice == "cuda":
        raise InputError("--device cuda", absent, "a CUDA device", "Use --device cpu, or install PyTorch with CUDA.")
    return torch.device("cpu"), f"{absent} (--device auto)"


def started_again(elastic: bool) -> bool:
    """Whether processes of this very command may have been lost before: the user says so (--elastic), or torchrun."""
    return elastic or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def refuse_beside_continue(options: Any) -> None:
    """InputError for options (a command's dataclass) that --continue takes from the run; where it runs may change."""
    plain = type(options)()
    given = [one.name for one in fields(options) if one.name not in ("continue_from", "elastic", "computing")]
    given = [name for name in given if getattr(options, name) != getattr(plain, name)]
    if given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise InputError("--continue", f"given together with {names}", "--device and --threads at most",
                         "All other options are those of the run; start a new run to change them.")  # fmt: skip


def check_seed(seed: int) -> None:
    """Raise InputError for a seed below 0, which numpy's generators do not take."""
    if seed < 0:
        raise InputError("--seed", str(seed), "0 or more")


def set_threads(n: int | None) -> int:
    """Let torch and Numba use `n` CPU threads; None leaves the choice to the environment. Returns the number that torch uses.

    Numba's pool cannot grow once it has started, so it takes at most the size it has then.
    """
    # Waiting OpenMP threads sleep instead of spinning: where another program uses a core, spinning made a reconstruction
    # three to ten times slower (benchmarks/NOTES.md). Read when torch is imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with importing():
        import torch

    if n is None:
        told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]  # by torchrun, say; Numba does not look at it
        if told.isdecimal() and int(told) and "numba" not in sys.modules:
            os.environ.setdefault("NUMBA_NUM_THREADS", told)
        return torch.get_num_threads()
    if n < 1:
        raise InputError("--threads", str(n), "a number of 1 or more")
    torch.set_num_threads(n)
    if "numba" in sys.modules:
        import numba

        numba.set_num_threads(min(n, numba.config.NUMBA_NUM_THREADS))  # type: ignore[attr-defined]
    else:
        os.environ["NUMBA_NUM_THREADS"] = str(n)  # read when Numba is imported
    return n


def absolute(path: Path | str) -> Path:
    """The path from the root on, links kept: a run may be continued from another folder."""
    return Path(os.path.abspath(path))
