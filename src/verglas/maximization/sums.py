"""What one half-set adds up during an expectation besides the map: noise, norm, scale, priors, likelihood (facts 3.8-3.10).

All of it is additive: sums of batches, devices and nodes are sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from verglas.core.memory import in_host_memory
from verglas.distributed.ranks import Ranks

NO_NOISE = 1e-14  # variance
SSNR_FOR_SCALE = 3.0  # group scales are fitted to shells whose map has more signal than this


@dataclass
class Sums:
    """Float64, on the device where it is added to. noise_GS: squared residuals; particles_G: posterior weight per optics group;
    direction_D: per direction, class after class; cross_M, power_M: of image and prediction over strong shells per
    micrograph group; totals_5: the five sums below; particles: count.
    """

    noise_GS: Tensor
    particles_G: Tensor
    direction_D: Tensor
    cross_M: Tensor
    power_M: Tensor
    totals_5: Tensor
    particles: int = 0

    @classmethod
    def zeros(cls, groups: int, shells: int, directions: int, micrographs: int, device: torch.device | str = "cpu") -> Sums:
        """Nothing added yet."""

        def zero(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        return cls(zero(groups, shells), zero(groups), zero(directions), zero(micrographs), zero(micrographs), zero(5))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def to(self, device: torch.device | str) -> Sums:
        """The same in the memory of a device."""
        noise_GS, particles_G, direction_D, cross_M, power_M, totals_5 = (tensor.to(device) for tensor in self.tensors)
        return Sums(noise_GS, particles_G, direction_D, cross_M, power_M, totals_5, self.particles)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All but the count."""
        return self.noise_GS, self.particles_G, self.direction_D, self.cross_M, self.power_M, self.totals_5

    @property
    def offset2(self) -> float:
        """Sum of w |d|^2 (Å^2)."""
        return float(self.totals_5[0])

    @property
    def weight(self) -> float:
        """Posterior weight of everything."""
        return float(self.totals_5[1])

    @property
    def norm(self) -> float:
        """Sum of the norm corrections."""
        return float(self.totals_5[2])

    @property
    def log_likelihood(self) -> float:
        return float(self.totals_5[3])

    @property
    def pmax(self) -> float:
        return float(self.totals_5[4])


def added_up(several: Sequence[Sums], ranks: Ranks) -> list[Sums]:
    """The sums of all ranks, on the host: of several sets, in one message and one copy."""
    counts = [one.totals_5.new_full((1,), one.particles) for one in several]
    flat = [[*one.tensors, count] for one, count in zip(several, counts, strict=True)]
    total = ranks.add_up(torch.cat([tensor.flatten() for tensors in flat for tensor in tensors]), "noise and priors")
    parts, found = iter(in_host_memory(total).split([tensor.numel() for tensors in flat for tensor in tensors])), []
    for tensors in flat:
        noise, particles, directions, cross, power, totals, count = (next(parts).view_as(tensor) for tensor in tensors)
        found.append(Sums(noise, particles, directions, cross, power, totals, int(count)))
    return found


def joined_classes(parts: list[Sums]) -> Sums:
    """Sums of several sets of particles, each with classes of its own: directions one after another, the rest added."""
    total = parts[0]
    direction_D = torch.cat([part.direction_D for part in parts])
    for part in parts[1:]:
        total = total + part
    return replace(total, direction_D=direction_D)


def updated_noise(sums: Sums, previous_GS: Tensor, pixels_S: Tensor) -> Tensor:
    """sigma2 [G, S] = residual / (2 weight pixels): variance per component (facts 3.10); a group without particles keeps its own.

    pixels_S: coefficients of each shell in the half plane. Values below `NO_NOISE` copy the shell before.
    """
    noise_GS = sums.noise_GS / (2 * sums.particles_G[:, None].clamp_min(1e-30) * pixels_S)
    for shell in range(1, noise_GS.shape[1]) if bool((noise_GS < NO_NOISE).any()) else ():
        noise_GS[:, shell] = torch.where(noise_GS[:, shell] < NO_NOISE, noise_GS[:, shell - 1], noise_GS[:, shell])
    return torch.where(sums.particles_G[:, None] > 0, noise_GS, previous_GS)


def updated_scale(sums: Sums, particles_M: Tensor) -> Tensor:
    """Scale of each micrograph group [M]: cross / power, kept within 5 x of the median, particle-weighted mean 1 (facts 3.8)."""
    scale_M = torch.where(sums.power_M > 0, sums.cross_M / sums.power_M.clamp_min(1e-300), 1.0)
    median = scale_M.sort().values[len(scale_M) // 2]
    if median <= 0:  # more groups anticorrelate than correlate: no scale can be trusted
        return torch.ones_like(scale_M)
    scale_M = scale_M.clamp(median / 5, median * 5)
    return scale_M / ((scale_M * particles_M).sum() / particles_M.sum())


def updated_offset_sigma(sums: Sums, previous: float) -> float:
    """Standard deviation of offsets in Å, per axis: sqrt(sum w |d|^2 / (2 sum w)), at least sqrt(2) (facts 3.5)."""
    if sums.weight <= 0:
        return previous
    return max(2.0, sums.offset2 / (2 * sums.weight)) ** 0.5


def updated_direction_prior(sums: Sums) -> Tensor:
    """Share of the posterior weight in each direction [D]; sums to 1."""
    return sums.direction_D / sums.direction_D.sum()


@lru_cache(maxsize=4)
def half_plane_counts(box: int) -> Tensor:
    """Coefficients of each shell round(r) of the half plane, x = 0, y < 0 left out; float64 [N/2 + 1], not to be changed."""
    y = torch.arange(-(box // 2) + 1, box // 2 + 1, dtype=torch.float64)[:, None]
    x = torch.arange(box // 2 + 1, dtype=torch.float64)[None]
    shell = (x * x + y * y).sqrt().add(0.5).floor().long()
    keep = ~((x == 0) & (y < 0)) & (shell <= box // 2)
    return torch.bincount(shell[keep], minlength=box // 2 + 1).double()
