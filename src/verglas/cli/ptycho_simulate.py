"""verglas ptycho simulate: scans whose truth is known. Option declarations; numpy is imported in `run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, check_seed
from verglas.ptychography.simulation_options import DetectorOptions, LightOptions, PathOptions, StarOptions

if TYPE_CHECKING:
    import numpy as np

    from verglas.io.runfolder import RunFolder
    from verglas.ptychography.scan import Reconstruction
    from verglas.ptychography.simulation import Setting, Truth


@dataclass(kw_only=True)
class PtychoSimulate:
    """Simulate a ptychographic scan with known truth.

    A Siemens star with phase and absorption, a defocused beam, a path of overlapping positions, counted photons. Writes
    scan.cxi (patterns and recorded positions, no probe) and truth.cxi (object, probe, true positions, intensities), which
    `verglas ptycho report --truth` compares with a reconstruction.

    Example: verglas ptycho simulate --window 64 --positions 200 --photons 1e5 --out star
    """

    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    with_probe: Flag = False
    """Put the true probe into scan.cxi, as a first guess."""
    seed: int = 0
    """The same seed gives the same scan."""
    star: StarOptions = field(default_factory=StarOptions)
    light: LightOptions = field(default_factory=LightOptions)
    path: PathOptions = field(default_factory=PathOptions)
    detector: DetectorOptions = field(default_factory=DetectorOptions)

    def run(self) -> None:
        """Check the options, simulate into a run folder, write the report."""
        for group in (self.star, self.light, self.path, self.detector):
            group.check()
        check_seed(self.seed)
        from verglas.io.runfolder import RunFolder
        from verglas.ptychography.files_result import write_result
        from verglas.ptychography.files_write import write_scan
        from verglas.ptychography.simulation import Setting, make_truth, patterns, stored_as

        setting = Setting(self.star, self.light, self.path, self.detector, self.seed)
        with RunFolder.create(self.out, "ptycho simulate", self, self.overwrite) as run:
            run.provenance("cpu", "numpy", "double", "simulations are exact")
            truth = make_truth(setting)
            probe_MYX = truth.probe_MYX if self.with_probe else None
            with run.progress("Simulating", len(truth.position_B2), "patterns") as bar:
                write_scan(run.path("scan.cxi"), truth.geometry, truth.recorded_B2, patterns(truth, setting),
                           stored_as(setting), probe_MYX, bar.advance)  # fmt: skip
            write_result(run.path("truth.cxi"), as_reconstruction(truth, setting), run.facts())
            note_figures(run, truth, setting)
            write_page(run, truth, setting)


def as_reconstruction(truth: Truth, setting: Setting) -> Reconstruction:
    """The truth in the terms of a result."""
    import torch

    from verglas.ptychography.scan import Reconstruction

    window = setting.detector.window
    return Reconstruction(
        torch.from_numpy(truth.object_YX)[None, None], torch.from_numpy(truth.probe_MYX), torch.from_numpy(truth.position_B2),
        torch.from_numpy(truth.scale_B), torch.full((window, window), setting.detector.background),
        pixel=truth.geometry.object_pixel((window, window)),
    )  # fmt: skip


def note_figures(run: RunFolder, truth: Truth, setting: Setting) -> None:
    """Key figures of a simulated scan."""
    assert truth.geometry.wavelength and truth.geometry.distance
    run.figure("positions", len(truth.position_B2))
    run.figure("window", setting.detector.window, "px")
    run.figure("object", " x ".join(map(str, truth.object_YX.shape)), "px")
    run.figure("object_pixel", setting.detector.pixel, "nm")
    run.figure("wavelength", float(f"{1e9 * truth.geometry.wavelength:.4g}"), "nm")
    run.figure("distance", float(f"{truth.geometry.distance:.4g}"), "m")


def write_page(run: RunFolder, truth: Truth, setting: Setting) -> None:
    """report.html: the object, the probe, where it went, the first patterns."""
    import numpy as np

    from verglas.report import Field, KeyFigures, Moves, Pictures, write_report
    from verglas.report.planes import wave_picture
    from verglas.report.sections import Section

    pixel = 1e-9 * setting.detector.pixel
    sections: list[Section] = [
        KeyFigures("What was made", run.figures),
        Field("Amplitude", np.abs(truth.object_YX), "transmission", pixel),
        Field("Phase", np.angle(truth.object_YX), "phase / rad", pixel),
        Pictures("Probe", {f"mode {number}": wave_picture(one) for number, one in enumerate(truth.probe_MYX, 1)},
                 "Brightness is amplitude, hue is phase."),
        Moves("Positions", truth.recorded_B2, truth.position_B2, "px",
              caption="Points: as the file tells. Arrows: to where the beam was in truth."),
        Field("Mean pattern", mean_pattern(truth), "log10(1 + expected counts)", caption="Of at most 50 positions."),
    ]  # fmt: skip
    write_report(run.path("report.html"), "A simulated scan", sections, run.facts())


def mean_pattern(truth: Truth) -> np.ndarray:
    """log10(1 + expected counts) of some positions, [Y, X]."""
    import numpy as np

    from verglas.ptychography.simulation import intensities

    step = -(-len(truth.position_B2) // 50)
    return np.log10(1 + intensities(truth, truth.position_B2[::step], truth.scale_B[::step]).mean(0))
