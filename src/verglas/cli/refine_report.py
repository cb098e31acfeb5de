"""report.html of a refinement, rewritten as it goes on. Imported only by a run that writes one: it needs numpy and figures."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from verglas.cli.refine_watch import gist
from verglas.core.symmetry import symmetry_matrices
from verglas.core.transfers import to_host
from verglas.report import Curve, Histogram, KeyFigures, Orientations, Pictures, Stack, Table, Text, write_report
from verglas.report.pictures import map_pictures, slices_picture, write_pngs
from verglas.report.sections import Section

if TYPE_CHECKING:
    from verglas.cli.refine_watch import Record
    from verglas.io.runfolder import RunFolder
    from verglas.refinement.config import RefineConfig
    from verglas.refinement.driver import Iteration
    from verglas.report.page import Draw

SHARE = 0.04  # of the run's time that reports may take
SHORTEST_INTERVAL = 5.0  # s
MOST_CURVES = 12  # of FSC on one figure
VIEWS = "surface, projections and central slices, seen along z, y and x"
MOST_VIEWS = 20_000  # particles on the sphere

JUNK = (
    "Junk shows in these three together: images without a particle are explained equally well by any view, so their "
    "log-likelihood lies in a tail or second hump below the rest, their largest posterior weight near 0 and the entropy of "
    "their posterior near its upper end."
)


class ReportWriter:
    """Writes the page after an iteration unless that would cost more than its share of the time."""

    subject = "Refinement"
    in_space = True  # of maps, which have a point group

    def __init__(self, run: RunFolder, config: RefineConfig) -> None:
        self.run, self.config = run, config
        self.draw: Draw | None = None  # instead of this process
        self.not_before = time.monotonic() + SHORTEST_INTERVAL  # a run that soon ends needs no page before

    def update(self, history: Sequence[Record], iteration: Iteration) -> None:
        """Rewrite report.html; the last iteration's always."""
        started, finished = time.monotonic(), self.finished(history, iteration)
        if started < self.not_before and not finished:
            return
        symmetry = f", {self.config.symmetry.upper()}" if self.in_space else ""
        title = f"{self.subject}{symmetry}" + ("" if finished else f": iteration {iteration.state.iteration}")
        final = self.final_maps(iteration) if finished else {}
        drawn = map_pictures({name: as_array(map_ZYX) for name, map_ZYX in final.items()})
        sections = self.sections(history, iteration, drawn)
        write_pngs({self.run.path(name): picture for name, picture in drawn.items()})
        write_report(self.run.path("report.html"), title, sections, self.run.facts(), True, self.draw)
        now = time.monotonic()
        self.not_before = now + max(SHORTEST_INTERVAL, (now - started) / SHARE)

    def finished(self, history: Sequence[Record], iteration: Iteration) -> bool:
        """Whether this is the last page."""
        return iteration.final is not None

    def final_maps(self, iteration: Iteration) -> dict[str, Tensor]:
        """File name -> map, of each of which a picture is written at the end."""
        assert iteration.final is not None
        return {"run_class001.png": iteration.final.joined.map_ZYX}

    def sections(self, history: Sequence[Record], iteration: Iteration, drawn: Mapping[str, np.ndarray]) -> list[Section]:
        """What stands on the page. drawn: pictures of the final maps."""
        return sections_of(history, iteration, self.config, self.run.figures, drawn)


def sections_of(
    history: Sequence[Record], iteration: Iteration, config: RefineConfig, figures: dict[str, dict[str, Any]],
    drawn: Mapping[str, np.ndarray],
) -> list[Section]:  # fmt: skip
    """Everything on the page, in its order."""
    box = iteration.state.box
    sections: list[Section] = [KeyFigures("Where it stands" if iteration.final is None else "What came out", figures)]
    sections += [fsc_curves(history, box), resolution_curve(history), *sampling_curves(history), pmax_curve(history)]
    sections += timings(history)
    sections.append(maps_shown(iteration, drawn))
    sections += [orientations(iteration, config), *junk_histograms(iteration), notes(history)]
    return sections


def column(history: Sequence[Record], name: str, scale: float = 1.0) -> np.ndarray:
    """One number of every iteration, NaN where it was not known."""
    return np.array([np.nan if record[name] is None else record[name] * scale for record in history])


def numbers(history: Sequence[Record]) -> np.ndarray:
    """Iteration numbers, int."""
    return np.array([record["iteration"] for record in history], dtype=int)


def fsc_curves(history: Sequence[Record], box: int) -> Section:
    """FSC of the half maps, from the first iteration to the last."""
    chosen = [history[i] for i in np.unique(np.linspace(0, len(history) - 1, MOST_CURVES).round().astype(int))]
    labels = [""] * len(chosen)
    labels[0] = f"iteration {chosen[0]['iteration']}"
    labels[-1] = f"iteration {chosen[-1]['iteration']}"
    frequency_S = np.arange(len(chosen[-1]["fsc"])) / (box * chosen[-1]["pixel_size"])
    return Curve(
        "Fourier shell correlation of the half maps", frequency_S, [compared_fsc(record) for record in chosen], labels,
        "resolution / Å", "FSC", (0.143,), True, y_range=(-0.1, 1.05), ramp=True,
        caption="Pale to strong: the iterations, each as far as its images were used. Up to 40 Å the halves are joined.",
    )  # fmt: skip


def compared_fsc(record: Record) -> np.ndarray:
    """FSC of an iteration, NaN beyond the images' size, where nothing was compared."""
    fsc_S = np.array(record["fsc"], float)
    fsc_S[record["current_size"] // 2 + 1 :] = np.nan
    return fsc_S


def resolution_curve(history: Sequence[Record]) -> Section:
    """Resolution that the run works with, of every iteration."""
    caption = (
        "The last shell in which the map has no less signal than noise (SSNR 1, FSC 1/2): what image size and sampling follow. "
        "The resolution of the result is that of FSC 0.143 between the unfiltered half maps, without a mask."
    )
    return Curve("Resolution at SSNR 1", numbers(history), [column(history, "resolution")], [""], "iteration", "resolution / Å",
                 caption=caption)  # fmt: skip


def sampling_curves(history: Sequence[Record]) -> list[Section]:
    """Changes and accuracy beside the step of the grid, for angles and for offsets."""
    found: list[Section] = []
    for title, names, unit in (
        ("Angles", ("fine_angular_step", "changes_angles", "accuracy_angles"), "degrees"),
        ("Offsets", ("fine_offset_step", "changes_offsets", "accuracy_offsets"), "Å"),
    ):
        ys = [column(history, name) for name in names]
        labels = ["step of the fine grid", "mean change", "expected accuracy"]
        found.append(Curve(title, numbers(history), ys, labels, "iteration", unit))
    return found


def pmax_curve(history: Sequence[Record]) -> Section:
    """Mean of the largest posterior weights."""
    return Curve("How sure the poses are", numbers(history), [column(history, "pmax")], [""], "iteration", "mean Pmax",
                 y_range=(0.0, 1.02), caption="Mean over the particles of the largest posterior weight of one pose.")  # fmt: skip


def timings(history: Sequence[Record]) -> list[Section]:
    """Seconds of each stage, iteration by iteration, and what travelled between ranks."""
    stages = list(dict.fromkeys(name for record in history for name in record["took"] if name != "total"))
    parts = {name: np.array([record["took"].get(name, 0.0) for record in history]) for name in stages}
    return [Stack("Where the time went", numbers(history), parts, "iteration", "seconds"), *communication(history)]


def communication(history: Sequence[Record]) -> list[Section]:
    """Megabytes that travelled and seconds spent on it, iteration by iteration; nothing if a process was alone."""
    if not all("communication" in record for record in history):
        return []
    tables = [record["communication"] for record in history]
    names = sorted({name for table in tables for name, entry in table["by_name"].items() if entry["kind"] != "wait"})
    empty = {"bytes": 0}
    sent = {name: np.array([table["by_name"].get(name, empty)["bytes"] / 1e6 for table in tables]) for name in names}
    labels = {"sending": "", "behind computing": "hidden_", "waiting for other ranks": "waiting_"}
    took = {text: np.array([np.mean(table[f"{name}seconds_of_ranks"]) for table in tables]) for text, name in labels.items()}
    return [
        *ranks(tables),
        Stack("What a rank sent", numbers(history), sent, "iteration", "megabytes"),
        Stack(f"Seconds of {tables[-1]['ranks']} ranks, mean", numbers(history), took, "iteration", "seconds"),
    ]


def ranks(tables: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Who has worked on what, in all iterations together that as many ranks shared as the last one. tables: of each iteration."""
    same = [table["work"] for table in tables if "work" in table and table["ranks"] == tables[-1]["ranks"]]
    header = ["rank", "host", "device", "particles owned", "worked on", "of others", "seconds of computing"]
    rows = [
        [str(rank), last["host"], last["device"], last["owned"],
         *(sum(work[rank][name] for work in same) for name in ("worked", "helped", "seconds"))]
        for rank, last in enumerate(same[-1] if same else [])
    ]  # fmt: skip
    caption = "Who is done with its own particles helps others. All iterations together."
    return [Table("Ranks", rows, header, caption=caption)] if rows else []


def maps_shown(iteration: Iteration, drawn: Mapping[str, np.ndarray]) -> Section:
    """Slices of both halves; at the end also the map of all particles, in every view (drawn)."""
    maps = {f"half-set {number}": half.map_ZYX for number, half in enumerate(iteration.state.halves, 1)}
    rows = {f"reference of {name}: central slices xy, xz, yz": slices_picture(as_array(one)) for name, one in maps.items()}
    caption = "Protein is bright. Both halves should look alike as far as they agree."
    joined = {f"map of all particles, neither masked nor sharpened: {VIEWS}": one for one in drawn.values()}
    return Pictures("Maps", joined | rows, caption)


def as_array(map_ZYX: Tensor) -> np.ndarray:
    """A map as the report's drawings take it."""
    return to_host(map_ZYX).float().numpy()


def orientations(iteration: Iteration, config: RefineConfig) -> Section:
    """Views of the particles on the sphere (at most 20,000 of them), symmetry copies included."""
    rotation_B33 = iteration.state.poses.rotation_B33.cpu().numpy()
    step = -(-len(rotation_B33) // MOST_VIEWS)
    return Orientations("Viewing directions", rotation_B33[::step], symmetry_matrices(config.symmetry).numpy())


def junk_histograms(iteration: Iteration) -> list[Section]:
    """Log-likelihood, Pmax and entropy of the particles."""
    poses = iteration.state.poses
    likelihood_B, pmax_B, entropy_B = (one.cpu().numpy() for one in (poses.log_likelihood_B, poses.pmax_B, poses.entropy_B))
    return [
        Histogram("Log-likelihood of each particle", likelihood_B, "log-likelihood contribution", caption=JUNK),
        Histogram("Log-likelihood of each particle, less that of noise alone", poses.gain_B.cpu().numpy(), "gain / nats",
                  caption="Images with about 0 are as likely noise; `verglas select --outliers` discards the low tail."),
        Histogram("Largest posterior weight of each particle", pmax_B, "Pmax"),
        Histogram("Spread of each particle's posterior", entropy_B, "posterior entropy / nats",
                  caption="exp(entropy) is about the number of poses that share the particle."),
    ]  # fmt: skip


def notes(history: Sequence[Record]) -> Section:
    """What the schedule did and why; a note that lasts over iterations is one row, with its latest numbers."""
    runs: list[tuple[str, int, int, str]] = []  # gist, first and last iteration, note
    for record in history:
        number = record["iteration"]
        for note in record["notes"]:
            same = [run for run in runs if run[0] == gist(note) and run[2] == number - 1]
            if same:
                runs[runs.index(same[0])] = (same[0][0], same[0][1], number, note)
            else:
                runs.append((gist(note), number, number, note))
    rows = [[str(first) if first == last else f"{first} to {last}", note] for _, first, last, note in runs]
    title = "Notes of the schedule"
    return Table(title, rows, ["iteration", "what happened"]) if rows else Text(title, "Nothing was changed yet.")
