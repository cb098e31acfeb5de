"""`verglas localres`: local resolution and a locally filtered map from two half-maps."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Computing, Flag
from verglas.postprocess.options import LocalOptions, MaskOptions

if TYPE_CHECKING:
    import numpy as np
    import torch

    from verglas.io.runfolder import RunFolder
    from verglas.postprocess.inputs import HalfMaps
    from verglas.postprocess.local import LocalResolution
    from verglas.report.sections import Section


@dataclass(kw_only=True)
class Localres:
    """Local resolution map and locally filtered map from two half-maps.

    FSC of the half-maps in soft windows on a grid, corrected with randomised phases, as relion_postprocess --locres
    measures it. Writes localres.mrc (Å) and filtered.mrc.

    Example: verglas localres --half1 run/half1.mrc --half2 run/half2.mrc --out local --sampling 20
    """

    half1: Annotated[Path, arg(metavar="MAP")]
    """Unfiltered map of the first half-set."""
    half2: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: --half1 with half1 -> half2)")] = None
    """Unfiltered map of the second half-set."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder for the results."""
    mask: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: made from the half-maps)")] = None
    """Where to take the statistics from; the measurement does not use it."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: what the files say)")] = None
    """Pixel size."""
    local: LocalOptions = field(default_factory=LocalOptions)
    seed: int = 0
    """Of the random phases."""
    overwrite: Flag = False
    """Replace an existing run in --out."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Read, measure, filter, write maps, table and report."""
        device, reason = self.computing.start()  # first, as it imports PyTorch while the GPU wakes
        from verglas.io.runfolder import RunFolder
        from verglas.postprocess.inputs import read_half_maps

        with RunFolder.create(self.out, "localres", self, self.overwrite) as run:
            run.provenance(device=device, kernels="torch FFT", precision="float64", reason=reason)
            halves = read_half_maps(self.half1, self.half2, self.pixel)
            for warning in halves.warnings:
                run.log(f"Warning: {warning}")
            self._check(halves)
            mask_ZYX = self._mask(halves)
            self._write(run, halves, self._measure(run, halves, device), mask_ZYX)

    def _check(self, halves: HalfMaps) -> None:
        from verglas.errors import InputError
        from verglas.postprocess.local import window_centres, window_of

        if min(self.local.sampling, self.local.randomise_at, self.local.lowest_resolution) <= 0:
            raise InputError("--sampling, --randomise-at, --lowest-resolution", "a value of 0 or less", "values above 0 Å")
        window, step = window_of(self.local, halves.pixel_size)
        if window.reach < 1 or not len(window_centres(halves.box, window, step)):
            found = f"window of radius {window.radius} px and edge {window.edge} px"
            fix = "Choose another --sampling or window."
            raise InputError("--window-radius", found, f"one that fits into the box of {halves.box} px", fix)

    def _mask(self, halves: HalfMaps) -> np.ndarray:
        import torch

        from verglas.postprocess.automask import make_mask
        from verglas.postprocess.inputs import read_mask

        if self.mask is not None:
            return read_mask(self.mask, halves.first)
        mean_ZYX = torch.tensor(halves.first.data_ZYX + halves.second.data_ZYX) / 2
        return make_mask(mean_ZYX, halves.pixel_size, MaskOptions(mask_extend=0.0))[0].numpy()

    def _measure(self, run: RunFolder, halves: HalfMaps, device: torch.device) -> LocalResolution:
        import torch

        from verglas.cli.postprocess import read_mtf
        from verglas.postprocess.local import local_resolution, window_centres, window_of

        window, step = window_of(self.local, halves.pixel_size)
        # Every window is measured twice (true and randomised phases), then every shell is filtered once.
        total = 2 * len(window_centres(halves.box, window, step)) + halves.box // 2 + 1
        mtf = read_mtf(self.local.mtf, self.local.mtf_pixel or halves.pixel_size)
        first, second = (torch.tensor(m.data_ZYX, device=device) for m in (halves.first, halves.second))
        with run.progress("Correlating in windows, filtering", total=total, unit="steps") as bar:
            return local_resolution(first, second, halves.pixel_size, self.local, self.seed, mtf, bar.advance)

    def _write(self, run: RunFolder, halves: HalfMaps, local: LocalResolution, mask_ZYX: np.ndarray) -> None:
        import numpy as np

        from verglas.io.mrc import Map, write_map
        from verglas.report.page import write_report
        from verglas.report.sections import Histogram, KeyFigures, Slices

        resolution_ZYX = local.resolution_ZYX.float().cpu().numpy()
        filtered_ZYX = local.filtered_ZYX.float().cpu().numpy()
        for name, data in (("localres.mrc", resolution_ZYX), ("filtered.mrc", filtered_ZYX)):
            write_map(run.path(name), Map(data, halves.pixel_size, halves.first.origin))
        self._write_windows(run, local, halves)
        inside = resolution_ZYX[(mask_ZYX > 0.5) & (resolution_ZYX > 0)]
        if inside.size:
            best, median, worst = np.percentile(inside, [2, 50, 98])
            run.figure("resolution_median", float(median), "Å")
            run.figure("resolution_best_2_percent", float(best), "Å")
            run.figure("resolution_worst_2_percent", float(worst), "Å")
        run.figure("windows", len(local.centre_P3))
        sections: list[Section] = [
            KeyFigures("Result", run.figures),
            Histogram("Local resolution in the mask", inside, "resolution (Å)"),
            Slices("Local resolution (bright: low resolution)", resolution_ZYX, halves.pixel_size),
            Slices("Locally filtered map", filtered_ZYX, halves.pixel_size),
        ]
        write_report(run.path("report.html"), "Local resolution", sections, run.facts())

    def _write_windows(self, run: RunFolder, local: LocalResolution, halves: HalfMaps) -> None:
        import pandas as pd

        from verglas.postprocess.output import write_csv

        centre_P3 = local.centre_P3.numpy()
        frame = pd.DataFrame({name: centre_P3[:, 2 - i] for i, name in enumerate(("x_px", "y_px", "z_px"))})
        frame["resolution_A"] = local.resolution_P.numpy()
        curves = pd.DataFrame(local.fsc_PS.numpy(), columns=[f"fsc_{s}" for s in range(halves.box // 2 + 1)])
        write_csv(run.path("windows.csv"), pd.concat([frame, curves], axis=1))
