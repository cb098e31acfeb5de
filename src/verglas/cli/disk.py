"""Whether the disk will take what a run still has to write: said after its first iteration, not when the disk is full."""

from __future__ import annotations

import shutil
from pathlib import Path

from verglas.core.memory import size_text


def disk_notice(folder: Path, iteration: int, expected: int) -> str | None:
    """A warning if the files of the iterations to come do not fit; None if they do.

    iteration: the last one written, whose files tell what each takes; expected: number of iterations in all. Maps and STAR files
    of all iterations stay, checkpoints of the last two.
    """
    left = max(0, expected - iteration)
    sizes = {path: path.stat().st_size for path in folder.glob(f"run_it{iteration:03d}*") if path.is_file()}
    checkpoint = sum(size for path, size in sizes.items() if path.suffix == ".checkpoint")
    each, free = sum(sizes.values()) - checkpoint, shutil.disk_usage(folder).free
    needed = left * each + 2 * checkpoint  # a third one is written before the oldest goes
    if needed <= free:
        return None
    return (
        f"The disk may become full: an iteration leaves {size_text(each)}, {left} more and their checkpoints need "
        f"{size_text(needed)}, {size_text(free)} are free. Nothing is lost then: free some space and go on with --continue."
    )
