"""Running averages of the map's weighted sums: the gradient step of a search that sees a few particles at a time.

The sums (data, weight) of all particles are the natural parameters of what is known of a map. A stochastic step along the
natural gradient of the likelihood moves them towards those of a mini-batch (Hoffman et al. 2013, J. Mach. Learn. Res. 14,
1303; Cappé & Moulines 2009, J. R. Stat. Soc. B 71, 593, "online EM"):

    S <- S + step (S_batch - S)        S: sums per particle

so older batches are forgotten as (1 - step)^age, and what is left weighs like `batch / step` particles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verglas.core.rows import RowTable, packed_sphere
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.reference import volume_spectrum
from verglas.projection.volume import FourierVolume, coordinate_chunks

NOTHING = torch.empty(0)  # sums of a class that has none yet
_FALL = 0.5  # power in shells that no reference has reached yet, of that in the last one reached


def stepped(old_V3: Tensor | None, batch: Accumulator, particles: int, step: float) -> Tensor:
    """The running sums per particle after a step, float32 [V, 3] on the batch's rows.

    old_V3: of the same or a smaller radius, None before the first step; particles: in the batch; step: 0..1.
    """
    fresh_V3 = batch.total()[:, :3].float() / max(particles, 1)
    if old_V3 is None:
        return fresh_V3
    old_V3 = old_V3.to(fresh_V3.device)
    if len(old_V3) != len(fresh_V3):
        old_V3 = on_rows(old_V3, rows_of(len(old_V3), batch), batch.rows)
    return torch.lerp(old_V3, fresh_V3, step)


def stepped_planes(running: list[Tensor], fresh_3CYX: Tensor, particles: int, step: float) -> list[Tensor]:
    """As `stepped` for classes of planes, from the totals of a batch [3, C, P, P/2 + 1]; float32 [3, P, P/2 + 1] each.

    running: before, of as many classes; one that is empty (`NOTHING`) takes the batch as it is, with its own weight.
    """
    out = []
    for old_3YX, fresh_3YX in zip(running, (fresh_3CYX / max(particles, 1)).float().unbind(1), strict=True):
        new_3YX = step * fresh_3YX
        out.append(new_3YX if old_3YX.numel() == 0 else torch.lerp(old_3YX.to(fresh_3YX), fresh_3YX, step))
    return out


def rows_of(count: int, like: Accumulator) -> RowTable:
    """The row table of `count` voxels among those of smaller radius than the accumulator's. ValueError if none has as many."""
    for radius in range(like.radius, 0, -1):
        rows = packed_sphere(float(int(radius * like.padding + 0.5)), like.rows.device)
        if rows.count == count:
            return rows
    raise ValueError(f"no packed sphere up to radius {like.radius} has {count} voxels")


def on_rows(values_VC: Tensor, rows: RowTable, larger: RowTable) -> Tensor:
    """Values moved to the rows of a larger packed sphere, 0 in what is new."""
    out = values_VC.new_zeros(larger.count, values_VC.shape[1])
    shift = larger.half
    for part, (x, y, z) in coordinate_chunks(rows):
        out[larger.start_ZY[z.long() + shift, y.long() + shift].long() + x.long()] = values_VC[part]
    return out


def accumulator_of(running_V3: Tensor, box: int, radius: int, padding: float, particles: float) -> Accumulator:
    """The running sums as those of so many particles, to be solved."""
    sums = Accumulator(box, radius, padding, running_V3.device)
    sums.running_V4[:, :3] = running_V3 * particles
    return sums


def prior_power(volume: FourierVolume, reached: int, radius: int) -> Tensor:
    """`volume_spectrum` of a reference that ends at shell `reached`; from there to `radius` half the power of its last."""
    power_S = volume_spectrum(volume)
    power_S[reached : radius + 1] = _FALL * power_S[max(reached - 1, 1)]
    return power_S
