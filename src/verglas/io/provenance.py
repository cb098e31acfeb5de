"""Facts about a run that let another person repeat it: versions, machine, inputs, options. Imports nothing heavy."""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import os
import platform
import resource
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import verglas

PACKAGES = ("torch", "numpy", "scipy", "numba", "triton", "mrcfile", "pandas")


def versions() -> dict[str, str]:
    """Versions of verglas, Python, the platform and the packages that results depend on (from metadata: nothing is imported)."""
    found = {"verglas": verglas.__version__, "python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def device_name(device: object) -> str:
    """'cuda (NVIDIA H100 80GB HBM3)' or 'cpu (AMD EPYC 9575F, 2 cores)'; torch is asked only where it is already loaded."""
    kind = str(device)
    if kind.startswith("cuda") and "torch" in sys.modules:
        return f"{kind} ({sys.modules['torch'].cuda.get_device_name(kind)})"
    if not kind.startswith("cpu"):
        return kind
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:  # not Linux
        pass
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"cpu ({name}, {cores} cores)"


def peak_memory() -> dict[str, dict[str, Any]]:
    """Largest resident memory of this process so far and, if torch has used a GPU, its largest allocation there, in GB (1e9)."""
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    found = {"host": {"value": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9, 3), "unit": "GB"}}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["device"] = {"value": round(torch.cuda.max_memory_allocated() / 1e9, 3), "unit": "GB"}
    return found


def command_line() -> str:
    """The command as typed, fit for pasting into a shell; 'verglas' stands for its full path."""
    name = Path(sys.argv[0]).name if sys.argv and sys.argv[0] else "python"
    return shlex.join(["verglas" if name in ("__main__.py", "verglas") else name, *sys.argv[1:]])


def timestamp(seconds: float) -> str:
    """Seconds since 1970 -> '2026-11-20T23:15:26+0000' in local time."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))


def input_facts(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Path, size in bytes and modification time of each input; a folder has no size, what is missing is left out."""
    facts = []
    for path in dict.fromkeys(paths):
        if path.exists():
            status = path.stat()
            size = {} if path.is_dir() else {"bytes": status.st_size}
            facts.append({"path": str(path), **size, "modified": timestamp(status.st_mtime)})
    return facts


def option_values(options: object, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(name, value) of every field of an option dataclass, groups of options (nested dataclasses) opened."""
    if not dataclasses.is_dataclass(options):
        return
    for field in dataclasses.fields(options):
        value = getattr(options, field.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from option_values(value, skip)
        elif field.name not in skip:
            yield field.name, value


def paths_in_options(options: object) -> list[Path]:
    """Every Path among the options, except the output (`out`)."""
    found: list[Path] = []
    for _, value in option_values(options, skip=("out",)):
        found += [one for one in (value if isinstance(value, list | tuple) else [value]) if isinstance(one, Path)]
    return found


def seed_of(options: object) -> int | None:
    """The option `seed`, if there is one."""
    return dict(option_values(options)).get("seed")


def plain(value: Any) -> Any:
    """`value` in terms of JSON: dataclasses become dicts, paths text, numbers of numpy and torch Python's, NaN and inf null."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(one) for one in value]
    if isinstance(value, enum.Enum):
        return plain(value.value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int | str | None) else str(value)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write `content` as indented JSON under a temporary name, then put it in place of `path`."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(json.dumps(plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
