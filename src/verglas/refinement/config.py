"""What a refinement can be told, with RELION's auto-refine defaults. Imports nothing heavy: the command line is made from it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Precision = Literal["auto", "half", "single", "double"]
Align = Literal["all", "offsets", "none"]
Start = Literal["settle", "random"]


@dataclass(frozen=True, kw_only=True)
class RefineConfig:
    """Options of one auto-refinement. Lengths in Å, angles in degrees, unless a comment says otherwise."""

    diameter: float  # of the particle: circular mask on images, spherical mask on maps
    symmetry: str = "C1"
    relax_symmetry: str | None = None  # searches are local about every pose that this larger group makes of each one
    initial_resolution: float = 60.0  # the reference is low-passed to this
    absolute_greyscale: bool = False  # the reference has the data's grey scale: no first iteration by cross-correlation
    mask: Path | None = None  # replaces the spherical mask on the maps
    solvent_corrected_fsc: bool = False  # FSC inside the mask, corrected by phase randomisation; needs a mask
    healpix_order: int = 2  # of the coarse grid at the start
    oversampling: int = 1  # each coarse orientation has 8^n children, each offset 4^n
    offset_range: float = 5.0  # px
    offset_step: float = 2.0  # px, coarse
    local_from_order: int = 4  # coarse order from which on searches are local
    perturbation: float = 0.5  # of the grids, in steps
    adaptive_fraction: float = 0.999
    join_resolution: float = 40.0  # below, the halves are averaged
    mask_edge: float = 5.0  # px
    padding: float = 2.0
    tau2_fudge: float = 1.0
    correct_norm: bool = True
    correct_scale: bool = True
    max_iterations: int = 60
    initial_offset_sigma: float = 10.0
    relion_offset_prior: bool = False  # count offsets in the prior as RELION does (Å taken for px): for comparisons only
    limit_resolution: float | None = None  # finer detail of the images is not compared, though it goes into the maps
    seed: int = 0
    precision: Precision = "auto"  # half operands with single sums on a GPU, single on a CPU
    memory_gb: float | None = None  # of the device that computes: all that may be used of it; None: what is free
    image_memory_gb: float | None = None  # for images, wherever they stay; None: what is free


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(RefineConfig):
    """Options of one 3-D classification, with RELION's defaults where the ones of a refinement differ."""

    classes: int = 1
    tau2_fudge: float = 4.0  # without half-sets, the weight of the data against the prior is chosen
    max_iterations: int = 25  # as many are made
    local_from_order: int = 11  # the sampling is fixed: searches are local from the start or never
    local_sigma: float = 0.0  # spread of the prior about the poses of the particles; 0: global searches
    start: Start = "settle"  # of several classes from one reference: one until poses have settled; or divided at random
    focus_mask: Path | None = None  # outside it all classes have one map, their mean
    align: Align = "all"  # offsets: orientations stay those of the particles; none: offsets stay as well, nothing is searched


@dataclass(frozen=True, kw_only=True)
class Classify2dConfig(RefineConfig):
    """Options of one 2-D classification, with RELION's defaults where the ones of a refinement differ."""

    classes: int = 50
    psi_step: float = 12.0  # degrees, coarse; halved by oversampling
    tau2_fudge: float = 2.0
    max_iterations: int = 25  # as many are made
    initial_resolution: float = 40.0  # the random averages that it starts from are low-passed to this
    absolute_greyscale: bool = True  # those averages have the particles' grey scale
    centre: bool = True  # averages are moved so that their positive pixels are centred
    gradient: bool | None = None  # batches first, all particles at last; None: where there are particles enough
    batch: int = 100  # particles of a batch for each class, to begin with
    select: str = "auto"  # which classes are selected, see refinement/class_quality.py


@dataclass(frozen=True, kw_only=True)
class AbInitioConfig(ClassifyConfig):
    """Options of a search for first models: a stochastic gradient from random starts, then some iterations with all particles.

    initial_resolution, final_resolution: of the images at the gradient's start and end; neither is finer than the grid can
    tell at the rim of the particle (`abinitio_schedule`). find_symmetry: the maps say what point group follows; symmetry is C1.
    """

    initial_resolution: float = 40.0
    final_resolution: float = 15.0
    steps: int = 80  # of the gradient
    batch: int = 100  # particles of a step and class at the start; three times as many at the end
    restarts: int = 2  # independent random starts; the one that explains the particles best is kept
    temperature: float = 2.0  # of the first steps: the noise's variance is multiplied by it, falling to 1
    full_iterations: int = 3  # with all particles, and as many with the point group
    find_symmetry: bool = False
