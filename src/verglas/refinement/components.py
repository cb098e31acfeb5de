"""The directions in which particles of known pose differ from their common map: probabilistic PCA of maps.

After 3-D variability analysis (Punjani & Fleet 2021). With A the pose and C the CTF of particle i,

    X_i = C_i A_i ((1 + z_i0) V_0 + sum_j z_ij V_j) + noise,      z_i ~ N(mean, covariance)

V_0, the common map, stays as it is; its z is the particle's contrast. Each round is one pass: what an image says of its z
(`Latents`), then sums for every direction as for a map, with z in the place of 1 and the other directions subtracted:

    data_j = sum_i z_ij C X - C^2 (z_ij V_0 + sum over l, not j, of <z_ij z_il> V_l)        weight_j = sum_i <z_ij^2> C^2

Unlike there, particles that nothing explains (junk) count little, or the directions would be those of the junk, each of which
soon explains those that made it. A kind of particle that differs much is not lost: all of it pulls the same way.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.core.fourier import fourier_resize
from verglas.core.masks import soft_sphere
from verglas.expectation.images import ModelGrid, Prepared
from verglas.expectation.latent import STRANGE, Gaussians, Latents, moments, strangeness
from verglas.expectation.search import Searcher
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.reference import volume_spectrum
from verglas.maximization.solve import gather_sums
from verglas.projection.volume import FourierVolume
from verglas.refinement.dataset import Progress
from verglas.refinement.expect import BYTES, HalfExpectation

ROUNDS, ADMITTED = 20, 10  # from that round on what the directions explain counts, before what the common map does
LARGEST_BATCH = {"cpu": 512, "cuda": 8192}
VOXELS_A_SHELL = 3  # edge of the maps: enough that masking them reflects nothing into the shells that count
KEPT_SHARE = 0.5  # of the memory for batches: prepared images that take no more are kept from round to round


@dataclass(frozen=True)
class Found:
    """latents: of all particles in the space of the common map and the directions; overall: their distribution; strange_B: how
    badly the particles fit in spite of them, see `latent.strangeness`."""

    latents: Latents
    overall: Gaussians
    strange_B: Tensor


def find_components(
    half: HalfExpectation, count: int, seed: int, mask_ZYX: Tensor | None = None, progress: Progress | None = None
) -> Found:
    """`count` directions in which the particles of `half` differ, begun at random. half: of one model, poses given.

    mask_ZYX: where they may differ; None: in a sphere of the particle's diameter.
    """
    search = _Search(half, count, mask_ZYX)
    draw = torch.Generator().manual_seed(seed)
    drawn_BQ = torch.randn(len(half.data), count, generator=draw, dtype=torch.float64)
    search.begin(torch.cat([torch.zeros_like(drawn_BQ[:, :1]), drawn_BQ], 1).to(half.on.device))
    for number in range(ROUNDS):
        search.round(number)
        if progress is not None:
            progress("division", (number + 1) * len(half.data) // ROUNDS, len(half.data))
    return search.found()


class _Search:
    """Common map and directions (`maps`), and the distribution of z, from round to round."""

    def __init__(self, half: HalfExpectation, count: int, mask_ZYX: Tensor | None) -> None:
        self.half, self.count = half, count
        self.device, self.dtype = half.on.device, half.on.dtype
        self.grid = _small(half.plan.model_grid)
        self.kept: list[tuple[Tensor, Searcher, Prepared]] | None = None
        whole_ZYX = half.model.map_ZYX.to(self.device)
        shrunk = len(whole_ZYX) / self.grid.box  # times which slices are as strong as they were
        self.maps = [fourier_resize(whole_ZYX, self.grid.box) * shrunk]
        radius_px = half.config.diameter / 2 / self.grid.pixel_size
        edge_px = half.config.mask_edge * self.grid.box / len(whole_ZYX)
        sphere_ZYX = soft_sphere(self.grid.box, radius_px, edge_px, self.device)
        self.mask_ZYX = sphere_ZYX if mask_ZYX is None else fourier_resize(mask_ZYX.to(self.device), self.grid.box).clamp(0, 1)
        self.cut()
        tau2_S = volume_spectrum(self.volumes[0])[: self.grid.radius + 1]
        self.inverse_tau2_S = 1 / (self.volumes[0].padding ** 3 * tau2_S)  # a difference is no stronger than the map itself
        one_Q = torch.ones(count + 1, dtype=torch.float64, device=self.device)
        self.overall = Gaussians(torch.zeros_like(one_Q)[None], torch.diag(one_Q)[None])
        self.weight_B = torch.ones(len(half.data), dtype=torch.float64, device=self.device)

    def begin(self, z_BQ: Tensor) -> None:
        """First directions: what is left of the particles, added up with random weights."""
        self.trim(self.latents().misfit_B)
        sums = self.accumulators()
        for row_B, searcher, prepared in self.batches():
            second_BQQ = torch.diag_embed(z_BQ[row_B].square())
            self.add(sums, searcher, prepared, row_B, (self.slices(searcher, row_B), z_BQ[row_B], second_BQQ))
        self.solve(sums)
        self.cut()

    def round(self, number: int) -> None:
        """Directions and distribution of z from those before; particles that are left unexplained count less in the next."""
        sums, gathered = self.accumulators(), _Gathered()
        for row_B, searcher, prepared in self.batches():
            slices_QB2K = self.slices(searcher, row_B)
            part = latents_of(slices_QB2K, prepared)
            mean_BQ, covariance_BQQ = self.overall.posterior(part)
            second_BQQ = covariance_BQQ + mean_BQ[:, :, None] * mean_BQ[:, None]
            self.add(sums, searcher, prepared, row_B, (slices_QB2K, mean_BQ, second_BQQ))
            gathered.add(row_B, part)
        latents = gathered.joined()
        mean_BQ, covariance_BQQ = self.overall.posterior(latents)
        self.solve(sums)
        self.overall = moments(mean_BQ, covariance_BQQ, self.weight_B[:, None])
        self.whiten()
        if number >= ADMITTED:
            self.trim(latents.misfit_at(mean_BQ))

    def trim(self, misfit_B: Tensor) -> None:
        """How much particles count: fully up to a usual misfit, then less and less."""
        self.weight_B = 1 / (1 + (strangeness(misfit_B).clamp_min(0) / STRANGE) ** 4)

    def latents(self) -> Latents:
        """What all particles say of their z."""
        gathered = _Gathered()
        for row_B, searcher, prepared in self.batches():
            gathered.add(row_B, latents_of(self.slices(searcher, row_B), prepared))
        return gathered.joined()

    def found(self) -> Found:
        """What is known at the end."""
        latents = self.latents()
        mean_BQ, _ = self.overall.posterior(latents)
        return Found(latents, self.overall, strangeness(latents.misfit_at(mean_BQ)))

    def batches(self) -> Iterator[tuple[Tensor, Searcher, Prepared]]:
        """All particles: rows of the table (on the device), searcher and images of each batch."""
        if self.kept is not None:
            yield from self.kept
            return
        kept, room = [], KEPT_SHARE * self.half.on.memory
        for batch in self.prepared():
            room -= sum(tensor.nbytes for tensor in vars(batch[2]).values())
            kept.append(batch)
            if room < 0:
                kept.clear()
            yield batch
        if room >= 0:
            self.kept = kept

    def prepared(self) -> Iterator[tuple[Tensor, Searcher, Prepared]]:
        """`batches`, made from the images."""
        half = self.half
        for group in range(len(half.data.groups)):
            mine = (half.data.group_B == group).nonzero().squeeze(1)
            if not len(mine):
                continue
            each = 2 * half.searcher_of(group).preparer.pixels.count * BYTES[self.dtype] * (3 * self.count + 6)
            step = max(1, min(int(half.on.memory / each), half.data.largest_batch(group), LARGEST_BATCH[self.device.type]))
            half.data.announce(mine, step)
            for rows in mine.split(step):
                searcher, prepared = half.prepared(rows, group)
                yield rows.to(self.device), searcher, prepared

    def slices(self, searcher: Searcher, row_B: Tensor) -> Tensor:
        """Of all maps at the poses of a batch, divided by the common noise, [Q, B, 2, K]."""
        preparer, rotation_B33 = searcher.preparer, self.half.poses.rotation_B33.to(self.device)[row_B]
        inverse_K = self.half.common_S[preparer.shell_K].reciprocal().to(self.dtype)
        return torch.stack([one.slices(rotation_B33, preparer.coordinates_K3, inverse_K) for one in self.volumes])

    def accumulators(self) -> list[Accumulator]:
        """Empty sums of every direction."""
        grid = self.grid
        return [Accumulator(grid.box, grid.radius, grid.padding, self.device, self.dtype) for _ in range(self.count)]

    def add(
        self, sums: list[Accumulator], searcher: Searcher, prepared: Prepared, row_B: Tensor, known: tuple[Tensor, Tensor, Tensor]
    ) -> None:
        """Add a batch to the sums of each direction. known: slices [Q, B, 2, K], <z> [B, Q], <z z> [B, Q, Q]."""
        slices_QB2K, mean_BQ, second_BQQ = known
        weight_B, count = self.weight_B[row_B], len(slices_QB2K)
        mean_BQ, second_BQQ = mean_BQ * weight_B[:, None], second_BQQ * weight_B[:, None, None]
        used_BQQ = second_BQQ - torch.diag_embed(second_BQQ.diagonal(dim1=1, dim2=2))
        used_BQQ[:, :, 0] += mean_BQ  # the common map is there 1 + z_0 times
        inverse_K = self.half.common_S[searcher.preparer.shell_K].reciprocal().to(self.dtype)
        mapped_BK = prepared.mapped_weight_BK
        rotation_B33 = self.half.poses.rotation_B33.to(self.device)[row_B]
        for j, accumulator in enumerate(sums, 1):
            others_B2K = torch.einsum("bq,qbck->bck", used_BQQ[:, j, :count].to(self.dtype), slices_QB2K)
            data_B2K = mean_BQ[:, j, None, None].to(self.dtype) * prepared.mapped_B2K - others_B2K * mapped_BK[:, None]
            weight_BK = second_BQQ[:, j, j, None].to(self.dtype) * mapped_BK * inverse_K.square()
            accumulator.add((data_B2K * inverse_K).contiguous(), weight_BK, rotation_B33, searcher.preparer.coordinates_K3)

    def solve(self, sums: list[Accumulator]) -> None:
        """Directions from their sums; not `cut` yet."""
        del self.maps[1:]
        for accumulator in sums:
            gathered = gather_sums([accumulator], self.half.config.symmetry, consume=True)
            self.maps.append((gathered.map(self.inverse_tau2_S) * self.mask_ZYX).float())

    def whiten(self) -> None:
        """Turn and scale the directions so that their z have no correlation and variance 1."""
        value_J, vector_JJ = torch.linalg.eigh(self.overall.covariance_MQQ[0, 1:, 1:])
        root_JJ = vector_JJ * value_J.clamp_min(max(1e-6 * float(value_J.max()), 1e-12)).sqrt()
        change_QQ = torch.eye(self.count + 1, dtype=torch.float64, device=self.device)
        change_QQ[1:, 1:] = torch.linalg.inv(root_JJ)
        turned = torch.einsum("jzyx,jl->lzyx", torch.stack(self.maps[1:]), root_JJ.to(self.maps[1].dtype))
        self.maps[1:] = list(turned)
        mean_MQ = self.overall.mean_MQ @ change_QQ.T
        self.overall = Gaussians(mean_MQ, change_QQ @ self.overall.covariance_MQQ @ change_QQ.T)
        self.cut()

    def cut(self) -> None:
        """Transforms of the maps, ready to be sliced."""
        grid = self.grid
        self.volumes = [FourierVolume.from_map(one, grid.radius, grid.padding, self.device, self.dtype) for one in self.maps]


def _small(grid: ModelGrid) -> ModelGrid:
    """The same shells on as few voxels as that needs."""
    box = min(grid.box, VOXELS_A_SHELL * grid.radius // 2 * 2 + 2)
    return replace(grid, box=box, pixel_size=grid.pixel_size * grid.box / box)


def latents_of(slices_QB2K: Tensor, prepared: Prepared) -> Latents:
    """What the images of a batch say of their z. slices: of all maps, divided by the common noise."""
    slices_BQN = slices_QB2K.permute(1, 0, 2, 3).flatten(2)
    weighted_BQN = (slices_QB2K * prepared.weight_BK[:, None]).permute(1, 0, 2, 3).flatten(2)
    gram_BQQ = (weighted_BQN @ slices_BQN.transpose(1, 2)).double()
    image_BQ = (slices_BQN @ prepared.scored_B2K.flatten(1)[..., None])[..., 0].double()
    misfit_B = 2 * prepared.constant_B.double() - 2 * image_BQ[:, 0] + gram_BQQ[:, 0, 0]
    return Latents(image_BQ - gram_BQQ[:, :, 0], gram_BQQ, misfit_B, torch.full_like(misfit_B, slices_BQN.shape[2]))



class _Gathered:
    """Latents of batches, to be put into the order of the table."""

    def __init__(self) -> None:
        self.rows: list[Tensor] = []
        self.parts: list[Latents] = []

    def add(self, row_B: Tensor, part: Latents) -> None:
        self.rows.append(row_B)
        self.parts.append(part)

    def joined(self) -> Latents:
        """Of all particles."""
        order_B = torch.cat(self.rows).argsort()
        names = Latents.__dataclass_fields__
        return Latents(*(torch.cat([getattr(part, name) for part in self.parts])[order_B] for name in names))
