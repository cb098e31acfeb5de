"""What takes memory in each phase of an iteration: what `plan` adds up. Bytes follow from what the engine allocates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from verglas.core.layers import share_of_layer
from verglas.distributed.rounds import BYTES_AT_ONCE
from verglas.maximization.accumulate import VOXELS_AT_ONCE as PIECE_NUMBERS
from verglas.maximization.planes import GATHERED_BYTES
from verglas.maximization.slabs import FEWEST_PLANES, stays_in_planes
from verglas.maximization.waiting import PIECE
from verglas.projection.pruned import BYTES_FROM_MAP, BYTES_OF_NUMBER, NUMBERS_AT_ONCE
from verglas.refinement import costs
from verglas.refinement.plan_sizes import (
    Sizes,
    Where,
    children_of,
    classes_of,
    coarse_bytes,
    fine_bytes,
    map_pixels,
    operand_bytes,
    padded_edge,
    reference_voxels,
    references_of,
    sets_of,
    slices_in_use,
    sum_bytes,
    transform_size,
)  # fmt: skip

if TYPE_CHECKING:
    from verglas.refinement.plan import RunPlan

SENT_AT_ONCE = 8  # times what a rank asks for in a round: what it cuts (in single precision), sends, gets, and puts in its place


@dataclass(frozen=True)
class Item:
    """Memory that something takes, bytes."""

    name: str
    where: Where
    bytes: float


def resident(run: RunPlan, sizes: Sizes) -> list[Item]:
    """What is there throughout an iteration."""
    problem, config, where = run.problem, run.config, run.machine.works_on
    maps = classes_of(config) * 4.0 * map_pixels(problem, config)
    return [
        Item("program and libraries", "host", costs.PROCESS_BYTES[run.machine.kind]),
        Item("particle table and poses", "host", costs.PARTICLE_BYTES * problem.n_particles * run.machine.ranks),  # of all ranks
        *_image_items(run),
        Item("maps", "host", (costs.MAPS + costs.MAPS_MORE * (classes_of(config) - 2)) * 4 * map_pixels(problem, config)),
        Item("maps of this iteration", "device", maps if where == "device" and not _maps_on_host(run, sizes) else 0.0),
        Item("sums that wait", "host", waiting_bytes(run, sizes)),
        Item("images, summed but not turned", where, _gathered_bytes(run, sizes)),
    ]


def _one_sum(run: RunPlan, sizes: Sizes) -> float:
    """Bytes of the sums of one map, as slices are added to them."""
    flushed = costs.VOXEL_SETTLED if _flushed(run, sizes) else 0
    voxels = reference_voxels(sizes, run.config) * share_of_volumes(run, sizes)
    return voxels * (costs.VOXEL_RUNNING * sum_bytes(run.config) + flushed)


def share_of_volumes(run: RunPlan, sizes: Sizes) -> float:
    """Of references and sums, what a rank has while particles are worked on: 1, or a layer where these are large enough."""
    ranks = run.machine.ranks
    if not run.in_layers or sizes.radius + 1 < FEWEST_PLANES * ranks:
        return 1.0
    return share_of_layer(sizes.radius * run.config.padding, ranks)


def _maps_on_host(run: RunPlan, sizes: Sizes) -> bool:
    """Whether maps come to the host as they are made."""
    return run.turns == "waiting" or share_of_volumes(run, sizes) < 1


def _sums(run: RunPlan, sizes: Sizes) -> Item:
    """Sums of all maps, as far as none of them waits on the host."""
    there = 1 if run.turns == "waiting" else classes_of(run.config)
    return Item("sums of all maps", run.machine.works_on, there * _one_sum(run, sizes))


def waiting_bytes(run: RunPlan, sizes: Sizes) -> float:
    """Of the host: sums of a half-set that wait there, and what is on its way."""
    number = _solved_bytes(run, sizes)
    return 3 * number * (reference_voxels(sizes, run.config) + 2 * PIECE) if run.turns == "waiting" else 0.0


def _flushed(run: RunPlan, sizes: Sizes) -> bool:
    """Whether single-precision sums are moved to double precision, for many slices."""
    half = -(-run.problem.n_particles // sets_of(run.config))
    half *= run.machine.ranks if run.in_layers else 1  # a layer gets the slices of all ranks
    slices = slices_in_use(sizes, half, run.config)[1] / references_of(run.config)
    return sum_bytes(run.config) == 4 and slices > costs.SLICES_BEFORE_FLUSH


def _solved_bytes(run: RunPlan, sizes: Sizes) -> int:
    """Of a number of the sums that maps are solved from: in double precision where they were moved to it, but not on GPUs
    (`Accumulator.used_up`), nor between ranks, where they travel as slices are added to them."""
    double = _flushed(run, sizes) and run.machine.ranks == 1 and run.machine.works_on == "host"
    return 8 if double else sum_bytes(run.config)


def _gathered_bytes(run: RunPlan, sizes: Sizes) -> float:
    """Of planes: the sums of images by angle, which are turned at the end unless there are too many of them."""
    if not sizes.classes:
        return 0.0
    size = sizes.orientations * children_of(sizes, run.config) * 3.0 * sizes.coefficients * sum_bytes(run.config)
    return size if size <= GATHERED_BYTES else 0.0


def _image_items(run: RunPlan) -> list[Item]:
    """What images take where they stay; where they are streamed, two batches of them on the host, and on a GPU, too."""
    problem, residency, works_on = run.problem, run.residency, run.machine.works_on
    everything = problem.n_particles * problem.box**2 * (residency.image_bytes or problem.image_bytes)
    if residency.home == "device":
        return [Item("images", works_on, everything)]
    ahead = min(residency.budget, 2 * -(-problem.n_particles // sets_of(run.config)) * problem.one_image)
    items = [Item("images read ahead", where, ahead) for where in run.places]
    return items if residency.home == "disk" else [*items, Item("images", "host", everything)]


def reference_items(run: RunPlan, sizes: Sizes) -> list[Item]:
    """While the reference is transformed."""
    config, where, s = run.config, run.machine.works_on, sum_bytes(run.config)
    others = 0 if run.turns == "waiting" else classes_of(config) - references_of(config)  # sums of sets that are through
    in_half = 4 * reference_voxels(sizes, config) if run.cells and operand_bytes(config, run.machine.kind) == 2 else 0
    if sizes.classes:
        made = 1.5 * transform_size(run.problem, config) * 2 * s
    else:
        parts = run.machine.ranks if share_of_volumes(run, sizes) < 1 else 1
        made = (s * map_pixels(run.problem, config) + _half_transform(run, sizes, s)) / parts
        made += BYTES_FROM_MAP * s / 4 * _column_numbers(run, sizes)
        made += 2 * s * reference_voxels(sizes, config) / parts if parts > 1 else 0  # of a slab of planes, before it is a layer
    return [
        Item("sums of all maps", where, others * _one_sum(run, sizes)),
        Item("transform of the reference", where, max(made, in_half)),
        Item("reference, packed", where, _volume_bytes(run, sizes)),
    ]


def _half_transform(run: RunPlan, sizes: Sizes, element: int) -> float:
    """Bytes of a map's transform along x, as far as it holds anything (projection/pruned.py)."""
    columns = sizes.radius * run.config.padding + 1
    return 2.0 * element * run.problem.box**2 * columns


def _some_columns(run: RunPlan, sizes: Sizes, element: int) -> float:
    """Bytes of the columns of a padded transform that are worked on at a time."""
    return BYTES_OF_NUMBER[run.machine.kind] * element / 4 * _column_numbers(run, sizes)


def _column_numbers(run: RunPlan, sizes: Sizes) -> float:
    reach, edge = sizes.radius * run.config.padding + 1, padded_edge(run.problem.box, run.config.padding)
    return min(NUMBERS_AT_ONCE[run.machine.kind], 2 * reach * edge * reach)


def _volume_bytes(run: RunPlan, sizes: Sizes) -> float:
    """The references that a particle is compared with, as slices are cut from them."""
    voxels = reference_voxels(sizes, run.config) * share_of_volumes(run, sizes)
    return references_of(run.config) * _one_volume_bytes(run, voxels)


def _one_volume_bytes(run: RunPlan, voxels: float) -> float:
    if operand_bytes(run.config, run.machine.kind) != 2:
        return voxels * 2.0 * sum_bytes(run.config)
    small, large = costs.VOXEL_IN_CELLS
    if not run.cells:
        return voxels * 2.0 * sum_bytes(run.config)
    return float(voxels * (small if voxels * small <= costs.LARGEST_IN_EIGHTS else large))


def batch_items(run: RunPlan, sizes: Sizes, batch: int) -> list[Item]:
    """While a batch is compared on the coarse grid and on the fine one: a GPU begins a batch before the last one is finished
    (refinement/ahead.py), if a half-set is not a single one, as the first half-set's references are given up before the second
    one's are made; on a CPU what the coarse search has freed is kept, but too small for the fine one's arrays."""
    config, kind, where = run.config, run.machine.kind, run.machine.works_on
    s, op = sum_bytes(config), operand_bytes(config, kind)
    k, coarse_k, coarse = sizes.coefficients, sizes.coarse_coefficients, sizes.orientations
    numbers = coarse * children_of(sizes, config) * 2 * k
    kept = not sizes.listed and numbers * op <= run.working_memory
    table = 0 if sizes.listed else coarse * coarse_k * (2 * op + (2 * s if op == 2 else s))
    single = kind == "cuda" and batch >= -(-run.problem.n_particles // sets_of(config))
    batches = 1 if kind == "cpu" or single else 2
    always = [
        _sums(run, sizes),
        Item("reference, packed", where, _volume_bytes(run, sizes)),
        Item("slices of the coarse grid", where, table),
        Item("slices of the fine grid", where, numbers * op if kept else 0),
        Item("prepared images of a batch", where, batches * batch * costs.PREPARED_PER_COEFFICIENT * k * s),
        Item("slices between ranks", where, SENT_AT_ONCE * BYTES_AT_ONCE[kind] if share_of_volumes(run, sizes) < 1 else 0),
    ]
    on_coarse = coarse_bytes(run.problem, config, kind, sizes, batch)
    on_fine = fine_bytes(config, kind, sizes, batch, run.working_memory, kept)
    searches = [Item("coarse search of a batch", where, on_coarse), Item("fine search of a batch", where, on_fine)]
    return [*always, *([max(searches, key=lambda one: one.bytes)] if single else searches)]


def solution_phases(run: RunPlan, sizes: Sizes) -> list[list[Item]]:
    """While the maps are solved; of several ranks first while their sums are added up, after which each has its slabs of them."""
    config, where, ranks = run.config, run.machine.works_on, run.machine.ranks
    sums = _sums(run, sizes)
    if sizes.classes:
        made = costs.SOLVING_PLANES * transform_size(run.problem, config) * 16
        maps = references_of(config) * 4 * map_pixels(run.problem, config)
        return [[sums, Item("transform of the map", where, made), Item("maps made", where, maps)]]
    if ranks == 1 and stays_in_planes(config.symmetry):
        return [[sums, *_solution_items(run, sizes)]]
    if ranks == 1:  # sums over the group take memory of their own
        voxels = reference_voxels(sizes, config) * _solved_bytes(run, sizes)
        turned = Item("sums over the point group", where, (1 if run.turns == "waiting" else classes_of(config)) * 3 * voxels)
        return [[sums, _turned_item(run, sizes)], [turned, *_solution_items(run, sizes)]]
    slabs = Item("slabs of the sums", where, classes_of(config) * _slab(run, sizes))
    one = Item("slabs of the sums", where, _slab(run, sizes) + 2 * PIECE_NUMBERS * 3 * sum_bytes(config))
    phases = [[sums, one], [slabs, _turned_item(run, sizes), *_solution_items(run, sizes)]]
    if share_of_volumes(run, sizes) < 1 and sizes.kind != "last":  # at last maps are not masked
        phases.append([Item("a map, its mask, and both", where, 12.0 * map_pixels(run.problem, config))])
    return phases


def _turned_item(run: RunPlan, sizes: Sizes) -> Item:
    """What one set's sums over a point group take while they are made, if it is none of those done plane by plane."""
    config, where = run.config, run.machine.works_on
    number = _solved_bytes(run, sizes)
    numbers = 0 if stays_in_planes(config.symmetry) else costs.VOXEL_TURNED * reference_voxels(sizes, config)
    return Item("sums, symmetrised", where, numbers * number / run.machine.ranks)


def _slab(run: RunPlan, sizes: Sizes) -> float:
    """Bytes of one rank's slab of the sums of a map."""
    numbers = 3 if share_of_volumes(run, sizes) < 1 else costs.VOXEL_RUNNING
    return numbers * sum_bytes(run.config) * reference_voxels(sizes, run.config) / run.machine.ranks


def _solution_items(run: RunPlan, sizes: Sizes) -> list[Item]:
    """What solving for maps takes beside the sums; 1 / ranks of it but for the maps that come about, which all ranks have: on the
    host, where volumes are in layers."""
    config, where, ranks = run.config, run.machine.works_on, run.machine.ranks
    pixels = map_pixels(run.problem, config)
    element = _solved_bytes(run, sizes)
    mask = 0.0 if sizes.kind == "last" else 5.0 * pixels  # in single precision, and where it is not 0
    maps = references_of(config) if sizes.kind != "last" else 2
    arriving = 0.0 if ranks == 1 else 4.0 * pixels / (ranks if share_of_volumes(run, sizes) < 1 else 1)
    map_itself = (element + (4 if element == 8 else 0)) * pixels / ranks + arriving
    return [
        Item("half transform of the map", where, _half_transform(run, sizes, element) / ranks),
        Item("columns of the transform", where, _some_columns(run, sizes, element)),
        Item("map that is made", where, map_itself),
        Item("maps made, mask", where, 0.0 if _maps_on_host(run, sizes) else maps * 4 * pixels + mask),
    ]
