"""Numba helpers of the CPU kernels: where the pixels of a slice fall, which words they touch, and fetching those ahead."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

# Reassociation and contraction only: NaN and infinity keep their meaning.
FASTMATH = {"contract", "arcp", "nsz", "reassoc"}
RUN = 256  # pixels handled at a time: the scratch arrays stay in the first-level cache
AHEAD = 8  # pixels between fetching a voxel into the cache and using it

u = np.uintp


@intrinsic
def prefetch(typing_context: Any, array: Any, index: Any) -> Any:
    """Ask the processor to bring array[index] into its first-level cache; never faults, returns nothing."""

    def generate(context, builder, signature, arguments):
        view = context.make_array(signature.args[0])(context, builder, arguments[0])
        pointer = builder.bitcast(builder.gep(view.data, [arguments[1]]), ir.IntType(8).as_pointer())
        int32 = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, int32, int32, int32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, int32(0), int32(3), int32(1)])
        return context.get_dummy_value()

    return types.void(array, types.uintp), generate


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def locate(sampling, x_K, y_K, z_K, half, limit2, row, column, fraction, sign):
    """Fill row (address in the row table), column (x), fraction [3, RUN] and sign of each pixel of a run.

    sign is +1, -1 where the position was turned into the stored half, and 0 beyond the radius (addressed at the origin).
    A loop without branches or look-ups, so that the compiler vectorises it. Integers never meet floats here: Numba would
    go to double precision (also math.floor gives an integer, np.floor does not).
    """
    edge = np.int32(2 * half + 1)
    shift = np.int32(half)
    one = limit2 / limit2  # 1 in the precision of the volume
    for i in range(len(x_K)):
        px = sampling[0, 0] * x_K[i] + sampling[0, 1] * y_K[i] + sampling[0, 2] * z_K[i]
        py = sampling[1, 0] * x_K[i] + sampling[1, 1] * y_K[i] + sampling[1, 2] * z_K[i]
        pz = sampling[2, 0] * x_K[i] + sampling[2, 1] * y_K[i] + sampling[2, 2] * z_K[i]
        s = one if px >= one - one else -one
        s = s if px * px + py * py + pz * pz <= limit2 else one - one
        px, py, pz = px * s, py * s, pz * s
        fx, fy, fz = np.floor(px), np.floor(py), np.floor(pz)
        column[i] = np.int32(fx)
        row[i] = (np.int32(fz) + shift) * edge + np.int32(fy) + shift
        fraction[0, i], fraction[1, i], fraction[2, i] = px - fx, py - fy, pz - fz
        sign[i] = s


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def find_words(start, edge, row, column, words_per_voxel, place, address):
    """Fill address [4, RUN + AHEAD]: first word of the voxel pair in each of the four rows around `place` pixels.

    place: which pixels of the run. Entries past them keep whatever valid address was there: they are only prefetched.
    """
    one = u(1)
    for j in range(u(len(place))):
        i = u(place[j])
        r, x = u(row[i]), u(column[i])
        address[0, j] = (u(start[r]) + x) * words_per_voxel
        address[1, j] = (u(start[r + one]) + x) * words_per_voxel
        address[2, j] = (u(start[r + edge]) + x) * words_per_voxel
        address[3, j] = (u(start[r + edge + one]) + x) * words_per_voxel


@numba.njit(inline="always", fastmath=FASTMATH, boundscheck=False)
def fetch(words, address, j):
    """Prefetch the four voxel pairs of entry j."""
    prefetch(words, u(address[0, j]))
    prefetch(words, u(address[1, j]))
    prefetch(words, u(address[2, j]))
    prefetch(words, u(address[3, j]))
