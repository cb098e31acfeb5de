"""How large a refinement is: grids, numbers of coefficients, bytes per particle, for each kind of iteration it will have."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import numpy as np

from verglas.core.symmetry import mates_beyond
from verglas.core.symmetry import order as group_order
from verglas.particles.files import pixel_bytes
from verglas.particles.table import ParticleTable
from verglas.refinement import costs
from verglas.refinement.classify2d_schedule import coarse_radius as coarse_radius_2d
from verglas.refinement.classify2d_schedule import count_at as classes_at
from verglas.refinement.classify2d_schedule import seen
from verglas.refinement.config import Classify2dConfig, ClassifyConfig, RefineConfig

Where = Literal["host", "device"]
# How half-sets follow one another: the second one in the same row, once the first one's references are given up; or in a row of
# its own, when the first one is through; or when its sums, too, are on the host, where they wait until maps are solved.
Turns = Literal["overlapping", "apart", "waiting"]
# The first iteration scores by correlation, the next ones see a blurred reference, the last one joins all particles; in a
# classification some orientations are given, not searched; planes: class averages, turned in the plane only.
Kind = Literal["correlation", "blurred", "global", "local", "last", "given", "planes"]


@dataclass(frozen=True)
class Problem:
    """The data. box: px; pixel_size: Å; both of the model (the first optics group). image_bytes: of a pixel, as it can stay in
    memory without loss."""

    n_particles: int
    box: int
    pixel_size: float
    image_bytes: int = 4

    @classmethod
    def of(cls, table: ParticleTable, ranks: int = 1) -> Problem:
        """One rank's part of these particles; looks into one stack of each optics group, if it is there."""
        group = table.groups[0]
        return cls(-(-len(table) // ranks), group.box, group.pixel_size, pixel_bytes(table))

    @property
    def one_image(self) -> int:
        """Bytes of an image."""
        return self.box**2 * self.image_bytes


@dataclass(frozen=True)
class Machine:
    """Where it runs. kind: cpu or cuda; host_memory, device_memory: bytes free for this run; cores: CPU threads.

    ranks: processes that share the run; memories, cores and the particles of its `Problem` are those of one of them.
    """

    kind: Literal["cpu", "cuda"]
    host_memory: float
    device_memory: float = 0.0
    cores: int = 1
    ranks: int = 1

    @property
    def works_on(self) -> Where:
        """Where the arrays of the expectation and the solution lie."""
        return "device" if self.kind == "cuda" else "host"

    def limited(self, gigabytes: float | None) -> Machine:
        """The same with no more than that (GB) of the memory that it works on; None: as it is."""
        if gigabytes is None:
            return self
        limit = min(gigabytes * costs.GB, self.memory(self.works_on))
        return replace(self, device_memory=limit) if self.works_on == "device" else replace(self, host_memory=limit)

    def memory(self, where: Where) -> float:
        """Bytes free there."""
        return self.device_memory if where == "device" else self.host_memory


@dataclass(frozen=True)
class Sizes:
    """Counts of one kind of iteration. order: HEALPix, coarse; orientations, offsets: coarse grids, in all classes together;
    radius, coarse_radius: shells; coefficients, coarse_coefficients: of the half plane within them; samples: fine ones
    compared, per particle; times: how often it comes; listed: orientations of each particle where they are its own, else 0;
    share: of the particles that an iteration sees; classes: of planes, their number.
    """

    kind: Kind
    order: int
    orientations: int
    offsets: int
    radius: int
    coarse_radius: int
    samples: float
    times: int
    listed: int = 0
    share: float = 1.0
    classes: int = 0

    @property
    def coefficients(self) -> int:
        return half_plane_count(self.radius)

    @property
    def coarse_coefficients(self) -> int:
        return half_plane_count(self.coarse_radius)

    @property
    def searches_locally(self) -> bool:
        return self.kind in ("local", "last")

    @property
    def title(self) -> str:
        """For tables: 'local, order 4'; of planes '50 classes, 0.3 of all'."""
        if self.classes:
            return f"{self.classes} classes" + (f", {self.share:.2g} of all" if self.share < 1 else "")
        return f"{self.kind}, order {self.order}"


def operand_bytes(config: RefineConfig, kind: str) -> int:
    """Bytes of a factor in matrix products: 2 in half precision (a GPU's default), else those of the sums."""
    half = config.precision == "half" or (config.precision == "auto" and kind == "cuda")
    return 2 if half and kind == "cuda" else sum_bytes(config)


def sum_bytes(config: RefineConfig) -> int:
    """Bytes of a number of the sums."""
    return 8 if config.precision == "double" else 4


def all_sizes(problem: Problem, config: RefineConfig) -> list[Sizes]:
    """Kinds of iteration of a usual run: by correlation, with a blurred reference, then one per HEALPix order, the last.

    A classification stays on its first grid.
    """
    if isinstance(config, Classify2dConfig):
        return sizes_of_planes(problem, config)
    if isinstance(config, ClassifyConfig):
        return _sizes_of_classes(problem, config)
    first = config.healpix_order
    if config.relax_symmetry is not None:  # local from the start
        orders = range(first, max(first, config.local_from_order) + 2)
        return [_sizes(problem, config, "local", order) for order in orders] + [_sizes(problem, config, "last", orders[-1])]
    if first >= config.local_from_order:  # local from the start, too
        started = [_sizes(problem, config, "local", order) for order in (first, first + 1)]
        return [*started, _sizes(problem, config, "last", first + 1)]
    kinds: list[tuple[Kind, int]] = [("blurred", first)]
    if not config.absolute_greyscale:
        kinds.insert(0, ("correlation", first))
    kinds += [("global", order) for order in range(first, config.local_from_order)]
    kinds += [("local", order) for order in range(max(first, config.local_from_order), config.local_from_order + 2)]
    kinds.append(("last", max(first, config.local_from_order + 2)))
    return [_sizes(problem, config, kind, order) for kind, order in kinds]


def classes_of(config: RefineConfig) -> int:
    """Maps (or class averages) that are made at a time: of the classes, or both halves."""
    return config.classes if isinstance(config, ClassifyConfig | Classify2dConfig) else 2


def sets_of(config: RefineConfig) -> int:
    """Sets of particles with maps of their own: one in a classification, else the halves."""
    return 1 if isinstance(config, ClassifyConfig | Classify2dConfig) else 2


def references_of(config: RefineConfig) -> int:
    """Maps that a particle is compared with: of all classes, or of its half."""
    return config.classes if isinstance(config, ClassifyConfig | Classify2dConfig) else 1


def reference_voxels(sizes: Sizes, config: RefineConfig) -> float:
    """Coefficients of one reference or its sums as they are packed: of half a sphere; of planes the two halves of a disc."""
    radius = sizes.radius * config.padding
    return 2 * half_plane_count(int(radius + 0.5)) if sizes.classes else sphere_count(radius)


def map_pixels(problem: Problem, config: RefineConfig) -> int:
    """Of one map or class average."""
    return problem.box ** (2 if isinstance(config, Classify2dConfig) else 3)


def transform_size(problem: Problem, config: RefineConfig) -> float:
    """Complex numbers of the padded transforms that are worked on at a time: of one map, of all class averages."""
    edge = padded_edge(problem.box, config.padding)
    if isinstance(config, Classify2dConfig):
        return config.classes * edge * (edge // 2 + 1)
    return edge**2 * (edge // 2 + 1)


def mates_of(config: RefineConfig) -> int:
    """Poses that a local search looks around for each particle, beside those that --sym makes equivalent."""
    return 1 if config.relax_symmetry is None else len(mates_beyond(config.symmetry, config.relax_symmetry))


def _sizes_of_classes(problem: Problem, config: ClassifyConfig) -> list[Sizes]:
    """Kinds of iteration of a classification; each class is so many more orientations."""
    local = config.local_sigma > 0 or config.relax_symmetry is not None
    search: Kind = "given" if config.align != "all" else "local" if local else "global"
    kinds: list[Kind] = [search]
    if search == "global":
        kinds = ["blurred", search] if config.absolute_greyscale else ["correlation", "blurred", search]
    found, left = [], config.max_iterations
    for kind in kinds:
        one = _sizes(problem, config, kind, config.healpix_order)
        times = left if kind == search else min(left, one.times)
        found += [replace(one, times=times)] if times else []
        left -= times
    k = config.classes
    found = [replace(one, orientations=k * one.orientations, listed=k * one.listed) for one in found]
    # What is significant is shared among the classes, unless everything is compared.
    return [replace(one, samples=k * one.samples) if one.kind in ("blurred", "given") else one for one in found]


def _sizes(problem: Problem, config: RefineConfig, kind: Kind, order: int) -> Sizes:
    """Counts of an iteration whose resolution is the one that its fine angular step allows at the particle's rim."""
    box, field = problem.box, problem.box * problem.pixel_size
    step = 60.0 / 2**order  # degrees, coarse
    coarse_arc = math.pi * config.diameter * step / 360
    start = kind in ("correlation", "blurred")
    detail = costs.DETAIL_AT_START if order == config.healpix_order else costs.DETAIL
    resolution = config.initial_resolution if start else detail * coarse_arc / 2**config.oversampling
    more = 10 if start else max(10, box // 8)
    radius = box // 2 if kind == "last" else min(box // 2, int(field / resolution + 0.5) + more)
    coarse_radius = min(radius, math.ceil(1.2 * field / coarse_arc)) if config.oversampling else radius
    orientations = math.ceil(12 * 4**order / group_order(config.symmetry)) * math.ceil(360 / step)
    refined = order > config.healpix_order  # then the range is a little over two steps
    offsets = disc_count(costs.STEPS_IN_RANGE if refined else config.offset_range / config.offset_step)
    everything = orientations * offsets * 32**config.oversampling
    listed = min(costs.LOCAL_ORIENTATIONS * mates_of(config), orientations) if kind in ("local", "last") else 0
    if kind == "given":
        listed, orientations = 1, problem.n_particles
        searched = not (isinstance(config, ClassifyConfig) and config.align == "none")
        offsets = offsets if searched else 1
        everything = offsets * 4**config.oversampling if searched else 1
    samples = costs.BLURRED_SHARE * everything if kind == "blurred" else min(everything, costs.FINE_SAMPLES[kind])
    return Sizes(kind, order, orientations, offsets, radius, coarse_radius, samples, costs.TIMES[kind], listed)


def sizes_of_planes(problem: Problem, config: Classify2dConfig) -> list[Sizes]:
    """Kinds of iteration of a 2-D classification: while classes are divided, with all of them in batches, and with all of both.

    Averages are taken to reach the pixels at last.
    """
    field, n = problem.box * problem.pixel_size, problem.n_particles
    offsets, angles = disc_count(config.offset_range / config.offset_step), math.ceil(360 / config.psi_step - 1e-9)
    numbers: dict[tuple[bool, bool], list[int]] = {}
    for number in range(1, config.max_iterations + 1):
        kind = (classes_at(number, config) == config.classes, seen(number, n, config) == n)
        numbers.setdefault(kind, []).append(number)
    found = []
    for (all_classes, whole), these in sorted(numbers.items()):
        classes = config.classes if all_classes else max(1, round(sum(classes_at(i, config) for i in these) / len(these)))
        radius = problem.box // 2 if all_classes else -(-problem.box * 3 // 8)
        coarse = coarse_radius_2d(field, config, config.offset_step * problem.pixel_size)
        coarse = min(radius, coarse) if config.oversampling else radius
        samples = min(costs.FINE_SAMPLES["planes"], offsets * angles * classes * 8**config.oversampling)
        share = 1.0 if whole else sum(seen(i, n, config) for i in these) / len(these) / n
        found.append(Sizes("planes", 0, classes * angles, offsets, radius, coarse, samples, len(these), 0, share, classes))
    return found


def counts(problem: Problem, sizes: Sizes, operand: int) -> costs.Counts:
    """What the engine sizes a batch by. operand: bytes of a factor of the products."""
    reduced = operand == 2 and not sizes.listed and sizes.kind not in ("correlation", "planes")
    orientations = sizes.listed or sizes.orientations
    return costs.Counts(
        problem.box, sizes.coefficients, sizes.coarse_coefficients, orientations, sizes.offsets, sizes.searches_locally,
        reduced,
    )  # fmt: skip


def particles_at_once(problem: Problem, config: RefineConfig, kind: str, sizes: Sizes, working: float) -> int:
    """Particles of a batch when its arrays may take so many bytes; at most those that are compared with the same maps."""
    operand = operand_bytes(config, kind)
    each = costs.reserved_bytes(counts(problem, sizes, operand), operand, sum_bytes(config))
    return max(1, min(int(working / each), -(-problem.n_particles // sets_of(config))))


def coarse_bytes(problem: Problem, config: RefineConfig, kind: str, sizes: Sizes, batch: int) -> float:
    """What a batch takes on the coarse grid beside its prepared images: while these are made, or while they are compared."""
    s, op = sum_bytes(config), operand_bytes(config, kind)
    c = counts(problem, sizes, op)
    preparing = (
        costs.PREPARING_PER_PIXEL * c.box**2 * s
        + (costs.PREPARING_PER_COEFFICIENT - costs.PREPARED_PER_COEFFICIENT) * c.coefficients * s
    )
    samples = c.offsets * c.orientations
    images = c.offsets * 2 * c.coarse_coefficients * op
    if c.reduced:
        comparing = images + costs.LISTED_BYTES + costs.PART_BYTES * samples + c.orientations * s
        return batch * max(preparing, comparing) + min(batch, costs.SCANNED) * samples * s
    comparing = images + samples * (s + costs.CHOOSING_BYTES[kind]) + 2 * c.orientations * s
    if c.local:
        comparing += costs.LOCAL_OWN * 2 * c.coarse_coefficients * op
    return batch * max(preparing, comparing) + min(costs.CHOOSING_AT_ONCE[kind], 9 * batch * samples)


def fine_bytes(config: RefineConfig, kind: str, sizes: Sizes, batch: int, working: float, kept: bool) -> float:
    """What the fine search of a batch takes: it is cut into parts that fit `working`. kept: all fine slices are there."""
    s, op, k = sum_bytes(config), operand_bytes(config, kind), sizes.coefficients
    needed, weighted = slices_in_use(sizes, batch, config)
    images = fine_shifts(sizes, config) * 2 * k * op
    each = images + sizes.samples * costs.SAMPLE_BYTES[kind]
    rows = (0 if kept else needed * 2 * k * op) + weighted * 3 * k * s
    return min(batch * each + rows, max(costs.FINE_SHARE * working, each + rows / batch))


def fine_shifts(sizes: Sizes, config: RefineConfig) -> float:
    """Fine offsets of a particle to which its image is shifted: the children of the significant ones."""
    every = sizes.offsets * 4**config.oversampling
    if sizes.kind == "blurred":
        return every
    if sizes.kind == "given":
        return sizes.samples / sizes.listed
    return min(every, sizes.samples / (costs.PARENTS_PER_PARTICLE[sizes.kind] * children_of(sizes, config)))


def children_of(sizes: Sizes, config: RefineConfig) -> int:
    """Fine orientations of a coarse one."""
    dimensions = {"given": 0, "planes": 1}.get(sizes.kind, 3)
    return int(2 ** (dimensions * config.oversampling))


def slices_in_use(sizes: Sizes, batch: int, config: RefineConfig) -> tuple[int, int]:
    """(fine slices that a batch needs, those that get weight): children of what is significant to any of its particles."""
    children = children_of(sizes, config)
    fine = sizes.orientations * children
    if sizes.kind == "blurred":
        return fine, fine
    if sizes.kind == "given":
        return sizes.listed * batch, batch
    parents, weighted = costs.PARENTS_PER_PARTICLE[sizes.kind], costs.SLICES_PER_PARTICLE[sizes.kind]
    return min(fine, int(parents * batch) * children), min(fine, int(weighted * batch))


@lru_cache(maxsize=1024)
def half_plane_count(radius: int) -> int:
    """Coefficients of the half plane with r <= radius, each once."""
    y = np.arange(-radius, radius + 1)
    return int(np.floor(np.sqrt(radius**2 - y**2) + 1e-9).sum()) + radius + 1


def disc_count(steps: float) -> int:
    """Points of a square grid within so many steps of one of them."""
    axis = np.arange(-math.ceil(steps), math.ceil(steps) + 1)
    return int((axis[:, None] ** 2 + axis**2 <= steps**2 + 1e-6).sum())


def sphere_count(radius: float) -> float:
    """Voxels of a packed half sphere (core/rows.py) of this radius, within a per cent."""
    return 2 / 3 * math.pi * (radius + 1) ** 3 + 1.5 * math.pi * (radius + 1) ** 2


def padded_edge(box: int, padding: float) -> int:
    """Even edge of the padded map, px."""
    edge = int(padding * box + 0.5)
    return edge + edge % 2
