"""The folder of one run: results, log, events, configuration and provenance; whole or not there at all.

    with RunFolder.create(out, "reconstruct", options, overwrite=False) as run:
        run.provenance(device="cpu", kernels="numba", precision="float32", reason="no GPU found")
        with run.progress("Backprojecting", total=n, unit="particles") as bar: ...
        write_map(run.path("map.mrc"), ...)
        run.figure("resolution", 8.1, "Å")

The run works in a hidden folder `.{name}.partial-<pid>` beside `out`, which takes the name `out` at the end and is removed on
any error. A resumable run works in `out` itself and leaves it there when it is stopped, for `RunFolder.reopen`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import verglas
from verglas.errors import OutputError
from verglas.io import progress as terminal
from verglas.io import provenance as facts_of
from verglas.io import staging


class RunFolder:
    """A run's folder as a context manager; make it with `create` or `reopen`."""

    def __init__(self, out: Path, command: str, options: object, overwrite: bool, resumable: bool, resumed: bool) -> None:
        self.out = Path(os.path.abspath(out))
        self.target = self.out.resolve()  # a link named `out` stays; what it points to is replaced
        self.command, self.options, self.overwrite = command, options, overwrite
        self.resumable, self.resumed = resumable, resumed
        self.started = time.time()
        self.figures: dict[str, dict[str, Any]] = {}
        self._chosen = {"device": facts_of.device_name("cpu")}
        self._inputs = facts_of.paths_in_options(options)
        self._made_parents: list[Path] = []
        self._folder = self.target if resumable or resumed else staging.sibling(self.target, "partial")
        self._signed = False  # whether the folder is this run's, to be removed on errors
        self._streams: dict[str, IO[str]] = {}
        self._closing = ExitStack()

    @classmethod
    def create(cls, out: Path, command: str, options: object, overwrite: bool, resumable: bool = False) -> RunFolder:
        """A new run; nothing is written before the `with`.

        options: the option dataclass, written to config.json; its Path fields are recorded as inputs, its `seed` as the seed.
        Raises OutputError if `out` exists (without overwrite), is not a run of verglas (with overwrite), holds an input, or
        is being written by another process.
        """
        run = cls(out, command, options, overwrite, resumable, resumed=False)
        run._check_target()
        return run

    @classmethod
    def reopen(cls, out: Path, command: str, options: object) -> RunFolder:
        """Go on with a resumable run that was stopped: log and events are continued, config.json is kept."""
        run = cls(out, command, options, overwrite=False, resumable=True, resumed=True)
        if not (run.target / "config.json").is_file():
            raise OutputError(f"{out}: there is no run to go on with (no config.json in it).")
        if (run.target / "result.json").exists():
            raise OutputError(f"{out}: this run is finished; start a new one with another --out, or with --overwrite.")
        return run

    def __enter__(self) -> RunFolder:
        self.started = time.time()
        with staging.disk_errors_named(self.out):
            try:
                self._make_parents()
                staging.clean_up(self.target)
                self._check_target()
                self._open()
            except BaseException:
                self._discard()
                raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            try:
                with staging.disk_errors_named(self.out):
                    self._finish()
            except BaseException:
                self._discard()
                raise
            return
        if self.resumable:
            self.stopped(f"{type(error).__name__}: {error}")
        self._discard()
        if isinstance(error, OSError) and staging.is_disk_full(error):
            raise OutputError(staging.disk_full_text(self.out)) from error
        if isinstance(error, OutputError) and str(self._folder) in str(error):  # people know the folder by its final name
            raise OutputError(str(error).replace(str(self._folder), str(self.out))) from error

    # What a command calls while it runs

    def path(self, name: str) -> Path:
        """Where to write the file `name` (may hold folders, 'images/000001.mrcs') of this run."""
        path = self._folder / name
        if not path.resolve().is_relative_to(self._folder.resolve()):
            raise ValueError(f"{name!r} leads out of the run folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def event(self, name: str, **facts: Any) -> None:
        """Append one line to events.jsonl: {"event", "seconds" since the start, and the facts}."""
        record = {"event": name, "seconds": round(time.time() - self.started, 3), **facts}
        self._append("events.jsonl", json.dumps(facts_of.plain(record), ensure_ascii=False, allow_nan=False))

    def stopped(self, reason: str) -> None:
        """The last event of a run that ends before it is finished; errors of the disk are not raised."""
        with suppress(OSError):
            self.event("stopped", reason=reason)

    def log(self, text: str) -> None:
        """One line to run.log (with the time) and to the terminal."""
        self._note(text)
        terminal.say(text)

    def progress(self, stage: str, total: int | None = None, unit: str = "steps") -> AbstractContextManager[terminal.Bar]:
        """Progress of one stage on the terminal; its time and count become an event and a line of run.log."""
        return _RecordedProgress(self, stage, total, unit)

    def figure(self, name: str, value: float | int | str, unit: str = "") -> None:
        """Add a key figure to result.json."""
        self.figures[name] = {"value": facts_of.plain(value), "unit": unit}

    def input(self, *paths: Path) -> None:
        """Record further inputs (the stacks that a STAR file names, say) with size and modification time."""
        self._inputs += paths

    def provenance(self, device: object, kernels: str = "", precision: str = "", reason: str = "") -> None:
        """Record and show what computes: device ('cpu', 'cuda' or a torch.device), implementation of the kernels,
        precision, and why these were chosen."""
        chosen = {"device": facts_of.device_name(device), "kernels": kernels, "precision": precision, "reason": reason}
        self._chosen.update(chosen)
        self.event("provenance", **chosen)
        terminal.say_facts(f"verglas {verglas.__version__} {self.command}", {"output": str(self.out), **chosen})

    def facts(self) -> dict[str, Any]:
        """Everything known about the run so far, as result.json will hold it (also the provenance of the report)."""
        seconds = time.time() - self.started
        return result_facts(self.command, self.options, self.figures, seconds, self._chosen, self._inputs)

    # Making, finishing and removing the folder

    def _check_target(self) -> None:
        if self.resumed or not os.path.lexists(self.target):
            return
        if not self.overwrite:
            raise OutputError(f"{self.out} exists. Choose another --out, or replace it with --overwrite.")
        if not self.target.is_dir():
            raise OutputError(f"{self.out} is a file, not the folder of a run; remove it or choose another --out.")
        if any(self.target.iterdir()) and not (self.target / "config.json").is_file():
            raise OutputError(
                f"{self.out} is not a run of verglas (no config.json in it), so --overwrite does not delete it. "
                "Choose another --out, or remove it yourself."
            )
        inside = [path for path in self._inputs if path.resolve().is_relative_to(self.target)]
        if inside:
            raise OutputError(f"{inside[0]} is an input and lies in {self.out}, which --overwrite deletes. Choose another --out.")

    def _make_parents(self) -> None:
        missing = [parent for parent in self.target.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made_parents.append(parent)

    def _open(self) -> None:
        if self.resumable and self.target.exists():
            staging.refuse_if_busy(self.target, self.out)
        line = facts_of.command_line()
        if not self.resumed:
            self._make(line)
        self._signed = True
        staging.sign(self._folder)
        for name in ("events.jsonl", "run.log"):
            end_last_line(self._folder / name)
            stream = open(self._folder / name, "a", encoding="utf-8")  # noqa: SIM115 (closed by _close_streams)
            self._streams[name] = self._closing.enter_context(stream)
        self._note(f"verglas {verglas.__version__}: {line}")
        self.event("resumed" if self.resumed else "started", command=self.command, at=facts_of.timestamp(self.started))

    def _make(self, line: str) -> None:
        """Make the folder. A resumable one appears under its own name with its config.json in it: killed later, it can go on."""
        made = staging.sibling(self.target, "partial")
        made.mkdir()
        try:
            staging.sign(made)
            config = {"command": self.command, "command_line": line, "version": verglas.__version__, "options": self.options}
            facts_of.write_json(made / "config.json", config)
            if self.resumable:
                if self.target.exists():
                    staging.move_aside(self.target)
                os.rename(made, self._folder)
        except BaseException:
            shutil.rmtree(made, ignore_errors=True)
            raise

    def _finish(self) -> None:
        self.event("finished", figures=self.figures)
        facts_of.write_json(self._folder / "result.json", self.facts())
        self._close_streams()
        if self._folder != self.target:
            staging.move_into_place(self._folder, self.target, self.overwrite)
        staging.unsign(self.target)
        for old in staging.siblings(self.target, "replaced") if self.resumable else []:
            shutil.rmtree(old, ignore_errors=True)
        figures = {
            name.replace("_", " "): f"{short(figure['value'])} {figure['unit']}".strip() for name, figure in self.figures.items()
        }
        terminal.say_facts(f"{self.command}: done in {terminal.duration_text(time.time() - self.started)}", figures)
        terminal.say(f"Results are in {self.out}")

    def _discard(self) -> None:
        """Remove what this run made; a resumable run keeps its folder and gives up the ownership only."""
        self._close_streams()
        if self.resumable:
            if self._signed:
                staging.unsign(self._folder)
            return
        if self._signed:
            shutil.rmtree(self._folder, ignore_errors=True)
        for parent in reversed(self._made_parents):
            with suppress(OSError):  # someone else may use it by now
                parent.rmdir()

    def _note(self, text: str) -> None:
        self._append("run.log", f"{facts_of.timestamp(time.time())} {text}")

    def _append(self, name: str, line: str) -> None:
        self._streams[name].write(line + "\n")
        self._streams[name].flush()

    def _close_streams(self) -> None:
        self._streams.clear()
        with suppress(OSError):  # a full disk cannot flush: that error was raised by the write itself
            self._closing.close()


class _RecordedProgress(AbstractContextManager[terminal.Bar]):
    """terminal.progress, with its end written to the run's events and log."""

    def __init__(self, run: RunFolder, stage: str, total: int | None, unit: str) -> None:
        self.run, self.unit, self.stage = run, unit, stage
        self.shown = terminal.progress(stage, total, unit)

    def __enter__(self) -> terminal.Bar:
        self.bar = self.shown.__enter__()
        return self.bar

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shown.__exit__(kind, error, trace)
        if error is None:
            self.run.event("stage", stage=self.stage, done=self.bar.done, unit=self.unit, took=round(self.bar.seconds, 3))
            self.run._note(self.bar.closing_line())


def end_last_line(path: Path) -> None:
    """End the last line of a text that a kill cut off, so that the next one stands alone."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("ab") as file:
            file.write(b"\n")


def result_facts(
    command: str,
    options: object,
    figures: Mapping[str, Mapping[str, Any]],
    seconds: float,
    chosen: Mapping[str, str],
    inputs: Sequence[Path],
) -> dict[str, Any]:
    """The content of a result.json. figures: name -> {"value", "unit"}; chosen: device, kernels, precision, reason."""
    return {
        "command": command,
        "command_line": facts_of.command_line(),
        "version": verglas.__version__,
        "figures": dict(figures),
        **chosen,
        "seed": facts_of.seed_of(options),
        "seconds": round(seconds, 3),
        "finished": facts_of.timestamp(time.time()),
        "peak_memory": facts_of.peak_memory(),
        "versions": facts_of.versions(),
        "inputs": facts_of.input_facts(inputs),
        "options": facts_of.plain(options),
    }


def write_result_json(
    path: Path,
    command: str,
    options: object,
    figures: Mapping[str, tuple[Any, str]],
    *,
    seconds: float,
    device: object = "cpu",
) -> Path:
    """For a command whose output is the one file `path`: write `<stem>.result.json` beside it and return its path.

    figures: name -> (value, unit). A file of that name is replaced, as it told of an earlier `path`; if it tells of another
    file of the same stem (map.star beside map.mrc), `<name>.result.json` is written instead.
    """
    facts = result_facts(
        command,
        options,
        {name: {"value": facts_of.plain(value), "unit": unit} for name, (value, unit) in figures.items()},
        seconds,
        {"device": facts_of.device_name(device)},
        facts_of.paths_in_options(options),
    )
    beside = path.with_name(f"{path.stem}.result.json")
    if beside.exists() and json.loads(beside.read_text(encoding="utf-8")).get("output") != path.name:
        beside = path.with_name(f"{path.name}.result.json")
    with staging.disk_errors_named(beside):
        facts_of.write_json(beside, {"output": path.name, **facts})
    return beside


def short(value: Any) -> str:
    """A figure for people: floats with four significant digits, integers with thousands separated, the rest as it is."""
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def records_of(events: Path, kind: str) -> Iterator[dict[str, Any]]:
    """The records of one kind in an events.jsonl, oldest first, but lines that a kill cut off; none if it is not there."""
    for line in events.read_text(encoding="utf-8", errors="replace").splitlines() if events.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and record.get("event") == kind:
            yield record
