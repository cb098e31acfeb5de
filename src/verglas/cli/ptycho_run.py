"""One ptychographic reconstruction from the command line: reads, drives the engine, writes files.

A stopped run goes on. It has one part, all positions, or three: with --halves each half of the positions follows. Every part has
checkpoints of its own. Where several processes (ranks) share the work, the first one, the lead, writes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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

    from verglas.distributed.ranks import Ranks
    from verglas.io.progress import Bar
    from verglas.ptychography.reconstruct import PassDone
    from verglas.ptychography.scan import Reconstruction, Scan

COMMAND = "ptycho reconstruct"
PARTS = {"all": "all positions", "half1": "every second position", "half2": "the other positions"}
RESULTS = {"all": "result.cxi", "half1": "half1.cxi", "half2": "half2.cxi"}
KEPT = ("halves", "beam_width", "unwrap", "checkpoint_every")  # of a job, as they stand in a record
CHECKPOINT_INTERVAL = 60.0  # s of passes from one checkpoint to the next, where nobody says how many
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
    checkpoint_every: int = 0
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


def was_begun(job: PtychoJob) -> bool:
    """Whether a run with these very options is under way in the job's folder, device and threads apart."""
    if not (job.out / "config.json").is_file() or (job.out / "result.json").exists():
        return False
    try:
        return job_of_run(job.out, job.device, job.threads) == replace(job, overwrite=False)
    except InputError:
        return False


class PtychoRun:
    """A run: make it of a job, then `run`. resumed: go on with the one in job.out."""

    def __init__(self, job: PtychoJob, resumed: bool = False) -> None:
        self.job, self.resumed = job, resumed
        self.history: dict[str, list[Record]] = {part: [] for part in PARTS}
        self.ranks: Ranks
        self._page_not_before = 0.0
        self._every = 1  # passes from one checkpoint to the next

    def run(self) -> None:
        """Read and check the scan, reconstruct, write everything. InputError for what cannot be reconstructed."""
        from verglas.cli.common import ranks_here, set_threads, wake_gpu

        wake_gpu(self.job.device)  # while PyTorch is imported, which is next
        set_threads(self.job.threads)
        with ranks_here(self.job.device) as (self.ranks, device, reason):
            self.resumed = self.ranks.agreed(self.resumed)  # others may look at the folder a moment later
            run, scan, notices = self._inputs()
            going_on = way_on(run, COMMAND, self.ranks, self.job.out)
            with run or nullcontext(), withdrawn_if_refused(run, self.resumed), going_on:
                if run is not None:
                    self._begin(run, scan, device, reason, notices)
                found = {part: self._part(run, part, one, device) for part, one in self._parts(scan).items()}
                if run is not None:
                    self._finish(run, scan, {part: one for part, one in found.items() if one is not None})

    def _inputs(self) -> tuple[RunFolder | None, Scan, list[str]]:
        """(the lead's folder, the scan, what a person should know of it): every rank reads the file, the lead first."""
        from verglas.distributed.ranks import lead_first
        from verglas.ptychography.files import read_scan

        job, run = self.job, None
        self.ranks.doing("reading the scan", part="")
        with lead_first(self.ranks):
            if self.ranks.is_lead:
                scan, notices = read_scan(job.scan, job.read)
                fewest = len(scan) // 2 if job.halves else len(scan)
                if fewest < self.ranks.size:
                    found = f"{self.ranks.size} for {fewest} positions" + job.halves * " (half of all)"
                    raise InputError("number of processes", found, "no more than positions")
                run = self._folder()
        if not self.ranks.is_lead:
            scan, notices = read_scan(job.scan, job.read)
        return run, scan, notices

    def _folder(self) -> RunFolder:
        job = self.job
        if self.resumed:
            return RunFolder.reopen(job.out, COMMAND, job)
        return RunFolder.create(job.out, COMMAND, job, job.overwrite, resumable=True)

    def _begin(self, run: RunFolder, scan: Scan, device: torch.device, reason: str, notices: list[str]) -> None:
        from verglas.refinement.files import remove_leftovers

        remove_leftovers(run.target)
        run.provenance(device, "", "double" if self.job.fit.double else "single", reason)
        for notice in notices:
            run.log(notice)
        self.history = read_history(run.target / "events.jsonl")
        self._page_not_before = time.monotonic() + PAGE_INTERVAL
        write_positions(run.path("positions.csv"), scan, None)

    def _parts(self, scan: Scan) -> dict[str, Scan]:
        import torch

        parts = {"all": scan}
        if self.job.halves:
            every_B = torch.arange(len(scan))
            parts |= {"half1": scan.subset(every_B[::2]), "half2": scan.subset(every_B[1::2])}
        return parts

    def _part(self, run: RunFolder | None, part: str, scan: Scan, device: torch.device) -> Reconstruction | None:
        """Reconstruct one part, from its last checkpoint on if there is one; the lead writes its result file at the end, and is
        the one that gets it."""
        from verglas.ptychography import checkpoint
        from verglas.ptychography.collect import whole
        from verglas.ptychography.files_result import read_result, write_result

        if self.ranks.agreed(run is not None and run.path(RESULTS[part]).exists()):
            if run is None:
                return None
            checkpoint.remove(run.target, part)
            return read_result(run.path(RESULTS[part]))[0]
        mark = checkpoint.fingerprint(scan)
        last = self._last(run, part, mark)
        if last is None:
            scan = self._lit(run, scan, device)
        last = self._passes(run, part, scan, device, (last, mark))
        done = whole(last, with_memory=False)
        if run is None or done is None:
            return None
        write_result(run.path(RESULTS[part]), done.found, run.facts(), overwrite=True)
        checkpoint.remove(run.target, part)
        return done.found

    def _last(self, run: RunFolder | None, part: str, mark: str) -> PassDone | None:
        """The pass after which a part goes on, which the lead names; None if it begins."""
        from verglas.ptychography import checkpoint

        if not self.resumed:
            return None
        last = None if run is None else checkpoint.newest(run.target, part, mark, run.log)
        number = self.ranks.agreed(None if last is None else last.number)
        if number is None:
            return None
        if run is not None:
            run.log(f"{PARTS[part]}: going on after pass {number}")
        return last or checkpoint.read(checkpoint.path_of(self.job.out, part, number))[0]

    def _passes(
        self, run: RunFolder | None, part: str, scan: Scan, device: torch.device, begun: tuple[PassDone | None, str]
    ) -> PassDone:
        """All passes that are left; begun: the one to go on after, and the scan's fingerprint."""
        from verglas.ptychography.reconstruct import reconstruct

        (last, mark), passes = begun, self.job.fit.passes
        before = 0 if last is None else last.number
        self.history[part] = [record for record in self.history[part] if record["pass"] <= before]
        title = f"Reconstructing {PARTS[part]}"
        self.ranks.doing("beginning", part=PARTS[part])
        # A GPU goes on while files are written; on a CPU both would want the same cores.
        with bar_of(run, title, passes - before) as bar, Behind(int(device.type == "cuda")) as later:
            for done in reconstruct(scan, self.job.fit, device, last, self.ranks):
                last = done
                self.history[part].append(record_of(last, len(scan)))
                if run is not None:
                    for line in done.plan if last.number == before + 1 else ():
                        run.log(line)
                    run.event("pass", part=part, **self.history[part][-1])
                if bar is not None:
                    bar.describe(progress_text(self.history[part][-1]))
                    bar.advance()
                if last.number - before <= 2:  # the first one compiles and plans
                    passes_a_minute = max(1, round(CHECKPOINT_INTERVAL / max(last.seconds, 1e-3)))
                    self._every = self.job.checkpoint_every or self.ranks.agreed(passes_a_minute)
                self._written(run, part, scan, (last, mark), later)
        assert last is not None
        return last

    def _written(self, run: RunFolder | None, part: str, scan: Scan, done: tuple[PassDone, str], later: Behind) -> None:
        """Checkpoint and page of a pass, where it is time for them."""
        from verglas.ptychography import checkpoint
        from verglas.ptychography.collect import whole

        last, mark = done
        if last.number >= self.job.fit.passes:
            return
        saving = last.number % self._every == 0
        # Ranks agree on pages now and then only: that takes as long as a short pass.
        shared = self.ranks.size > 1
        asked = part == "all" and (not shared or saving)
        paging = asked and self.ranks.agreed(time.monotonic() > self._page_not_before)
        if not saving and not paging:
            return
        copy, sent = whole(last, with_memory=saving), self.ranks.communication() if saving else None
        if run is None or copy is None:
            return
        if sent is not None:
            run.event("communication", part=part, after=last.number, **sent)
        if saving:
            later.do(partial(checkpoint.save, run.target, part, copy, mark))
        if paging:
            self._page_not_before = math.inf  # until that one is written
            later.do(partial(self._page_on_the_way, run, scan, copy, list(self.history[part])))

    def _lit(self, run: RunFolder | None, scan: Scan, device: torch.device) -> Scan:
        """The scan with a first guess of its probe, where the file has none or the user says how wide the beam is."""
        from verglas.ptychography.beam import guessed_beam

        width = self.job.beam_width
        if scan.geometry.kind == "near" and width is not None:
            raise InputError("--beam-width", f"{width:g} for a near field", "a far field",
                             "A near field starts with its mean pattern, bent as trials tell.")  # fmt: skip
        if scan.probe_MYX is not None and width is None:
            return scan
        self.ranks.doing("looking for the focus", part="")
        beam = guessed_beam(scan, device, width, self.ranks)
        tried = "" if width is not None else f"; error of its trial {beam.error[0]:.3g}, of the next best {beam.error[1]:.3g}"
        if run is not None:
            cone = f"light with the mean pattern's cone, {beam.width:g} windows wide on the object"
            mean = f"the mean pattern, with a curvature of {beam.width:g}"
            run.log(f"first guess of the probe: {mean if scan.geometry.kind == 'near' else cone}{tried}")
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


@contextmanager
def bar_of(run: RunFolder | None, title: str, passes: int) -> Iterator[Bar | None]:
    """Progress of the passes on the lead's terminal."""
    if run is None:
        yield None
        return
    with run.progress(title, passes, "passes") as bar:
        yield bar


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

