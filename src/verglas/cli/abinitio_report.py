"""report.html of a search for first models, rewritten as it goes on. Imported only by a run that writes one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from verglas.cli.abinitio_run import HAND
from verglas.cli.classify3d_report import ClassReport
from verglas.cli.solve_choices import doubt_of_starts
from verglas.refinement.abinitio_symmetry import decided
from verglas.refinement.config import AbInitioConfig
from verglas.report import Text
from verglas.report.sections import Section

if TYPE_CHECKING:
    import numpy as np

    from verglas.cli.refine_watch import Record
    from verglas.refinement.driver import Iteration


class FirstModelsReport(ClassReport):
    """The page of a classification, and what cannot be known of maps made from nothing."""

    subject = "First models"

    def update(self, history: Sequence[Record], iteration: Iteration) -> None:
        """As of a classification, under the point group once it was found."""
        assert isinstance(self.config, AbInitioConfig)
        self.config = decided(self.config, iteration.state)
        super().update(history, iteration)

    def sections(self, history: Sequence[Record], iteration: Iteration, drawn: Mapping[str, np.ndarray]) -> list[Section]:
        """As of a classification, with what is left open after its key figures."""
        made, *rest = super().sections(history, iteration, drawn)
        said = f"<p>{HAND} <code>verglas map --flip-hand</code> mirrors a map.</p>"
        consistency = history[-1]["consistency"]
        if doubt := doubt_of_starts(consistency):
            said = f"<p><b>{doubt}</b></p>{said}"
        if consistency is None:
            said += "<p>One start tells nothing of its luck: <code>--restarts 2</code> compares two.</p>"
        else:
            said += f"<p>Maps of independent starts agree by {consistency:.2f} (mean correlation at 20 Å, either hand).</p>"
        return [made, Text("What random starts leave open", f"{said}<p>Now: {history[-1]['stage']}.</p>"), *rest]
