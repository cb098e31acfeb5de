"""What is known of each particle's coordinates z in a space of a few directions, and mixtures of Gaussians fitted to it.

All that particle i says of its z, Q numbers, is ln p(X_i | z) = z.overlap_i - z.gram_i.z / 2 + const: an exact Gaussian, narrow
where the signal is strong. Mixtures are fitted to these, not to points (Bovy, Hogg & Roweis 2011, without its projections).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from verglas.core.small import inverse_and_log

STARTS, FIRST_ROUNDS, CONTINUED, LAST_ROUNDS = 16, 10, 3, 60  # of mixtures: many a little way, the best of them to the end
FIRST_PARTICLES = 5_000  # of which the many are fitted
ELEMENTS_AT_ONCE = 2**18  # particles times Gaussians, whose matrices are there at once
PRIOR_PARTICLES, PRIOR_SPREAD = 5.0, 1e-3  # every Gaussian has as many particles more, of that share of the overall covariance
MAD_TO_DEVIATION = 1.4826
STRANGE = 3.0  # robust standard deviations: a particle beyond fits worse than chance allows
TYPICAL_JUNK = STRANGE / 2  # strangeness of the middle of a class that consists of it; others have middles near 0
CLIPPINGS = 5


@dataclass(frozen=True)
class Latents:
    """overlap_BQ, gram_BQQ: see the module's text; misfit_B: sum of |X - C P|^2 / sigma^2 at z = 0, over so many numbers_B."""

    overlap_BQ: Tensor
    gram_BQQ: Tensor
    misfit_B: Tensor
    numbers_B: Tensor

    def __getitem__(self, part: slice | Tensor) -> Latents:
        return Latents(*(getattr(self, name)[part] for name in self.__dataclass_fields__))

    def misfit_at(self, z_BQ: Tensor) -> Tensor:
        """What is left of the misfit at some z, per number: 1 for noise alone, [B]."""
        explained_B = 2 * (z_BQ * self.overlap_BQ).sum(1) - (z_BQ * (self.gram_BQQ @ z_BQ[..., None])[..., 0]).sum(1)
        return (self.misfit_B - explained_B) / self.numbers_B


@dataclass(frozen=True)
class Gaussians:
    """Some Gaussians in that space: mean_MQ, covariance_MQQ."""

    mean_MQ: Tensor
    covariance_MQQ: Tensor

    def seen_by(self, latents: Latents) -> tuple[Tensor, Tensor, Tensor]:
        """(ln of the integral of p(X | z) N(z) over z [B, M], posterior means of z [Q, B, M], their covariances [Q, Q, B, M])."""
        inverse_QQM, log_M = inverse_and_log(self.covariance_MQQ.movedim(0, -1))
        pull_QM = (inverse_QQM * self.mean_MQ.T).sum(1)
        covariance_QQBM, log_BM = inverse_and_log(latents.gram_BQQ.movedim(0, -1)[..., None] + inverse_QQM[:, :, None])
        push_QBM = latents.overlap_BQ.T[..., None] + pull_QM[:, None]
        mean_QBM = (covariance_QQBM * push_QBM).sum(1)
        own_M = (pull_QM * self.mean_MQ.T).sum(0) + log_M
        return 0.5 * ((push_QBM * mean_QBM).sum(0) - own_M - log_BM), mean_QBM, covariance_QQBM

    def posterior(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Of a single Gaussian: posterior means [B, Q] and covariances [B, Q, Q]."""
        _, mean_QBM, covariance_QQBM = self.seen_by(latents)
        return mean_QBM[..., 0].T.contiguous(), covariance_QQBM[..., 0].movedim(-1, 0).contiguous()


def strangeness(misfit_B: Tensor) -> Tensor:
    """How far ln(misfit) lies above that of the particles that fit, in their standard deviations [B].

    Those are found by leaving out what lies beyond `STRANGE`, over again; the spread is taken below the median, where there is
    no junk. All zero if they have no spread.
    """
    log_B = misfit_B.clamp_min(1e-12).log()
    kept_B = torch.ones_like(log_B, dtype=torch.bool)
    strange_B = torch.zeros_like(log_B)
    for _ in range(CLIPPINGS):
        middle = log_B[kept_B].median()
        below = log_B[kept_B & (log_B < middle)]
        spread = MAD_TO_DEVIATION * (middle - below).median() if len(below) else middle.new_zeros(())
        if float(spread) <= 0:
            return torch.zeros_like(log_B)
        strange_B = (log_B - middle) / spread
        kept_B = strange_B < STRANGE
    return strange_B


def moments(mean_BQ: Tensor, covariance_BQQ: Tensor, weight_BM: Tensor) -> Gaussians:
    """Weighted means and covariances of z, of which the Gaussian of each particle is known."""
    share_BM = weight_BM / weight_BM.sum(0).clamp_min(1e-12)
    middle_MQ = share_BM.T @ mean_BQ
    second_BQQ = covariance_BQQ + mean_BQ[:, :, None] * mean_BQ[:, None]
    second_MQQ = torch.einsum("bm,bij->mij", share_BM, second_BQQ)
    return Gaussians(middle_MQ, second_MQQ - middle_MQ[:, :, None] * middle_MQ[:, None])


@dataclass(frozen=True)
class Mixture:
    """S mixtures of K classes, each a Gaussian of z times one of the strangeness u: share_SK; gaussians (M = S K);
    middle_SK, variance_SK: of u."""

    share_SK: Tensor
    gaussians: Gaussians
    middle_SK: Tensor
    variance_SK: Tensor

    @property
    def surplus_S(self) -> Tensor:
        """How many of the classes consist of strange particles, beyond one.

        What fits nothing differs more than anything that fits: a second class of it is always likelier than the truth.
        """
        return ((self.middle_SK > TYPICAL_JUNK).sum(1) - 1).clamp_min(0)

    def chosen(self, number_S: Tensor) -> Mixture:
        """Some of the mixtures."""
        classes = self.share_SK.shape[1]
        rows_M = (number_S[:, None] * classes + torch.arange(classes, device=number_S.device)).flatten()
        picked = Gaussians(self.gaussians.mean_MQ[rows_M], self.gaussians.covariance_MQQ[rows_M])
        return Mixture(self.share_SK[number_S], picked, self.middle_SK[number_S], self.variance_SK[number_S])


@dataclass
class _Shares:
    """Sums over particles, weighted by their probabilities in S mixtures' K classes (M = S K), of 1, of z, z z^T, u and u^2."""

    mass_M: Tensor
    first_QM: Tensor
    second_QQM: Tensor
    strange_M: Tensor
    square_M: Tensor

    @classmethod
    def of(cls, weight_BM: Tensor, mean_QBM: Tensor, covariance_QQBM: Tensor, u_B1: Tensor) -> _Shares:
        second_QQBM = covariance_QQBM.addcmul_(mean_QBM[:, None], mean_QBM).mul_(weight_BM)
        return cls(weight_BM.sum(0), (weight_BM * mean_QBM).sum(1), second_QQBM.sum(2), (weight_BM * u_B1).sum(0),
                   (weight_BM * u_B1.square()).sum(0))  # fmt: skip

    def __add__(self, other: _Shares) -> _Shares:
        return _Shares(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))

    def mixture(self, starts: int, n: int, overall: Gaussians) -> Mixture:
        """The likeliest mixtures, with their priors."""
        mass_M, some_M = self.mass_M, self.mass_M.clamp_min(1e-12)
        whole_M = mass_M + PRIOR_PARTICLES
        mean_QM = self.first_QM / some_M
        away_QQM = self.second_QQM - mass_M * mean_QM[:, None] * mean_QM
        few_MQQ = PRIOR_PARTICLES * PRIOR_SPREAD * overall.covariance_MQQ
        covariance_MQQ = (away_QQM.movedim(-1, 0) + few_MQQ) / whole_M[:, None, None]
        middle_M = self.strange_M / some_M
        variance_M = (self.square_M - mass_M * middle_M.square() + PRIOR_PARTICLES) / whole_M
        share_SK = ((mass_M + 1) / (n + len(mass_M) // starts)).view(starts, -1)
        gaussians = Gaussians(mean_QM.T.contiguous(), covariance_MQQ)
        return Mixture(share_SK, gaussians, middle_M.view(starts, -1), variance_M.view(starts, -1))


def compared(latents: Latents, strange_B: Tensor, mixture: Mixture) -> tuple[_Shares, Tensor, Tensor]:
    """Particles with mixtures: their shares, ln of the mixtures' likelihoods [S], and class probabilities [B, S, K]."""
    if strange_B.device.type == "cpu":
        return _compared_cpu(latents, strange_B, mixture)
    step = max(1, ELEMENTS_AT_ONCE // mixture.share_SK.numel())
    parts = [slice(first, first + step) for first in range(0, len(strange_B), step)]
    found = [compared_at_once(latents[part], strange_B[part], mixture) for part in parts]
    shares_P, log_PS, class_PBSK = zip(*found, strict=True)
    return reduce(operator.add, shares_P), torch.stack(log_PS).sum(0), torch.cat(class_PBSK)


def compared_at_once(latents: Latents, strange_B: Tensor, mixture: Mixture) -> tuple[_Shares, Tensor, Tensor]:
    """`compared` in plain tensors."""
    starts, classes = mixture.share_SK.shape
    u_B1, middle_M, variance_M = strange_B[:, None], mixture.middle_SK.flatten(), mixture.variance_SK.flatten()
    log_BM, mean_QBM, covariance_QQBM = mixture.gaussians.seen_by(latents)
    log_BM = log_BM - 0.5 * ((u_B1 - middle_M).square() / variance_M + variance_M.log())
    log_BSK = log_BM.view(-1, starts, classes) + mixture.share_SK.log()
    log_BS = torch.logsumexp(log_BSK, 2)
    class_BSK = torch.exp(log_BSK - log_BS[..., None])
    return _Shares.of(class_BSK.flatten(1), mean_QBM, covariance_QQBM, u_B1), log_BS.sum(0), class_BSK


def _compared_cpu(latents: Latents, strange_B: Tensor, mixture: Mixture) -> tuple[_Shares, Tensor, Tensor]:
    """`compared` by compiled loops."""
    from verglas.expectation.latent_cpu import sums_of_particles

    starts, classes = mixture.share_SK.shape
    gaussians, middle_M, variance_M = mixture.gaussians, mixture.middle_SK.flatten(), mixture.variance_SK.flatten()
    inverse_QQM, log_M = inverse_and_log(gaussians.covariance_MQQ.movedim(0, -1))
    pull_QM = (inverse_QQM * gaussians.mean_MQ.T).sum(1)
    own_M = mixture.share_SK.log().flatten() - 0.5 * ((pull_QM * gaussians.mean_MQ.T).sum(0) + log_M + variance_M.log())
    count, size = gaussians.mean_MQ.shape
    arrays = (latents.gram_BQQ, latents.overlap_BQ, strange_B, inverse_QQM.movedim(-1, 0), pull_QM.T, own_M, middle_M, variance_M)
    sums_MW, log_S, class_BM = sums_of_particles(arrays, starts)
    mass_M, strange_M, square_M, first_MQ, second_MW = sums_MW.split([1, 1, 1, size, size**2], 1)
    second_QQM = second_MW.view(count, size, size).movedim(0, -1)
    shares = _Shares(mass_M[:, 0], first_MQ.T, second_QQM, strange_M[:, 0], square_M[:, 0])
    return shares, log_S, class_BM.view(-1, starts, classes)


def fitted(
    latents: Latents, strange_B: Tensor, mixture: Mixture, overall: Gaussians, rounds: int
) -> tuple[Mixture, Tensor, Tensor]:
    """After some rounds of expectation-maximization: mixtures, ln of their likelihoods [S], class probabilities [B, S, K]."""
    for _ in range(rounds):
        shares, log_S, class_BSK = compared(latents, strange_B, mixture)
        mixture = shares.mixture(len(mixture.share_SK), len(strange_B), overall)
    return mixture, log_S, class_BSK


@dataclass(frozen=True)
class Division:
    """probability_BK of K classes; surplus: classes of strange particles beyond one; log: ln of the likelihood."""

    probability_BK: Tensor
    surplus: int
    log: float

    @property
    def merit(self) -> tuple[int, float]:
        """Of several the largest counts."""
        return -self.surplus, self.log


def classes_of(latents: Latents, overall: Gaussians, strange_B: Tensor, classes: int, seed: int) -> Division:
    """The best of several mixtures of so many classes. overall: of z over all particles.

    The starts are drawn as k-means++ draws them: far from each other.
    """
    draw = torch.Generator().manual_seed(seed)
    some_B = torch.randperm(len(strange_B), generator=draw)[:FIRST_PARTICLES].sort().values.to(strange_B.device)
    some = latents[some_B], strange_B[some_B]
    mixture = _starts(*some, overall, classes, draw)
    mixture, log_S, _ = fitted(*some, mixture, overall, FIRST_ROUNDS)
    merit_S = zip((-mixture.surplus_S).tolist(), log_S.tolist(), range(STARTS))
    mixture = mixture.chosen(torch.tensor([number for *_, number in sorted(merit_S)[-CONTINUED:]]).to(strange_B.device))
    mixture, log_S, class_BSK = fitted(latents, strange_B, mixture, overall, LAST_ROUNDS)
    found = [Division(class_BSK[:, s], int(mixture.surplus_S[s]), float(log_S[s])) for s in range(CONTINUED)]
    return max(found, key=lambda one: one.merit)


def _starts(latents: Latents, strange_B: Tensor, overall: Gaussians, classes: int, draw: torch.Generator) -> Mixture:
    """Particles divided by the nearest of K of them, `STARTS` times."""
    mean_BQ, covariance_BQQ = overall.posterior(latents)
    white_QQ = torch.linalg.inv(torch.linalg.cholesky(overall.covariance_MQQ[0]))
    point_BQ = (mean_BQ - overall.mean_MQ[0]) @ white_QQ.T
    point_BQ = torch.cat([point_BQ, strange_B[:, None].clamp(-STRANGE, 2 * STRANGE) / STRANGE], 1)
    nearest = [_nearest(point_BQ, classes, draw) for _ in range(STARTS)]
    weight_BM = torch.cat([torch.nn.functional.one_hot(near_B, classes) for near_B in nearest], 1).to(point_BQ) + 1e-6
    found = moments(mean_BQ, covariance_BQQ, weight_BM)
    mass_M = weight_BM.sum(0)
    middle_M = (weight_BM * strange_B[:, None]).sum(0) / mass_M
    variance_M = (weight_BM * (strange_B[:, None] - middle_M).square()).sum(0) / mass_M + 1
    few = Gaussians(found.mean_MQ, found.covariance_MQQ + PRIOR_SPREAD * overall.covariance_MQQ)
    return Mixture((mass_M / len(strange_B)).view(STARTS, -1), few, middle_M.view(STARTS, -1), variance_M.view(STARTS, -1))


def _nearest(point_BQ: Tensor, classes: int, draw: torch.Generator) -> Tensor:
    """Which of K particles is nearest to each, the K drawn with the square of the distance to those that were drawn before."""
    chosen = [int(torch.randint(len(point_BQ), (1,), generator=draw))]
    while len(chosen) < classes:
        distance2_B = torch.cdist(point_BQ, point_BQ[chosen]).amin(1).square().cpu() + 1e-12
        chosen.append(int(torch.multinomial(distance2_B, 1, generator=draw)))
    return torch.cdist(point_BQ, point_BQ[chosen]).argmin(1)
