"""What a benchmark leaves: `records/<machine>/<commit>/<name>.json`, with all that is needed to judge and repeat it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RECORDS = ROOT / "benchmarks" / "records"
HASHED = ("src/verglas/**/*.py", "src/verglas/**/*.cu", "tests/*.py", "benchmarks/*.py", "pyproject.toml")


@dataclass(frozen=True)
class Source:
    """The code that was measured. commit: of git (or $VERGLAS_COMMIT), "unknown" where neither tells; dirty: changed since;
    tree: hash of the files' content, which tells two dirty trees apart."""

    commit: str
    dirty: bool
    tree: str


@dataclass(frozen=True)
class Record:
    """One benchmark as it was run. figures: name -> number, medians over `runs` (their figures one by one); machine: device, cpu,
    cores; tests: what the tests said of this tree before; date: UTC."""

    name: str
    source: Source
    date: str
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    tests: str
    command: str
    figures: Mapping[str, float]
    runs: list[Mapping[str, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def folder(self) -> Path:
        """machine/commit, below the folder of records."""
        return Path(slug(self.machine["device"])) / (self.source.commit[:12] + "-dirty" * self.source.dirty)

    def write(self, records: Path = RECORDS) -> Path:
        """Write it into its place below `records`; returns the path."""
        path = records / self.folder / f"{self.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


def read(path: Path) -> Record:
    """The record in a file; ValueError if it is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Record(**(content | {"source": Source(**content["source"])}))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a record of a benchmark ({error})") from error


def all_records(records: Path = RECORDS) -> list[Record]:
    """Every record below a folder, oldest first."""
    return sorted((read(path) for path in records.glob("*/*/*.json")), key=lambda one: one.date)


def slug(name: str) -> str:
    """'NVIDIA H100 80GB HBM3' -> 'nvidia-h100-80gb-hbm3'."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def hashed_files(root: Path = ROOT) -> list[Path]:
    """The files that decide what a benchmark measures, in order."""
    return sorted({path for pattern in HASHED for path in root.glob(pattern)})


def tree_hash(root: Path = ROOT) -> str:
    """Hash of all code and tests as they lie there, 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in hashed_files(root):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def source(root: Path = ROOT) -> Source:
    """What is measured. Without git: $VERGLAS_COMMIT, "-dirty" at its end saying that files were changed since."""
    named = os.environ.get("VERGLAS_COMMIT", "")
    if named:
        return Source(named.removesuffix("-dirty"), named.endswith("-dirty"), tree_hash(root))
    commit = git(root, "rev-parse", "HEAD")
    if commit is None:
        return Source("unknown", True, tree_hash(root))
    changed = git(root, "status", "--porcelain", "--", ".", ":!benchmarks/records", ":!docs", ":!*.md")
    return Source(commit, bool(changed), tree_hash(root))


def git(root: Path, *words: str) -> str | None:
    """What git says, None where there is no git or no repository."""
    try:
        done = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def machine(kind: str) -> dict[str, Any]:
    """Name of the device that a benchmark of this kind ("cpu" or "gpu") uses, and of the processor and its cores beside it."""
    import torch

    from verglas.io.provenance import device_name

    described = re.fullmatch(r"cpu \((.*), (\d+) cores\)", device_name("cpu"))
    cpu, cores = (described[1], int(described[2])) if described else (device_name("cpu"), os.cpu_count() or 1)
    device = f"{cpu}, {cores} cores"
    if kind == "gpu":
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {"device": device, "cpu": cpu, "cores": cores}


def flat(content: Any, name: str = "") -> Iterator[tuple[str, float]]:
    """(name, number) of every number in JSON; names of what lies inside each other are joined by ' / '.

    In a list of objects, texts and whole numbers say which one it is, and name it: [{"box": 64, "kind": "random", "G/s": 9.5}]
    is '64 random / G/s'.
    """
    if isinstance(content, Mapping):
        items: Iterable[tuple[Any, Any]] = content.items()
    elif isinstance(content, list):
        items = told_apart([parts_of(number, value) for number, value in enumerate(content, 1)])
    else:
        if isinstance(content, int | float):
            yield name, float(content)
        return
    for key, value in items:
        yield from flat(value, f"{name} / {key}" if name else str(key))


def parts_of(number: int, value: Any) -> tuple[str, Any]:
    """Name of a list's item, and its figures."""
    if not isinstance(value, Mapping) or all(isinstance(one, float) for one in value.values()):
        return str(number), value
    title = " ".join(str(one) for one in value.values() if isinstance(one, int | str))
    return title, {key: one for key, one in value.items() if not isinstance(one, int | str)}


def told_apart(items: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Items with (1), (2) after those names that come more than once."""
    count, number, found = Counter(name for name, _ in items), Counter[str](), []
    for name, value in items:
        number[name] += 1
        found.append((f"{name} ({number[name]})" if count[name] > 1 else name, value))
    return found


def compare(before: Record, after: Record) -> list[tuple[str, float, float, float]]:
    """(figure, before, after, change in per cent) of the figures that both have."""
    shared = [name for name in before.figures if name in after.figures]
    pairs = [(name, before.figures[name], after.figures[name]) for name in shared]
    return [(name, a, b, 100 * (b - a) / abs(a) if a else float("nan")) for name, a, b in pairs]
