"""verglas reconstruct where memory does not hold the sums: the choice, and the way by slabs (`maximization/out_of_core.py`)."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verglas.cli.plan import host_memory
from verglas.cli.reconstruct import Task, batch_size, note_figures, report_bad
from verglas.cli.reconstruct_columns import InColumns, KeptImages, adder, in_columns
from verglas.cli.reconstruct_rounds import ByRounds, in_rounds
from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.distributed.ranks import Ranks
    from verglas.io.runfolder import RunFolder
    from verglas.maximization.device_memory import DeviceMemory
    from verglas.maximization.out_of_core import Needs
    from verglas.maximization.reconstruction import Reconstruction

GB = 1e9
SHARE_OF_FREE = 0.7  # of the free memory; the system keeps files that are read again in the rest


@dataclass(frozen=True)
class BySlabs:
    """ends: slab i has the planes ends[i] <= |z| < ends[i + 1] of the padded half volume; memory: bytes that arrays may take."""

    ends: list[int]
    memory: float
    written = True  # maps, by the time that they are solved

    def solved(self, task: Task, run: RunFolder) -> Reconstruction:
        """The maps, which are in the run folder by then."""
        from verglas.core.symmetry_names import normalise_name
        from verglas.maximization.out_of_core import OutOfCore, SumsBySlabs, solve_out_of_core

        geometry, folder = task.geometry, run.path("map.mrc").parent
        how = OutOfCore(geometry, normalise_name(task.options.sym), self.ends, folder, self.memory, run.progress)
        loaders = task.loaders(batch_size(geometry.box, task.device))
        names = [("map.mrc", "map.mrc")] if len(loaders) == 1 else [(f"half{i}.mrc", f"half{i}.mrc") for i in (1, 2)]
        images = [KeptImages(loader, task.device, keep=False) for loader in loaders]
        sets = [SumsBySlabs(how, adder(task, one, run), name) for one, name in zip(images, names, strict=True)]
        result = solve_out_of_core(sets, task.mask_ZYX, task.mask_radius)
        report_bad([image for loader in loaders for image in loader.bad], run)
        note_figures(task, sum(one.slices for one in sets), run)
        return result


def way_of(task: Task, ranks: Ranks, run: RunFolder | None) -> BySlabs | InColumns | ByRounds | None:
    """None: all in memory. Says which way and why; InputError if --memory is too little for either, or has no effect."""
    import numpy as np

    from verglas.core.memory import usable_device_memory
    from verglas.core.symmetry_names import normalise_name

    options = task.options
    reason = _only_in_memory(task, ranks)
    if reason is not None or run is None:
        if options.memory is not None and reason is not None:
            raise InputError("--memory", f"given {reason}", "one process; on a CPU, plain gridding")
        if run is not None and task.device.type == "cuda" and options.solver == "gridding":
            run.log(expected_on(task).verdict(usable_device_memory(task.device)))
        return None
    if task.device.type == "cuda":
        return way_on_gpu(task, run)
    from verglas.maximization.out_of_core import Needs, slab_ends  # compiles with Numba, which a GPU does without

    given = SHARE_OF_FREE * host_memory() if options.memory is None else options.memory * GB
    of_what = f"{given / GB:.3g} GB for arrays ({'--memory' if options.memory else f'{SHARE_OF_FREE:g} of what is free'})"
    sheets, sets = 1 if options.ewald == "off" else 2, len(np.unique(task.half_B))
    batch = batch_size(task.geometry.box, task.device)
    needs = Needs.of(task.geometry, sets, sheets * len(task.table), normalise_name(options.sym), batch)
    if needs.in_memory <= given:
        run.log(f"in memory: sums and maps take at most {needs.in_memory / GB:.3g} of {of_what}")
        return None
    ends = slab_ends(task.geometry, (given - needs.fixed) / needs.each_voxel)
    if ends is None:
        raise InputError("memory", of_what, f"{_least(task, needs) / GB:.3g} GB, for the smallest slab of this box",
                         "Give more with --memory, or choose a smaller --padding.")  # fmt: skip
    _check_disk(needs, run)
    number = f"{len(ends) - 1} slab{'s' if len(ends) > 2 else ''}"
    run.log(f"in {number}: in memory sums and maps would take {needs.in_memory / GB:.3g} of {of_what}; "
            f"{needs.on_disk / GB:.3g} GB of disk")  # fmt: skip
    return BySlabs(ends, given)


def way_on_gpu(task: Task, run: RunFolder) -> InColumns | ByRounds | None:
    """As `way_of`, of one process on a GPU.

    One set of images without symmetry goes one map at a time unless --memory holds all at once: data are added once and images
    are read once either way. Two half-sets, whose maps would all be made anew, and point groups, at all poses of which slices
    would be added, only where memory does not hold them.
    """
    import numpy as np

    from verglas.core.memory import usable_device_memory
    from verglas.core.symmetry import symmetry_matrices
    from verglas.maximization.round_choice import roomy

    asked, expected = task.options.memory, expected_on(task).peak
    free = usable_device_memory(task.device)
    given = free if asked is None else min(asked * GB, free)
    of_what = f"{given / GB:.3g} GB ({'that are free on the GPU' if asked is None or asked * GB > free else '--memory'})"
    small = asked is None and len(np.unique(task.half_B)) < 2 and len(symmetry_matrices(task.options.sym)) == 1
    if small or expected > given:
        way = in_rounds(task, run, min(given, roomy(task.geometry)) if small else given, of_what, expected)
        if way is not None:
            return way
    if expected <= given:
        run.log(f"in memory: sums and maps take at most {expected / GB:.3g} of {of_what}")
        run.figure("memory_expected", round(expected / GB, 3), "GB")
        return None
    return in_columns(task, run, given, of_what, expected)


def expected_on(task: Task) -> DeviceMemory:
    """What sums and maps will take of the GPU."""
    import numpy as np

    from verglas.core.symmetry import symmetry_matrices
    from verglas.maximization.device_memory import DeviceMemory

    geometry, options = task.geometry, task.options
    return DeviceMemory.of(
        geometry.box, geometry.radius, geometry.padding, len(np.unique(task.half_B)), options.gridding == "exact",
        len(symmetry_matrices(options.sym)) > 1,
    )  # fmt: skip


def _only_in_memory(task: Task, ranks: Ranks) -> str | None:
    """Why there is no choice, if there is none."""
    if ranks.size > 1:
        return f"for {ranks.size} processes"
    if task.options.solver == "cg":
        return "together with --solver cg"
    if task.device.type == "cuda":
        return None
    return "together with --gridding exact" if task.options.gridding == "exact" else None


def _least(task: Task, needs: Needs) -> float:
    """Bytes for slabs of one pair of planes."""
    from verglas.maximization.out_of_core import largest_pair

    return needs.fixed + needs.each_voxel * largest_pair(task.geometry)


def _check_disk(needs: Needs, run: RunFolder) -> None:
    """InputError before the work if the disk is too full."""
    folder = run.path("map.mrc").parent
    free = shutil.disk_usage(folder).free
    if free < needs.on_disk:
        raise InputError(run.out, f"{free / GB:.3g} GB are free there", f"{needs.on_disk / GB:.3g} GB for maps and transforms",
                         "Make room, or choose another --out.")  # fmt: skip
