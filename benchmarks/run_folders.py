"""Folders of `verglas refine` as a whole: is every file in one sound, and in what do two differ?"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from verglas.errors import InputError
from verglas.io.mrc import read_map, read_raw
from verglas.io.star import read_star
from verglas.refinement import checkpoint

LABELS = slice(224, 1024)  # of an MRC header: texts that may hold a date
TIMES = {"seconds", "took", "at", "finished", "started", "peak_memory"}  # keys of JSON that tell of clock and machine
RATE = re.compile(r"[\d.,]+ (?:[\w-]+/s|ms\b|s\b|min\b|h\b)|\b\d\d:\d\d\b|^\S+T\S+ ")
TIMED_LINE = "  : "  # what RATE leaves of "  12 s: expectation 11.1 s, ..."; stages that took no time are not named
SECTION = re.compile(r"<section.*?</section>", re.S)
TITLE = re.compile(r"<h2[^>]*>(.*?)</h2>", re.S)
TIMED_SECTIONS = ("Where the time went", "How it was made")


def hidden(path: Path) -> bool:
    """Temporary files and the note of the owner, which may be in any state."""
    return path.name.startswith(".")


def faults(folder: Path) -> list[str]:
    """Files of a run, killed or not, that are not whole; also those of a kind that no run writes. Hidden ones do not count."""
    found = []
    for path in sorted(path for path in folder.iterdir() if not hidden(path)):
        check = CHECKS.get(path.suffix)
        if check is None:
            found.append(f"{path.name}: not a file of a run")
            continue
        try:
            check(path)
        except (InputError, ValueError, AssertionError) as error:
            found.append(f"{path.name}: {error}")
    return found


def leftovers(folder: Path) -> list[str]:
    """Hidden files of a run; one that has ended leaves none."""
    return sorted(path.name for path in folder.iterdir() if hidden(path))


def check_events(path: Path) -> None:
    """Every line is JSON; only a last one without its end may be cut off."""
    *whole, _ = path.read_text(encoding="utf-8").split("\n")
    for line in whole:
        json.loads(line)


def check_page(path: Path) -> None:
    """A page of HTML to its end."""
    if not path.read_text(encoding="utf-8").rstrip().endswith("</html>"):
        raise ValueError("is cut short")


def check_picture(path: Path) -> None:
    """A PNG file to its end."""
    data = path.read_bytes()
    if not (data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")):
        raise ValueError("is no picture, or cut short")


CHECKS: dict[str, Callable[[Path], Any]] = {
    ".star": read_star,
    ".mrc": read_map,
    ".checkpoint": checkpoint.load,
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": check_events,
    ".html": check_page,
    ".png": check_picture,
    ".log": lambda path: path.read_text(encoding="utf-8"),
}


def differences(first: Path, second: Path) -> dict[str, list[str]]:
    """Files whose bytes differ -> in what they differ beside dates, times and memory ([]: in nothing else)."""
    names = sorted({path.name for folder in (first, second) for path in folder.iterdir()})
    found = {}
    for name in names:
        a, b = first / name, second / name
        if not (a.exists() and b.exists()):
            found[name] = [f"only in {(a if a.exists() else b).parent}"]
        elif a.read_bytes() != b.read_bytes():
            found[name] = list(COMPARISONS.get(a.suffix, bytes_differ)(a, b))
    return found


def bytes_differ(a: Path, b: Path) -> Iterator[str]:
    """For files without any date in them."""
    yield f"{a.stat().st_size} and {b.stat().st_size} bytes, not the same"


def maps_differ(a: Path, b: Path) -> Iterator[str]:
    """Header without its texts, and voxels."""
    one, other = (path.read_bytes()[:1024] for path in (a, b))
    if one[: LABELS.start] != other[: LABELS.start] or one[LABELS.stop :] != other[LABELS.stop :]:
        yield "header"
    if not same_voxels(a, b):
        yield "voxels"


def same_voxels(a: Path, b: Path) -> bool:
    """Whether two maps hold the same numbers, bit by bit."""
    (_, one), (_, other) = read_raw(a), read_raw(b)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def texts_differ(a: Path, b: Path) -> Iterator[str]:
    """Lines of a text, without times of day and durations."""
    lines = [[RATE.sub("", line) for line in path.read_text(encoding="utf-8").splitlines()] for path in (a, b)]
    if len(lines[0]) != len(lines[1]):
        yield f"{len(lines[0])} and {len(lines[1])} lines"
    for one, other in zip(*lines):
        timed = one.startswith(TIMED_LINE) and other.startswith(TIMED_LINE)
        if one != other and not timed:
            yield f"{one!r} and {other!r}"


def records_differ(a: Path, b: Path) -> Iterator[str]:
    """Records of a JSON or JSON-lines file, without what TIMES names."""
    lists = []
    for path in (a, b):
        text = path.read_text(encoding="utf-8")
        lists.append([json.loads(text)] if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()])
    if len(lists[0]) != len(lists[1]):
        yield f"{len(lists[0])} and {len(lists[1])} records"
    for one, other in zip(*lists):
        for key in sorted((one.keys() | other.keys()) - TIMES):
            if one.get(key) != other.get(key):
                yield f"{key}: {one.get(key)} and {other.get(key)}"


def pages_differ(a: Path, b: Path) -> Iterator[str]:
    """Sections of a report but for those that show times."""
    one, other = ([part.group() for part in SECTION.finditer(path.read_text(encoding="utf-8"))] for path in (a, b))
    if len(one) != len(other):
        yield f"{len(one)} and {len(other)} sections"
    for part, mate in zip(one, other):
        title = TITLE.search(part)
        name = title.group(1) if title else "a section without title"
        if part != mate and not name.startswith(TIMED_SECTIONS):
            yield f"section {name!r}"


COMPARISONS: dict[str, Callable[[Path, Path], Iterator[str]]] = {
    ".mrc": maps_differ, ".log": texts_differ, ".json": records_differ, ".jsonl": records_differ, ".html": pages_differ,
}  # fmt: skip
