"""What makes imports of large packages quick. Imports nothing heavy itself."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def importing() -> Iterator[None]:
    """Around the import of large packages: Python's collector of garbage, which would go through all modules again and again, a
    quarter of the time, rests, and leaves them out of its rounds later on."""
    if not gc.isenabled() or "torch" in sys.modules:  # within another one, or in a program that has its own ways
        yield
        return
    gc.collect()  # so that no garbage is kept for ever
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def import_triton() -> None:
    """Triton, and what it makes of its own files, which are many, to tell kernels in its cache apart. Nothing where it is not."""
    with suppress(ImportError):  # or another version has that elsewhere: then it does so when it is needed
        from triton.runtime.cache import triton_key

        triton_key()


def quiet_messages() -> None:
    """Before PyTorch is imported by one of several processes: what its C++ tells of a failed meeting would bury our message."""
    if os.environ.get("VERGLAS_DEBUG") != "1":
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
