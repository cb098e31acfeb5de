"""How many threads work on small arrays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

FEW = 4


@contextmanager
def few_threads(most: int = FEW) -> Iterator[None]:
    """At most four threads of torch inside, or `most`; also a decorator. On maps of some 32 px more of them wait for each other
    longer than they compute (an alignment, sixteen threads beside another program: over a minute; four: three seconds)."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
