"""One data set with its model and likelihood on one device: sums over all positions, taken chunk by chunk.

Where several ranks share the positions, each has a problem of its own ones, and sums are those over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fft import irfft2, rfft2

from verglas.core.memory import free_device_memory
from verglas.kernels.along import FLOOR
from verglas.ptychography import fused
from verglas.ptychography.counts import Counts
from verglas.ptychography.memory import Needs, kept
from verglas.ptychography.model import Model, Waves
from verglas.ptychography.noise import noise_named
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.scan import Scan
from verglas.ptychography.share import Share
from verglas.ptychography.summing import Summing
from verglas.ptychography.total_variation import TotalVariation
from verglas.ptychography.unknowns import Line, Unknowns

CPU_NUMBERS = 2**19  # complex numbers of a chunk's exit waves on the CPU: its arrays stay near the cache
GPU_NUMBERS = 65_535 * 32 * 32  # the most waves of a launch of `farfield`, were they of its smallest window
# Poisson's slope 1 - n / I is ruled by pixels that next to nothing is predicted for; far from the fit these lead astray: on
# counted photons 60 passes that began with 20 of the amplitudes came to a greater likelihood than 60 of Poisson's.
AMPLITUDE_PASSES = 20
ANSCOMBE, SMALL = 0.375, 0.01  # counts added to both sides before square roots are taken, and its largest share of the mean
ARRAYS = 16  # as large as a chunk's exit waves, that are there at the same time


@dataclass(frozen=True)
class Sums:
    """Over positions. loss: of the likelihood and regularisers; mismatch, counted: sums of (sqrt(I) - sqrt(n))^2 and of n over
    good pixels; curvature: a rough diagonal of the Gauss-Newton matrix over 2, real, of the shapes of the gradient."""

    gradient: Unknowns
    curvature: Unknowns
    totals_3: Tensor

    @property
    def loss(self) -> float:
        """Waits for the device, as the others do."""
        return float(self.totals_3[0])

    @property
    def mismatch(self) -> float:
        return float(self.totals_3[1])

    @property
    def counted(self) -> float:
        return float(self.totals_3[2])


class Problem:
    """See the module. `scan` stays where it is; counts go to the device, if they fit whole (`memory.py`). share: what this rank
    keeps, `scan` being its part; None: of a process alone."""

    def __init__(
        self, scan: Scan, options: PtychoOptions, device: torch.device | str = "cpu", share: Share | None = None
    ) -> None:
        self.scan, self.options, self.share = scan, options, share or Share.of_one(scan)
        self.like = torch.zeros(1, dtype=torch.float64 if options.double else torch.float32, device=device)
        self.needs = Needs.of(scan, options, self.share.object_pixels(scan))
        own = kept(self.needs, self.like.device, options.pattern_memory)
        self.kept = replace(own, line=self.share.sum_of(float(not own.line)) == 0)  # all search lines in the same way
        self.counts = Counts.of(scan, self.like, self.share, self.kept.patterns)
        # Files may hold other units than counts: there the offset is what is small beside the mean.
        self.offset = min(ANSCOMBE, SMALL * self.counts.total / (self.positions * float(self.counts.weight_YX.sum())))
        self.noise = noise_named(options.noise, self.offset)
        moves = options.subpixel and not (self.share.whole_pixels and not options.positions_from)
        self.model = Model(scan.geometry, scan.window, scan.object_pixel, self.like, moves)
        self.regulariser = TotalVariation(options.total_variation * self.counts.total, self.share)
        self.everything = torch.arange(len(scan), device=device)
        self.rests_B: Tensor | None = None  # of this rank's positions those that draw no object for a while
        self.why_not_fused = fused.why_not(self)
        self.chunk = self._chunk()

    @property
    def positions(self) -> int:
        """How many all ranks have."""
        return self.share.positions

    def _chunk(self) -> int:
        """Positions at a time."""
        numbers = self.options.object_modes * self.options.probe_modes * self.scan.window[0] * self.scan.window[1]
        room = CPU_NUMBERS
        if self.like.device.type == "cuda":
            size = self.like.element_size() * 2
            room = min(GPU_NUMBERS, int(0.5 * free_device_memory(self.like.device) / (ARRAYS * size)))
        return max(1, room // numbers)

    def begin(self, number: int) -> bool:
        """Choose the likelihood of pass `number` (1 is the first); whether it is another one than before."""
        if self.options.noise == "poisson":
            self.noise = noise_named("amplitude" if number <= AMPLITUDE_PASSES else "poisson", self.offset)
        return self.options.noise == "poisson" and number == AMPLITUDE_PASSES + 1

    def fitted(self, number: int) -> tuple[str, ...]:
        """Names of the fields that pass `number` (1 is the first) changes, positions apart."""
        options = self.options
        names = ["object_OLYX"]
        if options.probe_from and number >= options.probe_from:
            names += ["probe_MYX"]
            names += ["eigen_KYX", "opr_BK"] if options.opr_modes else []
        names += ["scale_B"] if options.fit_scale else []
        names += ["background_YX"] if options.fit_background else []
        return tuple(names)

    def chunks(self, rows_B: Tensor | None = None) -> Iterator[Tensor]:
        """Positions, all of this rank by default, in pieces that fit in memory."""
        rows_B = self.everything if rows_B is None else rows_B
        if len(rows_B):  # else this rank has none of a mini-batch
            yield from self.counts.walk(rows_B, self.chunk)

    def at_work(self, rows_B: Tensor | None = None) -> Tensor:
        """Those of positions, all of this rank by default, that do not rest."""
        rows_B = self.everything if rows_B is None else rows_B
        return rows_B if self.rests_B is None else rows_B[~self.rests_B[rows_B]]

    def works(self, rows_B: Tensor) -> Tensor:
        """1 for positions at work, 0 for those that rest."""
        return self.like.new_ones(len(rows_B)) if self.rests_B is None else (~self.rests_B[rows_B]).to(self.like.dtype)

    def mismatch(self, waves: Waves, counts_BYX: Tensor) -> Tensor:
        """Sum of (sqrt(I) - sqrt(n))^2 over good pixels, one number."""
        difference_BYX = waves.intensity[0].clamp_min(0).sqrt() - counts_BYX.clamp_min(0).sqrt()
        return (difference_BYX.square() * self.counts.weight_YX).sum(dtype=torch.float64)

    def error(self, x: Unknowns) -> float:
        """Of all positions: sum (sqrt(I) - sqrt(n))^2 / sum n over good pixels."""
        total = torch.zeros((), dtype=torch.float64, device=self.like.device)
        for rows_B in self.chunks():
            total += self.mismatch(self.model.waves(Line(x), rows_B), self.counts.rows(rows_B))
        return float(self.share.total(total)[0]) / self.counts.total

    def sums(self, x: Unknowns, names: tuple[str, ...], rows_B: Tensor | None = None) -> Sums:
        """Gradient of the loss with respect to the fields `names`, and what else one look at the positions gives.

        rows_B: of this rank; sums are those over the rows of all ranks.
        """
        rows_B = self.everything if rows_B is None else rows_B
        gradient = Unknowns(**{name: torch.zeros_like(x[name]) for name in names})
        curvature = self._own_curvature(x, names, rows_B)
        loss_of_shape = self.regulariser.add_gradient(x["object_OLYX"], gradient, len(rows_B), self.positions)
        totals_3 = torch.zeros(3, dtype=torch.float64, device=self.like.device)
        summing = Summing(self.share, gradient, curvature, complete=True, early=rows_B is self.everything)
        for some_B in summing.in_turn(rows_B, x["positions_B2"], self.chunks):
            if self.why_not_fused is None:
                totals_3 += fused.add_sums(self, x, some_B, gradient)
            else:
                totals_3 += self._add_sums(x, some_B, gradient, curvature)
        totals_3 = summing.finish(totals_3)
        totals_3[0] += loss_of_shape
        return Sums(gradient, self._spread(curvature, x, names), totals_3)

    def _add_sums(self, x: Unknowns, rows_B: Tensor, gradient: Unknowns, curvature: Unknowns) -> Tensor:
        """Adds those of a chunk; [3] float64: loss, mismatch, counted."""
        waves = self.model.waves(Line(x), rows_B)
        counts_BYX = self.counts.rows(rows_B)
        slope_BYX = self.noise.slope(waves.intensity[0], counts_BYX) * self.counts.weight_YX
        self.model.add_gradient(Line(x), waves, slope_BYX, gradient)
        self._add_curvature(waves, counts_BYX, x, curvature)
        loss = self.noise.loss(waves.intensity[0], counts_BYX) * self.counts.weight_YX
        counted = (counts_BYX * self.counts.weight_YX).sum(dtype=torch.float64)
        return torch.stack([loss.sum(dtype=torch.float64), self.mismatch(waves, counts_BYX), counted])

    def curvature(self, x: Unknowns, names: tuple[str, ...], rows_B: Tensor) -> Unknowns:
        """That of object and probe, from the map of positions alone; zeros for scale and background (see `_add_curvature`)."""
        own = self._own_curvature(x, names, rows_B)
        self.share.add_up(own)
        return self._spread(own, x, names)

    def _own_curvature(self, x: Unknowns, names: tuple[str, ...], rows_B: Tensor) -> Unknowns:
        """Its sums over this rank's positions: object_OLYX [Y, X], alike for all planes, probe_MYX [Y, X], alike for all modes;
        of a changing probe eigen_KYX [2 + K]: sum of scales, count, sums of squared weights."""
        out = {name: torch.zeros_like(x[name].real) for name in names if name in ("scale_B", "background_YX")}
        object_OLYX, probe_MYX = x["object_OLYX"], x["probe_MYX"]
        height, width = object_OLYX.shape[-2:]
        shape = fast_edge(height), fast_edge(width)
        corners_YX = rfft2(self._corners(x, rows_B), s=shape)
        if "object_OLYX" in names:
            light_YX = rfft2(probe_MYX.abs().square().sum(0), s=shape)
            out["object_OLYX"] = irfft2(corners_YX * light_YX, s=shape)[:height, :width].clamp_min(0)
        if "probe_MYX" in names:
            passed_YX = rfft2(object_OLYX.abs().square().prod(1).sum(0), s=shape)
            rows, columns = self.scan.window
            out["probe_MYX"] = irfft2(corners_YX.conj() * passed_YX, s=shape)[:rows, :columns].clamp_min(0)
        if "eigen_KYX" in names:
            square_K = x["opr_BK"][rows_B].square().sum(0)
            out["eigen_KYX"] = torch.cat([x["scale_B"][rows_B].sum()[None], square_K.new_tensor([len(rows_B)]), square_K])
        return Unknowns(**out)

    def _spread(self, sums: Unknowns, x: Unknowns, names: tuple[str, ...]) -> Unknowns:
        """From the sums of all ranks to the shapes of the fields."""
        out = dict(sums.items())
        for name in ("object_OLYX", "probe_MYX"):
            if name in names:
                out[name] = sums[name].expand(x[name].shape)
        if "eigen_KYX" in names:
            scale, count, square_K = sums["eigen_KYX"][0], sums["eigen_KYX"][1], sums["eigen_KYX"][2:]
            seen_YX = sums["probe_MYX"]
            out["eigen_KYX"] = seen_YX * (square_K / count)[:, None, None]
            power_K = (seen_YX * x["eigen_KYX"].abs().square()).sum((1, 2)) / scale
            out["opr_BK"] = power_K.expand(x["opr_BK"].shape)
        return Unknowns(**out)

    def _corners(self, x: Unknowns, rows_B: Tensor) -> Tensor:
        """[Y, X] map of the object with the scale of each position at its corner, shared among four pixels by its fraction."""
        height, width = x["object_OLYX"].shape[-2:]
        position_B2 = x["positions_B2"][rows_B]
        low_B2 = position_B2.floor()
        part_B2 = (position_B2 - low_B2).to(self.like.dtype)
        first_B = (low_B2[:, 0] * width + low_B2[:, 1]).long()
        map_N = self.like.new_zeros(height * width)
        scale_B = x["scale_B"][rows_B]
        for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
            weight_B = (part_B2[:, 0] if row else 1 - part_B2[:, 0]) * (part_B2[:, 1] if column else 1 - part_B2[:, 1])
            map_N.index_add_(0, first_B + row * width + column, weight_B * scale_B)
        return map_N.view(height, width)

    def _add_curvature(self, waves: Waves, counts_BYX: Tensor, x: Unknowns, curvature: Unknowns) -> None:
        """Those of scale and background: for the first, where the fit is good, s^2 / (4 I) with s the derivative of I; for the
        second the secant's from I to n, 1 / (2 sqrt(I) (sqrt(I) + sqrt(n))): dark pixels are far from any fit."""
        if curvature.scale_B is not None:
            rows_B = waves.place.rows_B
            curvature.scale_B[rows_B] += waves.power[0].sum((1, 2)) / (4 * x["scale_B"][rows_B])
        if curvature.background_YX is not None:
            root_BYX = waves.intensity[0].clamp_min(FLOOR).sqrt()
            curvature.background_YX.add_((0.5 / (root_BYX * (root_BYX + counts_BYX.clamp_min(0).sqrt()))).sum(0))


def fast_edge(edge: int) -> int:
    """The smallest even number from `edge` on without prime factors above 7: others take a GPU's transforms ten times as long."""
    edge += edge % 2
    while True:
        rest = edge
        for factor in (2, 3, 5, 7):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return edge
        edge += 2


def preconditioned(gradient: Unknowns, curvature: Unknowns, damping: float, share: Share) -> Unknowns:
    """gradient / (2 ((1 - damping) curvature + damping max curvature)): a step of about the right length, the wrong sign.

    damping 1 is ePIE's denominator, 0.05 about rPIE's, 0 blows up where no light falls. share: finds the maximum over all ranks.
    """
    out = {}
    for name, value in gradient.items():
        diagonal = curvature[name]
        each = tuple(range(1, diagonal.dim()))
        most = diagonal.amax(each, keepdim=True) if name == "eigen_KYX" else share.greatest(name, diagonal)
        bottom = torch.add(2 * damping * most, diagonal, alpha=2 * (1 - damping))
        out[name] = value / bottom.clamp_(min=torch.finfo(bottom.dtype).tiny)
    return Unknowns(**out)
