"""A whole simulated data set: stacks, STAR files for the data and for the truth, truth maps and a start map."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from verglas.errors import InputError
from verglas.io.mrc import Map, write_map
from verglas.io.runfolder import RunFolder
from verglas.io.star import write_star
from verglas.io.star_block import StarBlock
from verglas.optics.group import OpticsGroup
from verglas.simulation.imaging import HalfPlane
from verglas.simulation.maker import ImageMaker, Scene
from verglas.simulation.maps import check_fits, low_pass_bfactor, map_of_atoms, truth_map
from verglas.simulation.model import AtomModel, MapModel, Model, read_models
from verglas.simulation.options import ImageOptions, MicroscopeOptions, SampleOptions
from verglas.simulation.signal import AtomSource, MapTransforms, SignalSource, SliceSource
from verglas.simulation.truth import Truth, draw_truth
from verglas.simulation.writer import Delivery, check_disk, write_stack

ATOM_BFACTOR = 60.0  # Å^2, for atoms if none is given; a map has its own blur and gets none
ATOMS_PER_SECOND = {"cpu": 8e6, "cuda": 5e8}  # order of magnitude per core or GPU, for the choice of the method only
PATIENCE = 60.0  # s that exact images of atoms may take before slices are chosen


class Options(Protocol):
    """What `simulate` needs to know; the command's option dataclass has it."""

    model: tuple[str, ...]
    sample: SampleOptions
    microscope: MicroscopeOptions
    image: ImageOptions
    seed: int
    batch: int | None


@dataclass(frozen=True)
class Simulated:
    """What was made, for the report: truth, truth maps [Z, Y, X] (scaled to the images), pixel size in Å, some images."""

    truth: Truth
    maps: list[np.ndarray]
    pixel_size: float
    examples_BYX: np.ndarray


def simulate(options: Options, run: RunFolder, device: torch.device, reason: str) -> Simulated:
    """Simulate into the run folder. Raises InputError for what cannot be simulated, OutputError if the disk is too small."""
    names = options.model or ("demo",)
    models = read_models(names, options.sample.recentre, options.sample.sym, options.seed)
    truth = draw_truth(options.sample, options.microscope, len(models), options.seed)
    for text in [f"{model.name}: {note}" for model in models for note in model.notes] + check_fits(models, truth.groups):
        run.log(text)
    run.input(*(Path(name) for name in names if Path(name).is_file()))
    check_disk(run.out.parent, bytes_needed(truth, len(models), options.image.float16))
    method, why = choose_method(models, len(truth), options.image.method, device)
    bfactor = bfactor_of(models, options.image.bfactor)
    if method == "slices" and isinstance(models[0], AtomModel):
        models = [map_of_atoms(model, truth.groups, bfactor) for model in models if isinstance(model, AtomModel)]
        bfactor = 0.0  # the maps have it now
    makers = build_makers(options, models, truth, bfactor, device)
    run.provenance(device, kernels=makers[0].source.kernel, precision="float32", reason=f"{reason}; {why}")
    started = time.monotonic()
    examples_BYX = write_stacks(makers, options, run, device)
    seconds = time.monotonic() - started
    write_tables(truth, run)
    maps = write_maps(models, makers[0], bfactor, options.image.start_resolution, run)
    record_figures(run, truth, makers, seconds)
    return Simulated(truth, maps, truth.groups[0].pixel_size, examples_BYX)


def choose_method(models: list[Model], n: int, asked: str, device: torch.device) -> tuple[str, str]:
    """(method, why): atoms where exact images take less than a minute or are asked for, else slices."""
    if not all(isinstance(model, AtomModel) for model in models):
        if asked == "atoms":
            raise InputError("--method atoms", "the model is a map", "atoms", "Use --method slices, or give a structure.")
        return "slices", "slices, as the model is a map"
    if asked != "auto":
        return asked, f"{asked}, as asked"
    n_atoms = max(len(model.xyz_N3) for model in models if isinstance(model, AtomModel))
    cores = torch.get_num_threads() if device.type == "cpu" else 1
    seconds = n * n_atoms / (ATOMS_PER_SECOND[device.type] * cores)
    text = f"exact images of {n_atoms:,} atoms would take about {seconds:.0f} s"
    return ("atoms", f"atoms: {text}") if seconds <= PATIENCE else ("slices", f"slices of a map made of the atoms: {text}")


def bfactor_of(models: list[Model], asked: float | None) -> float:
    """Å^2; asked, or 60 for atoms and 0 for maps."""
    if asked is not None:
        return asked
    return ATOM_BFACTOR if isinstance(models[0], AtomModel) else 0.0


def build_makers(options: Options, models: list[Model], truth: Truth, bfactor: float, device: torch.device) -> list[ImageMaker]:
    """One ImageMaker per optics group that has particles, in the order of the groups; maps are sliced, atoms summed."""
    used = [group for group in truth.groups if bool((truth.group_B == group.number - 1).any())]
    sources = _sources(models, used, bfactor, options.image.padding, device)
    first_plane, first_source = sources[0]
    front = first_source(torch.eye(3, dtype=torch.float64, device=device)[None], torch.zeros(1, dtype=torch.long, device=device))
    mass = float(front[0, 0, 0].real) * first_plane.group.box**2
    extent = 0.6 * first_plane.group.box * first_plane.group.pixel_size
    scene = Scene.of(truth, mass, extent, options.seed)
    return [ImageMaker.build(scene, source, plane, options.image, options.seed) for plane, source in sources]


def _sources(
    models: list[Model], groups: list[OpticsGroup], bfactor: float, padding: float, device: torch.device
) -> list[tuple[HalfPlane, SignalSource]]:
    planes = [HalfPlane.of(group, device) for group in groups]
    atoms = [model for model in models if isinstance(model, AtomModel)]
    if atoms:
        return [(plane, AtomSource(atoms, plane, bfactor, torch.get_num_threads())) for plane in planes]
    maps = [model for model in models if isinstance(model, MapModel)]
    transforms = MapTransforms.of(maps, min(group.pixel_size for group in groups), device, padding)
    return [(plane, SliceSource(transforms, plane, bfactor)) for plane in planes]


def bytes_needed(truth: Truth, n_models: int, float16: bool) -> int:
    """Size of everything the run will write."""
    images = sum(int((truth.group_B == g).sum()) * group.box**2 for g, group in enumerate(truth.groups))
    maps = (n_models + 1) * truth.groups[0].box ** 3
    return images * (2 if float16 else 4) + maps * 4 + 600 * len(truth) + 2**24


def write_stacks(makers: list[ImageMaker], options: Options, run: RunFolder, device: torch.device) -> np.ndarray:
    """Write the stack of every group; returns the first images of the first group [<= 16, Y, X]."""
    truth = makers[0].scene.truth
    delivery = Delivery(device, options.image.float16, options.batch)
    with run.progress("Simulating", total=len(truth), unit="images") as bar:
        for maker in makers:
            group = maker.transfer.plane.group
            index_B = torch.from_numpy(np.flatnonzero(truth.group_B == group.number - 1))
            write_stack(run.path(truth.stack_name(group.number - 1)), group, index_B, maker, delivery, bar.advance)
    mine = torch.from_numpy(np.flatnonzero(truth.group_B == makers[0].transfer.plane.group.number - 1))
    return makers[0](mine[:16]).cpu().numpy()


def write_tables(truth: Truth, run: RunFolder) -> None:
    """particles.star without poses, truth.star with poses, origins and classes (0 = junk)."""
    optics = StarBlock.table("optics", truth.optics_frame())
    for name, with_truth in (("particles.star", False), ("truth.star", True)):
        table = StarBlock.table("particles", truth.data_frame(with_truth))
        write_star(run.path(name), {"optics": optics, "particles": table})


def write_maps(
    models: list[Model], maker: ImageMaker, bfactor: float, start_resolution: float, run: RunFolder
) -> list[np.ndarray]:
    """The truth of every conformation, in the grey values of the first group's images, and start.mrc of the first."""
    group = maker.transfer.plane.group
    maps: list[Tensor] = [truth_map(model, group.box, group.pixel_size, bfactor).mul_(maker.scale) for model in models]
    for number, map_ZYX in enumerate(maps, 1):
        name = "truth.mrc" if len(maps) == 1 else f"truth_class{number:03d}.mrc"
        write_map(run.path(name), Map(map_ZYX.numpy(), group.pixel_size, labels=(f"truth of {models[number - 1].name}"[:80],)))
    start = truth_map(models[0], group.box, group.pixel_size, bfactor + low_pass_bfactor(start_resolution)).mul_(maker.scale)
    label = f"truth, low-passed at {start_resolution:g} A"
    write_map(run.path("start.mrc"), Map(start.numpy(), group.pixel_size, labels=(label,)))
    return [map_ZYX.numpy() for map_ZYX in maps]


def record_figures(run: RunFolder, truth: Truth, makers: list[ImageMaker], seconds: float) -> None:
    """Key figures of result.json."""
    run.figure("images", len(truth))
    run.figure("junk", int((truth.class_B == 0).sum()), "images")
    for number in range(1, int(truth.class_B.max(initial=1)) + 1):
        run.figure(f"class {number}", int((truth.class_B == number).sum()), "images")
    run.figure("rate", round(len(truth) / max(seconds, 1e-9), 1), "images/s")
    for maker in makers:
        run.figure(f"grey scale, {maker.transfer.plane.group.name}", maker.scale)
