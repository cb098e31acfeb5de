"""report.html of a 2-D classification, rewritten as it goes on. Imported only by a run that writes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from verglas.cli.refine_report import ReportWriter, junk_histograms, notes, numbers, pmax_curve, timings
from verglas.refinement.class_quality import chosen_classes, ranking
from verglas.report import Curve, KeyFigures, Text
from verglas.report.pictures import MONTAGE_EDGE, shown, tag
from verglas.report.sections import Section

if TYPE_CHECKING:
    from torch import Tensor

    from verglas.cli.refine_watch import Record
    from verglas.refinement.config import Classify2dConfig
    from verglas.refinement.driver import Iteration

MOST_CURVES = 20  # classes whose share is drawn: the largest at the end
TILE = 96  # px of an average on the page
MOST_TILES = 200


class Class2dReport(ReportWriter):
    """The page of a 2-D classification."""

    subject = "2-D classification"
    in_space = False
    config: Classify2dConfig

    def finished(self, history: Sequence[Record], iteration: Iteration) -> bool:
        """Whether this is the last page."""
        return bool(history[-1]["final"])

    def final_maps(self, iteration: Iteration) -> dict[str, Tensor]:
        """None: averages are on the page as they are."""
        return {}

    def sections(self, history: Sequence[Record], iteration: Iteration, drawn: Mapping[str, np.ndarray]) -> list[Section]:
        """What stands on the page."""
        last = history[-1]
        return [
            KeyFigures("What came out" if last["final"] else "Where it stands", self.run.figures),
            montage(last, iteration, self.config), *class_curves(history), pmax_curve(history), *timings(history),
            *junk_histograms(iteration), notes(history),
        ]  # fmt: skip


def montage(last: Record, iteration: Iteration, config: Classify2dConfig) -> Section:
    """The class averages, the best first, with what is known of each."""
    from verglas.refinement.class_quality import ClassQuality

    qualities = [ClassQuality(**one) for one in last["averages"]]
    chosen = chosen_classes(config.select, qualities)
    order = ranking(qualities)[:MOST_TILES]
    tiles = []
    for k in order:
        one, edge = qualities[k], "#2a7" if k + 1 in chosen else "transparent"
        text = f"<b>{k + 1}</b>: {one.particles:,}<br>{one.resolution:.3g} Å, {one.score:.3g}"
        image_YX = iteration.state.halves[k].map_ZYX.float().cpu().numpy()
        image = tag(shown(image_YX, MONTAGE_EDGE), f"class {k + 1}")
        tiles.append(
            f'<figure style="margin: 0; width: {TILE}px; border: 2px solid {edge}">{image}'
            f'<figcaption style="font-size: .7rem; line-height: 1.2">{text}</figcaption></figure>'
        )
    body = f'<div style="display: flex; flex-wrap: wrap; gap: .4rem">{"".join(tiles)}</div>'
    caption = (
        "Number of the class, particles, resolution (SSNR 1) and score, which is told at the end; framed: selected. Each on its "
        "own grey scale."
    )
    return Text("Class averages by score", body, caption)


def class_curves(history: Sequence[Record]) -> list[Section]:
    """Shares of the largest classes, and how many particles change class, over the iterations."""
    last = history[-1]["averages"]
    largest = sorted(range(len(last)), key=lambda k: -last[k]["share"])[:MOST_CURVES]

    def share(record: Record, k: int) -> float:
        return 100 * record["averages"][k]["share"] if k < len(record["averages"]) else 0.0  # classes grow in number

    shares = [np.array([share(record, k) for record in history]) for k in largest]
    changed = np.array([100 * record["changes_classes"] for record in history])
    best = np.array([record["resolution"] for record in history])
    at = numbers(history)
    return [
        Curve("Shares of the largest classes", at, shares, [f"class {k + 1}" for k in largest], "iteration",
              "share of the particles / %"),
        Curve("Particles that change class", at, [changed], [""], "iteration", "share of the particles / %"),
        Curve("Resolution of the best class", at, [best], [""], "iteration", "resolution / Å",
              caption="Where the signal-to-noise ratio falls below 1."),
    ]  # fmt: skip
