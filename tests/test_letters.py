"""What ranks say to one another as objects, short or long, arrives whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from verglas.distributed.ranks import BRIEF, HEAD, SHORT, Ranks, length_of, letter

SIZE = 3
LENGTHS = [0, 1, BRIEF - 200, BRIEF + 1, SHORT - 200, 3 * SHORT]


def work(rank: int, folder: str) -> None:
    """Each process says texts of all lengths, one of them longer than the others' by far; and the lead its own."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(Path(folder) / "meeting"), SIZE), rank=rank, world_size=SIZE)
    ranks, right = Ranks(rank, SIZE, SIZE), True
    for number, length in enumerate(LENGTHS):
        long = [length if one == number % SIZE else one for one in range(SIZE)]
        right &= ranks.everyones("x" * long[rank]) == ["x" * one for one in long]
        for meeting in (True, False):
            found = ranks.agreed({"text": "y" * length, "array": torch.arange(5)} if rank == 0 else None, meeting=meeting)
            right &= found is not None and found["text"] == "y" * length and torch.equal(found["array"], torch.arange(5))
    sent = ranks.meter.read()
    right &= sent["decisions"].payload > 2 * sum(LENGTHS) and sent["decisions: the lead"].bytes == 0
    (Path(folder) / f"{rank}.txt").write_text(str(right))
    dist.barrier()
    dist.destroy_process_group()


def test_objects_arrive_whole(tmp_path: Path) -> None:
    multiprocessing.spawn(work, (str(tmp_path),), SIZE)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(SIZE)] == ["True"] * SIZE


@pytest.mark.parametrize("text", [b"", b"a", b"ab" * 40])
def test_a_letter_tells_its_length_and_what_there_is_room_for(text: bytes) -> None:
    found = letter(text, 50)
    assert length_of(found) == len(text) and len(found) == HEAD + 50
    assert found[HEAD : HEAD + len(text)].numpy().tobytes() == (text if len(text) <= 50 else bytes(50))
