"""Drawings of the sections: each function takes one section and returns an SVG element (style.py says in what colours)."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from verglas.io.runfolder import short
from verglas.report.sections import Curve, Histogram, Orientations, Stack
from verglas.report.style import FAINT, INK, SERIES, figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RESOLUTION_TICKS = (100, 50, 30, 20, 15, 12, 10, 8, 7, 6, 5, 4.5, 4, 3.5, 3, 2.8, 2.6, 2.4, 2.2, 2, 1.8, 1.6, 1.4, 1.2, 1)  # Å


def draw_curve(section: Curve, name: str) -> str:
    """Curves over x, with thresholds as dashed lines, and Å on the axis of resolutions."""
    counted = np.issubdtype(np.asarray(section.x).dtype, np.integer)
    with figure(6.4, 4.0) as drawn:
        axes = drawn.add_subplot()
        for i, (y_S, label) in enumerate(zip(section.ys, section.labels, strict=True)):
            colour = SERIES[i % len(SERIES)]
            if section.mark_crossings and section.thresholds and label not in section.unmarked:
                label += _mark_crossing(axes, np.asarray(section.x), np.asarray(y_S), section.thresholds[0], colour)
            style: dict[str, Any] = {"linestyle": "-" if i < len(SERIES) else "--"}
            if section.ramp:
                colour, style = SERIES[0], {"alpha": 0.15 + 0.85 * (i + 1) / len(section.ys)}
            if counted:
                style["marker"] = "."
            axes.plot(section.x, y_S, color=colour, label=label, **style)
        for value in section.thresholds:
            axes.axhline(value, color=FAINT, linestyle=(0, (4, 3)), linewidth=0.9)
            axes.annotate(f"{value:g}", (0, value), (5, 3), xycoords=("axes fraction", "data"),
                          textcoords="offset points", color=FAINT, fontsize=9)  # fmt: skip
        axes.set_xlabel(section.x_label)
        axes.set_ylabel(section.y_label)
        if section.log_y:
            axes.set_yscale("log")
        axes.margins(x=0.02 if counted else 0)
        if counted:
            axes.locator_params(axis="x", integer=True)
        if section.y_range:
            axes.set_ylim(*section.y_range)
        if section.resolution_axis:
            _resolution_axis(axes)
        if any(section.labels):  # outside, so that it can hide no curve
            drawn.legend(loc="outside lower center", ncols=2 if len(section.labels) < 5 else 4, columnspacing=1.6)
        return svg(drawn, name)


def draw_stack(section: Stack, name: str) -> str:
    """One bar per x, its parts on each other."""
    with figure(6.4, 4.0) as drawn:
        axes = drawn.add_subplot()
        axes.grid(axis="x", visible=False)
        below_S = np.zeros(len(section.x))
        for i, (label, part_S) in enumerate(section.parts.items()):
            shade = 1.0 if i < len(SERIES) else 0.5
            axes.bar(section.x, part_S, bottom=below_S, color=SERIES[i % len(SERIES)], label=label, alpha=shade, width=0.75)
            below_S = below_S + np.asarray(part_S)
        axes.set_xlabel(section.x_label)
        axes.set_ylabel(section.y_label)
        axes.locator_params(axis="x", integer=True)
        drawn.legend(loc="outside lower center", ncols=2 if len(section.parts) < 5 else 4, columnspacing=1.6)
        return svg(drawn, name)


def last_above(y_S: np.ndarray, threshold: float) -> int:
    """Index of the last point before the curve first drops below `threshold` (point 0 is not asked)."""
    below = np.flatnonzero(y_S[1:] < threshold)
    return int(below[0]) if len(below) else len(y_S) - 1


def _mark_crossing(axes: Axes, x_S: np.ndarray, y_S: np.ndarray, threshold: float, colour: str) -> str:
    """A dot where the curve is about to drop below the threshold; returns ', 8.1 Å' for its label, '' if it never drops."""
    at = last_above(y_S, threshold)
    if at == len(y_S) - 1 or x_S[at] <= 0:
        return ""
    axes.plot(x_S[at], y_S[at], "o", color=colour, markersize=5)
    return f", {1 / x_S[at]:.3g} Å"


def _resolution_axis(axes: Axes) -> None:
    """Label the frequency axis (1/Å) in Å, ticks no closer than a fourteenth of its length."""
    low, high = axes.get_xlim()
    chosen: list[float] = []
    for tick in RESOLUTION_TICKS:
        if low < 1 / tick <= high and (not chosen or 1 / tick - 1 / chosen[-1] >= (high - low) / 14):
            chosen.append(tick)
    axes.set_xticks([1 / tick for tick in chosen], [f"{tick:g}" for tick in chosen])
    top = axes.secondary_xaxis("top")
    top.set_xlabel("Spatial frequency (1/Å)", color=FAINT, fontsize=9)
    top.tick_params(labelcolor=FAINT, labelsize=9)


def draw_histogram(section: Histogram, name: str) -> str:
    """Bars of equal width, the median as a line."""
    values_B = np.asarray(section.values, dtype=float)
    values_B = values_B[np.isfinite(values_B)]
    with figure(6.4, 3.2) as drawn:
        axes = drawn.add_subplot()
        axes.grid(axis="x", visible=False)
        low, high = (float(values_B.min()), float(values_B.max())) if len(values_B) else (0.0, 0.0)
        alike = high - low <= 1e-9 * max(abs(low), abs(high), 1.0)  # too close for bins of their own
        ends = (low - 0.5, high + 0.5) if alike else (low, high)
        axes.hist(values_B, bins=section.bins, range=ends, color=SERIES[0], alpha=0.85)
        if len(values_B):
            axes.set_ylim(top=1.12 * axes.get_ylim()[1])  # room for the text above the bars
            median = float(np.median(values_B))
            axes.axvline(median, color=INK, linewidth=1)
            axes.annotate(f"median {short(median)}", (median, 1), (4, -2), xycoords=("data", "axes fraction"),
                          textcoords="offset points", va="top", fontsize=9)  # fmt: skip
        axes.set_xlabel(section.x_label)
        axes.set_ylabel("Count")
        return svg(drawn, name)


def draw_orientations(section: Orientations, name: str) -> str:
    """Density of viewing directions in the Mollweide (equal-area) projection, longitude = rot, latitude = 90° - tilt."""
    density, width = sphere_density(viewing_directions(section.rotation_B33, section.symmetry_R33))
    longitude, latitude, shown = onto_vertices(density)
    with figure(6.4, 3.75) as drawn:  # the map is twice as wide as high; the bar goes below it, where there is room
        axes: Any = drawn.add_subplot(projection="mollweide")
        mesh = axes.pcolormesh(longitude, latitude, shown, cmap="viridis", vmin=0, shading="gouraud", rasterized=True)
        axes.grid(color="white", alpha=0.25, linewidth=0.6)
        axes.set_xticks(np.radians([-120, -60, 0, 60, 120]), [""] * 5)
        for degrees in (-120, -60, 0, 60, 120):
            text = f"rot {degrees}°" if degrees == 0 else f"{degrees}°".replace("-", "−")
            axes.annotate(text, (math.radians(degrees), 0), ha="center", va="center", fontsize=8, color="white",
                          bbox={"boxstyle": "round,pad=0.2", "facecolor": "black", "lw": 0, "alpha": 0.3})  # fmt: skip
        axes.set_yticks(np.radians([-60, -30, 0, 30, 60]), ["150°", "120°", "tilt 90°", "60°", "30°"], fontsize=8)
        bar: Any = drawn.colorbar(mesh, ax=axes, location="bottom", shrink=0.6, pad=0.04, aspect=30)
        bar.set_label(f"Density relative to uniform (smoothed by {width:.0f}°)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
        bar.outline.set_visible(False)
        bar.solids.set_rasterized(True)
        return svg(drawn, name)


def onto_vertices(density: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Density on cells -> (longitude [C+1], latitude [R+2], values [R+2, C+1]) on vertices that reach the poles and +-180°."""
    rows, columns = density.shape
    latitude = np.concatenate([[-math.pi / 2], (np.arange(rows) + 0.5) / rows * math.pi - math.pi / 2, [math.pi / 2]])
    poles = density[[0, -1]].mean(1, keepdims=True).repeat(columns, 1)
    centres = np.concatenate([poles[:1], density, poles[1:]])
    edges = (centres + np.roll(centres, 1, axis=1)) / 2  # the edge before each cell; the first one is -180°
    return np.linspace(-math.pi, math.pi, columns + 1), latitude, np.concatenate([edges, edges[:, :1]], axis=1)


def viewing_directions(rotation_B33: np.ndarray, symmetry_R33: np.ndarray) -> np.ndarray:
    """Row 2 of each matrix A (object to image), and its symmetry copies A R^T: unit vectors [B * R, 3]."""
    view_B3 = np.asarray(rotation_B33, dtype=float)[:, 2]
    return np.einsum("bj,rij->bri", view_B3, np.asarray(symmetry_R33, dtype=float)).reshape(-1, 3)


def sphere_density(view_B3: np.ndarray, rows: int = 60, columns: int = 120) -> tuple[np.ndarray, float]:
    """Density of unit vectors [B, 3], 1 = uniform, on cells [rows (latitude from -90°), columns (longitude from -180°)].

    Counts and cell areas are both smoothed with a von Mises-Fisher kernel, exp((cos angle - 1) / width^2), and divided. The
    width (degrees, returned too) lets about 15 directions of a uniform set fall under the kernel, between 4 and 15 degrees.
    """
    longitude_B, latitude_B = np.arctan2(view_B3[:, 1], view_B3[:, 0]), np.arcsin(np.clip(view_B3[:, 2], -1, 1))
    ranges = ((-math.pi / 2, math.pi / 2), (-math.pi, math.pi))
    counts, edges, _ = np.histogram2d(latitude_B, longitude_B, (rows, columns), ranges)
    # The kernel's share of the sphere is width^2 / 2 (its integral is 2 pi width^2).
    width = min(max(math.sqrt(30 / max(len(view_B3), 1)), math.radians(4)), math.radians(15))
    area = np.diff(np.sin(edges)) / 2 / columns
    latitude = (edges[1:] + edges[:-1]) / 2
    z, across = np.sin(latitude), np.cos(latitude)
    # Kernel between a cell of row i and one of row j that is d columns on; the sum over columns is a circular convolution.
    step = 2 * math.pi / columns * np.arange(columns)
    cosine = z[:, None, None] * z[None, :, None] + across[:, None, None] * across[None, :, None] * np.cos(step)
    kernel = np.exp((cosine - 1) / width**2)
    spectrum = np.einsum("ijd,jd->id", np.fft.rfft(kernel, axis=-1), np.fft.rfft(counts, axis=-1))
    smooth_counts = np.fft.irfft(spectrum, columns, axis=-1)
    smooth_area = np.einsum("ijd,j->i", kernel, area)
    return smooth_counts / smooth_area[:, None] / max(len(view_B3), 1), math.degrees(width)
