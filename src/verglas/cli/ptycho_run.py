"""One ptychographic reconstruction from the command line: reads, drives the engine, writes files.

A stopped run goes on. It has one part, all positions, or three: with --halves each half of the positions follows. Every part has
checkpoints of its own.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from verglas.cli.behind import Behind
from verglas.cli.job import options_of_run
from verglas.cli.run_loop import way_on, withdrawn_if_refused
from verglas.errors import InputError
from verglas.io.progress import rate_text
from verglas.io.runfolder import RunFolder, records_of
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.read_options import ReadOptions

if TYPE_CHECKING:
    import torch

    from verglas.ptychography.reconstruct import PassDone
    from verglas.ptychography.scan import Reconstruction, Scan

COMMAND = "ptycho reconstruct"
PARTS = {"all": "all positions", "half1": "every second position", "half2": "the other positions"}
RESULTS = {"all": "result.cxi", "half1": "half1.cxi", "half2": "half2.cxi"}
KEPT = ("halves", "beam_width", "unwrap", "checkpoint_every")  # of a job, as they stand in a record
PAGE_SHARE, PAGE_INTERVAL = 0.05, 10.0  # of the time that pages may take; s between two at least
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class PtychoJob:
    """What a run is made from, as its config.json records it; paths are absolute."""

    scan: Path
    out: Path
    fit: PtychoOptions = field(default_factory=PtychoOptions)
    read: ReadOptions = field(default_factory=ReadOptions)
    halves: bool = False
    beam_width: float | None = None
    unwrap: bool = False
    checkpoint_every: int = 5
    overwrite: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = None


def job_of_run(out: Path, device: Literal["auto", "cpu", "cuda"], threads: int | None) -> PtychoJob:
    """The job of the run in the folder `out`, from its config.json; InputError if it is none."""
    with options_of_run(out, COMMAND) as options:
        read, fit = options["read"], PtychoOptions(**options["fit"])
        mask = None if read["mask"] is None else Path(read["mask"])
        kept = {one.name: options[one.name] for one in fields(PtychoJob) if one.name in KEPT}
        return PtychoJob(scan=Path(options["scan"]), out=out, fit=fit, read=ReadOptions(**{**read, "mask": mask}), device=device,
                         threads=threads, **kept)  # fmt: skip


class PtychoRun:
    """A run: make it of a job, then `run`. resumed: go on with the one in job.out."""

    def __init__(self, job: PtychoJob, resumed: bool = False) -> None:
        self.job, self.resumed = job, resumed
        self.history: dict[str, list[Record]] = {part: [] for part in PARTS}
        self._page_not_before = 0.0

    def run(self) -> None:
        """Read and check the scan, reconstruct, write everything. InputError for what cannot be reconstructed."""
        from verglas.cli.common import resolve_device, set_threads
        from verglas.ptychography.files import read_scan
        from verglas.refinement.files import remove_leftovers

        job = self.job
        set_threads(job.threads)
        device, reason = resolve_device(job.device)
        scan, notices = read_scan(job.scan, job.read)
        with self._folder() as run, withdrawn_if_refused(run, self.resumed), way_on(run, COMMAND):
            remove_leftovers(run.target)
            run.provenance(device, "", "double" if job.fit.double else "single", reason)
            for notice in notices:
                run.log(notice)
            self.history = read_history(run.target / "events.jsonl")
            self._page_not_before = time.monotonic() + PAGE_INTERVAL
            write_positions(run.path("positions.csv"), scan, None)
            found = {part: self._part(run, part, one, device) for part, one in self._parts(scan).items()}
            self._finish(run, scan, found)

    def _folder(self) -> RunFolder:
        job = self.job
        if self.resumed:
            return RunFolder.reopen(job.out, COMMAND, job)
        return RunFolder.create(job.out, COMMAND, job, job.overwrite, resumable=True)

    def _parts(self, scan: Scan) -> dict[str, Scan]:
        import torch

        parts = {"all": scan}
        if self.job.halves:
            every_B = torch.arange(len(scan))
            parts |= {"half1": scan.subset(every_B[::2]), "half2": scan.subset(every_B[1::2])}
        return parts

    def _part(self, run: RunFolder, part: str, scan: Scan, device: torch.device) -> Reconstruction:
        """Reconstruct one part, from its last checkpoint on if there is one; its result file is written at the end."""
        import torch

        from verglas.ptychography import checkpoint
        from verglas.ptychography.files_result import read_result, write_result
        from verglas.ptychography.reconstruct import reconstruct

        result = run.path(RESULTS[part])
        if result.exists():
            checkpoint.remove(run.target, part)
            return read_result(result)[0]
        mark, passes = checkpoint.fingerprint(scan), self.job.fit.passes
        last = checkpoint.newest(run.target, part, mark, run.log) if self.resumed else None
        done_before = 0 if last is None else last.number
        if last is None:
            scan = self._lit(run, scan, device)
        else:
            run.log(f"{PARTS[part]}: going on after pass {done_before}")
        self.history[part] = [record for record in self.history[part] if record["pass"] <= done_before]
        title = f"Reconstructing {PARTS[part]}"
        # A GPU goes on while files are written; on a CPU both would want the same cores.
        with run.progress(title, passes - done_before, "passes") as bar, Behind(torch.device(device).type == "cuda") as later:
            for done in reconstruct(scan, self.job.fit, device, last):
                last = done
                self.history[part].append(record_of(last, len(scan)))
                run.event("pass", part=part, **self.history[part][-1])
                bar.describe(progress_text(self.history[part][-1]))
                bar.advance()
                if last.number % self.job.checkpoint_every == 0 and last.number < passes:
                    later.do(partial(checkpoint.save, run.target, part, on_the_cpu(last), mark))
                if part == "all" and last.number < passes and time.monotonic() > self._page_not_before:
                    self._page_not_before = math.inf  # until that one is written
                    records = list(self.history[part])
                    later.do(partial(self._page_on_the_way, run, scan, on_the_cpu(last), records))
        assert last is not None
        found = last.found.to("cpu")
        write_result(result, found, run.facts(), overwrite=True)
        checkpoint.remove(run.target, part)
        return found

    def _lit(self, run: RunFolder, scan: Scan, device: torch.device) -> Scan:
        """The scan with a first guess of its probe, where the file has none or the user says how wide the beam is."""
        from verglas.ptychography.beam import guessed_beam

        width = self.job.beam_width
        if scan.geometry.kind == "near" and width is not None:
            raise InputError("--beam-width", f"{width:g} for a near field", "a far field",
                             "A near field starts with its mean pattern.")  # fmt: skip
        if scan.geometry.kind == "near" or (scan.probe_MYX is not None and width is None):
            return scan
        beam = guessed_beam(scan, device, width)
        tried = "" if width is not None else f"; error of its trial {beam.error[0]:.3g}, of the next best {beam.error[1]:.3g}"
        run.log(f"first guess of the probe: light with the mean pattern's cone, {beam.width:g} windows wide on the object{tried}")
        return replace(scan, probe_MYX=beam.probe_MYX)

    def _page_on_the_way(self, run: RunFolder, scan: Scan, last: PassDone, records: list[Record]) -> None:
        """Rewrite report.html, and say when the next one may come: pages take no more than their share of the time."""
        from verglas.cli.ptycho_page import Shown, write_page

        started = time.monotonic()
        note_figures(run, scan, last.found)
        shown = Shown(scan.positions_B2.numpy(), last.found, {"all": records}, self.job.unwrap)
        write_page(run.path("report.html"), shown, run.figures, run.facts(), f"Ptychography: pass {last.number}")
        now = time.monotonic()
        self._page_not_before = now + max(PAGE_INTERVAL, (now - started) / PAGE_SHARE)

    def _finish(self, run: RunFolder, scan: Scan, found: dict[str, Reconstruction]) -> None:
        from verglas.cli.ptycho_page import Shown, write_page, write_pictures

        note_figures(run, scan, found["all"])
        shown = Shown(scan.positions_B2.numpy(), found["all"], self.history, self.job.unwrap)
        if "half1" in found:
            shown.compare_halves(found["half1"], found["half2"])
            run.figure("resolution_of_halves", *shown.resolution())
        write_pictures(run, shown)
        write_positions(run.path("positions.csv"), scan, found["all"])
        write_errors(run.path("error.csv"), self.history)
        write_page(run.path("report.html"), shown, run.figures, run.facts(), "Ptychography")


def on_the_cpu(done: PassDone) -> PassDone:
    """The same pass, apart from what the engine goes on with."""
    memory = {name: value.detach().to("cpu", copy=True) for name, value in done.memory.items()}
    return replace(done, found=done.found.to("cpu"), memory=memory)


def progress_text(record: Record) -> str:
    """'error 0.0312, changes: object 2.1e-03, probe 4e-04; 5,120 patterns/s'."""
    changes = f"object {record['object_change']:.1e}, probe {record['probe_change']:.1e}"
    return f"error {record['error']:.4g}, changes: {changes}; {rate_text(record['patterns_per_second'], 1.0, 'patterns')}"


def record_of(done: PassDone, positions: int) -> Record:
    """The numbers of a pass in terms of JSON; patterns_per_second: speed of that pass."""
    return {
        "pass": done.number, "error": done.error, "object_change": done.object_change, "probe_change": done.probe_change,
        "took": round(done.seconds, 4), "patterns_per_second": round(positions / max(done.seconds, 1e-9), 1),
    }  # fmt: skip


def read_history(events: Path) -> dict[str, list[Record]]:
    """Records of the passes of each part, each in its latest version; torn lines are left out."""
    found: dict[str, dict[int, Record]] = {part: {} for part in PARTS}
    for record in records_of(events, "pass"):
        found[record["part"]][record["pass"]] = record
    return {part: [records[number] for number in sorted(records)] for part, records in found.items()}


def note_figures(run: RunFolder, scan: Scan, found: Reconstruction) -> None:
    """Key figures of a run as it stands."""
    rows, columns = found.object_OLYX.shape[-2:]
    run.figure("passes", len(found.error_P))
    run.figure("error", float(f"{found.error_P[-1]:.4g}"))
    run.figure("positions", len(scan))
    run.figure("window", " x ".join(map(str, scan.window)), "px")
    run.figure("object", f"{rows} x {columns}", "px")
    if found.pixel is not None:
        run.figure("object_pixel", float(f"{1e9 * found.pixel[0]:.4g}"), "nm")


def write_positions(path: Path, scan: Scan, found: Reconstruction | None) -> None:
    """positions.csv, px: as the scan has them and, once found, as they were used, in the same frame; relative intensities."""
    from verglas.io.atomic import atomic_path

    head, columns = "row,column", [scan.positions_B2]
    if found is not None:
        import torch

        head += ",found_row,found_column,intensity"
        columns += [found.positions_B2 + torch.tensor(found.origin_2, dtype=torch.float64), found.scale_B.double()[:, None]]
    rows = np.concatenate([one.numpy() for one in columns], 1)
    with atomic_path(path, overwrite=True) as temporary:
        np.savetxt(temporary, rows, "%.9g", ",", header=head, comments="")


def read_positions(path: Path) -> np.ndarray:
    """Positions (row, column) px as the scan has them, [B, 2], from positions.csv."""
    if not path.is_file():
        raise InputError(path, "there is no such file", "what `verglas ptycho reconstruct` writes at its start")
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=(0, 1), ndmin=2)


def write_errors(path: Path, history: dict[str, list[Record]]) -> None:
    """error.csv: part, pass, error, changes, seconds."""
    from verglas.io.atomic import atomic_path

    names = ("pass", "error", "object_change", "probe_change", "took")
    lines = [",".join(("part", *names))]
    for part, records in history.items():
        lines += [",".join([part, *(f"{record[name]:.8g}" for name in names)]) for record in records]
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")

