"""`python -m benchmarks list | run NAME... | cpu | gpu | compare A B | page | stamp TEXT`: see benchmarks/README.md.

cpu and gpu are `make bench` and `make bench-gpu`. Nothing is measured while tests are red, nothing recorded of changed files.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks import record as records
from benchmarks import runner, tables, verifier
from benchmarks.registry import BENCHMARKS, Benchmark, find


def list_all() -> int:
    """Print what there is, and why some of it cannot run here."""
    for one in BENCHMARKS:
        reason = runner.missing(one)
        rows = f"rows {one.rows}" if one.rows else ""
        print(f"{one.name:22s} {one.group:5s} {one.seconds:5.0f} s  {rows:12s} {one.about}{f'  [{reason}]' if reason else ''}")
    return 0


def measure(chosen: list[Benchmark], options: argparse.Namespace, words: list[str]) -> int:
    """Verify, run what is chosen, record and show it; 1 if a benchmark failed or missed a promise."""
    begin = time.perf_counter()
    source = records.source()
    reason = verifier.unrecorded(source, options.allow_dirty)
    keep = not (options.no_record or options.untested or reason)
    if reason:
        print(reason, flush=True)
    device = "gpu" if any(one.device == "gpu" for one in chosen) else "cpu"
    tests = "not run" if options.untested else verifier.require_green(device)
    faults = []
    for one in chosen:
        left = options.limit - (time.perf_counter() - begin) if options.limit else None
        reason = runner.missing(one) or too_long(one, left)
        if reason is not None:
            print(f"{one.name}: left out, {reason}", flush=True)
            continue
        print(f"{one.name}: {one.about}", flush=True)
        try:
            made = runner.run(one, source, tests, left, words, options.work)
        except runner.Failed as error:
            print(f"{one.name}: {error}", flush=True)
            faults.append(one.name)
            continue
        if records.tree_hash() != source.tree:
            print(f"{one.name}: not recorded, files changed while it ran")
        elif keep:
            print(f"recorded: {made.write(options.records)}")
        if not tables.show(made, one):
            faults.append(one.name)
    print(f"{time.perf_counter() - begin:.0f} s in all")
    if faults:
        print(f"failed or short of a promise: {', '.join(faults)}")
    return 1 if faults else 0


def too_long(one: Benchmark, left: float | None) -> str | None:
    """Why a benchmark is not begun with `left` seconds to go; None if it may be."""
    if left is None or left >= one.seconds:
        return None
    return f"takes about {one.seconds:.0f} s, {max(left, 0):.0f} s are left"


def compare(first: Path, second: Path) -> int:
    """Print how figures changed from one record (or folder of records) to another; 2 if they have none in common."""
    pairs = [(first, second)]
    if first.is_dir():
        pairs = [(path, second / path.name) for path in sorted(first.glob("*.json")) if (second / path.name).exists()]
    shown = 0
    for a, b in pairs:
        before, after = records.read(a), records.read(b)
        for name, old, new, change in records.compare(before, after):
            print(f"{after.name}: {name:50s} {old:12.5g} {new:12.5g} {change:+8.1f} %")
            shown += 1
    if not shown:
        print("no figure in common")
    return 0 if shown else 2


def parsed(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options, and what follows `--`: arguments for the modules."""
    words: list[str] = []
    if "--" in arguments:
        at = arguments.index("--")
        arguments, words = arguments[:at], arguments[at + 1 :]
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="what there is")
    commands.add_parser("page", help="fill the tables of docs/performance.md from the records")
    commands.add_parser("stamp", help="note that the tests of this tree were green (for `make test`)").add_argument("scope")
    two = commands.add_parser("compare", help="change of figures between two records, or two folders of records")
    two.add_argument("first", type=Path)
    two.add_argument("second", type=Path)
    for name, text in (("run", "the named ones"), ("cpu", "those for a CPU"), ("gpu", "those for a GPU")):
        one = commands.add_parser(name, help=text)
        if name == "run":
            one.add_argument("names", nargs="+")
        one.add_argument("--limit", type=float, default=280.0 if name == "cpu" else None, help="seconds in all, tests included")
        one.add_argument("--allow-dirty", action="store_true", help="record although files differ from the commit")
        one.add_argument("--no-record", action="store_true", help="only show")
        one.add_argument("--untested", action="store_true", help="do not run tests first; nothing is recorded then")
        one.add_argument("--work", type=Path, help="scratch folder that is kept (simulated sets are then made once)")
        one.add_argument("--records", type=Path, default=records.RECORDS)
    return parser.parse_args(arguments), words


def main(arguments: list[str] | None = None) -> int:
    """Do what the command line asks; the exit code."""
    options, words = parsed(sys.argv[1:] if arguments is None else arguments)
    if options.command == "list":
        return list_all()
    if options.command == "page":
        tables.rewrite_page()
        return 0
    if options.command == "stamp":
        verifier.write_stamp(options.scope)
        return 0
    if options.command == "compare":
        return compare(options.first, options.second)
    try:
        chosen = [find(name) for name in options.names] if options.command == "run" else of_group(options.command)
        return measure(chosen, options, words)
    except KeyError as error:
        print(error.args[0], file=sys.stderr)
    except verifier.Refused as error:
        print(f"nothing measured: {error}", file=sys.stderr)
    return 2


def of_group(group: str) -> list[Benchmark]:
    """Those that `make bench` or `make bench-gpu` run, in order."""
    return [one for one in BENCHMARKS if one.group == group]


if __name__ == "__main__":
    sys.exit(main())
