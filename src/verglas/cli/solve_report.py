"""The page of `verglas solve`: what came out, the pictures on the way, what was decided, what was left out and why."""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verglas.cli.solve_stages import Average, table_of
from verglas.core.symmetry import symmetry_matrices
from verglas.io.mrc import read_map
from verglas.refinement.files_data import shown_path
from verglas.report import Curve, Histogram, KeyFigures, Orientations, Pictures, Table, Text, write_report
from verglas.report.pictures import map_picture, montage, slices_picture, write_png
from verglas.report.sections import Section

if TYPE_CHECKING:
    from verglas.cli.solve_run import Story

VIEWS = "surface, projections and central slices, seen along z, y and x"
CURVES = {"corrected": "used", "unmasked": "unmasked", "masked": "masked", "phases randomised": "phase_randomised"}
COLUMNS = 10  # of a montage of averages


def write_story(story: Story) -> None:
    """Key figures of the run, and report.html with one section per part of the story, as far as it went."""
    note_figures(story)
    sections: list[Section] = [outcome(story), KeyFigures("Key figures", story.run.figures)]
    sections += [*final_map(story), *half_map_agreement(story), *views(story), *local_resolution(story)]
    sections += [*averages(story), *first_models(story), *classes3d(story)]
    sections += [discarded(story), Table("Decisions", story.table_rows(), ["stage", "decision", "reason"]), stages(story)]
    title = "From particles to a map" if "nothing" not in story.facts else "From particles: no map"
    write_report(story.run.path("report.html"), title, sections, story.run.facts(), overwrite=True)


def note_figures(story: Story) -> None:
    """Resolution, symmetry and counts."""
    run, facts = story.run, story.facts
    run.figures.clear()
    if "nothing" in facts:
        run.figure("outcome", "no map")
    elif (claim := facts.get("claim")) is not None:
        run.figure("resolution", float(f"{claim.resolution:.3g}"), "Å")
    if "sym" in facts:
        run.figure("symmetry", facts["sym"])
    run.figure("particles_given", facts["particles"])
    run.figure("particles_used", facts["particles"] - sum(story.discarded.values()))


def outcome(story: Story) -> Section:
    """What it amounts to, the hand, and the command that flips it."""
    if "nothing" in story.facts:
        return Text("No map", html.escape(story.facts["nothing"]))
    refined, claim = story.stages["6_refine"], story.facts["claim"]
    maps = [refined / "run_class001.mrc", *sorted(refined.glob("run_half?_class001_unfil.mrc")),
            story.stages["7_postprocess"] / "map.mrc"]  # fmt: skip
    words = ["verglas", "flip", "--maps", *map(str, maps), "--particles", str(refined / "run_data.star"),
             "--out", str(story.run.out / "flipped")]  # fmt: skip
    hand = next(one for one in story.decisions if one.stage == "Hand")
    command = from_here(shlex.join(words))
    text = f"{html.escape(claim.text)}</p><p><b>Hand: {html.escape(hand.decision)}.</b> {html.escape(hand.reason)} "
    return Text("What came out", f"{text}This flips maps and poses:</p><pre>{html.escape(command)}</pre><p>")


def final_map(story: Story) -> list[Section]:
    """The sharpened map, in its mask if it has one, as sharpening brings out the noise around it; the picture lies beside the
    report, too."""
    if "7_postprocess" not in story.stages or "nothing" in story.facts:
        return []
    folder = story.stages["7_postprocess"]
    masked = folder / "map_masked.mrc"
    picture = map_picture(read_map(masked if masked.exists() else folder / "map.mrc").data_ZYX)
    write_png(story.run.path("map.png"), picture)
    return [Pictures("The map", {f"sharpened: {VIEWS}": picture})]


def half_map_agreement(story: Story) -> list[Section]:
    """FSC of the final half-maps."""
    if "7_postprocess" not in story.stages:
        return []
    import pandas as pd

    frame = pd.read_csv(story.stages["7_postprocess"] / "fsc.csv")
    drawn = {label: f"fsc_{name}" for label, name in CURVES.items() if f"fsc_{name}" in frame}
    names, labels = list(drawn.values()), list(drawn)
    x_S = frame["frequency_1_per_A"].to_numpy()
    return [Curve("Agreement of the half-maps", x_S, [frame[name].to_numpy() for name in names], labels, "resolution / Å", "FSC",
                  (0.143,), True, True, y_range=(-0.1, 1.05), unmarked=["phases randomised"])]  # fmt: skip


def views(story: Story) -> list[Section]:
    """Where the particles look."""
    if "6_refine" not in story.stages:
        return []
    rotation_B33 = table_of(story.stages["6_refine"] / "run_data.star").rotations().numpy()
    step = -(-len(rotation_B33) // 20_000)
    return [Orientations("Viewing directions", rotation_B33[::step], symmetry_matrices(story.facts["sym"]).numpy())]


def local_resolution(story: Story) -> list[Section]:
    """Local resolution inside the mask, and where it is what."""
    if "8_localres" not in story.stages:
        return []
    local_ZYX = read_map(story.stages["8_localres"] / "localres.mrc").data_ZYX
    mask_ZYX = read_map(story.stages["7_postprocess"] / "mask.mrc").data_ZYX
    known_ZYX = (mask_ZYX > 0.5) & (local_ZYX > 0)
    if not known_ZYX.any():
        return []
    best, worst = (float(value) for value in np.percentile(local_ZYX[known_ZYX], [2, 98]))
    fineness_ZYX = np.where(known_ZYX, np.clip((worst - local_ZYX) / max(worst - best, 0.01), 0, 1), -0.25)
    line = f"central slices xy, xz, yz: white {best:.3g} Å, dark grey {worst:.3g} Å, black outside of the mask"
    return [Histogram("Local resolution in the mask", local_ZYX[known_ZYX], "resolution / Å"),
            Pictures("Local resolution", {line: slices_picture(fineness_ZYX, (-0.25, 1.0))})]  # fmt: skip


def averages(story: Story) -> list[Section]:
    """Class averages that were kept and those that were not, best first."""
    ranked: Sequence[Average] = story.facts.get("averages", [])
    rows = {}
    for text, chosen in (("kept", True), ("left out", False)):
        group = [one for one in ranked if one.selected == chosen]
        if group:
            share = 100 * sum(one.share for one in group)
            line = f"{text}: {len(group)} classes, {share:.0f} % of the particles"
            rows[line] = montage(np.stack([one.image_YX for one in group]), COLUMNS)
    return [Pictures("2-D class averages", rows, "Best score first, row by row; each in its own grey scale.")] if rows else []


def first_models(story: Story) -> list[Section]:
    """The first model, and the same on its symmetry axes."""
    if "3_abinitio" not in story.stages:
        return []
    maps = {"from random starts": story.stages["3_abinitio"] / "initial_model.mrc"}
    if story.facts.get("sym", "C1") != "C1":
        maps[f"on the axes of {story.facts['sym']}, averaged"] = story.stages["4_symmetry"] / "symmetrised.mrc"
    return [Pictures("First model", {f"{text}: {VIEWS}": map_picture(read_map(path).data_ZYX) for text, path in maps.items()})]


def classes3d(story: Story) -> list[Section]:
    """The 3-D classes, largest first."""
    found: list[dict[str, Any]] = story.facts.get("classes3d", [])
    rows = {}
    for number, one in sorted(enumerate(found, 1), key=lambda pair: -pair[1]["share"]):
        text = f"class {number}, {'kept' if one['kept'] else 'left out'}: {100 * one['share']:.0f} %, {one['resolution']:.3g} Å"
        if one["share"] > 0:
            rows[text] = map_picture(read_map(one["map"]).data_ZYX)
    died = [str(number) for number, one in enumerate(found, 1) if not one["share"] > 0]
    caption = f"Each: {VIEWS}." + (f" No particles were left in class {', '.join(died)}." if died else "")
    return [Pictures("3-D classes", rows, caption)] if rows else []


def discarded(story: Story) -> Section:
    """How many particles were left out, and why."""
    rows = [[reason, count, f"{100 * count / story.facts['particles']:.1f} %"] for reason, count in story.discarded.items()]
    title = "What was left out"
    return Table(title, rows, ["why", "particles", "share"]) if rows else Text(title, "Nothing.")


def stages(story: Story) -> Section:
    """Folder, command, time; how to change a stage."""
    rows = []
    for name, out in story.stages.items():
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        seconds = json.loads((out / "result.json").read_text(encoding="utf-8"))["seconds"]
        rows.append([name, round(seconds), from_here(config["command_line"])])
    caption = (
        f"Paths start from {Path.cwd()}. To change a stage, run its command again with other options and --overwrite; then "
        "`verglas solve --continue DIR` makes everything after it anew. Each folder has a report of its own."
    )
    return Table("Stages", rows, ["folder", "seconds", "command"], caption)


def from_here(command_line: str) -> str:
    """A command with its paths as `shown_path` says them: from the working folder where they lie below it."""
    words = shlex.split(command_line)
    return shlex.join([shown_path(Path(word)) if word.startswith("/") else word for word in words])
