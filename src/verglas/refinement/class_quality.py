"""How good class averages are, and which particles to keep.

    fits       means over the class's particles of how far they stand out of the noise through the average of the half of the
               class that they are not in, by all coefficients and by details alone (`class_fit`)
    score      the smaller of the two, each over what a quarter of all particles exceed by their classes

Averages of particles have much the same fits, whatever the view: scores of 0.75 to 1.25. Classes of broken particles, of gaps
between two, of ice, and of noise lack details, or everything else: 0.3 to 0.7. A score of 0 is given to what is none of it:

    classes far above the others       one of the fits beyond `STRONGEST` times that: thick or dense objects, carbon
    classes without contrast           (what 95 % of the pixels within 0.65 R stay below - mean of the rim) / deviation of the rim
                                       below `LEAST_CONTRAST`; R: radius of the mask, rim: its outer fifth. Noise has 1 to 3.5
    empty classes, and all classes before the last iteration, when there are no fits yet

Classes alone do not tell particles from all that looks like one: half of one, a gap between two, a particle far off the centre
have averages of their own, or share those of particles. So every particle is judged, too, by a map that is made of the good
classes (`model_fit`), and by how far from the centre of its class it was picked; there the box holds part of a neighbour:

    score of its class + `OF_GAIN` sqrt(gain) - `OF_MISFIT` misfit - `OF_DISTANCE` distance     at least `GOOD_PARTICLE`

Gain and distance are in units of the medians of the particles of good classes near their centres; misfit is how far its logarithm
lies above the median, in units of the spread of these. No particle of classes below `POOR_SCORE` is taken. Where no map can be
made, good classes are selected, less the particles picked further off the centre than `FARTHEST` times the median of those.

The limits were chosen on simulated picks alone (`python -m benchmarks.class2d simulated`), whose truth is known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from verglas.core.masks import radius_grid
from verglas.errors import InputError
from verglas.expectation.latent import MAD_TO_DEVIATION
from verglas.refinement.classes import last_shell
from verglas.refinement.state import State

RIM, MIDDLE, BRIGHTEST = 0.8, 0.65, 0.95  # of the radius, of the radius, of the pixels
BETTER = 0.75  # share of the particles whose class has at most a score of 1
GOOD_SCORE = 0.7  # from which on a class is selected by default
STRONGEST, LEAST_CONTRAST, FARTHEST = 1.5, 4.5, 2.5
POOR_SCORE = 0.5  # of classes of which no particle is selected by default
OF_GAIN, OF_MISFIT, OF_DISTANCE, GOOD_PARTICLE = 1.5, 0.3, 0.2, 1.3
MOST_GAIN, MOST_MISFIT, MOST_DISTANCE = 2.0, 6.0, 5.0  # beyond these, more makes no difference


@dataclass(frozen=True)
class ClassQuality:
    """share: of the posterior weight; particles: whose best class it is; resolution: Å, where the SSNR falls below 1; fit,
    detail_fit, contrast, score: see above."""

    share: float
    particles: int
    resolution: float
    fit: float
    detail_fit: float
    contrast: float
    score: float


def class_qualities(state: State, diameter: float) -> list[ClassQuality]:
    """Of every class of a 2-D classification. diameter: of the mask, Å."""
    image_CYX = torch.stack([model.map_ZYX.double().cpu() for model in state.halves])
    share_C = [float(model.direction_prior_D.sum()) for model in state.halves]
    count_C = torch.bincount(state.poses.class_B, minlength=len(share_C))
    contrast_C = contrasts(image_CYX, diameter / 2 / state.pixel_size)
    fit_C2 = torch.zeros(len(share_C), 2, dtype=torch.float64)
    if state.fit_B2 is not None:
        fit_C2 = fit_C2.index_add(0, state.poses.class_B, state.fit_B2) / count_C.clamp_min(1)[:, None]
    score_C = scores(fit_C2, contrast_C, state.poses.class_B)
    resolution_C = [state.resolution_of(last_shell(model, state)) for model in state.halves]
    columns = (count_C.tolist(), resolution_C, *fit_C2.T.tolist(), contrast_C.tolist(), score_C.tolist())
    return [ClassQuality(*one) for one in zip(share_C, *columns, strict=True)]


def scores(fit_C2: Tensor, contrast_C: Tensor, class_B: Tensor) -> Tensor:
    """Scores of classes [C] from their fits and contrasts, and the classes of all particles."""
    usual_2 = fit_C2[class_B].quantile(BETTER, 0)
    relative_C2 = fit_C2.clamp_min(0) / usual_2.clamp_min(1e-12)
    usable_C = (relative_C2 <= STRONGEST).all(1) & (contrast_C >= LEAST_CONTRAST) & (usual_2 > 0).all()
    return torch.where(usable_C, relative_C2.amin(1), 0)


def contrasts(image_CYX: Tensor, radius: float) -> Tensor:
    """Contrast of each average [C]; radius: of the mask, px."""
    distance_YX = radius_grid(image_CYX.shape[-1], 2)
    rim_CP = image_CYX[:, (distance_YX > RIM * radius) & (distance_YX <= radius)]
    middle_CP = image_CYX[:, distance_YX <= MIDDLE * radius]
    bright_C = middle_CP.quantile(BRIGHTEST, 1)
    return ((bright_C - rim_CP.mean(1)) / rim_CP.std(1).clamp_min(1e-12)).clamp_min(0)


def ranking(qualities: list[ClassQuality]) -> list[int]:
    """Classes, from 0, the best first: by score, and where that is the same by share."""
    return sorted(range(len(qualities)), key=lambda k: (-qualities[k].score, -qualities[k].share))


def chosen_classes(rule: str, qualities: list[ClassQuality]) -> list[int]:
    """Numbers, from 1, of the classes that a rule selects, the best first.

    rule: "auto" (score at least `GOOD_SCORE`), "score>=X", or numbers such as "1,4,7-9" (those that are not there
    yet are left out). InputError for anything else.
    """
    ranked = [k + 1 for k in ranking(qualities)]
    least = _least_score(rule)
    if least is not None:
        return [k for k in ranked if qualities[k - 1].score >= least]
    wanted = _numbers(rule)
    return [k for k in ranked if k in wanted]


def chosen_particles(rule: str, qualities: list[ClassQuality], state: State) -> Tensor:
    """Rows of the particles that a rule selects, ascending: those of its classes; with "auto" see the module's text."""
    if rule != "auto":
        chosen = torch.tensor(chosen_classes(rule, qualities), dtype=torch.int64) - 1
        return torch.isin(state.poses.class_B, chosen).nonzero().squeeze(1)
    central_B = central(qualities, state)
    if state.model_fit_B2 is None or not bool(central_B.any()):
        return central_B.nonzero().squeeze(1)
    score_B = torch.tensor([one.score for one in qualities], dtype=torch.float64)[state.poses.class_B]
    selected_B = (score_B >= POOR_SCORE) & (score_B + particle_merits(state, central_B) >= GOOD_PARTICLE)
    return selected_B.nonzero().squeeze(1)


def central(qualities: list[ClassQuality], state: State) -> Tensor:
    """Which particles are of good classes, and near their centres, bool [B]."""
    good_B = torch.tensor([one.score >= GOOD_SCORE for one in qualities])[state.poses.class_B]
    if not bool(good_B.any()):
        return good_B
    distance_B = distances(state)
    return good_B & (distance_B <= FARTHEST * distance_B[good_B].median())


def particle_merits(state: State, typical_B: Tensor) -> Tensor:
    """What counts for and against each particle, beside its class (see the module's text) [B]. typical_B: bool, the particles
    that the others are measured by; the state has figures of a map."""
    assert state.model_fit_B2 is not None
    gain_B, misfit_B = state.model_fit_B2.unbind(1)
    gain_B = gain_B / gain_B[typical_B].median().clamp_min(1e-12)
    log_B = misfit_B.clamp_min(1e-12).log()
    middle = log_B[typical_B].median()
    spread = MAD_TO_DEVIATION * (log_B[typical_B] - middle).abs().median().clamp_min(1e-12)
    distance_B = distances(state)
    distance_B = distance_B / distance_B[typical_B].median().clamp_min(1e-12)
    strange_B = ((log_B - middle) / spread).clamp(0, MOST_MISFIT)
    near_B = distance_B.clamp_max(MOST_DISTANCE)
    return OF_GAIN * gain_B.clamp(0, MOST_GAIN).sqrt() - OF_MISFIT * strange_B - OF_DISTANCE * near_B


def distances(state: State) -> Tensor:
    """How far from the usual place in its class each particle was picked, Å [B]: origins are turned to the class average, and the
    median of each class is taken off, as averages need not have their centre in the same place."""
    turned_B2 = torch.einsum("bji,bj->bi", state.poses.rotation_B33[:, :2, :2], state.poses.origin_B2)
    centre_C2 = torch.zeros(len(state.halves), 2, dtype=turned_B2.dtype)
    for k in state.poses.class_B.unique().tolist():
        centre_C2[k] = turned_B2[state.poses.class_B == k].median(0).values
    return (turned_B2 - centre_C2[state.poses.class_B]).norm(dim=1)


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
