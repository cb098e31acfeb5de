"""The expectation of a set of particles: batches in, sums and new poses out. Nothing but the sums is shared between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from verglas.core.memory import make_room, uploaded
from verglas.distributed.arrivals import Arrivals
from verglas.distributed.handout import Handout, all_taken
from verglas.errors import VerglasError
from verglas.expectation.classes import ClassGrid
from verglas.expectation.given import GivenPoses
from verglas.expectation.images import ImagePreparer, ModelGrid, NoiseSpectra, Prepared, common_noise, image_preparer
from verglas.expectation.local import select_local, select_relaxed
from verglas.expectation.sampling import OrientationGrid
from verglas.expectation.search import Local, Searcher, SearchSpace
from verglas.expectation.slices import FineSlices, Reference, Slicer
from verglas.kernels.admit import Parents
from verglas.maximization.accumulate import Accumulator, table_of
from verglas.maximization.gather import BatchFacts, BatchResult, WeightedSlices, update_sums, weighted_slices
from verglas.maximization.planes import PlaneAccumulator
from verglas.maximization.solvers import Solvers
from verglas.maximization.sums import Sums, added_up
from verglas.projection.volume import FourierVolume
from verglas.refinement import costs
from verglas.refinement.ahead import in_order
from verglas.refinement.batches import FineBytes
from verglas.refinement.computing import Computing, Plan
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.in_layers import InLayers, references_of
from verglas.refinement.plan_sizes import mates_of
from verglas.refinement.pose_tables import PoseTables
from verglas.refinement.state import HalfModel, Poses, direction_order

OUT_OF_MEMORY = (
    "The device ran out of memory, also with batches of half the size. Other programs may use it: free it, or give verglas less "
    "with --memory, and go on with --continue."
)
SOME = 128  # particles that stand for all of an optics group
Finished = list[tuple[Tensor, BatchResult]]  # rows [B] of the table and their new values, part by part of a batch
BYTES = {torch.float16: 2, torch.float32: 4, torch.float64: 8}


class HalfExpectation(PoseTables):
    """Expectation of particles against one model per class. `run` fills `sums` and `accumulators` (one per class, made when they
    are first needed) and yields batch results. Noise, norm, scales and spread of offsets are those of the first model.
    """

    layers: InLayers | None = None
    solvers: Solvers | None = None  # once its sums are added up: who solves for the map, if not all ranks do

    def __init__(
        self, models: list[HalfModel], data: Dataset, poses: Poses, plan: Plan, config: RefineConfig, on: Computing
    ) -> None:
        self.models, self.data, self.poses, self.plan, self.config, self.on = models, data, poses, plan, config, on
        self.model, device = models[0], on.device
        self.noise_GS = uploaded(self.model.sigma2_noise_GS, device)
        self.common_S = uploaded(common_noise(self.model.sigma2_noise_GS), device)
        grid, given = plan.model_grid, None
        if plan.align != "all":
            assert isinstance(plan.grid, OrientationGrid)
            given = GivenPoses.of(plan.grid, poses.rotation_B33, device)
        self.grid = ClassGrid(given or plan.grid, len(models))
        self.make_references()
        self.sums = Sums.zeros(len(data.groups), grid.shells, self.grid.n_directions, len(self.model.scale_M), device)
        self.ssnr_CS = uploaded(torch.stack([model.ssnr_S for model in models]), device)
        self.space = SearchSpace(
            self.grid, plan.offsets.to(device), self._log_prior_O(), self.model.offset_sigma, config.adaptive_fraction,
            on.operand, plan.correlate, config.relion_offset_prior, plan.most,
        )  # fmt: skip
        self.log_share_C = uploaded(torch.stack([model.direction_prior_D.sum() for model in models]), device).log()
        self.halved, self.notices = False, list[str]()
        self.name: str | None = None  # of the rows' counters, where ranks go through sets in different order (`Handout`)
        self._searchers: dict[int, Searcher] = {}
        self._slices: dict[tuple[float, ...], tuple[Slicer, Slicer, FineSlices]] = {}

    def make_references(self) -> None:
        """What is not made when it is first needed: references in layers, which all ranks make together."""
        if self.on.in_layers:
            maps = [model.map_ZYX for model in self.models]
            self.volumes, self.layers = references_of(maps, self.plan.model_grid, self.on)

    @cached_property
    def accumulators(self) -> list[Accumulator]:
        """What slices are added to."""
        g, on = self.plan.model_grid, self.on
        table = table_of(g.box, g.radius, g.padding, on.device) if self.layers is None else self.layers.across.mine
        # What making the references has left free lies between other arrays, and none of it is as large as sums are.
        make_room(on.device, costs.VOXEL_RUNNING * BYTES[on.dtype] * len(self.models) * table.count, on.most_held)
        if self.layers is not None:
            return self.layers.sums
        return [Accumulator(g.box, g.radius, g.padding, on.device, on.dtype) for _ in self.models]

    @cached_property
    def volumes(self) -> list[FourierVolume]:
        """What slices are cut from."""
        return references_of([model.map_ZYX for model in self.models], self.plan.model_grid, self.on)[0]

    def leave_references(self) -> None:
        """Leave what slices were cut from to the next expectation, which may be of the same maps."""
        self.on.ready[:] = ready_for(self.models, self.plan.model_grid, self.volumes)

    def slicer(self, coordinates_K3: Tensor, common_K: Tensor) -> Slicer:
        """What cuts slices from the references."""
        return Slicer(self.volumes, coordinates_K3, common_K, self.on.operand)

    def add(self, slices: WeightedSlices) -> None:
        """Add the weighted slices of some particles."""
        slices.add_to(self.accumulators)

    def _log_prior_O(self) -> Tensor:
        """Log prior of every coarse orientation of every class, relative to its mean; empty where particles have their own."""
        if self.plan.own_lists:  # not asked for, and long on a fine grid
            return torch.empty(0, dtype=torch.float64, device=self.on.device)
        prior_D = uploaded(torch.cat([model.direction_prior_D for model in self.models]), self.on.device)
        return torch.log(prior_D / prior_D.mean()).repeat_interleave(self.plan.grid.n_psi)

    def run(self, rows: Tensor, helps: bool = True) -> Iterator[tuple[Tensor, BatchResult]]:
        """Yield (rows [B] of the table, their new values) batch by batch."""
        for parts in in_order(self.begun(rows, helps), self.on.device, self.on.memory, self.on.ranks):
            yield from parts

    def begun(self, rows: Tensor, helps: bool = True) -> Iterator[Callable[[], Finished]]:
        """Batch by batch after its coarse search: what finishes it. To be called in this order, by whichever thread. helps: other
        ranks, once this one's own rows are done."""
        for group in range(len(self.data.groups)):
            mine = rows[self.data.group_B[rows] == group]
            if len(mine) == 0:
                continue
            name = None if self.name is None else f"{self.name}.{group}"
            if name is not None and all_taken(mine, self.data.shares, name):
                continue
            for block in self._blocks(mine, self.batch_size(group), name, helps):
                searcher = self.searcher_of(group)  # references first: making them takes much beside them
                self.sums_of_slices()  # their memory before that of any batch
                yield from self._block(searcher, block, group)

    def _blocks(self, rows: Tensor, size: int, name: str | None, helps: bool) -> Iterator[Tensor]:
        """All rows, at most `size` at a time; of several ranks those that this one gets to work on (name, helps: `Handout`)."""
        if self.data.shares is None:
            rows = self._in_order(rows)
            self.data.announce(rows, size)
            yield from rows.split(size)
            return
        handout = Handout(rows, self.data.shares, self.poses.significant_B, name=name, helps=helps, order=self._in_order)
        size = handout.best(size)
        self.data.announce(handout.own(), size)
        yield from handout.blocks(size, self.data.announce_next)

    def _in_order(self, rows: Tensor) -> Tensor:
        """Rows as they are best worked on: in local searches neighbours in direction share slices."""
        if not self.plan.schedule.local_sigma:
            return rows
        return rows[torch.argsort(direction_order(self.poses.rotation_B33[rows]), stable=True)]

    @property
    def _local(self) -> bool:
        """Whether orientations near each particle's own are searched."""
        return self.plan.own_lists and self.plan.align == "all"

    def _block(self, searcher: Searcher, block: Tensor, group: int) -> Iterator[Callable[[], Finished]]:
        """A batch, or, where the device runs out of memory, its parts."""
        first, step = 0, max(1, len(block) // (2 if self.halved else 1))
        while first < len(block):
            batch = block[first : first + step]
            try:
                rest = self._batch(searcher, batch, group)
            except torch.OutOfMemoryError as error:  # in the coarse search: nothing of the batch has been added
                if self.halved or len(batch) == 1:
                    raise VerglasError(OUT_OF_MEMORY) from error
                self._halve()
                step = max(1, len(batch) // 2)
                continue
            yield rest
            first += len(batch)

    def _halve(self) -> None:
        """After the device ran out of memory: once more, with half of what was planned for batches."""
        torch.cuda.empty_cache()
        self.halved = True
        self.on = replace(self.on, memory=self.on.memory / 2)
        self.notices.append(f"The {self.on.device.type} ran out of memory although it was planned for: batches are halved.")

    def prepared(self, rows: Tensor, group: int) -> tuple[Searcher, Prepared]:
        """The searcher of an optics group and some of its particles, prepared."""
        facts = self._facts(rows, group)
        searcher, spectra = self.searcher_of(group), NoiseSpectra(self.noise_GS[group], self.common_S)
        return searcher, self._prepare(searcher.preparer, rows, group, facts, spectra)

    def weights(self, rows: Tensor, group: int) -> tuple[Searcher, Tensor]:
        """The searcher of an optics group, and C^2 / sigma^2 of some of its particles as they are compared [B, K]: without their
        images, which may be another rank's."""
        searcher, row_B = self.searcher_of(group), uploaded(rows, self.on.device)
        ctf = None if self.ctf is None else self.ctf[row_B]
        spectra = NoiseSpectra(self.noise_GS[group], self.common_S)
        return searcher, searcher.preparer.weights(ctf, self.scale_M[self.micrograph_B[row_B]], spectra)

    def release(self) -> HalfExpectation:
        """Give back the memory of slices, once no rank needs this one any more; what was added up stays on the device, which may
        still be adding. Returns itself."""
        if self.layers is not None:
            self.layers.serve()
        self._searchers.clear()
        self._slices.clear()
        return self

    def begin_adding(self) -> list[Arrivals]:
        """Have the sums of all ranks travel, after `release`, as far as ranks share the solving; `add_up` waits for them."""
        if not self.on.ranks.ways.overlap:
            return []
        begun = (one.begin_adding(self.on.ranks) for one in self.sums_of_slices())
        return [arrivals for arrivals in begun if arrivals is not None]

    def add_up_slices(self, share: bool = False) -> None:
        """Add up the sums of slices of all ranks, after `release`. share: ranks may share the solving (`Accumulator.add_up`)."""
        for one in self.sums_of_slices():
            one.add_up(self.on.ranks, share)

    def add_up_sums(self) -> None:
        """Add up `sums`, which go to the host; where slices' sums of any set are under way, after all of these have arrived."""
        (self.sums,) = added_up([self.sums], self.on.ranks)

    @property
    def slices(self) -> int:
        """How many this rank has added to the first model's sums."""
        return self.accumulators[0].slices if "accumulators" in self.__dict__ else 0

    def add_sums(self, sums: Sums, packed: list[tuple[Tensor, int]]) -> None:
        """Add what another process has found, before `release`; packed: of each of its `sums_of_slices`."""
        self.sums = self.sums + sums.to(self.on.device)
        for one, (values_V3, slices) in zip(self.sums_of_slices(), packed, strict=True):
            one.add_packed(values_V3, slices)

    def sums_of_slices(self) -> Sequence[Accumulator | PlaneAccumulator]:
        """All that slices were added to."""
        return self.accumulators

    def batch_size(self, group: int) -> int:
        """Particles at once on the coarse grid: shifted images, scores and the images themselves fit the memory for batches, and
        images that are streamed fit theirs."""
        preparer, orientations = self._preparer_of(group), self.grid.count
        if self._local:
            orientations = min(orientations, costs.LOCAL_ORIENTATIONS * mates_of(self.config) * len(self.models))
        elif self.plan.align != "all":
            orientations = len(self.models)
        dense = self.plan.own_lists or self.plan.correlate or self.plan.most > 0
        reduced = self.on.operand == torch.float16 and not dense
        each = costs.reserved_bytes(
            costs.Counts(
                preparer.group.box, preparer.pixels.count, preparer.coarse_count,
                orientations, len(self.plan.offsets.coarse_T2), self._local, reduced,
            ),
            BYTES[self.on.operand], BYTES[self.on.dtype],
        )  # fmt: skip
        return max(1, min(int(self.on.memory / each), self.data.largest_batch(group)))

    def _batch(self, searcher: Searcher, rows: Tensor, group: int) -> Callable[[], Finished]:
        """Search a batch: all of it on the coarse grid; what is returned searches the fine one and adds what was found."""
        facts, spectra = self._facts(rows, group), NoiseSpectra(self.noise_GS[group], self.common_S)
        prepared = self._prepare(searcher.preparer, rows, group, facts, spectra)
        own = self._own(rows)
        if self.plan.align == "none":
            assert own is not None
            parents, significant_B = searcher.given(prepared, own)
        else:
            parents, significant_B = searcher.coarse(prepared, facts.old_offset_B2, own, spectra.sigma2_S)
        return partial(self._finish, searcher, prepared, parents, significant_B, facts, spectra, rows)

    def _finish(
        self, searcher: Searcher, prepared: Prepared, parents: Parents, significant_B: Tensor, facts: BatchFacts,
        spectra: NoiseSpectra, rows: Tensor,
    ) -> Finished:  # fmt: skip
        """Search a batch on the fine grid and add it, as many particles at once as fit."""
        parts, found = self._parts(parents, searcher.preparer.pixels.count), Finished()
        while parts:
            first, last = parts.pop(0)
            try:
                part, whole = slice(first, last), last - first == len(rows)
                mine = parents if whole else parents.part(first, last)
                result = self._part(searcher, prepared[part], mine, significant_B[part], facts[part], spectra)
            except torch.OutOfMemoryError as error:
                if self.halved or last - first == 1:
                    raise VerglasError(OUT_OF_MEMORY) from error
                self._halve()
                parts[:0] = [(first, (first + last) // 2), ((first + last) // 2, last)]
                continue
            found.append((rows[part], result))
        return found

    def _part(
        self, searcher: Searcher, prepared: Prepared, parents: Parents, significant_B: Tensor, facts: BatchFacts,
        spectra: NoiseSpectra,
    ) -> BatchResult:  # fmt: skip
        """Fine search and sums of some particles. What takes memory comes before anything is added, so that a part that ran
        out of it can be done again."""
        posterior = searcher.fine(prepared, parents, significant_B, spectra.sigma2_S)
        slices = weighted_slices(searcher, prepared, posterior, self.common_S)
        update_norm = self.config.correct_norm and not self.plan.correlate  # no norm against another grey scale
        result = update_sums(self.sums, searcher, prepared, posterior, facts, spectra, self.ssnr_CS, update_norm)
        self.add(slices)
        return result

    def _parts(self, parents: Parents, pixels: int) -> list[tuple[int, int]]:
        """Runs of particles whose fine samples, shifted images and slices fit into the memory for batches."""
        operand, full = BYTES[self.on.operand], BYTES[self.on.dtype]
        one = FineBytes(
            sample=self.plan.offsets.children_per_offset * costs.SAMPLE_BYTES[self.on.device.type],
            shift=self.plan.offsets.children_per_offset * 2 * pixels * operand, row=pixels * (3 * full + 2 * operand),
        )  # fmt: skip
        return one.runs(parents.blocks, self.grid, costs.FINE_SHARE * self.on.memory)

    def _facts(self, rows: Tensor, group: int) -> BatchFacts:
        row_B = uploaded(rows, self.on.device)
        pixel_size, micrograph_B = self.data.groups[group].pixel_size, self.micrograph_B[row_B]
        old_offset_B2 = (self.whole_B2[group][row_B] + self._rest(row_B, group)) * pixel_size
        return BatchFacts(old_offset_B2, self.norm_B[row_B], self.scale_M[micrograph_B], micrograph_B, group)

    def _prepare(self, preparer: ImagePreparer, rows: Tensor, group: int, facts: BatchFacts, spectra: NoiseSpectra) -> Prepared:
        row_B = uploaded(rows, self.on.device)
        gain_B = 1 / facts.norm_B if self.config.correct_norm else torch.ones_like(facts.norm_B)
        ctf = None if self.ctf is None else self.ctf[row_B]
        shift_B2 = self.whole_B2[group][row_B]
        prepared = preparer(self.data.images_of(rows, group), shift_B2, ctf, gain_B, facts.scale_B, spectra)
        return prepared if self.plan.align != "none" else prepared.moved(self._rest(row_B, group), preparer.pixels)

    def _rest(self, row_B: Tensor, group: int) -> Tensor:
        """What is left of the offsets beyond whole pixels, px [B, 2]; 0 where offsets are searched, which finds it."""
        if self.plan.align != "none":
            return torch.zeros_like(self.whole_B2[group][row_B])
        return self.origin_B2[row_B] / self.data.groups[group].pixel_size - self.whole_B2[group][row_B]

    def _own(self, rows: Tensor) -> Local | None:
        """Each particle's own orientations, in every class; with the prior of the class. None: all of the grid."""
        if not self.plan.own_lists:
            return None
        if self.plan.align != "all":
            row_B = uploaded(rows, self.on.device)
            lists = (torch.arange(len(rows) + 1, device=self.on.device), row_B, torch.zeros_like(row_B, dtype=torch.float64))
        else:
            assert isinstance(self.plan.grid, OrientationGrid)  # in-plane searches are never local
            rotation_B33 = self.posed_B33[uploaded(rows, self.on.device)]
            about = (self.plan.grid, rotation_B33, self.plan.schedule.local_sigma, self.config.symmetry)
            relaxed = self.config.relax_symmetry
            lists = select_local(*about) if relaxed is None else select_relaxed(*about, relaxed)
        return Local(*self.grid.in_every_class(*lists, self.log_share_C))

    def searcher_of(self, group: int) -> Searcher:
        """What compares the particles of an optics group."""
        if group not in self._searchers:
            preparer = self._preparer_of(group)
            some = partial(self._some_weights, group)
            self._searchers[group] = Searcher(preparer, self.space, *self._slices_of(preparer), some)
        return self._searchers[group]

    def _preparer_of(self, group: int) -> ImagePreparer:
        """What makes the images of an optics group comparable."""
        config, on = self.config, self.on
        geometry = self.data.groups[group], self.plan.model_grid, config.diameter, config.mask_edge
        return image_preparer(*geometry, on.device, on.dtype)

    def _some_weights(self, group: int) -> Tensor:
        """`weights` of a few of an optics group's particles: of all half-sets, and of all ranks."""
        rows = (self.data.group_B == group).nonzero().squeeze(1)
        return self.weights(rows[:: max(1, len(rows) // SOME)][:SOME], group)[1]

    def _slices_of(self, preparer: ImagePreparer) -> tuple[Slicer, Slicer, FineSlices]:
        """Slicers of this geometry: coarse disc, all coefficients, children; shared by groups of one geometry."""
        group = preparer.group
        key = (group.box, group.pixel_size, *group.magnification[0], *group.magnification[1])
        if key not in self._slices:
            common_K = self.common_S[preparer.shell_K]
            full, n = self.slicer(preparer.coordinates_K3, common_K), preparer.coarse_count
            coarse = self.slicer(preparer.coordinates_K3[:n], common_K[:n])
            grid = self.grid
            table = grid.count * grid.children_per_orientation * 2 * preparer.pixels.count * BYTES[self.on.operand]
            whole = not self.plan.own_lists and table <= self.on.memory
            self._slices[key] = (coarse, full, FineSlices(full, grid, whole))
        return self._slices[key]


def leave_references(models: list[HalfModel], grid: ModelGrid, on: Computing) -> None:
    """Make what slices of these models are cut from, for the next expectation."""
    on.ready[:] = ready_for(models, grid, references_of([model.map_ZYX for model in models], grid, on)[0])


def ready_for(models: list[HalfModel], grid: ModelGrid, volumes: list[FourierVolume]) -> list[Reference]:
    """References of these models, for who needs the same."""
    return [Reference(model.map_ZYX, grid, volume) for model, volume in zip(models, volumes, strict=True)]
