"""verglas reconstruct on a GPU, one map at a time in little more memory than its packed voxels (`maximization/in_rounds.py`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verglas.cli.reconstruct import Task
from verglas.cli.reconstruct_columns import GB, KeptImages, adder, slices_of, solved_anew, stored_images

if TYPE_CHECKING:
    from verglas.io.runfolder import RunFolder
    from verglas.maximization.apart import ApartSums
    from verglas.maximization.reconstruction import Reconstruction
    from verglas.maximization.round_choice import RoundChoice


@dataclass(frozen=True)
class ByRounds:
    """As `reconstruct_slabs.BySlabs`, on a GPU (or, for tests, a CPU)."""

    choice: RoundChoice
    written = False  # maps, by the time that they are solved

    def solved(self, task: Task, run: RunFolder) -> Reconstruction:
        """The maps."""
        from verglas.core.memory import grow_device_memory
        from verglas.core.symmetry_names import normalise_name
        from verglas.maximization.in_rounds import InRounds, SumsInRounds

        options, geometry, choice = task.options, task.geometry, self.choice
        if task.device.type == "cuda":
            from verglas.kernels.backproject.bricks import prepare

            grow_device_memory()
            prepare(geometry.rows(task.device))
        loaders = task.loaders(choice.batch)
        loaders[0].begin()  # weights come first
        how = InRounds(geometry, normalise_name(options.sym), task.device, options.gridding == "exact", choice.waiting,
                       choice.waiting_weights, choice.transforms, choice.remade, choice.numbers, len(loaders) > 1)  # fmt: skip
        return solved_anew(task, run, loaders, choice.kept > 0,
                           lambda images, name: SumsInRounds(how, blank_or_not(task, images, run), name))  # fmt: skip


def blank_or_not(task: Task, images: KeptImages, run: RunFolder) -> Callable[[ApartSums, str, bool], None]:
    """Adds the slices of all images to sums, as a stage of the run. For weights alone images are not read, unless some of
    them may be left out."""
    add = adder(task, images, run)

    def add_to(sums: ApartSums, stage: str, weights_alone: bool) -> None:
        add(sums, stage, blank=weights_alone and not task.options.skip_bad)

    return add_to


def rounds_of(task: Task, given: float) -> RoundChoice | None:
    """What fits into `given` bytes of the device."""
    import numpy as np

    from verglas.maximization.round_choice import RoundChoice

    images = stored_images(task) if len(np.unique(task.half_B)) > 1 else 0.0  # of one set they are read once
    return RoundChoice.of(task.geometry, task.options.gridding == "exact", images, slices_of(task, poses=1), given)


def in_rounds(task: Task, run: RunFolder, given: float, of_what: str, whole: float) -> ByRounds | None:
    """The choice, said and noted, if there is one. whole: bytes that sums and maps would take all at once."""
    from verglas.core.symmetry import symmetry_matrices
    from verglas.maximization.round_choice import served

    slices = slices_of(task, len(symmetry_matrices(task.options.sym)))
    choice = rounds_of(task, given) if served(task.geometry, task.device, slices) else None
    if choice is None:
        return None
    order = "weights first, then data" if task.options.gridding == "exact" else "data and weights apart"
    run.log(f"one map at a time, {order}: {choice.peak / GB:.3g} GB of memory expected of {of_what}; "
            f"all at once, with as much --memory, sums and maps would take {whole / GB:.3g} GB")  # fmt: skip
    run.figure("one_map_at_a_time", order)
    run.figure("memory_expected", round(choice.peak / GB, 3), "GB")
    return ByRounds(choice)
