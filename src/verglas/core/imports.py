"""What makes imports of large packages quick. Imports nothing heavy itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


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
