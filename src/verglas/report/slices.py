"""Central slices of a map as an SVG element, without matplotlib, which took a second for them and half a one to be imported."""

from __future__ import annotations

import base64
import html
import io

import numpy as np

from verglas.report.sections import Slices
from verglas.report.style import INK, coloured

SCALE_BARS = (5, 10, 20, 50, 100, 200, 500, 1000, 2000)  # Å
PANEL, GAP, TITLE = 220, 12, 20  # a panel, between two, for the title above: units of the drawing
PIXELS = 640  # px of a panel's picture: sharp on screens of three pixels a point
WIDEST = 11.0  # in


def draw_slices(section: Slices) -> str:
    """Central slices side by side with one grey scale and one scale bar."""
    slices = central_slices(section.map_ZYX, section.thickness)
    low, high = grey_limits(section.map_ZYX)
    width, height = 3 * PANEL + 2 * GAP, TITLE + PANEL
    parts = []
    for i, (labels, slice_YX) in enumerate(slices):
        left, data = i * (PANEL + GAP), base64.b64encode(grey_png(slice_YX, low, high)).decode()
        parts.append(f'<text x="{left + PANEL / 2:g}" y="14" font-size="10" text-anchor="middle" fill="{INK}">{labels}</text>')
        parts.append(f'<image x="{left}" y="{TITLE}" width="{PANEL}" height="{PANEL}" href="data:image/png;base64,{data}"/>')
    parts += scale_bar(slices[0][1].shape[1], section.pixel_size)
    style = f"max-width: {WIDEST}in; font-family: var(--font)"
    title = html.escape(section.title)
    head = f'<svg viewBox="0 0 {width} {height}" style="{style}" role="img" aria-label="{title}" xmlns="http://www.w3.org/2000/svg">'
    return coloured("\n".join([head, *parts, "</svg>"]))


def grey_png(slice_YX: np.ndarray, low: float, high: float) -> bytes:
    """A slice with its first row below, `low` black and `high` white, as a PNG file of `PIXELS` px (Lanczos)."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(slice_YX[::-1], np.float32))
    rows, columns = slice_YX.shape
    size = (round(PIXELS * columns / max(rows, columns)), round(PIXELS * rows / max(rows, columns)))
    large_YX = np.asarray(picture.resize(size, Image.Resampling.LANCZOS))
    grey_YX = np.clip((large_YX - low) * (255 / (high - low)), 0, 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grey_YX).save(buffer, format="png", compress_level=3)
    return buffer.getvalue()


def scale_bar(columns: int, pixel_size: float) -> list[str]:
    """A white bar in the lower left corner of the first panel, of a round length near a quarter of its width."""
    length = min(SCALE_BARS, key=lambda bar: abs(bar - columns * pixel_size / 4))
    left, long, y = 0.06 * PANEL, length / pixel_size / columns * PANEL, TITLE + 0.93 * PANEL
    return [
        f'<line x1="{left:.1f}" x2="{left + long:.1f}" y1="{y:.1f}" y2="{y:.1f}" stroke="white" stroke-width="2.5"/>',
        f'<text x="{left + long / 2:.1f}" y="{y - 4:.1f}" font-size="9" text-anchor="middle" fill="white">{length} Å</text>',
    ]


def central_slices(map_ZYX: np.ndarray | tuple[np.ndarray, ...], thickness: int = 1) -> list[tuple[str, np.ndarray]]:
    """[('xy', Y X), ('xz', Z X), ('yz', Z Y)] through the centre N/2, averaged over `thickness` voxels; of these as they are."""
    if isinstance(map_ZYX, tuple):
        return list(zip(("xy", "xz", "yz"), map_ZYX, strict=True))
    volume_ZYX = np.asarray(map_ZYX)  # as it is: float32 of the few planes alone
    found = []
    for axis, labels in enumerate(("xy", "xz", "yz")):
        first = volume_ZYX.shape[axis] // 2 - (thickness - 1) // 2
        found.append((labels, volume_ZYX.take(range(first, first + thickness), axis).mean(axis, dtype=np.float32)))
    return found


def grey_limits(map_ZYX: np.ndarray | tuple[np.ndarray, ...]) -> tuple[float, float]:
    """Densities shown as black and white: the central planes from 2 standard deviations of the solvent below its level
    (the median of the map) to the 99.9th percentile, so that solvent is dark grey and not a mass of noise."""
    planes = np.concatenate([slice_YX.ravel() for _, slice_YX in central_slices(map_ZYX)])
    solvent, high = float(np.median(planes)), float(np.percentile(planes, 99.9))
    low = solvent - 0.35 * (high - solvent)
    return (low, high) if high > low else (low, low + 1.0)
