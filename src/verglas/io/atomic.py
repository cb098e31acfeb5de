"""Files appear whole or not at all: write under a temporary name beside the target, then rename."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from verglas.errors import OutputError


@contextmanager
def atomic_path(target: Path | str, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path in the folder of `target`; renamed to `target` on success, removed on any error.

    Raises OutputError if `target` exists and `overwrite` is False (before anything is written), if the folder does not
    exist or is not writable, and if the disk is full.
    """
    target = Path(target)
    check_target(target, overwrite)
    # The suffix stays last, so that writers which look at it see the kind of file they are asked for.
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}.part{target.suffix}")
    try:
        yield temporary
        if not overwrite and target.exists():
            raise OutputError(f"{target} appeared while verglas was writing it; nothing was overwritten.")
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(_explain(target, error)) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Raise OutputError now if `atomic_path(target, overwrite)` could not succeed: before hours of work, not after."""
    if target.is_dir():
        raise OutputError(f"{target} is a folder; give the name of a file.")
    if target.exists() and not overwrite:
        raise OutputError(f"{target} exists already. Give another name, or pass --overwrite.")
    if not target.parent.is_dir():
        raise OutputError(f"{target.parent} is not a folder, so {target.name} cannot be written there. Make the folder first.")


def _explain(target: Path, error: OSError) -> str:
    reasons = {
        errno.ENOSPC: "the disk is full. Free some space, or write to another disk.",
        errno.EDQUOT: "your disk quota is used up. Free some space, or write to another disk.",
        errno.EACCES: "no permission to write there. Choose another folder.",
        errno.EROFS: "that disk is read-only. Choose another folder.",
        errno.ENAMETOOLONG: "the file name is too long. Choose a shorter one.",
    }
    reason = reasons.get(error.errno or 0, f"{error.strerror or error}.")
    return f"{target} could not be written: {reason} Nothing was left behind."
