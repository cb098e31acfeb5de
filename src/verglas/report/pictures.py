"""Maps and images as pixels: slices, projections, montages. (`surface` renders; section `Pictures` shows them.)"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from verglas.io.atomic import atomic_path
from verglas.report.slices import central_slices, grey_limits
from verglas.report.surface import surface_views

PANEL, GAP = 400, 0.04  # px of one grey panel of three, about; between two panels, of their width
AT_ONCE = 4  # maps that are drawn, 0.3 GB each
MONTAGE_EDGE = 128  # px of one image of a montage, at most


def png(picture: np.ndarray) -> bytes:
    """A picture, uint8 [row, column, 4] red, green, blue, opacity, as a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="png", compress_level=3)  # four times faster than 6, and no larger here
    return buffer.getvalue()


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write (or replace) a PNG file."""
    with atomic_path(path, overwrite=True) as temporary:
        temporary.write_bytes(png(picture))


def write_pngs(pictures: Mapping[Path, np.ndarray]) -> None:
    """`write_png` of several, a few at a time."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        for _ in threads.map(write_png, pictures, pictures.values()):
            pass


def with_opacity(grey_YX: np.ndarray) -> np.ndarray:
    """Grey values [row, column], 0 black to 1 white -> uint8 [row, column, 4]."""
    byte_YX = (255 * np.clip(grey_YX, 0, 1)).astype(np.uint8)
    return np.stack([byte_YX, byte_YX, byte_YX, np.full_like(byte_YX, 255)], -1)


def tag(picture: np.ndarray, alternative: str) -> str:
    """An HTML image that holds the picture itself, drawn no more than half larger than it is."""
    data = base64.b64encode(png(picture)).decode()
    style = f"display: block; width: 100%; max-width: {1.5 * picture.shape[1]:.0f}px"
    return f'<img alt="{html.escape(alternative)}" style="{style}" src="data:image/png;base64,{data}">'


def map_picture(map_ZYX: np.ndarray) -> np.ndarray:
    """Surface, projections and central slices of a map below each other, three of each, uint8 [row, column, 4].

    Columns: xy, xz, yz (the first to the right, the second up), seen along z, y and x.
    """
    surfaces = np.array_split(surface_views(map_ZYX), 3, axis=1)
    size = len(surfaces[0])
    slices = [one for _, one in central_slices(map_ZYX)]
    greys = [shown(one, size) for one in projections(map_ZYX)]
    greys += [shown(one, size, grey_limits(np.asarray(map_ZYX))) for one in slices]
    return tiled([*surfaces, *greys], 3)


def map_pictures(maps: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`map_picture` of each map, by its name; a few at a time."""
    with ThreadPoolExecutor(min(AT_ONCE, max(1, len(maps)))) as threads:
        return dict(zip(maps, threads.map(map_picture, maps.values())))


def slices_picture(map_ZYX: np.ndarray, limits: tuple[float, float] | None = None) -> np.ndarray:
    """Three central slices (xy, xz, yz) side by side, uint8 [row, column, 4]. limits: values shown as black and white, if not
    those that suit a density."""
    limits = limits or grey_limits(np.asarray(map_ZYX))
    return tiled([shown(one_YX, PANEL, limits) for _, one_YX in central_slices(map_ZYX)], 3)


def projections(map_ZYX: np.ndarray) -> list[np.ndarray]:
    """Sums along z, y and x: [Y, X], [Z, X], [Z, Y]."""
    return [np.asarray(map_ZYX, np.float32).sum(axis) for axis in (0, 1, 2)]


def montage(image_BYX: np.ndarray, columns: int) -> np.ndarray:
    """Images in rows from the top left, each in its own grey scale, uint8 [row, column, 4]."""
    return tiled([shown(one_YX, MONTAGE_EDGE) for one_YX in np.asarray(image_BYX, np.float32)], columns)


def shown(image_YX: np.ndarray, size: int, limits: tuple[float, float] | None = None) -> np.ndarray:
    """A square image with y up, binned and then resized to `size` px by cubic interpolation, uint8 [row, column, 4].

    limits: values shown as black and white; None: 0.5th and 99.5th percentile.
    """
    from scipy import ndimage

    factor = max(1, len(image_YX) // size)
    edge = len(image_YX) // factor
    whole_YX = np.asarray(image_YX, np.float32)[: edge * factor, : edge * factor]
    binned_YX = whole_YX.reshape(edge, factor, edge, factor).mean((1, 3))
    low, high = np.percentile(binned_YX, [0.5, 99.5]) if limits is None else limits
    large_YX = ndimage.zoom(binned_YX, size / edge, order=3, mode="nearest", grid_mode=True)
    return with_opacity((large_YX[::-1] - low) / max(high - low, 1e-20))


def tiled(panels: Sequence[np.ndarray], columns: int) -> np.ndarray:
    """Square panels of one size [row, column, 4] in rows, transparent gaps between them."""
    size = len(panels[0])
    step = size + round(GAP * size)
    rows = -(-len(panels) // columns)
    columns = min(columns, len(panels))
    page = np.zeros((rows * step - step + size, columns * step - step + size, 4), np.uint8)
    for i, panel in enumerate(panels):
        row, column = divmod(i, columns)
        page[row * step : row * step + size, column * step : column * step + size] = panel
    return page
