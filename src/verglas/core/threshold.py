"""A density that separates two kinds of voxels."""

from __future__ import annotations

import numpy as np

_BINS = 1024


def otsu_threshold(values: np.ndarray) -> float:
    """The value that splits a histogram into two classes of least variance (Otsu 1979, IEEE SMC 9, 62)."""
    count, edges = np.histogram(values, bins=_BINS)
    centre = (edges[1:] + edges[:-1]) / 2
    below = np.cumsum(count)[:-1]
    above = below[-1] + count[-1] - below
    sum_below = np.cumsum(count * centre)[:-1]
    mean_gap = sum_below / np.maximum(below, 1) - ((count * centre).sum() - sum_below) / np.maximum(above, 1)
    score = below * above * mean_gap**2
    # An empty stretch between the classes ties: its middle is the fair answer.
    return float(edges[1 + int(np.flatnonzero(score == score.max()).mean())])
