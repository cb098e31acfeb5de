"""What several ranks keep of a pass, put together again."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from verglas.ptychography.reconstruct import PassDone
from verglas.ptychography.scan import Reconstruction
from verglas.ptychography.share import OBJECT, Share
from verglas.ptychography.tiles import Box
from verglas.ptychography.unknowns import PER_POSITION


def whole(done: PassDone, with_memory: bool = True) -> PassDone | None:
    """A pass as one process would have it, copied to host memory, at the lead; None at the other ranks. All ranks ask together.

    with_memory: what the engine goes on with, too. Field after field, so that the lead's device holds one of them at most.
    """
    share = done.share
    fields = {name: value for name, value in vars(done.found).items() if isinstance(value, Tensor)}
    memory = done.memory if with_memory else {}
    if share is None or share.alone:
        found_there, memory_there = ({n: v.detach().to("cpu", copy=True) for n, v in some.items()} for some in (fields, memory))
    else:
        found_there, memory_there = ({n: gathered(share, n, v) for n, v in some.items()} for some in (fields, memory))
        if not share.ranks.is_lead:
            return None
    found: Reconstruction = replace(done.found, **found_there)  # type: ignore[arg-type]
    return replace(done, found=found, memory=memory_there, share=None)


def gathered(share: Share, name: str, value: Tensor) -> Tensor:
    """One field of all ranks in host memory, of a whole reconstruction; of use at the lead alone."""
    if share.alone:
        return value.detach().to("cpu", copy=True)
    kind = name.rpartition(".")[2]
    if kind == OBJECT:
        everything = Box(0, 0, *share.shape)
        nothing = Box(0, 0, 0, 0)
        boxes = [everything] + [nothing] * (share.ranks.size - 1)
        return share.halo.moved(value, share.tiles, boxes[share.ranks.rank], boxes).cpu()
    if name == "positions_B2":
        value = value + share.corner_2.to(value)
    return (share.everyones(value) if kind in (*PER_POSITION, "exit") else value.detach()).to("cpu", copy=True)


def bytes_of(*several: object) -> int:
    """Bytes of all tensors in these objects, lists and dictionaries, each storage counted once."""
    seen: dict[int, int] = {}

    def look(one: object) -> None:
        if isinstance(one, Tensor):
            storage = one.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(one, dict):
            for value in one.values():
                look(value)
        elif isinstance(one, list | tuple):
            for value in one:
                look(value)
        elif hasattr(one, "__dict__") and type(one).__module__.startswith("verglas.ptychography"):
            look(vars(one))

    for one in several:
        look(one)
    return sum(seen.values())
