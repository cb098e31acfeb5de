"""What is known of each particle's coordinates z in a space of a few directions, and mixtures of Gaussians fitted to it.

All that particle i says of its z, Q numbers, is ln p(X_i | z) = z.overlap_i - z.gram_i.z / 2 + const: an exact Gaussian, narrow
where the signal is strong. Mixtures are fitted to these, not to points (Bovy, Hogg & Roweis 2011, without its projections).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STARTS, FIRST_ROUNDS, CONTINUED, LAST_ROUNDS = 16, 10, 2, 60  # of mixtures: many a little way, the best of them to the end
PRIOR_PARTICLES, PRIOR_SPREAD = 5.0, 1e-3  # every Gaussian has as many particles more, of that share of the overall covariance
MAD_TO_DEVIATION = 1.4826
STRANGE = 3.0  # robust standard deviations: a particle beyond fits worse than chance allows
CLIPPINGS = 5


@dataclass(frozen=True)
class Latents:
    """overlap_BQ, gram_BQQ: see the module's text; misfit_B: sum of |X - C P|^2 / sigma^2 at z = 0, over so many numbers_B."""

    overlap_BQ: Tensor
    gram_BQQ: Tensor
    misfit_B: Tensor
    numbers_B: Tensor

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
        """(ln of the integral of p(X | z) N(z) over z [B, M], posterior means of z [B, M, Q], their covariances [B, M, Q, Q])."""
        inverse_MQQ = torch.linalg.inv(self.covariance_MQQ)
        pull_MQ = (inverse_MQQ @ self.mean_MQ[..., None])[..., 0]
        root_BMQQ = torch.linalg.cholesky(latents.gram_BQQ[:, None] + inverse_MQQ)
        covariance_BMQQ = torch.cholesky_inverse(root_BMQQ)
        push_BMQ = latents.overlap_BQ[:, None] + pull_MQ
        mean_BMQ = (covariance_BMQQ @ push_BMQ[..., None])[..., 0]
        log_BM = 0.5 * ((push_BMQ * mean_BMQ).sum(-1) - (pull_MQ * self.mean_MQ).sum(-1) + torch.logdet(inverse_MQQ))
        return log_BM - root_BMQQ.diagonal(dim1=-2, dim2=-1).log().sum(-1), mean_BMQ, covariance_BMQQ

    def posterior(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Of a single Gaussian: posterior means [B, Q] and covariances [B, Q, Q]."""
        _, mean_BMQ, covariance_BMQQ = self.seen_by(latents)
        return mean_BMQ[:, 0], covariance_BMQQ[:, 0]


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


def moments(mean_BMQ: Tensor, covariance_BMQQ: Tensor, weight_BM: Tensor) -> Gaussians:
    """Weighted mean and covariance of z, of which the Gaussians of each particle are known."""
    share_BM = weight_BM / weight_BM.sum(0).clamp_min(1e-12)
    middle_MQ = torch.einsum("bm,bmq->mq", share_BM, mean_BMQ)
    away_BMQ = mean_BMQ - middle_MQ
    spread_MQQ = torch.einsum("bm,bmij->mij", share_BM, covariance_BMQQ)
    return Gaussians(middle_MQ, spread_MQQ + torch.einsum("bm,bmi,bmj->mij", share_BM, away_BMQ, away_BMQ))


@dataclass(frozen=True)
class Mixture:
    """S mixtures of K classes, each a Gaussian of z times one of the strangeness u: share_SK; gaussians (M = S K);
    middle_SK, variance_SK: of u."""

    share_SK: Tensor
    gaussians: Gaussians
    middle_SK: Tensor
    variance_SK: Tensor

    def chosen(self, number_S: Tensor) -> Mixture:
        """Some of the mixtures."""
        classes = self.share_SK.shape[1]
        rows_M = (number_S[:, None] * classes + torch.arange(classes, device=number_S.device)).flatten()
        picked = Gaussians(self.gaussians.mean_MQ[rows_M], self.gaussians.covariance_MQQ[rows_M])
        return Mixture(self.share_SK[number_S], picked, self.middle_SK[number_S], self.variance_SK[number_S])


def fitted(
    latents: Latents, strange_B: Tensor, mixture: Mixture, overall: Gaussians, rounds: int
) -> tuple[Mixture, Tensor, Tensor]:
    """After some rounds of expectation-maximization: mixtures, ln of their likelihoods [S], class probabilities [B, S, K]."""
    starts, classes = mixture.share_SK.shape
    n, u_B1 = len(strange_B), strange_B[:, None]
    few_QQ = PRIOR_PARTICLES * PRIOR_SPREAD * overall.covariance_MQQ[0]
    log_S, class_BSK = torch.zeros(starts), torch.zeros(n, starts, classes)
    for _ in range(rounds):
        log_BM, mean_BMQ, covariance_BMQQ = mixture.gaussians.seen_by(latents)
        middle_M, variance_M = mixture.middle_SK.flatten(), mixture.variance_SK.flatten()
        log_BM = log_BM - 0.5 * ((u_B1 - middle_M).square() / variance_M + variance_M.log())
        log_BSK = log_BM.view(n, starts, classes) + mixture.share_SK.log()
        log_BS = torch.logsumexp(log_BSK, 2)
        class_BSK, log_S = torch.exp(log_BSK - log_BS[..., None]), log_BS.sum(0)
        weight_BM = class_BSK.flatten(1)
        mass_M = weight_BM.sum(0)
        found, whole_M = moments(mean_BMQ, covariance_BMQQ, weight_BM), mass_M + PRIOR_PARTICLES
        covariance_MQQ = (mass_M[:, None, None] * found.covariance_MQQ + few_QQ) / whole_M[:, None, None]
        middle_M = (weight_BM * u_B1).sum(0) / mass_M.clamp_min(1e-12)
        variance_M = ((weight_BM * (u_B1 - middle_M).square()).sum(0) + PRIOR_PARTICLES) / whole_M
        share_SK = ((mass_M + 1) / (n + classes)).view(starts, -1)
        middle_SK, variance_SK = middle_M.view(starts, -1), variance_M.view(starts, -1)
        mixture = Mixture(share_SK, Gaussians(found.mean_MQ, covariance_MQQ), middle_SK, variance_SK)
    return mixture, log_S, class_BSK


def classes_of(latents: Latents, overall: Gaussians, strange_B: Tensor, classes: int, seed: int) -> tuple[Tensor, float]:
    """Probabilities of so many classes [B, K] from the likeliest of several mixtures, and ln of its likelihood.

    overall: of z over all particles. The starts are drawn as k-means++ draws them: far from each other.
    """
    mixture = _starts(latents, overall, strange_B, classes, seed)
    mixture, log_S, _ = fitted(latents, strange_B, mixture, overall, FIRST_ROUNDS)
    mixture = mixture.chosen(log_S.topk(CONTINUED).indices)
    _, log_S, class_BSK = fitted(latents, strange_B, mixture, overall, LAST_ROUNDS)
    best = int(log_S.argmax())
    return class_BSK[:, best], float(log_S[best])


def _starts(latents: Latents, overall: Gaussians, strange_B: Tensor, classes: int, seed: int) -> Mixture:
    """Particles divided by the nearest of K of them, `STARTS` times."""
    draw = torch.Generator().manual_seed(seed)
    mean_BQ, covariance_BQQ = overall.posterior(latents)
    white_QQ = torch.linalg.inv(torch.linalg.cholesky(overall.covariance_MQQ[0]))
    point_BQ = (mean_BQ - overall.mean_MQ[0]) @ white_QQ.T
    point_BQ = torch.cat([point_BQ, strange_B[:, None].clamp(-STRANGE, 2 * STRANGE) / STRANGE], 1)
    nearest = [_nearest(point_BQ, classes, draw) for _ in range(STARTS)]
    weight_BM = torch.cat([torch.nn.functional.one_hot(near_B, classes) for near_B in nearest], 1).to(point_BQ) + 1e-6
    count = weight_BM.shape[1]
    shape = (-1, count, *mean_BQ.shape[1:])
    found = moments(mean_BQ[:, None].expand(shape), covariance_BQQ[:, None].expand(*shape, shape[-1]), weight_BM)
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
