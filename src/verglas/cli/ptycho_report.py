"""verglas ptycho report: the page of a run, again or with more in it. Option declarations; the page is made in ptycho_page."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from verglas.cli.common import Flag
from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.ptychography.scan import Reconstruction


@dataclass(kw_only=True)
class PtychoReport:
    """Write report.html of a reconstruction again, with more in it.

    For the phase unwrapped, for a comparison with a truth, or while the run is under way. With --truth, or where half1.cxi
    and half2.cxi stand beside the result, it also says, and prints, how good the object is: error and structural similarity
    once everything is removed that data leave open (global phase, phase slope, scale, shift), Fourier ring correlation.

    Example: verglas ptycho report found --truth star/truth.cxi --unwrap
    """

    run_folder: Positional[Annotated[Path, arg(metavar="DIR")]]
    """Folder of `verglas ptycho reconstruct`, finished or not."""
    truth: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """truth.cxi of `verglas ptycho simulate`, or any other reconstruction to compare with."""
    unwrap: Flag = False
    """Show the phase without jumps of 2 pi."""
    out: Annotated[Path | None, arg(metavar="HTML", help_behavior_hint="(default: report.html in the folder)")] = None
    """Where to write the page; replaced if it is there."""

    def run(self) -> None:
        """Read what the run has so far, write the page, print the verdict."""
        from verglas.cli.ptycho_page import Shown, write_page
        from verglas.cli.ptycho_run import read_history, read_positions
        from verglas.io.progress import say, say_facts
        from verglas.ptychography.files_result import read_result
        from verglas.ptychography.judge import position_error

        found, facts = self._newest()
        nominal_B2 = read_positions(self.run_folder / "positions.csv")
        shown = Shown(nominal_B2, found, read_history(self.run_folder / "events.jsonl"), self.unwrap)
        figures = dict(facts.get("figures", {}))
        halves = [self.run_folder / name for name in ("half1.cxi", "half2.cxi")]
        said: dict[str, str] = {}
        if all(half.exists() for half in halves):
            shown.compare_halves(*(read_result(half)[0] for half in halves))
            period, unit = shown.resolution()
            figures["resolution_of_halves"] = {"value": period, "unit": unit}
            said["halves agree to"] = f"{period} {unit}"
        if self.truth is not None:
            truth = read_result(self.truth)[0]
            verdict = shown.compare_truth(truth)
            figures["error_against_truth"] = {"value": float(f"{verdict.error:.4g}"), "unit": ""}
            said |= {
                "error": f"{verdict.error:.5g}", "SSIM of the amplitude": f"{verdict.ssim_amplitude:.5f}",
                "SSIM of the phase": f"{verdict.ssim_phase:.5f}", "error of the phase": f"{verdict.phase_error:.4g} rad rms",
            }  # fmt: skip
            if len(truth.positions_B2) == len(found.positions_B2):
                errors = [position_error(one, truth.positions_B2.numpy()) for one in (nominal_B2, found.positions_B2.numpy())]
                said["error of the positions"] = f"{errors[1]:.3g} px rms, as recorded {errors[0]:.3g} px"
        page = self.out or self.run_folder / "report.html"
        write_page(page, shown, figures, facts, f"Ptychography: pass {len(found.error_P)}")
        if said:
            say_facts("against the truth" if self.truth else "halves", said)
        say(f"The page is {page}")

    def _newest(self) -> tuple[Reconstruction, dict]:
        """The result, or the last checkpoint, and the facts of the run."""
        from verglas.ptychography import checkpoint
        from verglas.ptychography.files_result import read_result

        folder = self.run_folder
        places = [folder / "result.cxi"] if (folder / "result.cxi").exists() else checkpoint.numbered(folder, "all")
        if not places:
            raise InputError(folder, "no result.cxi and no checkpoint in it", "the folder of `verglas ptycho reconstruct`",
                             "Wait for the first checkpoint of a run under way.")  # fmt: skip
        found, facts = read_result(places[0])
        result = folder / "result.json"
        return found, json.loads(result.read_text(encoding="utf-8")) if result.exists() else facts
