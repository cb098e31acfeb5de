"""A map as a lit surface of equal density, seen along z, y and x.

No mesh is made. The map is interpolated in Fourier space to a fine cubic grid (which is smooth, and exact for a band-limited
map); along each ray of an orthographic view the first voxel above the level is found, the depth between two voxels by linear
interpolation, the normal from the gradient there.
"""

from __future__ import annotations

import numpy as np

from verglas.core.threshold import otsu_threshold

FINE_BOX = 192  # px of the picture and of the grid that the rays go through, about
SMALLEST_PIECE = 0.02  # of the largest; smaller ones are dust
COLOUR = np.array([0.42, 0.62, 0.80])  # of the surface, red, green, blue
LIGHT = np.array([-0.45, 0.55, 0.70])  # towards the lamp: x right, y up, z to the viewer
VIEWS = (0, 1, 2)  # axes of [Z, Y, X] along which one looks


def surface_views(map_ZYX: np.ndarray, level: float | None = None) -> np.ndarray:
    """Three views side by side, uint8 [rows, columns, 4] red, green, blue, opacity; row 0 is at the top.

    map_ZYX: protein positive. level: density of the surface; None: `surface_level`. The first view has x to the right and y
    up, seen from +z; the second x and z, from -y; the third y and z, from +x: right-handed all three. An empty map gives an
    empty picture.
    """
    fine_ZYX = resized(np.asarray(map_ZYX, np.float32))
    level = surface_level(fine_ZYX) if level is None else level
    fine_ZYX = without_dust(fine_ZYX, level)
    return np.concatenate([view(turned, level) for turned in facing(fine_ZYX)], axis=1)


def surface_level(map_ZYX: np.ndarray) -> float:
    """Otsu's threshold between solvent and particle, of the sphere inscribed in the box."""
    box = map_ZYX.shape[0]
    axis = np.arange(box) - box // 2
    inside = axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2 < (box // 2) ** 2
    return otsu_threshold(map_ZYX[inside])


def resized(map_ZYX: np.ndarray) -> np.ndarray:
    """To about `FINE_BOX` px a side: large maps are first binned, then zeros are added around the transform (or it is cut)."""
    from scipy import fft

    factor = max(1, map_ZYX.shape[0] // FINE_BOX)
    edge = map_ZYX.shape[0] // factor
    cut = edge * factor
    binned = map_ZYX[:cut, :cut, :cut].reshape(edge, factor, edge, factor, edge, factor).mean((1, 3, 5))
    size = fft.next_fast_len(FINE_BOX, real=True)
    kept = (min(edge, size) - 1) // 2  # highest frequency taken over; Nyquist is not, it has no sign
    source_ZYX, target_ZYX = fft.rfftn(binned), np.zeros((size, size, size // 2 + 1), np.complex64)
    for z in (slice(0, kept + 1), slice(-kept, None)):
        for y in (slice(0, kept + 1), slice(-kept, None)):
            target_ZYX[z, y, : kept + 1] = source_ZYX[z, y, : kept + 1]
    return fft.irfftn(target_ZYX, (size,) * 3, overwrite_x=True) * np.float32((size / edge) ** 3)


def without_dust(map_ZYX: np.ndarray, level: float) -> np.ndarray:
    """The map with connected pieces above the level that are below `SMALLEST_PIECE` of the largest put to the level."""
    from scipy import ndimage

    labels_ZYX, count = ndimage.label(map_ZYX > level)
    if count < 2:
        return map_ZYX
    sizes = np.bincount(labels_ZYX.ravel())
    sizes[0] = 0
    dust = sizes < SMALLEST_PIECE * sizes.max()
    dust[0] = False
    return np.where(dust[labels_ZYX], np.float32(level), map_ZYX)


def facing(map_ZYX: np.ndarray) -> list[np.ndarray]:
    """The map as [depth, row, column] of the three views; depth 0 is nearest to the viewer, row 0 at the top."""
    from_z = map_ZYX[::-1, ::-1]
    from_y = map_ZYX.transpose(1, 0, 2)[:, ::-1]
    from_x = map_ZYX.transpose(2, 0, 1)[::-1, ::-1]
    return [from_z, from_y, from_x]


def view(map_DYX: np.ndarray, level: float) -> np.ndarray:
    """One picture [row, column, 4], uint8, of the surface as seen from depth 0."""
    depth_YX, hit_YX = first_crossing(map_DYX, level)
    row, column = np.nonzero(hit_YX)
    normal_P3 = normals(map_DYX, depth_YX[row, column], row, column)
    near_P = 1 - depth_YX[row, column] / map_DYX.shape[0]
    lit_P = np.clip(normal_P3 @ (LIGHT / np.linalg.norm(LIGHT)), 0, 1)
    rim_P = np.clip(normal_P3[:, 2], 0, 1)  # surfaces seen edge-on are darker, which draws outlines
    shade_P = (0.25 + 0.75 * near_P) * (0.22 + 0.20 * rim_P + 0.62 * lit_P)
    colour_P3 = shade_P[:, None] * COLOUR + 0.35 * (near_P * lit_P**24)[:, None]
    picture = np.zeros((*hit_YX.shape, 4), np.uint8)
    picture[row, column, :3] = (255 * np.clip(1.5 * colour_P3, 0, 1)).astype(np.uint8)
    # The edge is as opaque as its neighbours are hit: soft outlines.
    from scipy import ndimage

    cover_YX = ndimage.uniform_filter(hit_YX.astype(np.float32), 3)
    picture[row, column, 3] = (255 * np.clip(1.5 * cover_YX[row, column], 0, 1)).astype(np.uint8)
    return picture


def first_crossing(map_DYX: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Depth (fractional voxels) at which each ray first rises above the level, and whether it does: [row, column] both."""
    above_DYX = map_DYX > level
    behind_YX = above_DYX.argmax(0)
    before_YX = np.maximum(behind_YX - 1, 0)
    high_YX = np.take_along_axis(map_DYX, behind_YX[None], 0)[0]
    low_YX = np.take_along_axis(map_DYX, before_YX[None], 0)[0]
    back_YX = (high_YX - level) / np.maximum(high_YX - low_YX, 1e-20)
    return behind_YX - np.clip(back_YX, 0, 1) * (behind_YX > 0), np.asarray(above_DYX.any(0))


def normals(map_DYX: np.ndarray, depth_P: np.ndarray, row_P: np.ndarray, column_P: np.ndarray) -> np.ndarray:
    """Unit vectors [P, 3] out of the surface (x right, y up, z to the viewer): minus the gradient over two voxels each way."""
    size = map_DYX.shape[0]
    place = np.stack([np.rint(depth_P).astype(int), row_P, column_P])

    def slope(axis: int) -> np.ndarray:
        step = np.zeros((3, 1), int)
        step[axis] = 2
        ahead, back = np.clip(place + step, 0, size - 1), np.clip(place - step, 0, size - 1)
        return map_DYX[tuple(ahead)] - map_DYX[tuple(back)]

    normal_P3 = np.stack([-slope(2), slope(1), slope(0)], -1).astype(float)
    return normal_P3 / np.maximum(np.linalg.norm(normal_P3, axis=1, keepdims=True), 1e-20)
