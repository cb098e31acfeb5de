"""How good class averages are, and which particles to keep.

    contrast   (what 95 % of the pixels within 0.65 R stay below - mean of the rim) / standard deviation of the rim
    score      contrast sqrt(min(1, K share))

R is the radius of the circular mask, the rim its outer fifth, K share the class's particles over those of an average class. An
average of particles is bright in the middle and flat at its rim, where neighbours, carbon, ice and noise are not; one of few
particles shows their noise there. Scores of particles are 10 to 40, of what is left over mostly 2 to 6.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.masks import radius_grid
from verglas.errors import InputError
from verglas.refinement.classes import last_shell
from verglas.refinement.state import State

RIM, MIDDLE, BRIGHTEST = 0.8, 0.65, 0.95  # of the radius, of the radius, of the pixels
GOOD_SCORE = 8.0  # from which on a class is selected by default


@dataclass(frozen=True)
class ClassQuality:
    """share: of the posterior weight; particles: whose best class it is; resolution: Å, where the SSNR falls below 1; score: see
    above, 0 for an empty class."""

    share: float
    particles: int
    resolution: float
    score: float


def class_qualities(state: State, diameter: float) -> list[ClassQuality]:
    """Of every class of a 2-D classification. diameter: of the mask, Å."""
    image_CYX = torch.stack([model.map_ZYX.double().cpu() for model in state.halves])
    share_C = torch.stack([model.direction_prior_D.sum() for model in state.halves])
    count_C = torch.bincount(state.poses.class_B, minlength=len(share_C))
    occupancy_C = (share_C * len(share_C)).clamp_max(1)
    score_C = contrasts(image_CYX, diameter / 2 / state.pixel_size) * occupancy_C.sqrt() * (count_C > 0)
    return [
        ClassQuality(float(share), int(count), state.resolution_of(last_shell(model, state)), float(score))
        for model, share, count, score in zip(state.halves, share_C, count_C, score_C)
    ]


def contrasts(image_CYX: Tensor, radius: float) -> Tensor:
    """Contrast of each average [C]; radius: of the mask, px."""
    distance_YX = radius_grid(image_CYX.shape[-1], 2)
    rim_CP = image_CYX[:, (distance_YX > RIM * radius) & (distance_YX <= radius)]
    middle_CP = image_CYX[:, distance_YX <= MIDDLE * radius]
    bright_C = middle_CP.quantile(BRIGHTEST, 1)
    return ((bright_C - rim_CP.mean(1)) / rim_CP.std(1).clamp_min(1e-12)).clamp_min(0)


def chosen_classes(rule: str, qualities: list[ClassQuality]) -> list[int]:
    """Numbers, from 1, of the classes that a rule selects, the best first.

    rule: "auto" (score at least `GOOD_SCORE`), "score>=X", or numbers such as "1,4,7-9" (those that are not there
    yet are left out). InputError for anything else.
    """
    ranked = sorted(range(1, len(qualities) + 1), key=lambda k: -qualities[k - 1].score)
    least = _least_score(rule)
    if least is not None:
        return [k for k in ranked if qualities[k - 1].score >= least]
    wanted = _numbers(rule)
    return [k for k in ranked if k in wanted]


def check_rule(rule: str, classes: int) -> None:
    """InputError for a rule that `chosen_classes` would not understand, or that names a class beyond the last."""
    beyond = [] if _least_score(rule) is not None else sorted(k for k in _numbers(rule) if not 1 <= k <= classes)
    if beyond:
        raise InputError("--select", f"class {beyond[0]}", f"classes from 1 to {classes}")


def _least_score(rule: str) -> float | None:
    """The score that a rule asks for, None if it lists numbers."""
    if rule == "auto":
        return GOOD_SCORE
    if not rule.startswith("score>="):
        return None
    try:
        return float(rule.removeprefix("score>="))
    except ValueError as error:
        raise _not_understood(rule) from error


def _numbers(rule: str) -> set[int]:
    """The numbers that a list such as "1,4,7-9" names."""
    wanted: set[int] = set()
    try:
        for part in rule.split(","):
            first, _, last = part.partition("-")
            wanted |= set(range(int(first), int(last or first) + 1))
    except ValueError as error:
        raise _not_understood(rule) from error
    return wanted


def _not_understood(rule: str) -> InputError:
    return InputError("--select", f"'{rule}'", "auto, score>=X, or numbers of classes such as 1,4,7-9")
