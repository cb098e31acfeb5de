"""Large arrays between the memory of the host and a GPU: in pieces through pinned memory, several at a time.

What a GPU copies from or to ordinary memory itself goes at 1 to 2 GB/s, and memory that is pinned for a map or for sums costs
more than the copy. So the host copies pieces to or from small pinned ones, in threads of their own, while others are under way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from verglas.core.memory import in_host_memory

PIECE = 2**26  # bytes that travel at a time
WORKERS = 4  # pieces that are under way together
T = TypeVar("T")


def at_once(parts: Sequence[T], work: Callable[[T], None], device: torch.device) -> None:
    """work(part) of every part, in any order; on a GPU several at a time, each in a thread and a stream of its own, after what
    has been asked of the current stream. All is done on return."""
    if device.type != "cuda":
        for part in parts:
            work(part)
        return
    before = torch.cuda.current_stream(device)
    streams = [torch.cuda.Stream(device) for _ in range(min(WORKERS, len(parts)))]

    def go_through(number: int) -> None:
        with torch.cuda.stream(streams[number]):
            for part in parts[number :: len(streams)]:
                work(part)
                streams[number].synchronize()  # or pinned pieces would pile up

    if not streams:
        return
    for stream in streams:
        stream.wait_stream(before)
    with ThreadPoolExecutor(len(streams), thread_name_prefix="verglas-transfer") as workers:
        for done in [workers.submit(go_through, number) for number in range(len(streams))]:
            done.result()


def piece_to_device(values: Tensor, device: torch.device) -> Tensor:
    """A piece of the host's memory on a device, in the order of its stream."""
    if device.type != "cuda":
        return values.to(device)
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    np.copyto(pinned.numpy(), values.numpy())  # in this thread alone: torch would have threads of its own for each of `at_once`
    return pinned.to(device, non_blocking=True)


def piece_to_host(values: Tensor, into: Tensor) -> None:
    """A piece of a device's memory into the host's."""
    if values.device.type != "cuda":
        into.copy_(values)
        return
    pinned = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
    torch.cuda.current_stream(values.device).synchronize()
    np.copyto(into.numpy(), pinned.numpy())


def to_device(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Values, wherever they are, on a device; dtype: there."""
    dtype = values.dtype if dtype is None else dtype
    if device.type != "cuda" or values.device.type == "cuda" or values.nbytes <= PIECE:
        return values.to(device, dtype)
    values = values.detach().contiguous()
    out = torch.empty(values.shape, dtype=dtype, device=device)

    def send(part: slice) -> None:
        out.view(-1)[part] = piece_to_device(values.view(-1)[part], device)

    at_once(_parts(values), send, device)
    return out


def to_host(values: Tensor) -> Tensor:
    """Values, wherever they are, in the memory of the host."""
    if values.device.type != "cuda" or values.nbytes <= PIECE:
        return in_host_memory(values)
    values = values.detach().contiguous()
    out = torch.empty(values.shape, dtype=values.dtype)
    at_once(_parts(values), lambda part: piece_to_host(values.view(-1)[part], out.view(-1)[part]), values.device)
    return out


def _parts(values: Tensor) -> list[slice]:
    step = PIECE // values.element_size()
    return [slice(first, min(first + step, values.numel())) for first in range(0, values.numel(), step)]
