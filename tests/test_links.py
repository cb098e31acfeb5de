"""First messages between ranks go in a thread; others wait for them, and learn what went wrong."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from verglas.distributed.links import Links
from verglas.distributed.ranks import Ranks

SIZE = 3


def work(rank: int, folder: str) -> None:
    """What each process does: on the CPU through gloo, which has all kinds of messages that NCCL has."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "meeting"), SIZE), rank=rank, world_size=SIZE)
    links = Links(torch.device("cpu"), SIZE)
    assert not links.done
    links.wait()
    links.wait()  # once is enough
    assert links.done
    ranks = Ranks(rank, SIZE, SIZE, links=links)
    (Path(folder) / f"{rank}.txt").write_text(f"{links.seconds > 0} {ranks.add_up(torch.tensor([rank]), 'numbers').item()}")
    dist.barrier()
    dist.destroy_process_group()


def test_every_kind_of_message_goes_through(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), SIZE)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(SIZE)] == ["True 3"] * SIZE


def test_what_goes_wrong_is_raised_where_it_is_waited_for() -> None:
    links = Links(torch.device("cpu"), 2)  # nobody has met
    with pytest.raises(ValueError, match="process group"):
        links.wait()


def test_messages_of_a_gpu_wait_and_those_of_the_host_do_not() -> None:
    waited = list[str]()
    ranks = Ranks(0, 2, links=SimpleNamespace(wait=lambda: waited.append("waited"), done=False))  # type: ignore[arg-type]
    ranks.connected(torch.device("cpu"))
    assert not waited
    ranks.connected(torch.device("cuda", 0))
    assert waited == ["waited"]
