"""The stages of `verglas solve`: each decides by what is known so far, runs a command, and reads what came out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verglas.cli import solve_choices as choices
from verglas.cli.classify2d_run import LEFT_OUT
from verglas.cli.solve_run import NothingFound, SolveJob, Story

if TYPE_CHECKING:
    from verglas.particles.table import ParticleTable

RESTARTS = 2  # of the search for a first model: their agreement is told
ITERATIONS_3D = 15
MAP_NAMES = {"half1": "run_half1_class001_unfil.mrc", "half2": "run_half2_class001_unfil.mrc"}


def check_particles(job: SolveJob) -> None:
    """InputError before a folder is made: too few particles, more classes asked for than they can fill, no CTF, inverted
    contrast, a diameter beyond the box."""
    from verglas.refinement.config import RefineConfig
    from verglas.refinement.inputs import check_without_reference

    table = table_of(job.particles, job.folder)
    choices.check_count(len(table), job.particles)
    choices.classes2d(len(table), job.classes2d)
    choices.classes3d(len(table), job.classes3d)
    check_without_reference(table, RefineConfig(diameter=job.diameter, seed=job.seed), job.ignore_contrast)


def classify2d(story: Story) -> None:
    """2-D class averages of all particles."""
    job = story.job
    count = len(table_of(job.particles, job.folder))
    story.facts["particles"] = count
    classes, reason = choices.classes2d(count, job.classes2d)
    story.decide("2-D classes", f"{classes} classes", reason)
    folder = ["--folder", job.folder] if job.folder else []
    story.command("1_classify2d", "classify2d", "--particles", job.particles, *folder, *common(job), "--classes", classes,
                  "--skip-bad")  # fmt: skip


def select(story: Story) -> None:
    """The particles of good 2-D classes, as `verglas classify2d` selects them."""
    out = story.stages["1_classify2d"]
    ranking = ranked_averages(out)
    good = sum(one.selected for one in ranking)
    story.facts["averages"] = ranking
    if not good:
        raise NothingFound(
            "None of the 2-D class averages looks like a particle: there is nothing to make a map of. Look at the averages; if "
            "there are particles among them, run 1_classify2d again with --select and their numbers, then go on with --continue."
        )
    story.particles = out / "particles_selected.star"
    kept = len(table_of(story.particles))
    left_over = int(figures_of(out).get(LEFT_OUT, 0))
    story.discarded["2-D classes that do not look like particles"] = story.facts["particles"] - kept - left_over
    if left_over:
        story.discarded["in good 2-D classes, but far from the centre or unlike a map of these"] = left_over
    left_out = len(ranking) - good
    reason = "the averages of the others score too low: noise, ice, edges, or empty" if left_out else "every average is good"
    story.decide("Selection", f"{kept:,} particles of {good} classes kept, {left_out} classes left out", reason)
    choices.check_count(kept, story.particles)


def first_model(story: Story) -> None:
    """A map from random starts, without symmetry."""
    out = story.command("3_abinitio", "abinitio", "--particles", story.particles, *common(story.job), "--restarts", RESTARTS)
    agreement = figures_of(out).get("consistency_of_restarts")
    text = "one class, as 3-D classes come later"
    if agreement is not None:
        text += f"; {RESTARTS} random starts correlate by {agreement:g} at 20 Å, either hand"
    story.decide("First model", f"the better of {RESTARTS} random starts, without symmetry", text)
    if doubt := choices.doubt_of_starts(agreement):
        raise NothingFound(f"{doubt} To try that, run 3_abinitio again (its command is below), then go on with --continue.")


def symmetry(story: Story) -> None:
    """The point group of the first model, and the model on its axes."""
    model = story.stages["3_abinitio"] / "initial_model.mrc"
    story.facts["reference"], story.facts["sym"] = model, "C1"
    if story.job.sym.upper() == "C1":
        story.decide("Symmetry", "C1", "asked for with --sym")
        return
    out = story.command("4_symmetry", "align-symmetry", "--map", model, "--sym", story.job.sym)
    figures = figures_of(out)
    name, reason = str(figures["symmetry"]), "asked for with --sym"
    if story.job.sym == "auto":
        name, reason = choices.symmetry(name, float(figures["worst_operation"]))
    story.facts["sym"] = name
    if name != "C1":
        story.facts["reference"] = out / "symmetrised.mrc"
    story.decide("Symmetry", name, reason)


def classify3d(story: Story) -> None:
    """3-D classes, and the particles of those that show one structure; left out where particles are few."""
    count = len(table_of(story.particles))
    classes, reason = choices.classes3d(count, story.job.classes3d)
    if classes == 1:
        story.decide("3-D classes", "left out: one model has to explain all particles", reason)
        return
    story.decide("3-D classes", f"{classes} classes", reason)
    out = story.command(
        "5_classify3d", "classify3d", "--particles", story.particles, "--reference", story.facts["reference"], *common(story.job),
        "--sym", story.facts["sym"], "--classes", classes, "--iterations", ITERATIONS_3D,
    )  # fmt: skip
    share_C, resolution_C = class_numbers(figures_of(out), classes)
    maps = [last_file(out, f"class{k:03d}.mrc") for k in range(1, classes + 1)]
    kept, why = choices.kept_classes(share_C, resolution_C, lambda best: correlations(maps, resolution_C, best))
    story.facts["classes3d"] = [{"map": path, "share": share, "resolution": resolution, "kept": k in kept}
                                for k, (path, share, resolution) in enumerate(zip(maps, share_C, resolution_C))]  # fmt: skip
    story.particles = story.run.path("particles_3d.star")
    table = table_of(last_data(out))
    table.select(table.frame["rlnClassNumber"].isin([k + 1 for k in kept]).to_numpy()).write(story.particles, overwrite=True)
    left = len(table_of(story.particles))
    story.discarded["3-D classes of another structure"] = count - left
    story.facts["reference"] = maps[kept[0]]
    story.decide("3-D classes", f"{left:,} particles of {'class' if len(kept) == 1 else 'classes'} "
                                f"{', '.join(str(k + 1) for k in kept)} kept", why)  # fmt: skip


def refine(story: Story) -> None:
    """Gold-standard refinement of what is left."""
    story.command(
        "6_refine", "refine", "--particles", story.particles, "--reference", story.facts["reference"], *common(story.job),
        "--sym", story.facts["sym"], "--initial-resolution", choices.JOINED,
    )  # fmt: skip
    story.decide("Refinement", f"{story.facts['sym']}, from the last map at {choices.JOINED:g} Å",
                 "only coarse features are handed on, so that finer agreement of the half-sets is their own")  # fmt: skip


def postprocess(story: Story) -> None:
    """Resolution between the half-maps, and the sharpened map."""
    out = story.command("7_postprocess", "postprocess", *half_maps(story))
    figures = figures_of(out)
    finest = 2 * table_of(story.particles).groups[0].pixel_size
    claim = choices.claim(float(figures["resolution"]), float(figures["resolution_unmasked"]), finest)
    story.facts["claim"] = claim
    story.decide("Resolution", "none claimed" if claim.resolution is None else f"{claim.resolution:.3g} Å", claim.text)
    if claim.resolution is None:
        raise NothingFound(claim.text)
    open_hand, text = choices.hand_text(claim.resolution)
    story.decide("Hand", "undetermined" if open_hand else "not determined by this program", text)


def localres(story: Story) -> None:
    """Local resolution."""
    story.command("8_localres", "localres", *half_maps(story), "--mask", story.stages["7_postprocess"] / "mask.mrc")


STAGES: tuple[Callable[[Story], None], ...] = (
    classify2d, select, first_model, symmetry, classify3d, refine, postprocess, localres,
)  # fmt: skip


def common(job: SolveJob) -> list[object]:
    """Words of all iterative stages."""
    return ["--diameter", f"{job.diameter:g}", "--seed", job.seed, *(["--ignore-contrast"] if job.ignore_contrast else [])]


def half_maps(story: Story) -> list[object]:
    """Words that name the final half-maps."""
    folder = story.stages["6_refine"]
    return ["--half1", folder / MAP_NAMES["half1"], "--half2", folder / MAP_NAMES["half2"]]


@dataclass(frozen=True)
class Average:
    """A 2-D class: number from 1, score (more is better), share of the particles, whether it was selected, its average."""

    number: int
    score: float
    share: float
    selected: bool
    image_YX: np.ndarray


def ranked_averages(out: Path) -> list[Average]:
    """The class averages of a 2-D classification, best first."""
    from verglas.io.mrc import Stack
    from verglas.io.star import read_star

    frame = read_star(out / "class_ranking.star")["class_ranking"].frame
    numbers = [int(name.partition("@")[0]) for name in frame["rlnReferenceImage"]]
    stack = Stack.open(last_file(out, "classes.mrcs"))
    image_CYX = stack.read(slice(0, len(stack)))
    columns = zip(numbers, frame["rlnClassScore"], frame["rlnClassDistribution"], frame["rlnSelected"], strict=True)
    return [Average(k, float(score), float(share), bool(int(chosen)), image_CYX[k - 1]) for k, score, share, chosen in columns]


def table_of(path: Path, folder: Path | None = None) -> ParticleTable:
    """The particles of a file."""
    from verglas.particles.table import ParticleTable

    return ParticleTable.read(path, folder)


def figures_of(out: Path) -> dict[str, Any]:
    """Key figures of a finished run: name -> value."""
    figures = json.loads((out / "result.json").read_text(encoding="utf-8"))["figures"]
    return {name: figure["value"] for name, figure in figures.items()}


def last_file(out: Path, ending: str) -> Path:
    """The file run_itNNN_`ending` of the last iteration."""
    return max(out.glob(f"run_it*_{ending}"))


def last_data(out: Path) -> Path:
    """Particles of the last iteration."""
    return last_file(out, "data.star")


def class_numbers(figures: dict[str, Any], classes: int) -> tuple[list[float], list[float]]:
    """(shares, resolutions in Å) of the classes of a 3-D classification."""
    numbers = range(1, classes + 1)
    shares = [float(figures[f"class_{k}_share"]) for k in numbers]
    return shares, [float(figures[f"class_{k}_resolution_at_SSNR_1"]) for k in numbers]


def correlations(maps: list[Path], resolution_C: list[float], best: int) -> list[float]:
    """Correlation of each map with that of class `best`, both low-passed to the coarser one's resolution and without mean."""
    import torch

    from verglas.io.mrc import read_map
    from verglas.postprocess.mapops import low_passed

    first = read_map(maps[best])
    found = []
    for path, resolution in zip(maps, resolution_C):
        cutoff = max(resolution, resolution_C[best])
        pair = [low_passed(torch.tensor(one.data_ZYX).double(), one.pixel_size, cutoff) for one in (first, read_map(path))]
        found.append(float(torch.corrcoef(torch.stack(pair).flatten(1))[0, 1]))
    return found
