"""verglas reconstruct on a GPU whose memory does not hold the sums: columns after columns (`maximization/by_columns.py`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from verglas.cli.reconstruct import Task, batch_size, note_figures, report_bad
from verglas.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import torch

    from verglas.io.runfolder import RunFolder
    from verglas.maximization.anew import Anew
    from verglas.maximization.column_choice import ColumnChoice
    from verglas.maximization.reconstruct import Addable, GroupSlices
    from verglas.maximization.reconstruction import Reconstruction
    from verglas.optics.group import OpticsGroup
    from verglas.particles.loader import ImageBatch, ImageLoader

GB = 1e9
A = TypeVar("A", bound="Anew")


@dataclass(frozen=True)
class InColumns:
    """As `reconstruct_slabs.BySlabs`, on a GPU (or, for tests, a CPU)."""

    choice: ColumnChoice
    written = False  # maps, by the time that they are solved

    def solved(self, task: Task, run: RunFolder) -> Reconstruction:
        """The maps."""
        from verglas.core.memory import grow_device_memory
        from verglas.core.symmetry_names import normalise_name
        from verglas.maximization.by_columns import ByColumns, SumsByColumns

        options, geometry, choice = task.options, task.geometry, self.choice
        if task.device.type == "cuda":
            grow_device_memory()
        loaders = task.loaders(choice.batch)
        how = ByColumns(geometry, normalise_name(options.sym), task.device, options.gridding == "exact", choice.ends,
                        choice.transforms, choice.at_once, on_host=len(loaders) > 1)  # fmt: skip
        return solved_anew(task, run, loaders, choice.kept > 0,
                           lambda images, name: SumsByColumns(how, adder(task, images, run), name))  # fmt: skip


def solved_anew(
    task: Task, run: RunFolder, loaders: list[ImageLoader], keep: bool, sums_of: Callable[[KeptImages, str], A]
) -> Reconstruction:
    """The maps of the sets that the loaders read, with what is said of images. sums_of: (images, name) of a set; keep: images
    stay on the device."""
    from verglas.maximization.anew import solve_anew

    names = ["all images"] if len(loaders) == 1 else ["half-set 1", "half-set 2"]
    sets = [sums_of(KeptImages(loader, task.device, keep), name) for loader, name in zip(loaders, names, strict=True)]
    result = solve_anew(sets, task.geometry, task.device, task.mask_ZYX, task.mask_radius)
    report_bad([image for loader in loaders for image in loader.bad], run)
    note_figures(task, sum(one.slices for one in sets), run)
    return result


class KeptImages:
    """Batches of a loader; once they were all read they come from the memory of the device, if they are to stay there.

    As float16 where that holds them to the last bit, as it does images that were stored so.
    """

    def __init__(self, loader: ImageLoader, device: torch.device, keep: bool) -> None:
        self.loader, self.device, self.keep = loader, device, keep
        self._batches: list[tuple[ImageBatch, torch.Tensor]] = []

    def __iter__(self) -> Iterator[ImageBatch]:
        from dataclasses import replace

        if self._batches:
            for batch, image_BYX in self._batches:
                yield replace(batch, image_BYX=image_BYX.float())
            return
        waiting: list[tuple[ImageBatch, torch.Tensor]] = []
        for batch in self.loader:
            if self.keep:
                image_BYX = batch.image_BYX.to(self.device, non_blocking=True)
                half_BYX = image_BYX.half()
                stays = half_BYX if bool((half_BYX == image_BYX).all()) else image_BYX
                waiting.append((replace(batch, image_BYX=batch.image_BYX.new_empty(0)), stays))
                yield replace(batch, image_BYX=image_BYX)
            else:
                yield batch
        self._batches = waiting


class Adder(Protocol):
    """Adds the slices of all images to sums, as a stage of the run. blank: of images of zeros, for their weights alone."""

    def __call__(self, sums: Addable, stage: str, blank: bool = False) -> None: ...


def adder(task: Task, images: KeptImages, run: RunFolder) -> Adder:
    """Of the images of a set."""
    import numpy as np

    from verglas.maximization.reconstruct import accumulate

    cut = task.slicer()
    made: dict[OpticsGroup, GroupSlices] = {}

    def remembered(group: OpticsGroup, *words: Any) -> GroupSlices:
        """Tables of a group, which are made once."""
        if group not in made:
            made[group] = cut(group, *words)
        return made[group]

    def add_to(sums: Addable, stage: str, blank: bool = False) -> None:
        one_set: np.ndarray = np.ones(len(task.table), np.int64)
        with run.progress(stage, len(images.loader.indices), "particles") as bar:
            how = task.options.ctf, task.device, bar.advance, lambda: sums, remembered
            some = images.loader.blank(task.device) if blank else images
            accumulate(task.table, one_set, some, task.geometry, *how)

    return add_to


def stored_images(task: Task) -> float:
    """Bytes of all images, as they are stored."""
    return float(task.loader.stored_bytes()) * len(task.loader.indices) * max(task.loader.box_of_group.values()) ** 2


def slices_of(task: Task, poses: int) -> int:
    """Of a half-set, at so many poses each."""
    import numpy as np

    sheets = 1 if task.options.ewald == "off" else 2
    return sheets * len(task.table) * poses // len(np.unique(task.half_B))


def columns_of(task: Task, given: float) -> ColumnChoice | None:
    """What fits into `given` bytes of the device."""
    from verglas.core.symmetry import symmetry_matrices
    from verglas.maximization.column_choice import ColumnChoice

    options, geometry, images = task.options, task.geometry, stored_images(task)
    slices, batch = slices_of(task, len(symmetry_matrices(options.sym))), batch_size(geometry.box, task.device)
    return ColumnChoice.of(geometry, options.gridding == "exact", images, slices, batch, given)


def in_columns(task: Task, run: RunFolder, given: float, of_what: str, whole: float) -> InColumns:
    """The choice, said and noted; InputError if memory is too little. whole: bytes that sums and maps would take in memory."""
    from verglas.maximization.column_choice import least

    choice = columns_of(task, given)
    if choice is None:
        fewest = least(task.geometry, task.options.gridding == "exact", len(task.table))
        raise InputError("memory", of_what, f"{fewest / GB:.3g} GB, for the smallest slab of this box",
                         "Give more with --memory, choose a smaller --padding, or use --max-resolution.")  # fmt: skip
    number = f"{choice.slabs} slab{'s' if choice.slabs > 1 else ''} of columns"
    kept = "images stay on the device" if choice.kept else "images are read for each"
    run.log(f"in {number}, {kept}: {choice.peak / GB:.3g} GB expected of {of_what}; "
            f"in memory sums and maps would take {whole / GB:.3g} GB")  # fmt: skip
    run.figure("slabs_of_columns", choice.slabs)
    run.figure("memory_expected", round(choice.peak / GB, 3), "GB")
    return InColumns(choice)
