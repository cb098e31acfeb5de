"""The expectation of one half-set: batches in, sums and new poses out. Nothing but the sums is shared between particles."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.errors import VerglasError
from verglas.expectation.images import ImagePreparer, ModelGrid, NoiseSpectra, Prepared, common_noise
from verglas.expectation.local import select_local
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.expectation.search import Local, Searcher, SearchSpace
from verglas.expectation.slices import FineSlices, Slicer
from verglas.kernels.admit import Parents
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.gather import BatchFacts, BatchResult, update_sums, weighted_slices
from verglas.maximization.sums import Sums
from verglas.particles.preprocess import whole_pixels
from verglas.projection.volume import FourierVolume
from verglas.refinement import costs
from verglas.refinement.config import RefineConfig
from verglas.refinement.dataset import Dataset
from verglas.refinement.state import HalfModel, Poses, Schedule

OUT_OF_MEMORY = (
    "The device ran out of memory, also with batches of half the size. Other programs may use it: free it, or give verglas less "
    "with --memory, and go on with --continue."
)
BYTES = {torch.float16: 2, torch.float32: 4, torch.float64: 8}


@dataclass(frozen=True)
class Computing:
    """Where and how the expectation runs. dtype: of images and sums; operand: of the factors of matrix products;
    memory: bytes that the arrays of one batch may take, and as many those of the slices.
    """

    device: torch.device
    dtype: torch.dtype
    operand: torch.dtype
    memory: float


@dataclass(frozen=True)
class Plan:
    """What an iteration does: grids, sizes (shells), and whether it scores by correlation (first iteration)."""

    grid: OrientationGrid
    offsets: OffsetGrid
    model_grid: ModelGrid
    schedule: Schedule
    correlate: bool


class HalfExpectation:
    """Expectation of the particles `rows` against one model. `run` fills `sums` and `accumulator`, yields batch results."""

    def __init__(self, model: HalfModel, data: Dataset, poses: Poses, plan: Plan, config: RefineConfig, on: Computing) -> None:
        self.model, self.data, self.poses, self.plan, self.config, self.on = model, data, poses, plan, config, on
        self.common_S = common_noise(model.sigma2_noise_GS).to(on.device)
        grid = plan.model_grid
        self.volume = FourierVolume.from_map(model.map_ZYX, grid.radius, grid.padding, on.device, on.dtype)
        self.accumulator = Accumulator(grid.box, grid.radius, grid.padding, on.device, on.dtype)
        self.sums = Sums.zeros(len(data.groups), grid.shells, plan.grid.n_directions, len(model.scale_M))
        prior_D = model.direction_prior_D.to(on.device)
        log_prior_D = torch.log(prior_D / prior_D.mean())
        if plan.schedule.local_sigma:  # not asked for, and long on a fine grid
            log_prior_D = log_prior_D[:0]
        self.space = SearchSpace(
            plan.grid, plan.offsets, log_prior_D.repeat_interleave(plan.grid.n_psi), model.offset_sigma,
            config.adaptive_fraction, on.operand, plan.correlate, config.relion_offset_prior,
        )  # fmt: skip
        self.halved = False
        self.notices: list[str] = []
        self._searchers: dict[int, Searcher] = {}
        self._slices: dict[tuple[float, ...], tuple[Slicer, Slicer, FineSlices]] = {}

    def run(self, rows: Tensor) -> Iterator[tuple[Tensor, BatchResult]]:
        """Yield (rows [B] of the table, their new values) batch by batch."""
        for group in range(len(self.data.groups)):
            mine = rows[self.data.group_B[rows] == group]
            if len(mine) == 0:
                continue
            searcher = self._searcher(group)
            if self.plan.schedule.local_sigma:  # neighbours in direction share slices
                mine = mine[torch.argsort(direction_order(self.poses.rotation_B33[mine]), stable=True)]
            step = self.batch_size(searcher)
            first = 0
            while first < len(mine):
                batch = mine[first : first + step]
                try:
                    yield from self._batch(searcher, batch, group)
                except torch.OutOfMemoryError as error:  # in the coarse search: nothing of the batch has been added
                    if self.halved or len(batch) == 1:
                        raise VerglasError(OUT_OF_MEMORY) from error
                    self._halve()
                    step = max(1, len(batch) // 2)
                    continue
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
        spectra = NoiseSpectra(self.model.sigma2_noise_GS[group].to(self.on.device), self.common_S)
        searcher = self._searcher(group)
        return searcher, self._prepare(searcher.preparer, rows, group, facts, spectra)

    def release(self) -> None:
        """Give back the memory of slices; sums and accumulator stay."""
        self._searchers.clear()
        self._slices.clear()

    def batch_size(self, searcher: Searcher) -> int:
        """Particles at once on the coarse grid: shifted images, scores and the images themselves fit the memory for batches."""
        local = bool(self.plan.schedule.local_sigma)
        each = costs.reserved_bytes(
            costs.Counts(
                self.data.groups[0].box, searcher.preparer.pixels.count, searcher.preparer.coarse_count,
                costs.LOCAL_ORIENTATIONS if local else self.plan.grid.count, len(self.plan.offsets.coarse_T2), local,
            ),
            BYTES[self.on.operand], BYTES[self.on.dtype],
        )  # fmt: skip
        return max(1, int(self.on.memory / each))

    def _batch(self, searcher: Searcher, rows: Tensor, group: int) -> Iterator[tuple[Tensor, BatchResult]]:
        """Search a batch: all of it on the coarse grid, then as many particles at once as fit on the fine one."""
        facts = self._facts(rows, group)
        spectra = NoiseSpectra(self.model.sigma2_noise_GS[group].to(self.on.device), self.common_S)
        prepared = self._prepare(searcher.preparer, rows, group, facts, spectra)
        parents, significant_B = searcher.coarse(prepared, facts.old_offset_B2, self._local(rows), spectra.sigma2_S)
        parts = self._parts(parents, searcher.preparer.pixels.count)
        while parts:
            first, last = parts.pop(0)
            try:
                result = self._part(searcher, prepared[first:last], parents.part(first, last), significant_B[first:last],
                                    facts[first:last], spectra)  # fmt: skip
            except torch.OutOfMemoryError as error:
                if self.halved or last - first == 1:
                    raise VerglasError(OUT_OF_MEMORY) from error
                self._halve()
                parts[:0] = [(first, (first + last) // 2), ((first + last) // 2, last)]
                continue
            yield rows[first:last], result

    def _part(
        self, searcher: Searcher, prepared: Prepared, parents: Parents, significant_B: Tensor, facts: BatchFacts,
        spectra: NoiseSpectra,
    ) -> BatchResult:  # fmt: skip
        """Fine search and sums of some particles. What takes memory comes before anything is added, so that a part that ran
        out of it can be done again."""
        posterior = searcher.fine(prepared, parents, significant_B, spectra.sigma2_S)
        slices = weighted_slices(searcher, prepared, posterior, self.common_S)
        update_norm = self.config.correct_norm and not self.plan.correlate  # no norm against another grey scale
        result = update_sums(self.sums, searcher, prepared, posterior, facts, spectra, self.model.ssnr_S, update_norm)
        slices.add_to(self.accumulator)
        return result

    def _parts(self, parents: Parents, pixels: int) -> list[tuple[int, int]]:
        """Runs of particles whose fine samples, shifted images and slices fit into the memory for batches."""
        grid, offsets, blocks = self.plan.grid, self.plan.offsets, parents.blocks
        each = grid.children_per_orientation
        operand, full = BYTES[self.on.operand], BYTES[self.on.dtype]
        samples_B = blocks.value_ptr_B1.diff() * (each * offsets.children_per_offset)
        slices_B = (blocks.slice_ptr_B1.diff() * each).clamp_max(grid.count * each)
        row = pixels * (3 * full + 2 * operand)
        limit = grid.count * each * row  # particles share slices: all of them together never need more than the grid
        fixed = len(offsets.fine_F2) * 2 * pixels * operand
        bytes_B = samples_B * costs.SAMPLE_BYTES[self.on.device.type] + fixed
        parts, first, used, rows = [], 0, 0.0, 0.0
        for i, (samples, slices) in enumerate(zip(bytes_B.tolist(), (slices_B * row).tolist())):
            if i > first and used + samples + min(rows + slices, limit) > costs.FINE_SHARE * self.on.memory:
                parts.append((first, i))
                first, used, rows = i, 0.0, 0.0
            used, rows = used + samples, rows + slices
        return [*parts, (first, blocks.particles)]

    def _facts(self, rows: Tensor, group: int) -> BatchFacts:
        pixel_size = self.data.groups[group].pixel_size
        old_offset_B2 = whole_pixels(self.poses.origin_B2[rows], pixel_size) * pixel_size
        micrograph_B = self.poses.micrograph_B[rows]
        norm_B = self.poses.norm_B[rows] / self.model.norm_average
        return BatchFacts(old_offset_B2.to(self.on.device), norm_B, self.model.scale_M[micrograph_B], micrograph_B, group)

    def _prepare(self, preparer: ImagePreparer, rows: Tensor, group: int, facts: BatchFacts, spectra: NoiseSpectra) -> Prepared:
        shift_B2 = whole_pixels(self.poses.origin_B2[rows], self.data.groups[group].pixel_size)
        gain_B = 1 / facts.norm_B if self.config.correct_norm else torch.ones(len(rows))
        ctf = None if self.data.ctf is None else self.data.ctf[rows]
        return preparer(self.data.images_of(rows, group), shift_B2, ctf, gain_B, facts.scale_B, spectra)

    def _local(self, rows: Tensor) -> Local | None:
        sigma = self.plan.schedule.local_sigma
        if not sigma:
            return None
        lists = select_local(self.plan.grid, self.poses.rotation_B33[rows], sigma, self.config.symmetry)
        return Local(*(part.to(self.on.device) for part in lists))

    def _searcher(self, group: int) -> Searcher:
        if group not in self._searchers:
            preparer = ImagePreparer(
                self.data.groups[group], self.plan.model_grid, self.config.diameter, self.config.mask_edge, self.on.device,
                self.on.dtype,
            )  # fmt: skip
            self._searchers[group] = Searcher(preparer, self.space, *self._slices_of(preparer))
        return self._searchers[group]

    def _slices_of(self, preparer: ImagePreparer) -> tuple[Slicer, Slicer, FineSlices]:
        """Slicers of this geometry: coarse disc, all coefficients, children; shared by groups of one geometry."""
        group = preparer.group
        key = (group.box, group.pixel_size, *group.magnification[0], *group.magnification[1])
        if key not in self._slices:
            common_K = self.common_S[preparer.shell_K]
            full = Slicer(self.volume, preparer.coordinates_K3, common_K, self.on.operand)
            n = preparer.coarse_count
            coarse = Slicer(self.volume, preparer.coordinates_K3[:n], common_K[:n], self.on.operand)
            grid = self.plan.grid
            table = grid.count * grid.children_per_orientation * 2 * preparer.pixels.count * BYTES[self.on.operand]
            whole = not self.plan.schedule.local_sigma and table <= self.on.memory
            self._slices[key] = (coarse, full, FineSlices(full, grid, whole))
        return self._slices[key]


def direction_order(rotation_B33: Tensor) -> Tensor:
    """Sort key that puts poses of like viewing direction, then of like in-plane angle, next to each other [B]."""
    view_B3 = rotation_B33[:, 2]
    cells = 64
    place = ((view_B3 + 1) * (cells / 2)).floor().clamp(0, cells - 1).long()
    key = torch.zeros(len(view_B3), dtype=torch.int64)
    for bit in range(6):
        for axis in range(3):
            key |= ((place[:, axis] >> bit) & 1) << (3 * bit + axis)
    return key
