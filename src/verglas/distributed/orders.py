"""What the lead has the other ranks do with it, one thing after another, where it alone knows what comes next.

    orders = Orders(ranks)
    if ranks.is_lead:
        with orders.given():
            ...; orders.give(words); work(words); ...
    else:
        for words in orders.taken():
            work(words)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Generic, TypeVar

import torch.distributed as dist

from verglas.distributed.place import LAST_WORDS
from verglas.distributed.ranks import Ranks

T = TypeVar("T")
UNTIL_CALLED = timedelta(days=30)  # the lead may have long work of its own
_DONE, _REFUSED = "done", "refused"


class Orders(Generic[T]):
    """Made by all ranks at once. They wait in a group of their own, as a wait in the common one is soon taken for a fault."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._group = dist.new_group(backend="gloo", timeout=UNTIL_CALLED) if ranks.size > 1 else None

    def give(self, order: T) -> None:
        """The lead: let all others begin with this."""
        self._next(("order", order))

    @contextmanager
    def given(self) -> Iterator[None]:
        """The lead: the others end when the `with` does."""
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # they may have ended before
                self._next((_REFUSED, None))
            raise
        self._next((_DONE, None))

    def taken(self) -> Iterator[T]:
        """The others: what there is to do, until the lead is done. If an error ends it they end, too, and say nothing."""
        while True:
            word, order = self._next(None)
            if word == _REFUSED:
                time.sleep(LAST_WORDS)  # whoever started the ranks ends all when the first one goes: that is to be the lead
                raise SystemExit(2)
            if word == _DONE:
                return
            yield order

    def _next(self, said: tuple[str, T | None] | None) -> tuple[str, T]:
        box = [said]
        if self._group is not None:
            with nullcontext() if self._ranks.is_lead else self._ranks.idle():
                dist.broadcast_object_list(box, 0, group=self._group)
        return box[0]  # type: ignore[return-value]
