"""verglas simulate: particle stacks whose truth is known. Option declarations; torch is imported in `run`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import UseAppendAction, arg

from verglas.cli.common import Computing, Flag, check_seed
from verglas.errors import InputError
from verglas.simulation.options import ImageOptions, MicroscopeOptions, SampleOptions

if TYPE_CHECKING:
    from verglas.io.runfolder import RunFolder
    from verglas.simulation.simulate import Simulated


@dataclass(kw_only=True)
class Simulate:
    """Simulate particle images with known truth.

    Writes particles.mrcs, particles.star (no poses), truth.star (poses, origins, classes; class 0 is junk), the truth of
    every conformation as a map in the grey values of the images, and start.mrc, a low-passed first map.

    Example: verglas simulate --model demo --out demo_data --n 2000 --box 64 --pixel 3 --snr 0.1
    """

    model: Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FILE", help_behavior_hint="(default: demo; repeatable)")] = ()
    """.pdb, .cif, .npz (xyz, w), .mrc or .map; demo and demo-open are built in. Repeat it for several conformations."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    seed: int = 0
    """The same seed gives the same particles, whatever the device and batch (noise: on the CPU)."""
    batch: Annotated[int | None, arg(metavar="N", help_behavior_hint="(default: by image size)")] = None
    """Images computed at once."""
    sample: SampleOptions = field(default_factory=SampleOptions)
    microscope: MicroscopeOptions = field(default_factory=MicroscopeOptions)
    image: ImageOptions = field(default_factory=ImageOptions)
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Check the options, simulate into a run folder, write the report."""
        self.check()
        device, reason = self.computing.start()  # first, as it imports PyTorch while the GPU wakes
        from verglas.io.runfolder import RunFolder
        from verglas.simulation.simulate import simulate

        with RunFolder.create(self.out, "simulate", self, self.overwrite) as run:
            made = simulate(self, run, device, reason)
            write_report_of(made, self, run)

    def check(self) -> None:
        """Raise InputError for options that make no sense, before anything heavy is loaded."""
        self.sample.check(max(len(self.model), 1))
        self.microscope.check()
        self.image.check()
        check_seed(self.seed)
        if self.batch is not None and self.batch < 1:
            raise InputError("--batch", str(self.batch), "at least 1")


def write_report_of(made: Simulated, options: Simulate, run: RunFolder) -> None:
    """report.html: key figures, the truth, where the particles look, their defoci."""
    import numpy as np

    from verglas.report import Histogram, KeyFigures, Orientations, Pictures, Slices, write_report
    from verglas.report.pictures import montage
    from verglas.report.sections import Section

    truth = made.truth
    particles = truth.class_B > 0
    defocus_B = 0.5 * (truth.ctf.defocus_u_B + truth.ctf.defocus_v_B).numpy()
    slices = [
        Slices(f"Truth of class {number}", map_ZYX, made.pixel_size, caption="In the grey values of the images.")
        for number, map_ZYX in enumerate(made.maps, 1)
    ]
    sections: list[Section] = [
        KeyFigures("What was made", run.figures),
        Pictures("The first images", {f"{len(made.examples_BYX)} particles": montage(made.examples_BYX, 8)}),
        *slices,
        Orientations("Viewing directions", truth.rotations().numpy()[particles]),
        Histogram("Defocus", defocus_B, "mean defocus / Å"),
        Histogram("Distance from the image centre", np.hypot(*truth.origin_B2[particles].T), "length of the origin / Å"),
    ]
    write_report(run.path("report.html"), "Simulated particles", sections, run.facts())
