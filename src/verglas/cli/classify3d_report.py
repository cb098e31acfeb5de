"""report.html of a classification, rewritten as it goes on. Imported only by a run that writes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from verglas.cli.refine_report import (
    VIEWS,
    ReportWriter,
    as_array,
    junk_histograms,
    notes,
    numbers,
    orientations,
    pmax_curve,
    sampling_curves,
    timings,
)
from verglas.report import Curve, KeyFigures, Pictures
from verglas.report.pictures import slices_picture
from verglas.report.sections import Section

if TYPE_CHECKING:
    from torch import Tensor

    from verglas.cli.refine_watch import Record
    from verglas.refinement.config import RefineConfig
    from verglas.refinement.driver import Iteration


class ClassReport(ReportWriter):
    """The page of a classification."""

    subject = "3-D classification"

    def finished(self, history: Sequence[Record], iteration: Iteration) -> bool:
        return bool(history[-1]["final"])

    def final_maps(self, iteration: Iteration) -> dict[str, Tensor]:
        """File name -> map of each class."""
        state = iteration.state
        return {f"run_it{state.iteration:03d}_class{k:03d}.png": half.map_ZYX for k, half in enumerate(state.halves, 1)}

    def sections(self, history: Sequence[Record], iteration: Iteration, drawn: Mapping[str, np.ndarray]) -> list[Section]:
        return sections_of(history, iteration, self.config, self.run.figures, list(drawn.values()))


def sections_of(
    history: Sequence[Record], iteration: Iteration, config: RefineConfig, figures: dict[str, dict[str, Any]],
    drawn_C: Sequence[np.ndarray],
) -> list[Section]:  # fmt: skip
    """Everything on the page, in its order."""
    done = history[-1]["final"]
    sections: list[Section] = [KeyFigures("What came out" if done else "Where it stands", figures)]
    sections += [*class_curves(history), class_maps(history, iteration, drawn_C), *sampling_curves(history), pmax_curve(history)]
    return [*sections, *timings(history), orientations(iteration, config), *junk_histograms(iteration), notes(history)]


def class_curves(history: Sequence[Record]) -> list[Section]:
    """Shares and resolutions of the classes and how many particles change class, over the iterations."""
    count = len(history[-1]["classes"])
    labels = [f"class {k + 1}" for k in range(count)]

    def column(name: str, scale: float = 1.0) -> list[np.ndarray]:
        def one(record: Record, k: int) -> float:  # while the poses settle there is one class
            return scale * record["classes"][k][name] if k < len(record["classes"]) else np.nan

        return [np.array([one(record, k) for record in history]) for k in range(count)]

    changed = np.array([100 * record["changes_classes"] for record in history])
    at = numbers(history)
    sections: list[Section] = [
        Curve("Shares of the classes", at, column("share", 100.0), labels, "iteration", "share of the particles / %"),
        Curve("Resolution of the classes", at, column("resolution"), labels, "iteration", "resolution / Å",
              caption="Where the signal-to-noise ratio falls below 1. Without half-sets, it depends on --tau2-fudge."),
        Curve("Particles that change class", at, [changed], [""], "iteration", "share of the particles / %"),
    ]  # fmt: skip
    return sections if count > 1 else sections[1:2]


def class_maps(history: Sequence[Record], iteration: Iteration, drawn_C: Sequence[np.ndarray]) -> Section:
    """The maps, the largest class first: central slices, at the end every view (drawn)."""
    order = np.argsort([-one["share"] for one in history[-1]["classes"]], kind="stable").tolist()
    rows = {}
    for k in order:
        one = history[-1]["classes"][k]
        if one["share"] > 0:
            text = f"class {k + 1}: {100 * one['share']:.1f} %, {one['resolution']:.3g} Å"
            rows[text] = drawn_C[k] if drawn_C else slices_picture(as_array(iteration.state.halves[k].map_ZYX))
    seen = VIEWS if drawn_C else "central slices xy, xz, yz"
    return Pictures("Maps of the classes", rows, f"Each: {seen}. Protein is bright. Classes without particles are not shown.")
