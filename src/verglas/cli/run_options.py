"""Options that all iterative commands share (refine, classify3d, ...). Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from verglas.cli.common import Flag, HelpedComputing, absolute
from verglas.errors import InputError
from verglas.refinement.config import Precision, RefineConfig


@dataclass(kw_only=True)
class ParticleOptions:
    """Of commands that compare particles with anything. A command adds its own options, and makes its configuration of
    `config_options` and its job of `job_options`."""

    particles: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(required)")] = None
    """Particles, .star or .cs."""
    diameter: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(required)")] = None
    """Of the particle with some room around it: circular mask on the images, spherical mask on the maps."""
    out: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(required)")] = None
    """Folder to be made."""
    continue_from: Annotated[Path | None, arg(name="continue", metavar="DIR", help_behavior_hint="(default: a new run)")] = None
    """Go on with a run that was stopped, from its last whole iteration; everything but --device and --threads is kept."""
    offset_range: Annotated[float, arg(metavar="PX")] = RefineConfig.offset_range
    """How far from the last centre shifts are searched."""
    offset_step: Annotated[float, arg(metavar="PX")] = RefineConfig.offset_step
    """Step of the coarse search over shifts, halved by oversampling."""
    seed: int = RefineConfig.seed
    """For random divisions of the particles and the random turns of the grids. On a CPU the same seed gives the same files."""
    precision: Annotated[Precision, arg(metavar="auto|half|single|double")] = RefineConfig.precision
    """Of the comparison; sums are single or better. auto: half on a GPU, single on a CPU."""
    memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")] = None
    """Of the GPU (of the computer with --device cpu), all that may be used."""
    image_memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: what is free)")] = None
    """For images. What does not fit is read from the files again in every iteration, while the last batch is compared."""
    scratch: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: none)")] = None
    """Folder on a fast disk of the computer: images are copied there once and read from there, if the files are on a slow or
    shared disk. The copies are removed at the end. On several computers each copies those of its own ranks."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the STAR file's)")] = None
    """What image names are relative to, if not the STAR file's folder (or the current one)."""
    skip_bad: Flag = False
    """Leave out images with NaN or without contrast instead of stopping (one more reading of all images)."""
    ignore_contrast: Flag = False
    """Go on even if references or images look inverted (protein dark)."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    elastic: Flag = False
    """Go on by itself after a lost process: with --gpus up to three times, on the GPUs that are left. Whoever starts the same
    command again (torchrun --max-restarts, sbatch --requeue) goes on with the run in --out, if its options are these."""
    computing: HelpedComputing = field(default_factory=HelpedComputing)

    def require(self, *names: str) -> None:
        """InputError for the first of these options that was not given."""
        for name in names:
            if getattr(self, name) in (None, []):
                raise InputError(f"--{name}", "not given", "it, for a new run", "Or go on with a run: --continue DIR.")

    def config_options(self) -> dict[str, Any]:
        """What these options say of a `RefineConfig`."""
        return {
            "diameter": self.diameter, "offset_range": self.offset_range, "offset_step": self.offset_step, "seed": self.seed,
            "precision": self.precision, "memory_gb": self.memory, "image_memory_gb": self.image_memory,
        }  # fmt: skip

    def job_options(self) -> dict[str, Any]:
        """What these options say of a `run_loop.Job`; paths of inputs absolute."""
        assert self.particles is not None
        return {
            "particles": absolute(self.particles), "out": self.out,
            "folder": absolute(self.folder) if self.folder else None, "skip_bad": self.skip_bad,
            "scratch": absolute(self.scratch) if self.scratch else None, "ignore_contrast": self.ignore_contrast,
            "overwrite": self.overwrite, "device": self.computing.device, "threads": self.computing.threads,
            "cpu_ranks": self.computing.cpu_ranks,
        }  # fmt: skip


@dataclass(kw_only=True)
class RunOptions(ParticleOptions):
    """Of commands that compare particles with maps."""

    sym: Annotated[str, arg(metavar="GROUP")] = RefineConfig.symmetry
    """Point group of every map: Cn, Dn, T, O, I (= I2), I1, I2, I3, I4."""
    initial_resolution: Annotated[float, arg(metavar="Å")] = RefineConfig.initial_resolution
    """References are low-passed to this before the first iteration."""
    absolute_greyscale: Flag = RefineConfig.absolute_greyscale
    """References have the grey values of the particles: no first iteration by cross-correlation."""
    mask: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: a soft sphere)")] = None
    """Map with values 0..1: the solvent outside is flattened in every iteration."""
    healpix_order: Annotated[int, arg(metavar="N")] = RefineConfig.healpix_order
    """Angular sampling at the start: 1 = 30°, 2 = 15°, 3 = 7.5°, halved by oversampling."""

    def config_options(self) -> dict[str, Any]:
        """What these options say of a `RefineConfig`."""
        return super().config_options() | {
            "symmetry": self.sym, "initial_resolution": self.initial_resolution, "healpix_order": self.healpix_order,
            "absolute_greyscale": self.absolute_greyscale, "mask": absolute(self.mask) if self.mask else None,
        }  # fmt: skip


@dataclass(kw_only=True)
class KnownPoses(RunOptions):
    """Of commands that can look for the poses of particles near those that they came with."""

    relax_sym: Annotated[str | None, arg(metavar="GROUP", help_behavior_hint="(default: none)")] = None
    """For particles that are nearly of this point group, which holds the one of --sym: the search goes on near the poses of the
    particles' file and near all that this group makes of them, all equally likely before. So what breaks the symmetry (one
    subunit differs, is missing or has a ligand) is found from poses that a refinement with the symmetry gave."""

    def config_options(self) -> dict[str, Any]:
        """What these options say of a `RefineConfig`."""
        return super().config_options() | {"relax_symmetry": self.relax_sym}
