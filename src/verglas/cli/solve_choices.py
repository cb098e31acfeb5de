"""What `verglas solve` decides by itself: pure functions of numbers, each with its reason. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from verglas.errors import InputError

PER_CLASS_2D = 50  # particles of an average, about
FEWEST_2D, MOST_2D = 10, 200
PER_CLASS_3D = 500  # particles of a 3-D class, at least
MOST_3D = 4
FEWEST_PARTICLES = 100  # without a reference
JOINED = 40.0  # Å: up to here the half-sets of a refinement share a start map, and their agreement proves nothing
PROVEN = 0.7  # a resolution is claimed from this share of JOINED on
SAME_STRUCTURE = 0.9  # correlation of two maps
AGREEING = 0.5  # correlation of maps from two random starts: noise reaches 0.4, particles 0.77 (300 weak ones) to 0.99
HAND_SEEN = 4.0  # Å: coarser than this, helices show no hand


@dataclass(frozen=True)
class Decision:
    """What was decided in a stage, and why."""

    stage: str
    decision: str
    reason: str


def check_count(count: int, where: object) -> None:
    """InputError for fewer particles than a first model can be made from."""
    if count < FEWEST_PARTICLES:
        raise InputError(str(where), f"{count} particles", f"at least {FEWEST_PARTICLES} to begin without a reference",
                         "Pick more particles, or give `verglas refine` a reference.")  # fmt: skip


def classes2d(count: int, asked: int | None) -> tuple[int, str]:
    """(number of 2-D classes, reason); InputError if more are asked for than the particles can fill."""
    if asked is not None:
        if not 1 <= asked <= count // 20:
            raise InputError("--classes2d", f"{asked} for {count} particles", f"1 to {count // 20}: 20 particles a class")
        return asked, "asked for with --classes2d"
    chosen = min(max(count // PER_CLASS_2D, FEWEST_2D), MOST_2D)
    return chosen, f"{count:,} particles, about {PER_CLASS_2D} in a class, from {FEWEST_2D} to {MOST_2D} classes"


def classes3d(count: int, asked: int | None) -> tuple[int, str]:
    """(number of 3-D classes, reason); 1: no classification. InputError if more are asked for than the particles can fill."""
    if asked is not None:
        if not 1 <= asked <= max(count // 20, 1):
            raise InputError("--classes3d", f"{asked} for {count} particles", f"1 to {count // 20}: 20 particles a class")
        return asked, "asked for with --classes3d"
    chosen = min(count // PER_CLASS_3D, MOST_3D)
    if chosen < 2:
        return 1, f"{count:,} particles: a second class would hold fewer than {PER_CLASS_3D}, too few for a map of its own"
    return chosen, f"{count:,} particles, at least {PER_CLASS_3D} in a class, up to {MOST_3D} classes"


def kept_classes(
    share_C: Sequence[float], resolution_C: Sequence[float], correlation: Callable[[int], Sequence[float]]
) -> tuple[list[int], str]:
    """(numbers from 0 of the 3-D classes that are refined together, the best one first; reason).

    The best class has the finest resolution (Å) of those with at least half of an equal share. correlation(best): of each map
    with that one; classes of the same structure go with it.
    """
    large = [k for k, share in enumerate(share_C) if share >= 0.5 / len(share_C)]
    best = min(large, key=lambda k: (resolution_C[k], -share_C[k]))
    correlation_C = correlation(best)
    others = [k for k in range(len(share_C)) if k != best and share_C[k] > 0 and correlation_C[k] >= SAME_STRUCTURE]
    text = f"class {best + 1} has the finest map ({resolution_C[best]:.3g} Å, {100 * share_C[best]:.0f} % of the particles)"
    for k in others:
        text += f"; class {k + 1} is the same structure (correlation {correlation_C[k]:.2f}, at least {SAME_STRUCTURE:g})"
    return [best, *others], text


def doubt_of_starts(agreement: float | None) -> str | None:
    """What is wrong if random starts agree so little (mean correlation of their maps at 20 Å); None: nothing, or not known."""
    if agreement is None or agreement >= AGREEING:
        return None
    return (
        f"Random starts found different maps: they correlate by {agreement:.2f} at 20 Å, as on pure noise (one structure: "
        f"{AGREEING:g} at least, mostly above 0.9). The particles show nothing that a map could be made of, or are too "
        "few. Look at their 2-D class averages; with more particles or more --restarts it may come out."
    )


def symmetry(proposed: str, weakest: float) -> tuple[str, str]:
    """(point group to go on with, reason). weakest: agreement of the first model with its worst turned copy, 1 at best."""
    if proposed == "C1":
        return "C1", "no turned copy of the first model agrees with it well enough (4_symmetry/report.html)"
    return proposed, (f"the first model agrees with all its {proposed} copies by at least {weakest:.2f} "
                      "(4_symmetry/report.html); no larger group holds")  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """Whether a resolution may be claimed, and what to say. resolution: Å, None without agreement of the half-sets."""

    resolution: float | None
    text: str


def claim(corrected: float, unmasked: float, finest: float = 0.0) -> Claim:
    """Judge the FSC 0.143 resolutions (Å) of the final half-maps: within the mask and corrected, and without a mask.
    finest: what the pixels can hold, Å.

    Half-sets that start from one map agree up to its resolution even on noise. Agreement counts where it goes well beyond.
    """
    limit = PROVEN * JOINED
    if corrected > limit or unmasked > JOINED:
        text = (
            f"The half-sets agree to {corrected:.3g} Å only ({unmasked:.3g} Å without a mask). Both started from one map at "
            f"{JOINED:g} Å, so that agreement coarser than {limit:g} Å proves nothing: no resolution is claimed, and the map may "
            "be no more than noise laid on the start map."
        )
        return Claim(None, text)
    text = f"The half-sets, refined apart, agree to {corrected:.3g} Å within the mask ({unmasked:.3g} Å without one), FSC 0.143."
    if corrected < 1.02 * finest:
        text += " That is as far as pixels of this size reach: smaller ones may show more."
    return Claim(corrected, text)


def hand_text(resolution: float) -> tuple[bool, str]:
    """(whether the hand is undetermined, what to say)."""
    if resolution > HAND_SEEN:
        return True, (
            f"At {resolution:.3g} Å the hand cannot be told (helices show theirs below about {HAND_SEEN:g} Å): this map and its "
            "mirror image explain the particles equally well."
        )
    return False, (
        "Images do not tell the hand, but the map is fine enough to show it: look at its helices, and flip the hand if they are "
        "left-handed."
    )
