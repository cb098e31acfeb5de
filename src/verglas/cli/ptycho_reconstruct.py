"""verglas ptycho reconstruct: a scan in, object and probe out. Options; the work is in ptycho_run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from tyro.conf import FlagCreatePairsOff, arg

from verglas.cli.common import Flag, SharedComputing, absolute, check_seed, refuse_beside_continue, started_again
from verglas.errors import InputError
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.read_options import ReadOptions


@dataclass(kw_only=True)
class PtychoReconstruct:
    """Reconstruct object and probe from overlapping diffraction patterns.

    Writes result.cxi (object, probe modes, corrected positions and all else that was fitted), amplitude.png, phase.png,
    error.csv and report.html, which is rewritten as it goes on. With --halves every second position is also reconstructed
    alone, and the rest alone, and report.html tells how far both agree (Fourier ring correlation). A run that was stopped
    or killed goes on with --continue DIR from its last checkpoint, to the same result. With --gpus several GPUs share the work,
    each with a tile of the object and the patterns that lie on it (docs/ptychography.md).

    Example: verglas ptycho reconstruct --scan star/scan.cxi --passes 100 --out found
    """

    scan: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """Patterns and positions: .cxi .h5 .nxs .ptyd .npz (`verglas ptycho info` tells what is read)."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """Folder to be made."""
    continue_from: Annotated[Path | None, arg(name="continue", metavar="DIR", help_behavior_hint="(default: a new run)")] = None
    """Go on with a run that was stopped; everything but --device and --threads is kept."""
    halves: Flag = False
    """Reconstruct two independent halves of the positions as well, for the resolution; takes twice as long."""
    beam_width: Annotated[float | None, arg(metavar="F", help_behavior_hint="(default: the file's probe, else by trials)")] = None
    """First guess of the probe in a far field: light with the mean pattern's cone that is so wide on the object, in widths of
    the window; below 0: its focus lies behind the object, 0: in it. Trials take some passes over a part of the scan."""
    unwrap: Flag = False
    """Show the phase without jumps of 2 pi."""
    checkpoint_every: Annotated[int, arg(metavar="N", help_behavior_hint="(default: what takes about a minute)")] = 0
    """Passes from one checkpoint to the next."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    elastic: Flag = False
    """Go on by itself after a lost process: with --gpus up to three times, on the GPUs that are left. Whoever starts the same
    command again (torchrun --max-restarts, sbatch --requeue) goes on with the run in --out, if its options are these."""
    fit: FlagCreatePairsOff[PtychoOptions] = field(default_factory=PtychoOptions)
    read: ReadOptions = field(default_factory=ReadOptions)
    computing: SharedComputing = field(default_factory=SharedComputing)

    def run(self) -> None:
        """Check the options, then reconstruct, or go on with a stopped run."""
        from verglas.cli.ptycho_run import PtychoJob, PtychoRun, job_of_run, was_begun

        if self.continue_from is not None:
            refuse_beside_continue(self)
            PtychoRun(job_of_run(self.continue_from, self.computing.device, self.computing.threads), resumed=True).run()
            return
        for name in ("scan", "out"):
            if getattr(self, name) is None:
                raise InputError(f"--{name}", "not given", "it, for a new run", "Or go on with a run: --continue DIR.")
        if self.checkpoint_every < 0:
            raise InputError("--checkpoint-every", str(self.checkpoint_every), "1 or more, or 0 for about a minute")
        if self.beam_width is not None and not abs(self.beam_width) < 1:
            raise InputError("--beam-width", f"{self.beam_width:g}", "above -1, below 1: the window must hold the beam")
        check_seed(self.fit.seed)
        assert self.scan is not None and self.out is not None
        read = self.read if self.read.mask is None else replace(self.read, mask=absolute(self.read.mask))
        job = PtychoJob(
            scan=absolute(self.scan), out=self.out, halves=self.halves, unwrap=self.unwrap, beam_width=self.beam_width,
            checkpoint_every=self.checkpoint_every, fit=self.fit, read=read, overwrite=self.overwrite,
            device=self.computing.device, threads=self.computing.threads,
        )  # fmt: skip
        PtychoRun(job, resumed=started_again(self.elastic) and was_begun(job)).run()
