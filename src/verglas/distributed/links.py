"""First messages between the GPUs of a run, sent while images are read: NCCL connects each pair, and loads its kernels, when the
first message of a kind is sent, which takes seconds."""

from __future__ import annotations

import time
from threading import Thread

import torch
import torch.distributed as dist

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since PyTorch 2.13, and before
KINDS = (torch.float32, torch.float64, torch.uint8, torch.int64)  # of numbers that travel


class Links:
    """Begun by all ranks once they have met. No other message of a GPU may be sent before `wait` has returned.

    seconds: that it took, once it is done.
    """

    def __init__(self, device: torch.device, size: int) -> None:
        self.seconds = 0.0
        self._error: BaseException | None = None
        self._thread: Thread | None = Thread(target=self._connect, args=(device, size), name="verglas-links", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        """Whether `wait` would return at once."""
        return self._thread is None

    def wait(self) -> None:
        """Until all are connected; an error of that is raised here."""
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        if self._error is not None:
            raise self._error

    def _connect(self, device: torch.device, size: int) -> None:
        begin = time.perf_counter()
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
                with torch.cuda.stream(torch.cuda.Stream(device)):  # the other thread's work does not wait for it
                    first_messages(device, size)
                    torch.cuda.current_stream(device).synchronize()
            else:
                first_messages(device, size)
        except BaseException as error:
            self._error = error
        self.seconds = time.perf_counter() - begin


def first_messages(device: torch.device, size: int) -> None:
    """One message of every kind that ranks send."""
    for kind in KINDS:
        numbers = torch.ones(size, dtype=kind, device=device)
        dist.all_to_all_single(torch.empty_like(numbers), numbers)
        dist.all_reduce(numbers)
        dist.broadcast(numbers, 0)
        all_gather(numbers.new_empty(size * size), numbers)
