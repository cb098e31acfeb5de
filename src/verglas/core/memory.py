"""Memory of the process: kept when it is freed, whole on a GPU; how much of a GPU is free, and how much may be taken."""

from __future__ import annotations

import ctypes
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let large arrays reuse the memory of freed ones instead of asking the system for fresh pages each time.

    The arrays of a batch (hundreds of MB) come and go many times an iteration; without this every one of them is mapped
    anew and each of its pages faults once, which took a third of the time of a refinement on two cores (benchmarks/
    NOTES.md). glibc only; returns whether it was done.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))


def grow_device_memory() -> bool:
    """Let PyTorch extend the memory it holds on a GPU instead of adding pieces of fixed size; returns whether it was done.

    The arrays of every iteration have other sizes than those of the last: freed pieces that fit none of them piled up to six
    times what was in use (84 GB held for 13 GB of arrays, 1,000 images of 256 px).
    """
    import torch

    # Not public; the environment is read too early. Before torch 2.10 it had another name.
    change = getattr(torch._C, "_accelerator_setAllocatorSettings", None)
    change = change or getattr(torch.cuda.memory, "_set_allocator_settings", None)
    if change is None:
        return False
    change("expandable_segments:True")
    return True


def free_device_memory(device: torch.device) -> float:
    """Bytes that PyTorch can still take of a GPU: what is free, and no more than it is allowed
    (torch.cuda.set_per_process_memory_fraction, which the driver knows nothing of)."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return float(min(free, allowed_fraction(device) * total - torch.cuda.memory_reserved(device)))


def usable_device_memory(device: torch.device) -> float:
    """Bytes that arrays can still take of a GPU: beside what is free, what PyTorch holds without using it."""
    import torch

    return free_device_memory(device) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def uploaded(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values of the host on a device. A GPU's stream takes them in its turn (from pinned memory): nobody waits for it."""
    if device.type != "cuda" or values.device.type != "cpu":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def make_room(device: torch.device, needed: float, most: float = float("inf")) -> None:
    """Give back what PyTorch holds of a GPU without using it, if less than `needed` bytes are free beside it, or if with as many
    more it would hold more than `most`.

    Taking it anew costs tens of ms. PyTorch itself gives back what it holds before it runs out; what else is on the GPU does not.
    """
    import torch

    if device.type == "cuda" and (free_device_memory(device) < needed or torch.cuda.memory_reserved(device) + needed > most):
        torch.cuda.empty_cache()


def allowed_fraction(device: torch.device) -> float:
    """Share of a GPU's memory that PyTorch may take; 1 where it cannot tell."""
    import torch

    number = torch.cuda.current_device() if device.index is None else device.index
    tell = getattr(torch.cuda, "get_per_process_memory_fraction", None)
    return 1.0 if tell is None else float(tell(number))


def limit_device_memory(device: torch.device, limit: float) -> None:
    """Let PyTorch hold no more than `limit` bytes of a GPU; a smaller limit that was set before stays."""
    import torch

    total = torch.cuda.mem_get_info(device)[1]
    number = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_per_process_memory_fraction(min(allowed_fraction(device), max(limit, 0.0) / total), number)


def in_host_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor in the memory of the host; of a GPU it is copied, beside what that computes, to memory that it writes to itself:
    into other memory 1.4 GB/s were measured (67 MB, H200), while its stream stands still."""
    import torch

    tensor = tensor.detach()
    if tensor.device.type != "cuda":
        return tensor.cpu()
    with torch.cuda.device(tensor.device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())  # that made it
        with torch.cuda.stream(side):
            there = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        side.synchronize()
    return there


def size_text(size: float) -> str:
    """'8.39 GB', '12.5 MB', '3,120 GB'."""
    value, unit = (size / 1e9, "GB") if size >= 1e9 else (size / 1e6, "MB")
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.3g} {unit}"
