"""verglas reconstruct: a map from particles whose poses are known. Option declarations; torch is imported in `run`."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import arg

from verglas.cli.common import Flag, SharedComputing, check_seed, ranks_here, set_threads, wake_gpu
from verglas.core.imports import importing
from verglas.core.symmetry_names import normalise_name
from verglas.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    import torch

    from verglas.distributed.ranks import Ranks
    from verglas.io.runfolder import RunFolder
    from verglas.maximization.least_squares import NormalSums
    from verglas.maximization.reconstruct import Geometry, GroupSlices, Sums
    from verglas.maximization.reconstruction import Reconstruction
    from verglas.particles.loader import BadImage, ImageLoader
    from verglas.particles.table import ParticleTable
    from verglas.report.page import Draw


@dataclass(kw_only=True)
class Reconstruct:
    """Reconstruct a map from particles with known poses.

    Writes map.mrc (weighted least squares, the algorithm of relion_reconstruct --skip_gridding) and, with half maps,
    half1.mrc, half2.mrc, fsc.csv (FSC, SSNR, coverage) and map_wiener.mrc (with the prior that the half maps imply: the
    best single estimate). report.html shows them. Half maps are made if the particles come in half sets
    (rlnRandomSubset): halves split only now share their poses, so ask for those with --half-maps.

    Example: verglas reconstruct --particles run_data.star --sym D2 --out reconstruct
    """

    particles: Annotated[Path, arg(metavar="FILE")]
    """Particles with poses: .star or .cs."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    sym: Annotated[str, arg(metavar="GROUP")] = "C1"
    """Point group: Cn, Dn, T, O, I (= I2), I1, I2, I3, I4."""
    ctf: bool = True
    """Correct for the contrast transfer function (needs defoci)."""
    half_maps: Flag = False
    """Make half maps even if the file holds no half sets: split at random."""
    no_half_maps: Flag = False
    """Make no half maps even if the file holds half sets."""
    max_resolution: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: Nyquist)")] = None
    """Leave out frequencies beyond this resolution."""
    subset: Annotated[int | None, arg(metavar="1|2", help_behavior_hint="(default: both)")] = None
    """Use only this half set (rlnRandomSubset), as relion_reconstruct --subset does."""
    mask: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: a soft sphere)")] = None
    """Map with values 0..1: where the masked FSC is taken."""
    mask_diameter: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: the box less its edge)")] = None
    """Diameter of the soft sphere of the masked FSC (edge of 3 px outside)."""
    padding: Annotated[float, arg(metavar="X")] = 2.0
    """Oversampling of Fourier space."""
    gridding: Literal["plain", "exact"] = "plain"
    """plain: data over weight; exact: weights are iterated to even sampling (relion_reconstruct without --skip_gridding)."""
    solver: Literal["gridding", "cg"] = "gridding"
    """gridding: sums on a padded grid; cg: least squares by conjugate gradients, without interpolation: slower, more accurate."""
    ewald: Literal["off", "on", "reversed"] = "off"
    """Correct for the curvature of the Ewald sphere (needs CTFs). Which of the two is right depends on the map's hand."""
    folder: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: the STAR file's)")] = None
    """What image names are relative to, if not the STAR file's folder (or the current one)."""
    skip_bad: Flag = False
    """Leave out images with NaN or without contrast instead of stopping."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    memory: Annotated[float | None, arg(metavar="GB", help_behavior_hint="(default: 0.7 of what is free, on a GPU all)")] = None
    """What arrays may take; the program itself takes 0.6 GB beside. Sums that need more are made in slabs, on a CPU with the run
    folder's disk for help; on a GPU one map at a time, as is a single map in C1 if nothing is given."""
    seed: int = 0
    """For splitting into half sets where the file has none."""
    computing: SharedComputing = field(default_factory=SharedComputing)

    def run(self) -> None:
        """Check the options and the particles, reconstruct into a run folder, write the report."""
        self.check()
        from verglas.cli.reconstruct_report import painter

        with painter(self.computing.device) as draw, ExitStack() as stack:
            wake_gpu(self.computing.device)
            with importing():
                set_threads(self.computing.threads)
                ranks, device, reason = stack.enter_context(ranks_here(self.computing.device))
                from verglas.maximization import ahead

                if device.type == "cuda":
                    ahead.of_device(device)
                import verglas.maximization.reconstruct  # noqa: F401  and with it pandas
            self._reconstruct(ranks, device, reason, draw)

    def _reconstruct(self, ranks: Ranks, device: torch.device, reason: str, draw: Draw | None) -> None:
        """`run` on this device. draw: of `painter`."""
        from verglas.cli.reconstruct_columns import InColumns
        from verglas.cli.reconstruct_report import Ahead
        from verglas.cli.reconstruct_rounds import ByRounds
        from verglas.cli.reconstruct_slabs import way_of
        from verglas.distributed.ranks import lead_first
        from verglas.io.runfolder import RunFolder
        from verglas.maximization import ahead

        with lead_first(ranks):
            run = RunFolder.create(self.out, "reconstruct", self, self.overwrite) if ranks.is_lead else None
            task = Task.of(self, ranks, device)
        on_gpu = device.type == "cuda" and self.solver == "gridding"
        if on_gpu:
            ahead.of_adding(task.geometry, device, task.fewest_slices())
        with run or nullcontext():
            if run is not None:
                announce(task, run, reason)
            way = way_of(task, ranks, run)
            if way is None:
                task.loader.begin()
            if on_gpu and run is not None:
                granted = way.choice.transforms if isinstance(way, InColumns | ByRounds) else None
                ahead.of_solving(task.geometry, device, self.gridding == "exact", granted, isinstance(way, ByRounds))
            with nullcontext() if run is None else Ahead(task.table, self, draw) as report:
                result = way.solved(task, run) if way and run else solved(task, added_up(task, ranks, run), run)
                if run is not None and report is not None and result is not None:
                    if device.type == "cuda":
                        note_peak(device, run)
                    report.finish(result, run, written=way is not None and way.written)

    def check(self) -> None:
        """Raise InputError for options that make no sense, before anything heavy is loaded."""
        check_seed(self.seed)
        normalise_name(self.sym)
        if self.subset not in (None, 1, 2):
            raise InputError("--subset", str(self.subset), "1 or 2, the half set to use")
        if not 1 <= self.padding <= 4:
            raise InputError("--padding", str(self.padding), "1 to 4")
        for name, value in (("--max-resolution", self.max_resolution), ("--mask-diameter", self.mask_diameter)):
            if value is not None and not value > 0:
                raise InputError(name, str(value), "a length above 0 Å")
        if self.memory is not None and not self.memory > 0:
            raise InputError("--memory", str(self.memory), "a number of GB above 0")
        if self.half_maps and self.no_half_maps:
            raise InputError("--half-maps", "given together with --no-half-maps", "one of the two")
        if self.ewald != "off" and not self.ctf:
            raise InputError("--ewald", "given together with --no-ctf", "one of the two: sidebands differ by the CTF's phase")
        if self.solver == "cg" and self.gridding == "exact":
            raise InputError("--gridding", "exact given together with --solver cg", "one of the two: cg does no gridding")
        if self.mask is not None and self.mask_diameter is not None:
            raise InputError("--mask-diameter", "given together with --mask", "one of the two")

    def chosen(self, table: ParticleTable) -> ParticleTable:
        """The particles to use; InputError if columns are missing or none is left."""
        table.require("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")
        if self.subset is not None:
            table.require("rlnRandomSubset")
            if not has_half_sets(table):
                raise InputError(self.particles, "rlnRandomSubset is 0 throughout", "half sets 1 and 2",
                                 "Leave out --subset, or use the file of a refinement.")  # fmt: skip
            table = table.select(table.half_sets(self.seed) == self.subset)
        if len(table) == 0:
            raise InputError(self.particles, "no particles are left to reconstruct from", "at least one")
        return table


@dataclass(frozen=True)
class Task:
    """What is to be done, checked: all particles and their half-sets, the images that this rank adds up, the mask of the user."""

    options: Reconstruct
    table: ParticleTable
    half_B: np.ndarray
    geometry: Geometry
    loader: ImageLoader
    device: torch.device
    mask_ZYX: torch.Tensor | None

    @classmethod
    def of(cls, options: Reconstruct, ranks: Ranks, device: torch.device) -> Task:
        """From the options; InputError for what cannot be reconstructed."""
        from verglas.maximization.reconstruct import model_geometry
        from verglas.particles.loader import ImageLoader
        from verglas.particles.table import ParticleTable

        table = options.chosen(ParticleTable.read(options.particles, options.folder))
        geometry = model_geometry(table, options.max_resolution, options.padding)
        mask, half_B = read_mask(options, geometry), halves(table, options)
        size = batch_size(geometry.box, device)
        loader = ImageLoader(table, share(table, half_B, ranks), size, device, skip_bad=options.skip_bad)
        return cls(options, table, half_B, geometry, loader, device, mask)

    def loaders(self, batch: int) -> list[ImageLoader]:
        """Of all images of each half-set, so many at a time."""
        import numpy as np

        from verglas.particles.loader import ImageLoader

        skip = self.options.skip_bad
        sets = [np.flatnonzero(self.half_B == half) for half in np.unique(self.half_B)]
        return [ImageLoader(self.table, rows, batch, self.device, skip_bad=skip) for rows in sets]

    def fewest_slices(self) -> int:
        """In a call that adds some: about what the last batch holds of a half-set and an optics group; 0 for curved ones, which
        are added as few are."""
        import numpy as np

        if self.options.ewald != "off":
            return 0
        last = len(self.loader.indices) % self.loader.batch_size or self.loader.batch_size
        return last // (len(np.unique(self.half_B)) * len(self.table.groups))

    @property
    def mask_radius(self) -> float | None:
        """Of the soft sphere that the user asks for, px."""
        diameter = self.options.mask_diameter
        return diameter / 2 / self.geometry.pixel_size if diameter else None

    def new_sums(self) -> Callable[[], NormalSums] | None:
        """Makes the normal equations that `--solver cg` adds to; None for sums on a padded grid."""
        if self.options.solver == "gridding":
            return None
        from verglas.maximization.least_squares import NormalSums

        geometry, symmetry = self.geometry, normalise_name(self.options.sym)
        return partial(NormalSums, geometry.box, geometry.radius, symmetry, self.device)

    def slicer(self) -> Callable[..., GroupSlices]:
        """Makes what turns the images of a group into slices: planes, or with --ewald both sheets of the sphere."""
        from verglas.maximization.ewald import EwaldSlices
        from verglas.maximization.reconstruct import GroupSlices

        if self.options.ewald == "off":
            return GroupSlices
        diameter = self.options.mask_diameter or self.geometry.box * self.geometry.pixel_size
        return partial(EwaldSlices, diameter=diameter, reverse=self.options.ewald == "reversed")


def share(table: ParticleTable, half_B: np.ndarray, ranks: Ranks) -> np.ndarray:
    """The rows whose images this rank adds up: an equal part of every half-set, one piece of the order of the files."""
    import torch

    from verglas.distributed.shares import owners

    import numpy as np  # isort: skip

    rows = np.arange(len(table))
    if ranks.size == 1:
        return rows
    order_B = torch.from_numpy(table.image_locations().in_file_order(rows))
    return np.flatnonzero((owners(order_B, torch.from_numpy(half_B), ranks.size) == ranks.rank).numpy())


def added_up(task: Task, ranks: Ranks, run: RunFolder | None) -> Sequence[Sums]:
    """Weighted sums of all slices, of all ranks, one for each half-set; run None: this rank says nothing."""
    from verglas.distributed.ranks import each_its_part
    from verglas.maximization.reconstruct import accumulate

    count = len(task.table)
    with run.progress("Backprojecting", count, "particles") if run else nullcontext() as bar:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            ranks.doing("backprojecting", done)
            if bar is not None:
                bar.advance(min(n * ranks.size, count - bar.done))  # shares are equal: the others are as far as this rank

        with each_its_part(ranks):
            ctf, device = task.options.ctf, task.device
            how = task.new_sums(), task.slicer()
            sums = accumulate(task.table, task.half_B, task.loader, task.geometry, ctf, device, advance, *how)
        for one in sums:
            one.add_up(ranks)
        advance(count)
    bad = [image for images in ranks.everyones(task.loader.bad) for image in images]
    if run is not None:
        run.log(sums[0].precision)
        report_bad(bad, run)
    return sums


def announce(task: Task, run: RunFolder, reason: str) -> None:
    """Say what computes, and what of the options has no effect."""
    from verglas.kernels.backproject import choose_backproject
    from verglas.kernels.weigh import choose_weigh

    import numpy as np  # isort: skip
    import torch  # isort: skip

    for notice in task.table.notices:
        run.log(notice)
    options = task.options
    choice = choose_backproject(task.device, torch.float32)
    weighing = choose_weigh(task.device, torch.float32)
    kernels = f"backproject: {choice.name} ({choice.reason}); weigh: {weighing.name} ({weighing.reason})"
    run.provenance(task.device, kernels, "images, CTF and sums in float32", reason)
    nyquist = 2 * task.geometry.pixel_size
    if options.max_resolution is not None and options.max_resolution < nyquist:
        run.log(f"--max-resolution {options.max_resolution:g} Å is finer than the pixel size allows: {nyquist:g} Å is used")
    if len(np.unique(task.half_B)) < 2 and (options.mask is not None or options.mask_diameter is not None):
        run.log("the mask is not used: without half maps there is no FSC to take in it")


def solved(task: Task, sums: Sequence[Sums], run: RunFolder | None) -> Reconstruction | None:
    """The maps that the sums make, on the rank that has the run."""
    if run is None:
        return None
    from verglas.maximization.reconstruction import solve

    slices, mask = sum(one.slices for one in sums), task.mask_ZYX
    with run.progress("Solving for the maps", 1, "steps") as bar:
        symmetry = normalise_name(task.options.sym)
        mask = None if mask is None else mask.to(task.device)
        result = solve(sums, symmetry, task.geometry.pixel_size, mask, task.mask_radius, task.options.gridding == "exact")
        bar.advance(1)
    note_figures(task, slices, run)
    return result


def note_figures(task: Task, slices: int, run: RunFolder) -> None:
    """What was reconstructed from, as key figures; slices: all that were added, of each image one, or one of each sheet."""
    run.figure("particles", slices // (1 if task.options.ewald == "off" else 2), "particles")
    run.figure("box", task.geometry.box, "px")
    run.figure("pixel_size", task.geometry.pixel_size, "Å")


def note_peak(device: torch.device, run: RunFolder) -> None:
    """What arrays took of the GPU at most."""
    import torch

    run.figure("memory_peak", round(torch.cuda.max_memory_allocated(device) / 1e9, 3), "GB")


def halves(table: ParticleTable, options: Reconstruct) -> np.ndarray:
    """1 or 2 for each particle; 1 throughout if the halves are not kept apart."""
    import numpy as np

    present = has_half_sets(table)
    if options.no_half_maps or options.subset is not None or not (present or options.half_maps):
        return np.ones(len(table), np.int64)
    half_B = table.half_sets(options.seed)
    if len(np.unique(half_B)) < 2:
        raise InputError(options.particles, f"all particles are in half set {half_B[0]}", "particles in both half sets",
                         "Remove the column rlnRandomSubset for a random split, or pass --no-half-maps.")
    return half_B


def has_half_sets(table: ParticleTable) -> bool:
    """Whether the file assigns half sets: a column of zeros means that it does not yet."""
    return "rlnRandomSubset" in table.frame and bool((table.frame["rlnRandomSubset"] != 0).any())


def read_mask(options: Reconstruct, geometry: Geometry) -> torch.Tensor | None:
    """The user's mask as a tensor [N, N, N], None for a sphere; InputError if it does not fit the particles."""
    width = geometry.box * geometry.pixel_size
    if options.mask_diameter is not None and options.mask_diameter > width:
        raise InputError("--mask-diameter", f"{options.mask_diameter:g} Å", f"at most {width:g} Å, the width of the box")
    if options.mask is None:
        return None
    import numpy as np
    import torch

    from verglas.io.mrc import Map, read_map
    from verglas.postprocess import inputs

    voxel = read_map(options.mask).pixel_size
    if abs(voxel - geometry.pixel_size) > 1e-2 * geometry.pixel_size:
        raise InputError(options.mask, f"voxel size {voxel:g} Å", f"{geometry.pixel_size:g} Å, the particles' pixel size",
                         "Resample it with `verglas map --new-pixel`.")  # fmt: skip
    like = Map(np.empty((geometry.box,) * 3, np.float32), geometry.pixel_size)
    return torch.from_numpy(np.array(inputs.read_mask(options.mask, like)))


def batch_size(box: int, device: torch.device) -> int:
    """Images at once: about a million pixels on the CPU (they stay near the cache), 64 million on a GPU."""
    pixels = 2**26 if device.type == "cuda" else 2**20
    return max(8, min(4096, pixels // box**2))


def report_bad(bad: list[BadImage], run: RunFolder) -> None:
    """Say which images were left out, and record how many."""
    if bad:
        names = ", ".join(f"{image.name} ({image.reason})" for image in bad[:5])
        run.log(f"left out {len(bad)} unusable images: {names}{', ...' if len(bad) > 5 else ''}")
        run.figure("images_left_out", len(bad), "images")
        run.figure("names_of_images_left_out", ", ".join(image.name for image in bad[:1000]))
