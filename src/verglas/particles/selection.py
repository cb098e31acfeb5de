"""Rules that keep some of the particles: by class, by a column, outliers, duplicates, preferred views, at random.

A rule looks at the particles that the rules before it have left, and says which of them stay. Where one of several has to
go, the better one stays: that with the higher value of a quality column (the first in the file where there is none).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from verglas.core.sphere import even_directions
from verglas.core.symmetry import symmetry_matrices
from verglas.errors import InputError
from verglas.particles.table import ParticleTable

REASON = "vglDiscardedBy"  # column of the particles that were not kept
QUALITY_LABELS = ("vglLogLikelihoodGain", "rlnLogLikeliContribution", "rlnMaxValueProbDistribution", "rlnAutopickFigureOfMerit")
MICROGRAPH_PIXEL_LABELS = ("rlnMicrographPixelSize", "rlnMicrographOriginalPixelSize")
ROBUST_DEVIATION = 1.4826  # standard deviation of a Gaussian over its median absolute deviation
ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Rule:
    """name: what is said of those it discards; keep: bool [B] for the particles given to it."""

    name: str
    keep: Callable[[ParticleTable], np.ndarray]


@dataclass(frozen=True)
class Selection:
    """kept, discarded (with the column `REASON`): tables in the order of the file; counts: (rule, particles it discarded)."""

    kept: ParticleTable
    discarded: ParticleTable
    counts: list[tuple[str, int]]


def select(table: ParticleTable, rules: Sequence[Rule]) -> Selection:
    """Apply the rules one after another. Raises InputError if none is left, saying what each rule took."""
    row_B = np.arange(len(table))
    reason_B = np.full(len(table), "", object)
    counts = []
    for rule in rules:
        keep_B = rule.keep(table.select(row_B))
        reason_B[row_B[~keep_B]] = rule.name
        counts.append((rule.name, int((~keep_B).sum())))
        row_B = row_B[keep_B]
        if not len(row_B):
            taken = ", ".join(f"{name}: {count:,}" for name, count in counts)
            raise InputError(table.source, f"no particle is left ({taken})", "rules that keep some", "Loosen the last rule.")
    gone_B = np.setdiff1d(np.arange(len(table)), row_B)
    discarded = table.select(gone_B).with_columns(**{REASON: [rule.replace(" ", "_") for rule in reason_B[gone_B]]})
    return Selection(table.select(row_B), discarded, counts)


def column(table: ParticleTable, label: str) -> np.ndarray:
    """A column as finite numbers, float64 [B]; InputError if it is missing or holds something else."""
    table.require(label)
    return table.numbers(label).numpy()


def quality(table: ParticleTable, label: str | None = None) -> np.ndarray:
    """Higher is better [B]: the column asked for, or the first of `QUALITY_LABELS`; zeros if the file has none of them."""
    found = label or next((one for one in QUALITY_LABELS if one in table.frame.columns), None)
    return np.zeros(len(table)) if found is None else column(table, found)


def of_classes(numbers: Sequence[int]) -> Rule:
    """Only these values of rlnClassNumber (from 1); InputError if the file has none of one of them."""

    def keep(table: ParticleTable) -> np.ndarray:
        class_B = column(table, "rlnClassNumber").astype(np.int64)
        missing = sorted(set(numbers) - set(class_B.tolist()))
        if missing:
            there = np.unique(class_B)
            raise InputError("--classes", f"class {missing[0]}, which holds no particles of {table.source}",
                             f"some of {', '.join(map(str, there[:20]))}{', ...' if len(there) > 20 else ''}")  # fmt: skip
        return np.isin(class_B, list(numbers))

    return Rule("other class", keep)


def within(label: str, low: float, high: float) -> Rule:
    """Values of a column from `low` to `high`, both included."""

    def keep(table: ParticleTable) -> np.ndarray:
        value_B = column(table, label)
        return (value_B >= low) & (value_B <= high)

    limits = [f"at least {low:g}"] * (low > -np.inf) + [f"at most {high:g}"] * (high < np.inf)
    return Rule(f"{label} not {' and '.join(limits)}", keep)


def of_defocus(low: float, high: float) -> Rule:
    """Mean defocus (U + V) / 2 from `low` to `high`, Å."""

    def keep(table: ParticleTable) -> np.ndarray:
        ctf = table.ctf()
        mean_B = (0.5 * (ctf.defocus_u_B + ctf.defocus_v_B)).numpy()
        return (mean_B >= low) & (mean_B <= high)

    return Rule("defocus out of range", keep)


def best_share(share: float, label: str | None = None) -> Rule:
    """The best `share` (0 to 1) by a quality column."""

    def keep(table: ParticleTable) -> np.ndarray:
        order_B = np.argsort(-quality(_with_quality(table, label), label), kind="stable")
        kept_B = np.zeros(len(table), bool)
        kept_B[order_B[: max(1, round(share * len(table)))]] = True
        return kept_B

    return Rule(f"not in the best {100 * share:g} %", keep)


def without_outliers(deviations: float, label: str | None = None) -> Rule:
    """Quality less than this many robust standard deviations below the median of its optics group."""

    def keep(table: ParticleTable) -> np.ndarray:
        value_B = quality(_with_quality(table, label), label)
        kept_B = np.ones(len(table), bool)
        for group in np.unique(table.group_index_B):
            mine = table.group_index_B == group
            median = np.median(value_B[mine])
            spread = ROBUST_DEVIATION * np.median(np.abs(value_B[mine] - median))
            kept_B[mine] = value_B[mine] >= median - deviations * spread
        return kept_B

    return Rule("outlier of low quality", keep)


def without_duplicates(distance: float, label: str | None = None, pixel_size: float | None = None) -> Rule:
    """Of particles closer than `distance` Å on one micrograph the best one alone.

    Positions: rlnCoordinateX/Y times the micrographs' pixel size (Å; from the optics table unless given) less the origins.
    """

    def keep(table: ParticleTable) -> np.ndarray:
        table.require("rlnMicrographName", "rlnCoordinateX", "rlnCoordinateY")
        pixel_B = _micrograph_pixel(table, pixel_size)
        place_B2 = np.stack([column(table, f"rlnCoordinate{axis}") * pixel_B for axis in "XY"], 1) - table.origins().numpy()
        quality_B = quality(table, label)
        kept_B = np.ones(len(table), bool)
        for rows in table.frame.groupby("rlnMicrographName", sort=False).indices.values():
            kept_B[rows] = _spaced(place_B2[rows], quality_B[rows], distance)
        return kept_B

    return Rule(f"duplicate within {distance:g} Å", keep)


def rebalanced(most: float, directions: int, symmetry: str = "C1", label: str | None = None) -> Rule:
    """At most `most` times the mean number of particles per direction: the sphere cut into `directions` even cells.

    Views that the symmetry makes equivalent count as one direction. The best of a crowded cell stay.
    """

    def keep(table: ParticleTable) -> np.ndarray:
        cell_B = _cells(table, directions, symmetry)
        used, cell_B = np.unique(cell_B, return_inverse=True)
        limit = max(1, int(most * len(table) / len(used)))
        order_B = np.lexsort((-quality(table, label), cell_B))
        first_C = np.concatenate([[0], np.bincount(cell_B).cumsum()[:-1]])
        rank_B = np.empty(len(table), np.int64)
        rank_B[order_B] = np.arange(len(table)) - first_C[cell_B[order_B]]
        return rank_B < limit

    return Rule("crowded view", keep)


def random_subset(count: int | float, seed: int) -> Rule:
    """This many particles (int), or this share of them (float below 1), drawn with the seed; all if there are no more."""

    def keep(table: ParticleTable) -> np.ndarray:
        number = max(1, round(count * len(table))) if isinstance(count, float) else count
        kept_B = np.zeros(len(table), bool)
        kept_B[np.random.default_rng(seed).permutation(len(table))[:number]] = True
        return kept_B

    return Rule("not in the random subset", keep)


def _with_quality(table: ParticleTable, label: str | None) -> ParticleTable:
    """The table; InputError if no quality is known: which particles are best cannot be said."""
    if label is None and not set(QUALITY_LABELS) & set(table.frame.columns):
        raise InputError(f"{table.source}, particles", f"none of the columns {', '.join(QUALITY_LABELS)}",
                         "a figure of quality", "Name a column with --quality, or give a refinement's data.star.")  # fmt: skip
    return table


def _micrograph_pixel(table: ParticleTable, pixel_size: float | None) -> np.ndarray:
    """Pixel size of each particle's micrograph, Å [B]."""
    if pixel_size is not None:
        return np.full(len(table), pixel_size)
    label = next((one for one in MICROGRAPH_PIXEL_LABELS if one in table.optics_frame.columns), None)
    if label is None:
        raise InputError(f"{table.source}, data_optics", f"no column {' or '.join(MICROGRAPH_PIXEL_LABELS)}",
                         "the pixel size of the micrographs", "Give it with --micrograph-pixel.")  # fmt: skip
    of_group = table.optics_frame.set_index("rlnOpticsGroup")[label]
    return table.frame["rlnOpticsGroup"].map(of_group).to_numpy(np.float64)


def _spaced(place_P2: np.ndarray, quality_P: np.ndarray, distance: float) -> np.ndarray:
    """Which points stay so that no two are closer than `distance`: the best first, each takes its neighbours away; bool [P]."""
    from scipy.spatial import cKDTree

    kept_P = np.ones(len(place_P2), bool)
    near = cKDTree(place_P2).query_pairs(distance, output_type="ndarray")
    rank_P = np.empty(len(place_P2), np.int64)
    rank_P[np.argsort(-quality_P, kind="stable")] = np.arange(len(place_P2))
    pairs = np.sort(rank_P[near], axis=1)
    at_rank = np.argsort(rank_P)
    for better, worse in pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]:  # only pairs that are close: few
        if kept_P[at_rank[better]]:
            kept_P[at_rank[worse]] = False
    return kept_P


def _cells(table: ParticleTable, directions: int, symmetry: str) -> np.ndarray:
    """Nearest of `directions` even directions to each particle's view, equivalent views at one of them; int64 [B]."""
    view_B3 = table.rotations()[:, 2]
    mates_G33 = symmetry_matrices(symmetry)
    # Of equivalent views the one nearest to a direction that lies on no axis or mirror plane of any group.
    apart_3 = torch.tensor([0.31, 0.23, 0.92], dtype=torch.float64)
    cell_D3 = even_directions(directions)
    found = []
    for part_B3 in view_B3.split(ROWS_AT_ONCE):
        mate_BG3 = torch.einsum("bi,gij->bgj", part_B3, mates_G33)
        nearest_B = (mate_BG3 @ apart_3).argmax(1)
        one_B3 = mate_BG3[torch.arange(len(part_B3)), nearest_B]
        found.append((one_B3 @ cell_D3.T).argmax(1))
    return torch.cat(found).numpy()
