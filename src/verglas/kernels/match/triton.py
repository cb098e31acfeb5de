"""`match` on the GPU: one program gathers a block of slices of a particle, a step of coefficients at a time, and multiplies it
with the shifted images on the tensor cores. Nothing of the slices is stored.

* Slices come from half-precision cells (kernels/project/cells.py); neighbouring threads gather neighbouring coefficients.
* Few coefficients a thread and step (4), so that several programs share a multiprocessor and one multiplies while others wait
  for their voxels. Each program covers up to 128 shifts; beyond, slices are gathered again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from verglas.kernels.blocks import Blocks
from verglas.kernels.project.cells import interpolate, rounded, scaled
from verglas.kernels.tasks import Sizes, Tile, list_tasks

if TYPE_CHECKING:
    from verglas.kernels.match import Source

# The smallest that holds the shifts of most samples, and its limit of registers (measured: NOTES.md).
TILES = (
    (Tile(16, 16, 32, 4, 1), None),
    (Tile(16, 32, 32, 4, 1), None),
    (Tile(32, 64, 32, 8, 1), 128),
    (Tile(32, 128, 32, 8, 1), 128),
)


@triton.jit
def _match_kernel(
    words, plane, sampling, coordinates, factor, shifted, weight, slice_list, shift_list, slice_ptr, shift_ptr, value_ptr,
    task_particle, task_block, task_count, out, n_images, n_pixels, half, limit2,
    CORNERS: tl.constexpr, SLICES: tl.constexpr, SHIFTS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    if tl.program_id(0) >= tl.load(task_count):
        return
    i = tl.load(task_particle + tl.program_id(0)).to(tl.int64)
    block = tl.load(task_block + tl.program_id(0))
    slice_0, shift_0 = tl.load(slice_ptr + i), tl.load(shift_ptr + i)
    n = (tl.load(slice_ptr + i + 1) - slice_0).to(tl.int32)
    m = (tl.load(shift_ptr + i + 1) - shift_0).to(tl.int32)
    shift_blocks = tl.cdiv(m, SHIFTS)
    a = (block // shift_blocks) * SLICES + tl.arange(0, SLICES)
    t = (block % shift_blocks) * SHIFTS + tl.arange(0, SHIFTS)
    matrix = sampling + tl.load(slice_list + slice_0 + a, mask=a < n, other=0).to(tl.int64) * 9
    ax, bx = tl.load(matrix)[:, None], tl.load(matrix + 1)[:, None]
    ay, by = tl.load(matrix + 3)[:, None], tl.load(matrix + 4)[:, None]
    az, bz = tl.load(matrix + 6)[:, None], tl.load(matrix + 7)[:, None]
    image = tl.load(shift_list + shift_0 + t, mask=t < m, other=0).to(tl.int64) + i * n_images
    image_at = shifted + (image * 2 * n_pixels)[None, :]
    cross = tl.zeros([SLICES, SHIFTS], tl.float32)
    power = tl.zeros([SLICES, STEP], tl.float32)
    for first in range(0, n_pixels, STEP):
        k = first + tl.arange(0, STEP)
        mask = k < n_pixels
        kx = tl.load(coordinates + k, mask=mask, other=0.0)[None, :]
        ky = tl.load(coordinates + n_pixels + k, mask=mask, other=0.0)[None, :]
        f = tl.load(factor + k, mask=mask, other=0.0)[None, :]
        w = tl.load(weight + i * n_pixels + k, mask=mask, other=0.0)[None, :]
        # Rounded in one fixed way: the compiler computes positions twice, in two layouts, and a voxel found from one goes with
        # the fractions of the other. Left free to contract, they may differ across a voxel boundary.
        px, py, pz = tl.fma(ax, kx, bx * ky), tl.fma(ay, kx, by * ky), tl.fma(az, kx, bz * ky)
        re, im = interpolate(words, plane, px, py, pz, half, limit2, mask[None, :], CORNERS)
        re, im = rounded(re * f, tl.float16), rounded(im * f, tl.float16)
        wanted = (t < m)[None, :] & mask[:, None]
        cross = tl.dot(re, tl.load(image_at + k[:, None], mask=wanted, other=0.0), cross)
        cross = tl.dot(im, tl.load(image_at + n_pixels + k[:, None], mask=wanted, other=0.0), cross)
        re, im = re.to(tl.float32), im.to(tl.float32)
        power += (re * re + im * im) * w
    score = cross - 0.5 * tl.sum(power, 1)[:, None]
    at = a[:, None] * m + t[None, :]  # a particle has less than 2^31 samples
    tl.store(out + tl.load(value_ptr + i) + at, score, mask=(a < n)[:, None] & (t < m)[None, :])


def match_triton(source: Source, sampling_U33: Tensor, shifted_BT2K: Tensor, weight_BK: Tensor, blocks: Blocks) -> Tensor:
    """See `match_reference`; images and volume in float16, weights and sums in float32. TypeError if they are not."""
    cells = source.cells
    if cells is None or shifted_BT2K.dtype != torch.float16:
        raise TypeError(f"match gathers from cells and multiplies float16 images, got {shifted_BT2K.dtype} and cells {cells}")
    shifted, samples, n_pixels = shifted_BT2K.contiguous(), blocks.samples, shifted_BT2K.shape[3]
    score_N = torch.empty(samples, dtype=torch.float32, device=shifted.device)
    if samples == 0:
        return score_N
    sizes = Sizes.of(blocks, samples)
    tile, registers = next((one for one in TILES if sizes.shifts <= one[0].shifts), TILES[-1])
    tasks = list_tasks(blocks, samples, tile)
    limit = {} if registers is None else {"maxnreg": registers}
    _match_kernel[(tasks.bound,)](
        cells.words, cells.plane_Z2, sampling_U33.float().contiguous(), source.coordinates_K2.float().T.contiguous(),
        scaled(source.factor_K, cells.scale, n_pixels, shifted.device), shifted, weight_BK.float().contiguous(), blocks.slice_N,
        blocks.shift_M, blocks.slice_ptr_B1, blocks.shift_ptr_B1, blocks.value_ptr_B1, tasks.particle_J, tasks.block_J,
        tasks.count, score_N, shifted.shape[1], n_pixels, cells.half, cells.limit2, CORNERS=cells.words.shape[1],
        SLICES=tile.slices, SHIFTS=tile.shifts, STEP=tile.coefficients, num_warps=tile.warps, num_stages=tile.stages, **limit,
    )  # fmt: skip
    return score_N
