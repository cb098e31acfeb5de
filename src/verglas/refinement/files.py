"""Files of a refinement in RELION's layout: after each iteration run_itNNN_..., at the end run_... .

    run_it012_data.star                            particles with their poses, half-sets and figures of this iteration
    run_it012_half1_model.star, _half2_model.star  spectra, noise, scales and direction priors (run_it012_model.star if
                                                   all particles are together)
    run_it012_half1_class001.mrc, _half2_...       references
    run_it012_sampling.star, run_it012_optimiser.star

A classification has run_it012_model.star and run_it012_class001.mrc, run_it012_class002.mrc and so on, one per class; one of
two dimensions has run_it012_classes.mrcs instead, all averages in one stack.

Nothing in them depends on the clock: two runs of one seed write the same bytes, as long as folder and command line agree.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from verglas.core.transfers import to_host
from verglas.io.mrc import Map, StackWriter, write_map
from verglas.maximization.halves import Solution
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig
from verglas.refinement.files_data import groups_in_file_order, write_data
from verglas.refinement.files_model import ModelFile, write_model
from verglas.refinement.files_optimiser import OptimiserFile, write_optimiser, write_sampling
from verglas.refinement.state import State

MAPS_AT_ONCE = 2  # written, beside the tables


class FinalMaps(NamedTuple):
    """joined: regularised map of all particles; unfil_halves: half maps [N, N, N] without prior, mask or filter."""

    joined: Solution
    unfil_halves: list[Tensor]


def iteration_name(iteration: int) -> str:
    """How all files of an iteration begin: run_it007."""
    return f"run_it{iteration:03d}"


def write_iteration(
    folder: Path, state: State, table: ParticleTable, config: RefineConfig, directions_D2: Tensor, command_line: str
) -> list[Path]:
    """Write the files of the iteration `state.iteration` and return their paths; files of the same name are replaced.

    table: the particles as read, rows in the order of state.poses; directions_D2: (rot, tilt) of the coarse grid in
    degrees, before perturbation, in the order of direction_prior_D. Names of images, maps and files in the STAR files
    start from the working folder, as RELION wants it. Raises OutputError if a file cannot be written.
    """
    name = iteration_name(state.iteration)
    data, sampling = folder / f"{name}_data.star", folder / f"{name}_sampling.star"
    models, maps = [], list[Future[Path]]()
    with ThreadPoolExecutor(MAPS_AT_ONCE, "verglas-maps") as beside:  # tables and maps take equally long
        members = [[half] for half in state.halves] if state.split else [state.halves]
        parts = [f"{name}_half{number}" if state.split else name for number in range(1, len(members) + 1)]
        paths = [[folder / f"{part}_class{k:03d}.mrc" for k in range(1, len(one) + 1)] for part, one in zip(parts, members)]
        for path, model in zip(chain(*paths), state.halves, strict=True):
            maps.append(beside.submit(_write_map, path, model.map_ZYX, state.pixel_size))
        write_data(data, state, table)
        write_sampling(sampling, state, config, directions_D2)
        groups = groups_in_file_order(state, table)
        for number, (part, classes, own) in enumerate(zip(parts, members, paths), 1):
            models.append(folder / f"{part}_model.star")
            members_B = state.poses.half_B == number if state.split else torch.ones_like(state.poses.half_B, dtype=torch.bool)
            write_model(models[-1], ModelFile(state, classes, own, groups, members_B), config)
    written, optimiser = [one.result() for one in maps], folder / f"{name}_optimiser.star"
    write_optimiser(optimiser, OptimiserFile(folder / "run", models, data, sampling, command_line), state, config)
    return [data, *models, sampling, optimiser, *written]


def write_classes2d(
    folder: Path, state: State, table: ParticleTable, config: RefineConfig, directions_D2: Tensor, command_line: str
) -> list[Path]:
    """As `write_iteration` for a classification in two dimensions (model.map_ZYX: [N, N])."""
    name = iteration_name(state.iteration)
    data, sampling, stack = (folder / f"{name}_{part}" for part in ("data.star", "sampling.star", "classes.mrcs"))
    write_data(data, state, table)
    write_sampling(sampling, state, config, directions_D2)
    box = state.box
    with StackWriter(stack, len(state.halves), (box, box), state.pixel_size, overwrite=True) as averages:
        averages.append(np.stack([np.asarray(model.map_ZYX.detach().cpu(), np.float32) for model in state.halves]))
    model, everyone_B = folder / f"{name}_model.star", torch.ones(len(table), dtype=torch.bool)
    groups = groups_in_file_order(state, table)
    write_model(model, ModelFile(state, state.halves, [stack], groups, everyone_B, planes=True), config)
    optimiser = folder / f"{name}_optimiser.star"
    write_optimiser(optimiser, OptimiserFile(folder / "run", [model], data, sampling, command_line), state, config)
    return [data, model, sampling, optimiser, stack]


def write_final(
    folder: Path, state: State, table: ParticleTable, config: RefineConfig, final: FinalMaps, directions_D2: Tensor,
    command_line: str,
) -> list[Path]:  # fmt: skip
    """Write run_class001.mrc, the two run_halfN_class001_unfil.mrc, and run_{data,model,sampling,optimiser}.star.

    The arguments as in `write_iteration`. run_model.star holds the spectra of the joined map, and noise, scales and
    direction priors of the first half, as RELION's does.
    """
    data, sampling = folder / "run_data.star", folder / "run_sampling.star"
    write_data(data, state, table)
    write_sampling(sampling, state, config, directions_D2)
    joined = _write_map(folder / "run_class001.mrc", final.joined.map_ZYX, state.pixel_size)
    halves = [
        _write_map(folder / f"run_half{number}_class001_unfil.mrc", half_ZYX, state.pixel_size)
        for number, half_ZYX in enumerate(final.unfil_halves, 1)
    ]
    model, everyone_B = folder / "run_model.star", torch.ones(len(table), dtype=torch.bool)
    groups = groups_in_file_order(state, table)
    write_model(model, ModelFile(state, state.halves[:1], [joined], groups, everyone_B, final.joined), config)
    optimiser = folder / "run_optimiser.star"
    write_optimiser(optimiser, OptimiserFile(folder / "run", [model], data, sampling, command_line), state, config)
    return [data, model, sampling, optimiser, joined, *halves]


def remove_leftovers(folder: Path) -> list[Path]:
    """Delete the temporary files of a run that was killed while it wrote, and return their paths.

    Only for the owner of the folder, before it writes: the temporary file of a living process would go as well.
    """
    leftovers = sorted({*folder.glob(".*.part.*"), *folder.glob(".*.json.partial-*")})
    for path in leftovers:
        path.unlink(missing_ok=True)
    return leftovers


def _write_map(path: Path, map_ZYX: Tensor, pixel_size: float) -> Path:
    write_map(path, Map(np.asarray(to_host(map_ZYX), np.float32), pixel_size), overwrite=True)
    return path
