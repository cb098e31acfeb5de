"""Where the seconds of a command go, by the clock: what each of its threads is doing, asked every few milliseconds.

    python -m benchmarks.timeline [--least 0.03] reconstruct --particles ...

A tree in the order of time for each thread: when something was first seen, how long it was seen in all, its functions of verglas
and the modules being imported. Unlike cProfile it does not slow what it measures, and counts waiting as time.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

EVERY = 0.004  # s between two looks
LEAST = 0.03  # s below which nothing is printed


@dataclass
class Node:
    """Something that was seen on a thread's stack. first, seconds: when, from the start of the process, and how long in all."""

    first: float = 0.0
    seconds: float = 0.0
    below: dict[str, Node] = field(default_factory=dict)

    def lines(self, least: float, depth: int = 0) -> list[str]:
        """One for what is below it, and what is below that, if it took so long."""
        found = []
        for name, one in sorted(self.below.items(), key=lambda pair: pair[1].first):
            if one.seconds >= least:
                found.append(f"{one.first:7.2f} {one.seconds:7.2f} s {'  ' * depth}{name}")
                found += one.lines(least, depth + 1)
        return found


def path_of(frame: FrameType | None) -> list[str]:
    """From the outermost to the innermost: verglas's functions, modules that are imported (the first of others' packages), where
    it stands now."""
    frames = []
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    path, package = [], ""
    for one in reversed(frames):
        code = one.f_code
        if code.co_name == "_find_and_load" and "name" in one.f_locals:
            name = str(one.f_locals["name"])
            if name.partition(".")[0] in ("verglas", package):
                path += [f"import {name}"] if name.startswith("verglas") else []
            else:
                package = name.partition(".")[0]
                path.append(f"import {name}")
        elif "verglas" in code.co_filename and code.co_name != "<module>":
            path.append(f"{Path(code.co_filename).stem}.{code.co_name}")
    innermost = frames[0].f_code
    if "verglas" not in innermost.co_filename and innermost.co_name != "_worker":  # a thread of a pool that has nothing to do
        path.append(f"[{Path(innermost.co_filename).stem}.{innermost.co_name}]")
    return path


class Timeline:
    """Looks at all threads but its own from `start` to `stop`."""

    def __init__(self) -> None:
        self.began = seconds_of_process()
        self._threads: dict[str, Node] = {}
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True, name="timeline")

    def start(self) -> None:
        self._watch.start()

    def _look(self) -> None:
        last, start = time.perf_counter(), time.perf_counter() - self.began
        while not self._ended.wait(EVERY):
            now = time.perf_counter()
            names = {one.ident: one.name for one in threading.enumerate()}
            for ident, frame in sys._current_frames().items():
                if ident == self._watch.ident:
                    continue
                node = self._threads.setdefault(names.get(ident, "a thread"), Node())
                for name in path_of(frame):
                    node = node.below.setdefault(name, Node(first=last - start))
                    node.seconds += now - last
            last = now

    def stop(self, least: float) -> str:
        """What was seen."""
        self._ended.set()
        self._watch.join()
        lines = [f"{self.began:.2f} s before the first look, {seconds_of_process():.2f} s in all"]
        for name, node in self._threads.items():
            if found := node.lines(least):
                lines += [f"thread {name}:", *found]
        return "\n".join(lines)


def seconds_of_process() -> float:
    """Since this process was started (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def main() -> int:
    words = sys.argv[1:]
    least = LEAST
    if words[:1] == ["--least"]:
        least, words = float(words[1]), words[2:]
    timeline = Timeline()
    timeline.start()
    from verglas.cli.main import main as verglas

    sys.argv = ["verglas", *words]
    code = verglas(words)
    print(timeline.stop(least), flush=True)
    return code


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(code)
