"""How several classes begin from one reference: with one class until poses have settled, then divided where particles differ.

At the resolution of a first reference molecules of one kind look alike, and junk differs more than they do: classes that begin
there end as one of everything and some of junk. Poses do not need classes, and once they are known what differs is a linear
problem: `components` finds the directions, `latent` the groups of particles along them.

What fits none of the classes (`misfit`) is junk. If one of the groups consists of it, its class is the place for the rest:
particles that fit no class count for that one alone, or their strong signal would pull the other classes to itself.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from verglas.expectation.images import detail_shell
from verglas.expectation.latent import STRANGE, TYPICAL_JUNK, classes_of, strangeness
from verglas.expectation.sampling import OffsetGrid
from verglas.io.mrc import read_map
from verglas.maximization.accumulate import Accumulator
from verglas.maximization.reference import check_mask
from verglas.maximization.sums import Sums
from verglas.projection.volume import FourierVolume
from verglas.refinement.accuracy import plan_of
from verglas.refinement.components import find_components
from verglas.refinement.computing import Computing
from verglas.refinement.config import ClassifyConfig
from verglas.refinement.dataset import Dataset, Progress
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.state import State
from verglas.refinement.step import ParticleSet

SETTLING = "One class until the poses have settled; then the particles are divided."
PATIENCE = 2  # iterations without better resolution after which poses have settled; 1 where they are given
LONGEST_SETTLING = 0.6  # of all iterations
FAINT, SURE = 0.1, 20.0  # gain of a particle of which little is seen, as a share of the typical one; nats, if that is above
SURE_DIVISION = 0.9  # certainty; particles all alike are divided along noise with 0.86
STARTS = 3  # searches for directions; the best division counts


@dataclass(frozen=True)
class Division:
    """class_B: int64, class of each particle, of so many `classes`; rest: which of them is of particles that fit nothing, or -1;
    certainty: mean probability of a particle's class (1 / K: there is nothing to tell them by)."""

    class_B: Tensor
    classes: int
    rest: int
    certainty: float

    @property
    def note(self) -> str:
        """For the user."""
        counts = ", ".join(str(count) for count in torch.bincount(self.class_B, minlength=self.classes).tolist())
        rest = f" Class {self.rest + 1} takes what fits no class." if self.rest >= 0 else ""
        sure = "" if self.certainty > SURE_DIVISION else " They hardly differ: these classes may be all alike."
        return f"The particles were divided where they differ most: {counts} (mean probability {self.certainty:.2f}).{rest}{sure}"

    def begin(self, state: State) -> State:
        """The state with as many classes, all of them still what the one was."""
        model = state.halves[0]
        each = replace(model, direction_prior_D=model.direction_prior_D / self.classes)
        return replace(state, halves=[each] * self.classes, rest=self.rest)

    def sets(self, state: State) -> list[ParticleSet]:
        """Each class with its own particles alone."""
        return [ParticleSet([model], (self.class_B == k).nonzero().squeeze(1)) for k, model in enumerate(state.halves)]


def is_settling(state: State, config: ClassifyConfig) -> bool:
    """Whether there is one class still, where there are to be several."""
    return len(state.halves) < config.classes


def has_settled(state: State, config: ClassifyConfig) -> bool:
    """Whether poses are good enough to divide the particles after this state: the resolution gets no better, or time is short.

    The first iteration knows no grey scale; the second is the first one with a map of its own.
    """
    patience = PATIENCE if config.align == "all" else 1
    stalled = state.iteration > 1 and state.schedule.iterations_without_gain >= patience
    return stalled or state.iteration >= max(1, int(LONGEST_SETTLING * config.max_iterations))


def divided(
    state: State, data: Dataset, config: ClassifyConfig, on: Computing, mask_ZYX: Tensor | None, progress: Progress
) -> Division | None:
    """The division of the particles of a state of one class, at the poses that they have; None while these have not settled.

    mask_ZYX: the user's; None: a sphere. With a focus mask, the particles may differ within that. The lead divides for all ranks.
    """
    if not has_settled(state, config):
        return None
    return on.ranks.agreed(_division(state, data, config, on, mask_ZYX, progress) if on.ranks.is_lead else None, "division")


def _division(
    state: State, data: Dataset, config: ClassifyConfig, on: Computing, mask_ZYX: Tensor | None, progress: Progress
) -> Division:
    """The best division of `STARTS`."""
    if config.focus_mask is not None:
        mask_ZYX = check_mask(read_map(config.focus_mask), state.box, state.pixel_size, str(config.focus_mask))
    at_rest = replace(config, align="none", limit_resolution=None)
    shell = detail_shell(state.box * state.pixel_size, config.diameter, state.box // 2)
    plan = replace(plan_of(replace(state, current_size=2 * shell), at_rest, False), align="none",
                   offsets=OffsetGrid.build(0.0, state.pixel_size, 0))  # fmt: skip
    half = HalfExpectation(state.halves, data, state.poses, plan, at_rest, on)
    divisions = [_one_division(half, config, number, mask_ZYX, progress) for number in range(STARTS)]
    half.release()
    return max(divisions, key=lambda one: one[1])[0]


def _one_division(
    half: HalfExpectation, config: ClassifyConfig, number: int, mask_ZYX: Tensor | None, progress: Progress
) -> tuple[Division, tuple[int, float]]:
    """The division from one random start, and how good it is."""
    found = find_components(half, config.classes + 1, config.seed + number, mask_ZYX, progress)
    best = classes_of(found.latents, found.overall, found.strange_B, config.classes, config.seed)
    return division_of(best.probability_BK.cpu(), found.strange_B.cpu()), best.merit


def division_of(probability_BK: Tensor, strange_B: Tensor) -> Division:
    """The likeliest class of each particle; the one for the rest is the one whose typical member fits nothing."""
    certain_B, class_B = probability_BK.max(1)
    classes = probability_BK.shape[1]
    typical = [float(strange_B[class_B == k].median()) if bool((class_B == k).any()) else 0.0 for k in range(classes)]
    strangest = max(range(classes), key=typical.__getitem__)
    return Division(class_B, classes, strangest if typical[strangest] > TYPICAL_JUNK else -1, float(certain_B.mean()))


def with_apart(state: State) -> State:
    """With a class for the rest: the state with the particles that fit no class in this iteration: too much is left of them, or,
    where the others are sure, noise explains them almost as well."""
    if state.rest < 0:
        return state
    apart_B, gain_B = strangeness(state.poses.misfit_B) > STRANGE, state.poses.gain_B
    typical = float(gain_B.median())
    if typical > SURE:
        apart_B |= gain_B < FAINT * typical
    return replace(state, apart_B=apart_B)


def sets_with_rest(state: State) -> list[ParticleSet]:
    """All particles with all classes, those that fit none by themselves."""
    if not bool(state.apart_B.any()):
        return [ParticleSet(state.halves, torch.arange(len(state.poses.half_B)))]
    return [ParticleSet(state.halves, rows_B.nonzero().squeeze(1)) for rows_B in (~state.apart_B, state.apart_B)]


def with_rest(parts: list[HalfExpectation], rest: int) -> tuple[Sums, list[Accumulator], list[FourierVolume]]:
    """Sums of the particles that fit, and of the others (the second part) as far as they count: all of them belong to the
    class for the rest, whose map they shape as far as they like it; noise and scales are those of particles that fit.
    """
    fitting, others = parts
    classes = len(fitting.models)
    direction_KD = fitting.sums.direction_D.view(classes, -1).clone()
    direction_KD[rest] += others.sums.direction_D.view(classes, -1).sum(0)
    fitting.accumulators[rest].merge(others.accumulators[rest])
    own = {name: getattr(fitting.sums, name) for name in ("noise_GS", "particles_G", "cross_M", "power_M")}
    return replace(fitting.sums + others.sums, **own, direction_D=direction_KD.flatten()), fitting.accumulators, fitting.volumes
