"""Regions whose positions fit together, but not to the rest, are taken out and grown back from what surrounds them.

Positions and object of a region go wrong together: a star gets a spoke too many where two regions meet that each began for
itself, and no step of single positions mends that. What the others see of positions there explains their patterns badly. These
and those near them rest: they draw no object, and the object that they alone saw is forgotten. Then pass by pass those wake of
which positions at work see enough; each is looked for about where its file and its neighbours' corrections put it. So order
grows from the sound side. When all have been at work for a while, the data judge: a region that is not better explained than
before gets back what it had.

Axes: B all positions of all ranks where not said otherwise, N some of this rank's.
"""

from __future__ import annotations

import torch
from scipy.spatial import cKDTree
from torch import Tensor

from verglas.kernels.patches import patches
from verglas.ptychography.positions_search import REACH, Others, best_places, expected_loss, inside, losses_here, others_of
from verglas.ptychography.problem import Problem
from verglas.ptychography.share import Share
from verglas.ptychography.unknowns import Line, Unknowns

LOOKS = range(15, 41, 4)  # passes of correction that look for regions
ENOUGH = 20  # passes left at least for that
SETTLING = 8  # passes with everybody at work before the data judge
ILL = 0.6  # misfit above the usual one, relative to it, times the squared share that the others see: so much makes a position ill
AGAIN, REGION = 0.5, 0.5  # so much more for each time that it was tried; radius of the region about it, beam widths
SEEN, LIT = 0.5, 0.05  # share of a position's light that falls where this share of the greatest light is: it can be placed
NEIGHBOURS = 24  # that tell where one that rests ought to be; as many at least stay at work
PREFIXES = ("regions.", "before.")


class Regions:
    """rests_B: positions that rest; group_B: those of the region under trial; tried_B: how often each was in one. memory: these
    as "regions.rests" and so on, "regions.state" [2]: the pass of the verdict and the misfit of the group before the
    trial; "regions.positions" [B, 2] in the whole object, "before.object_OLYX": what there was before it."""

    def __init__(self, problem: Problem, recorded_B2: Tensor, memory: dict[str, Tensor]) -> None:
        """recorded_B2: of all ranks; memory: of a pass to go on after; what is of regions is taken out of it."""
        self.problem, self.recorded_B2 = problem, recorded_B2
        kept = {name: memory.pop(name) for name in list(memory) if name.startswith(PREFIXES)}
        nobody_B = torch.zeros(len(recorded_B2), dtype=torch.bool, device=recorded_B2.device)
        self.rests_B, self.group_B = (kept.get(f"regions.{name}", nobody_B).bool() for name in ("rests", "group"))
        self.tried_B = kept.get("regions.tried", nobody_B.double())
        state_2 = kept.get("regions.state", torch.zeros(2, dtype=torch.float64))
        self.due, self.misfit = int(state_2[0]), float(state_2[1])
        self.before_B2 = kept.get("regions.positions", recorded_B2)
        self.before_OLYX = kept.get("before.object_OLYX")
        several = problem.options.engine in ("dm", "raar") or bool(problem.scan.geometry.slice_distances)
        self.possible = not several  # these keep the exit waves of all positions, or no sum over slices is known
        self._tell()

    @property
    def memory(self) -> dict[str, Tensor]:
        """What the next pass depends on."""
        state_2 = torch.tensor([self.due, self.misfit], dtype=torch.float64)
        groups = {"rests": self.rests_B.double(), "group": self.group_B.double(), "tried": self.tried_B}
        named = {f"regions.{name}": value for name, value in (groups | {"state": state_2, "positions": self.before_B2}).items()}
        return named if self.before_OLYX is None else named | {"before.object_OLYX": self.before_OLYX}

    @property
    def under_trial(self) -> bool:
        """Whether a region is being grown back, or has been and is not yet judged."""
        return self.before_OLYX is not None

    def follow(self, following: Share) -> None:
        """The problem's share is about to be another one of the same positions."""
        if self.before_OLYX is not None:
            self.before_OLYX = self.problem.share.moved("object_OLYX", self.before_OLYX, following)

    def after_pass(self, x: Unknowns, passes: int, left: int) -> Unknowns:
        """Unknowns after `passes` passes of correction, with `left` to come. Positions may have gone far from what this rank
        keeps of the object, which has to follow them before anything looks at it."""
        if bool(self.rests_B.any()):
            x, self.due = self._woken(x, left <= SETTLING), passes + SETTLING
        elif self.under_trial and (passes >= self.due or not left):
            x = self._judged(x)
        elif self.possible and not self.under_trial and left >= ENOUGH and passes in LOOKS:
            x = self._looked(x)
        return x

    def _tell(self) -> None:
        self.problem.rests_B = self.problem.share.own_part(self.rests_B) if bool(self.rests_B.any()) else None

    def _everyones(self, x: Unknowns) -> Tensor:
        """[B, 2] positions of all ranks, counted from the whole object's corner."""
        return self.problem.share.everyones(x["positions_B2"] + self.problem.share.corner_2.to(self.recorded_B2))

    def _looked(self, x: Unknowns) -> Unknowns:
        """Takes out the region about positions that are ill, if there are any."""
        problem, share = self.problem, self.problem.share
        others = others_of(problem, x)
        misfit_B = share.everyones(misfits(problem, x, others))
        seen_B = share.everyones(seen(problem, x, others))
        ill_B = (misfit_B / misfit_B.median() - 1) * seen_B.square() > ILL * (1 + AGAIN * self.tried_B)
        if not bool(ill_B.any()):
            return x
        reach_B = REGION * (1 + self.tried_B) * beam_width(x["probe_MYX"])
        position_B2 = self._everyones(x)
        near_B = _about(*(one.cpu() for one in (position_B2, misfit_B, ill_B, reach_B)))
        self.group_B = self.rests_B = near_B.to(ill_B.device)
        self.tried_B = self.tried_B + self.group_B
        self.misfit = float(misfit_B[self.group_B].sum())
        self.before_OLYX, self.before_B2 = x["object_OLYX"], position_B2
        self._tell()
        return self._waiting(x.changed(object_OLYX=forgotten(problem, x)))

    def _woken(self, x: Unknowns, everybody: bool) -> Unknowns:
        """Those of which enough is seen, or all, go to their best places and to work."""
        problem, share = self.problem, self.problem.share
        others = others_of(problem, x)
        seen_B = share.everyones(seen(problem, x, others)) * self.rests_B
        wakes_B = self.rests_B & (seen_B >= (0.0 if everybody else min(SEEN, float(seen_B.max()))))
        rows_N = share.own_part(wakes_B).nonzero()[:, 0]
        position_B2 = x["positions_B2"].clone()
        if len(rows_N):
            position_B2[rows_N] += best_places(problem, x, others, rows_N)[0]
        self.rests_B = self.rests_B & ~wakes_B
        self._tell()
        return self._waiting(x.changed(positions_B2=inside(problem, x, position_B2)))

    def _waiting(self, x: Unknowns) -> Unknowns:
        """Positions that rest where they ought to be: as recorded, corrected as the nearest at work are in the mean."""
        if not bool(self.rests_B.any()):
            return x
        position_B2, works_B = self._everyones(x), ~self.rests_B
        recorded_B2 = self.recorded_B2.cpu()
        count = min(NEIGHBOURS, int(works_B.sum()))
        nearest_BN = cKDTree(recorded_B2[works_B.cpu()]).query(recorded_B2, range(1, count + 1))[1]
        correction_B2 = (position_B2 - self.recorded_B2)[works_B]
        expected_B2 = self.recorded_B2 + correction_B2[torch.from_numpy(nearest_BN).to(works_B.device)].mean(1)
        position_B2 = torch.where(works_B[:, None], position_B2, expected_B2)
        return x.changed(positions_B2=inside(self.problem, x, self.problem.share.cut_field("positions_B2", position_B2)))

    def _judged(self, x: Unknowns) -> Unknowns:
        """The region as it is now, or as it was, whichever explains its patterns better."""
        assert self.before_OLYX is not None, "under trial"
        misfit_B = self.problem.share.everyones(misfits(self.problem, x, others_of(self.problem, x)))
        if float(misfit_B[self.group_B].sum()) > self.misfit:
            position_B2 = self.problem.share.cut_field("positions_B2", self.before_B2)
            x = x.changed(object_OLYX=self.before_OLYX, positions_B2=position_B2)
        self.before_OLYX = None
        return x


def misfits(problem: Problem, x: Unknowns, others: Others) -> Tensor:
    """[B] of this rank: loss on what the others see over what noise makes of it."""
    expected = [expected_loss(problem, problem.model.waves(Line(x), rows_B)) for rows_B in problem.chunks()]
    return losses_here(problem, x, others) / torch.cat(expected)


def seen(problem: Problem, x: Unknowns, others: Others) -> Tensor:
    """[B] of this rank: share of each position's light that falls where the others' light is LIT of the greatest or more."""
    assert others.light_OLYX is not None, "one slice"
    found = []
    least = LIT * problem.share.greatest("object_OLYX", others.light_OLYX)
    for rows_B in problem.chunks():
        waves = problem.model.waves(Line(x), rows_B)
        power_BYX = waves.light[0].abs().square().sum(1)
        light_BOLYX = patches(others.light_OLYX.to(waves.light[0].dtype), waves.place.corner_B2 + REACH, problem.scan.window)
        left_BYX = light_BOLYX[:, 0, 0].real - power_BYX * problem.works(rows_B)[:, None, None]
        found.append((power_BYX * (left_BYX > least)).sum((1, 2)) / power_BYX.sum((1, 2)))
    return torch.cat(found)


def forgotten(problem: Problem, x: Unknowns) -> Tensor:
    """The object, its mean where positions at work hardly see it."""
    share, object_OLYX = problem.share, x["object_OLYX"]
    light_OLYX = problem.curvature(x, ("object_OLYX",), problem.at_work())["object_OLYX"]
    own = (..., *share.cell)
    sum_O, light_O = share.total((light_OLYX * object_OLYX)[own].sum((1, 2, 3)), light_OLYX[own].sum((1, 2, 3)))
    ridge = LIT * share.greatest("object_OLYX", light_OLYX)
    return (light_OLYX * object_OLYX + ridge * (sum_O / light_O)[:, None, None, None]) / (light_OLYX + ridge)


def beam_width(probe_MYX: Tensor) -> float:
    """Diameter, px, of the disc of even light that has the probe's (sum power)^2 / sum power^2 pixels."""
    power_YX = probe_MYX.abs().square().sum(0).double()
    return float((power_YX.sum().square() / power_YX.square().sum() * (4 / torch.pi)).sqrt())


def _about(position_B2: Tensor, misfit_B: Tensor, ill_B: Tensor, reach_B: Tensor) -> Tensor:
    """[B] whether each is within reach, px, of one that is ill; where too few would be left, the best region stays out of it."""
    near_B = (torch.cdist(position_B2, position_B2[ill_B]) <= reach_B[ill_B]).any(1)
    nearest_BN = torch.from_numpy(cKDTree(position_B2).query(position_B2, range(1, min(NEIGHBOURS, len(position_B2)) + 1))[1])
    if int((~near_B).sum()) < NEIGHBOURS:
        near_B = torch.ones_like(near_B)
        near_B[nearest_BN[misfit_B[nearest_BN].mean(1).argmin()]] = False
    return near_B
