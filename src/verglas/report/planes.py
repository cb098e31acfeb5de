"""Drawings of quantities over a plane: fields with their colours, points that moved; and complex waves as coloured pictures."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from verglas.report.sections import Field, Moves
from verglas.report.style import FAINT, SERIES, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_PIXELS = 1200  # along an edge of a drawn field; larger ones are binned
MOST_ARROWS = 4000
UNITS = (("nm", 1e-9), ("µm", 1e-6), ("mm", 1e-3), ("m", 1.0))


def draw_field(section: Field, name: str) -> str:
    """The field in grey (an angle: in a cyclic scale of colours), a colour bar, a bar of a round length."""
    field_YX = np.asarray(section.field_YX, float)
    factor = -(-max(field_YX.shape) // MOST_PIXELS)
    if factor > 1:
        field_YX = binned(field_YX, factor, section.cyclic)
    known = field_YX[np.isfinite(field_YX)]
    limits = section.limits or ((-math.pi, math.pi) if section.cyclic else tuple(np.percentile(known, [0.5, 99.5])))
    with figure(6.4, 1.2 + 5.0 * min(1.6, field_YX.shape[0] / field_YX.shape[1])) as drawn:
        axes = drawn.add_subplot()
        shown = axes.imshow(field_YX, cmap="twilight" if section.cyclic else "gray", vmin=limits[0], vmax=limits[1],
                            interpolation="none" if factor == 1 else "antialiased")  # fmt: skip
        bar = drawn.colorbar(shown, ax=axes, location="bottom", shrink=0.6, pad=0.02, aspect=35)
        bar.set_label(section.label, fontsize=9)
        bar.ax.tick_params(labelsize=8)
        axes.grid(visible=False)
        if section.pixel_size is None:
            axes.tick_params(labelsize=8)
        else:
            axes.set_axis_off()
            _length_bar(axes, field_YX.shape, section.pixel_size * factor)
        return svg(drawn, name)


def binned(field_YX: np.ndarray, factor: int, cyclic: bool) -> np.ndarray:
    """Means over factor x factor pixels; of angles the direction of the mean unit vector."""
    rows, columns = (edge // factor for edge in field_YX.shape)
    whole = field_YX[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor)
    return np.angle(np.exp(1j * whole).mean((1, 3))) if cyclic else whole.mean((1, 3))


def _length_bar(axes: Axes, shape: tuple[int, ...], pixel_size: float) -> None:
    """A bar of 1, 2 or 5 x 10^n near a quarter of the width, with its length."""
    wanted = shape[1] * pixel_size / 4
    power = 10.0 ** math.floor(math.log10(wanted))
    length = max(step * power for step in (1, 2, 5) if step * power <= wanted)
    unit, size = max(((unit, size) for unit, size in UNITS if size <= length), key=lambda one: one[1], default=UNITS[0])
    x, y = 0.05 * shape[1], 0.95 * shape[0]
    for colour, width in (("white", 4), ("black", 2)):
        axes.plot([x, x + length / pixel_size], [y, y], color=colour, linewidth=width, solid_capstyle="butt")
    frame = {"boxstyle": "round,pad=0.2", "facecolor": "white", "lw": 0, "alpha": 0.6}
    axes.text(x + length / pixel_size / 2, y - 0.015 * shape[0], f"{length / size:g} {unit}", ha="center", va="bottom",
              fontsize=9, bbox=frame, color="black")  # fmt: skip


def draw_moves(section: Moves, name: str) -> str:
    """Points, and an arrow from each to where it went."""
    step = -(-len(section.start_B2) // MOST_ARROWS)
    start_B2, move_B2 = section.start_B2[::step], (section.end_B2 - section.start_B2)[::step] * section.stretch
    with figure(6.4, 6.0) as drawn:
        axes = drawn.add_subplot()
        axes.plot(start_B2[:, 1], start_B2[:, 0], ".", color=FAINT, markersize=2, rasterized=True)
        if np.abs(move_B2).max(initial=0) > 0:
            axes.quiver(start_B2[:, 1], start_B2[:, 0], move_B2[:, 1], move_B2[:, 0], color=SERIES[0], angles="xy",
                        scale_units="xy", scale=1, width=0.0025)  # fmt: skip
        axes.set_aspect("equal")
        axes.invert_yaxis()
        axes.set_xlabel(f"column / {section.unit}")
        axes.set_ylabel(f"row / {section.unit}")
        return svg(drawn, name)


def wave_picture(wave_YX: np.ndarray) -> np.ndarray:
    """A complex wave as a picture, uint8 [row, column, 4]: phase as hue (0 red, +2 pi / 3 green), amplitude as brightness."""
    amplitude_YX = np.abs(wave_YX) / max(float(np.percentile(np.abs(wave_YX), 99.9)), 1e-30)
    hue_YX3 = np.angle(wave_YX)[..., None] - np.array([0.0, 2.0, 4.0]) * math.pi / 3
    colour_YX3 = (0.5 + 0.5 * np.cos(hue_YX3)) * np.clip(amplitude_YX, 0, 1)[..., None]
    opaque_YX1 = np.full((*wave_YX.shape, 1), 255, np.uint8)
    return np.concatenate([np.round(255 * colour_YX3).astype(np.uint8), opaque_YX1], -1)
