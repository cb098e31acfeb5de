"""What each form of the shared transform (`transforms`) does and sends, and how long it takes: a model with three coefficients.

    seconds of a form = a + b (numbers through transforms, times log2 of their length) + c (bytes that a rank sends)

a, b, c >= 0 are fitted to probes, each weighted by its time (`transform_probes`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from verglas.distributed.ways import FORMS, Form
from verglas.maximization.slabs import Slabs

Way = Literal["to map", "from map"]
WAYS: tuple[Way, ...] = ("to map", "from map")


@dataclass(frozen=True)
class Shape:
    """What a transform is like. box: N; size: P; radius: of the voxels, in padded ones; wanted: rows y of the map; ranks;
    voxels: packed ones, of all ranks."""

    box: int
    size: int
    radius: int
    wanted: int
    ranks: int
    voxels: int

    @classmethod
    def of(cls, slabs: Slabs, box: int, size: int, wanted: int) -> Shape:
        return cls(box, size, int(slabs.whole.radius), wanted, slabs.ranks.size, slabs.whole.count)

    @property
    def columns(self) -> int:
        return min(self.radius, self.size // 2) + 1

    @property
    def planes(self) -> int:
        """Of voxels, that hold anything."""
        return 2 * self.columns - 1

    def lines(self, at_radius: bool) -> int:
        """Lines along y that hold any voxel nearer than the radius, or at it."""
        left2 = self.radius**2 - np.arange(1 - self.columns, self.columns, dtype=np.int64) ** 2 - (0 if at_radius else 1)
        return int((np.sqrt(left2[left2 >= 0]).astype(np.int64) + 1).sum())

    def sent_bytes(self, form: Form, element: int) -> dict[Way, float]:
        """That a rank sends, the mean of all; element: bytes of a real number."""
        share, complex_bytes = (self.ranks - 1) / self.ranks, 2 * element
        there = {
            "replicated": complex_bytes * self.voxels,
            "transposed": complex_bytes * self.lines(False) * self.wanted / self.ranks,
            "stride": element * self.box**2 * self.wanted,
        }
        back = {
            "replicated": 0,
            "transposed": complex_bytes * self.lines(True) * self.box / self.ranks,
            "stride": complex_bytes * self.planes * self.box * self.columns,
        }
        return {"to map": share * there[form], "from map": share * back[form]}

    def work(self, form: Form, way: Way) -> float:
        """Numbers that a rank transforms, times log2 of the length."""
        rows, ranks = (self.wanted if way == "to map" else self.box), self.ranks
        along_y = self.planes * self.size * self.columns
        along_z, along_x = self.size * rows * self.columns, self.box * rows * self.size / 2
        each = math.log2(self.size)
        if form == "transposed" or (form == "stride" and way == "from map"):
            return (along_y + along_z + along_x) / ranks * each
        if form == "stride":
            return along_y / ranks * each + along_z * (each - math.log2(ranks)) + along_x * each
        return ((along_y if way == "to map" else along_y / ranks) + along_z + along_x) * each

    def workspace(self, form: Form, element: int) -> float:
        """Bytes beside a rank's voxels while a map comes about (some columns and small arrays apart)."""
        half = 2 * element * self.box * self.wanted * self.columns
        map_bytes = element * self.box**2 * self.wanted
        if form == "replicated":
            return 2 * element * self.voxels * (1 + 1 / self.ranks) + half + map_bytes
        if form == "transposed":
            return (half + map_bytes) / self.ranks
        cut = 2 * element * self.planes * self.wanted * self.columns
        return (cut + 4 * map_bytes) / self.ranks

    def collected_bytes(self, form: Form) -> float:
        """That a rank sends for all to have the whole map afterwards, in single precision."""
        return 0.0 if form == "replicated" else (self.ranks - 1) / self.ranks * 4.0 * self.box**2 * self.wanted


@dataclass(frozen=True)
class Costs:
    """Seconds of each way and form: coefficients[way][form] = (a, b, c) of the module's formula."""

    coefficients: dict[str, dict[str, list[float]]]

    def seconds(self, shape: Shape, way: Way, form: Form, element: int = 4) -> float:
        """Of a transform; to a map: until all ranks have the map."""
        return float(np.dot(self.coefficients[way][form], features(shape, way, form, element)))

    def choice(
        self, shape: Shape, way: Way = "to map", element: int = 4, room: float = math.inf, forms: tuple[Form, ...] = FORMS
    ) -> Form:
        """The quickest of some forms that has room (bytes) for its arrays; the one that needs least, if none has."""
        fitting = [form for form in forms if shape.workspace(form, element) <= room]
        if not fitting:
            return min(forms, key=lambda form: shape.workspace(form, element))
        return min(fitting, key=lambda form: self.seconds(shape, way, form, element))


def features(shape: Shape, way: Way, form: Form, element: int) -> list[float]:
    """What the coefficients are multiplied by."""
    sent = shape.sent_bytes(form, element)[way] + (shape.collected_bytes(form) if way == "to map" else 0.0)
    return [1.0, shape.work(form, way), sent]


def fitted(measured: list[tuple[Shape, Way, Form, float]], element: int = 4) -> Costs:
    """From probes: (shape, way, form, seconds)."""
    found: dict[str, dict[str, list[float]]] = {way: {} for way in WAYS}
    for way in WAYS:
        for form in FORMS:
            mine = [(shape, seconds) for shape, w, f, seconds in measured if (w, f) == (way, form)]
            seconds_n = np.array([seconds for _, seconds in mine])
            terms_nF = np.array([features(shape, way, form, element) for shape, _ in mine])
            found[way][form] = _least_squares(terms_nF / seconds_n[:, None])
    return Costs(found)


def _least_squares(terms_nF: np.ndarray) -> list[float]:
    """Coefficients >= 0 with which the terms come nearest to 1."""
    from scipy.optimize import nnls

    scale_F = np.abs(terms_nF).max(0).clip(1e-300)
    return [float(c) for c in nnls(terms_nF / scale_F, np.ones(len(terms_nF)))[0] / scale_F]
