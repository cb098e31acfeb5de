"""What a refinement's arrays and passes cost: bytes and rates. The one table that `plan` is computed from.

Rates were read off benchmarks/NOTES.md and single runs; a machine that is shared or older is slower. Times from them are
meant to tell minutes from hours; memory is meant to be right within some per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

GB = 1e9

# Memory of the process before any data: Python, torch, pandas, compiled kernels (CPU); CUDA's libraries on top (GPU).
PROCESS_BYTES = {"cpu": 0.55 * GB, "cuda": 2.5 * GB}
PARTICLE_BYTES = 1200  # of the particle table and the poses, per particle (STAR files have some 25 columns)
READING_BYTES = 4 * 2**22 * 4  # batches of images read ahead, 2^22 pixels each

# Numbers (of the precision of sums) that preparing one image makes at once, per pixel and per kept coefficient.
PREPARING_PER_PIXEL = 10
PREPARING_PER_COEFFICIENT = 14
SLICES_MADE_AT_ONCE = 2**27  # numbers of slices before they are rounded (expectation/slices.py)

# Bytes per sample beside its score: finding the significant ones, and what is done with those that are.
CHOOSING_BYTES = {"cpu": 1, "cuda": 52}
WEIGHING_BYTES = 93

# What the size of a batch is chosen by: numbers per score and per pixel.
RESERVED_PER_SCORE = {"cpu": 3, "cuda": 14}
RESERVED_PER_PIXEL = 30

VOXEL_RUNNING, VOXEL_SETTLED = 4, 24  # accumulator: numbers of the sums' precision, bytes of the float64 copy
VOXEL_GATHERED = 24  # data and weight in float64 after the point group
VOXEL_TURNED = 32  # copies while the point group is applied

# Fine samples (orientations times offsets, children of the significant coarse ones) that are compared for a particle. Measured
# on beta-galactosidase, D2; a blurred reference tells little, so that nearly half of the whole fine grid is looked at.
BLURRED_SHARE = 0.45
FINE_SAMPLES = {"correlation": 32, "global": 3500, "local": 150, "last": 150}
STEPS_IN_RANGE = 2.1  # of the offset grid, once it has been refined
LOCAL_ORIENTATIONS = 400  # coarse orientations within three sigma of a pose
LOCAL_OWN = 200  # slices that only one particle of a batch needs

# Slices per particle of a batch: parents whose children are compared, and children that get weight (neighbours share some).
PARENTS_PER_PARTICLE = {"correlation": 1.0, "global": 6.0, "local": 3.0, "last": 3.0}
SLICES_PER_PARTICLE = {"correlation": 1.0, "global": 8.0, "local": 6.0, "last": 6.0}
POSE_BYTES = 200  # of a slice: its matrix in float64 and what that is made from

MAPS = 6  # of float32 on the host: references, half maps, what is written
SOLVING = 1.5  # transforms of the padded box at once, complex128

# How often each kind of iteration comes in a usual run.
TIMES = {"correlation": 1, "blurred": 2, "global": 5, "local": 4, "last": 1}


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


# On a CPU per core (two cores of an EPYC); on a GPU altogether (H100).
RATES = {
    "cpu": Rates(90e9, 1.5e8, 40e9, 50e6, 25e6, 20e6, 5e8, 4e6, 2e8),
    "cuda": Rates(300e12, 5e9, 20e12, 40e9, 4e9, 2e9, 2e11, 3e8, 1e9),
}
