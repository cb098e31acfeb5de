"""What a refinement's arrays and passes cost: bytes and rates. The one table that `plan` is computed from.

Rates were read off benchmarks/NOTES.md and single runs; a machine that is shared or older is slower. Times from them are
meant to tell minutes from hours; memory is meant to be right within some per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9

# Memory of the process before any data: Python, torch, pandas, compiled kernels (CPU); CUDA's libraries on top (GPU).
PROCESS_BYTES = {"cpu": 0.42 * GB, "cuda": 2.3 * GB}
CONTEXT_BYTES = 0.75 * GB  # of the device: CUDA's context with the compiled kernels, which nvidia-smi counts, too
HELD_SHARE = {"cpu": 1.10, "cuda": 1.06}  # of what arrays take at the peak: what the process, or PyTorch on a GPU, holds
PARTICLE_BYTES = 1200  # of the particle table and the poses, per particle (STAR files have some 25 columns)

# Numbers (of the precision of sums): that preparing one image makes at once, per pixel; of a prepared image, per coefficient.
PREPARING_PER_PIXEL = 8
PREPARING_PER_COEFFICIENT = 16
PREPARED_PER_COEFFICIENT = 6

SAMPLE_BYTES = {"cpu": 12, "cuda": 24}  # per sample of the fine search: score, accepted score, weight; on a GPU indices, too
CHOOSING_BYTES = {"cpu": 0, "cuda": 1}  # per sample of the coarse search beside its score: whether it is significant
CHOOSING_AT_ONCE = {"cpu": 0, "cuda": 2**27 * 9}  # bytes of what is made of some samples at a time to find that out
LOCAL_ORIENTATIONS = 250  # coarse orientations that a local search compares, about
LOCAL_OWN = 200  # of them, those that no other particle of the batch shares
LISTED_BYTES = 2**15 * 8  # of a particle whose scores are reduced as they are made: those listed, with their numbers
PART_BYTES = 12 / 64  # of each of its samples: for 64 of them the largest score, and where they are listed
SCANNED = 24  # particles whose scores are then in memory at a time
FINE_SHARE = 0.6  # of the memory for batches: what a part of the fine search takes beside the prepared batch


@dataclass(frozen=True)
class Counts:
    """What the memory of a particle in the coarse search depends on. box: px; orientations, offsets: compared with it;
    reduced: scores are reduced as they are made (kernels/coarse: global searches with half operands, not by correlation)."""

    box: int
    coefficients: int
    coarse_coefficients: int
    orientations: int
    offsets: int
    local: bool
    reduced: bool = False


def reserved_bytes(counts: Counts, operand: int, full: int) -> float:
    """What one particle of a batch is taken to need on the coarse grid: prepared image, shifted images, scores (and, in local
    searches, the slices that only it needs). The size of a batch follows from it. operand, full: bytes of a number."""
    c = counts
    images = c.offsets * 2 * c.coarse_coefficients * operand
    scores: float = c.offsets * c.orientations * (3 if c.local else 2) * full
    if c.reduced:
        scores = LISTED_BYTES + PART_BYTES * c.offsets * c.orientations + c.orientations * full
    whole = PREPARING_PER_COEFFICIENT * c.coefficients * full + PREPARING_PER_PIXEL * c.box**2 * full
    slices = LOCAL_OWN * 2 * c.coarse_coefficients * operand if c.local else 0
    return images + scores + whole + slices


VOXEL_IN_CELLS = (49, 29)  # bytes of a voxel of a reference with cells (kernels/project/cells.py): small and large volumes
LARGEST_IN_EIGHTS = 2**29  # bytes of cells of eight voxels; beyond, cells hold four
VOXEL_RUNNING, VOXEL_SETTLED = 4, 24  # accumulator: numbers of the sums' precision, bytes of the float64 copy
SLICES_BEFORE_FLUSH = 25_000  # of a half-set, at padding 2: the float64 copy is made after so many
VOXEL_TURNED = 7  # numbers: sums over a point group other than C and D, and copies while they are made (maximization/point_group)

# Fine samples (orientations times offsets, children of the significant coarse ones) that are compared for a particle. Measured
# on beta-galactosidase, D2; a blurred reference tells little, so that nearly half of the whole fine grid is looked at.
BLURRED_SHARE = 0.45
FINE_SAMPLES = {"correlation": 32, "global": 3500, "local": 150, "last": 150, "given": 32, "planes": 40}
DETAIL_AT_START, DETAIL = 0.9, 1.25  # resolution reached on the first grid, on finer ones: as a multiple of the fine arc
STEPS_IN_RANGE = 2.6  # of the offset grid, once it has been refined

# Slices per particle of a batch: parents whose children are compared, and children that get weight (neighbours share some).
PARENTS_PER_PARTICLE = {"correlation": 1.0, "global": 6.0, "local": 3.0, "last": 3.0, "given": 1.0, "planes": 2.0}
SLICES_PER_PARTICLE = {"correlation": 1.0, "global": 8.0, "local": 6.0, "last": 6.0, "planes": 2.0}

MAPS, MAPS_MORE = 14, 4  # of float32 on the host: reading and cropping the reference, two maps, what is written; a further map
SOLVING_PLANES = 8  # transforms of padded class averages at once, all classes, complex128
STAR_BYTES, POSE_BYTES = 400, 150  # on disk, per particle: in the STAR file of an iteration, in a checkpoint
SHELL_BYTES = 160  # on disk, per shell of a map's spectra

STARTING_SECONDS = {"cpu": 6.0, "cuda": 9.0}  # program, reading; beside it, a GPU's kernels are compiled once, 25 s
ITERATION_SECONDS = {"cpu": 0.3, "cuda": 0.06}  # of every iteration: accuracy, files, report
# Voxels of padded transforms per second, of references that are made ready and sums that are begun: by every rank, whatever the
# number of particles. (On a CPU it is little beside the rest.)
MADE_READY = {"cpu": float("inf"), "cuda": 1.3e9}

# Between ranks: bytes per second that one sends (NVLink; processes of one host), seconds of an iteration for all meetings, and
# the share of an iteration that the first to be done waits for the last.
LINK = {"cpu": 1e9, "cuda": 1.5e11}
MEETING_SECONDS = {"cpu": 0.02, "cuda": 0.01}
WAITING_SHARE = 0.03

# How often each kind of iteration comes in a usual refinement; a classification repeats its last kind as often as it is told.
TIMES = {"correlation": 1, "blurred": 2, "global": 5, "local": 4, "last": 1, "given": 1}


@dataclass(frozen=True)
class Rates:
    """Per second. flops: of matrix products; scores: judged; compared: products of the fine comparison (flops);
    samples: of volumes, sliced; added: of volumes, backprojected; pixels: of images prepared; shifted: numbers of shifted
    copies; transformed: voxels of padded volumes, transformed and solved; read: bytes of images from disk.
    """

    flops: float
    scores: float
    compared: float
    samples: float
    added: float
    pixels: float
    shifted: float
    transformed: float
    read: float


# On a CPU per core (two cores of an EPYC); on a GPU altogether, fitted to iterations of 12,500 and 25,000 x 256 px (H200) and of
# 105,247 x 360 px (H100), which it meets within a factor of 1.6 (benchmarks/NOTES.md, "Several GPUs").
RATES = {
    "cpu": Rates(90e9, 1.5e8, 40e9, 50e6, 25e6, 20e6, 5e8, 3e7, 2e8),
    "cuda": Rates(450e12, 6e10, 120e12, 1e11, 1.6e10, 8e9, 1e12, 3e9, 1.8e9),
}
