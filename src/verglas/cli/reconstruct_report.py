"""report.html of verglas reconstruct."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from importlib import import_module
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from verglas.cli.behind import Behind
from verglas.cli.common import gpu_likely
from verglas.distributed.place import place_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    import torch

    from verglas.cli.reconstruct import Reconstruct
    from verglas.io.runfolder import RunFolder
    from verglas.maximization.reconstruction import Reconstruction
    from verglas.particles.table import ParticleTable
    from verglas.report.page import Block, Draw
    from verglas.report.sections import Section

FEWEST_VIEWS = 20


@contextmanager
def painter(choice: Literal["auto", "cpu", "cuda"]) -> Iterator[Draw | None]:
    """What draws the report. Where a GPU is likely to make a map in a second: a process of its own, which begins before this one
    imports PyTorch and loads meanwhile what drawing needs; else None for this process. choice: of a device."""
    place = place_of(os.environ)
    if (place is not None and place.rank > 0) or not gpu_likely(choice):
        yield None
        return
    from verglas.cli.painters import Painters

    with Painters(1) as one:
        yield one.draw


class Ahead(AbstractContextManager["Ahead"]):
    """The report, as far as it is known before there is a map: views are drawn, and how even they are is computed, meanwhile.
    draw: of `painter`."""

    def __init__(self, table: ParticleTable, options: Reconstruct, draw: Draw | None) -> None:
        self.table, self.options, self._draw, self._stack = table, options, draw, ExitStack()

    def __enter__(self) -> Ahead:
        pool = self._stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="verglas-views"))
        self._evenness = pool.submit(evenness, self.table, self.options)
        self._views = pool.submit(self._draw_views)
        pool.submit(import_module, "jinja2")  # what writes the page
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _draw_views(self) -> Block:
        from verglas.core.symmetry import symmetry_matrices
        from verglas.report import Orientations
        from verglas.report.page import drawn_blocks

        symmetry = symmetry_matrices(self.options.sym).numpy()
        section = Orientations("Viewing directions", self.table.rotations().numpy(), symmetry)
        return (self._draw or drawn_blocks)([("views", section)])[0]

    def finish(self, result: Reconstruction, run: RunFolder, written: bool) -> None:
        """Maps, unless they are `written`, curves, and the report, which is drawn while maps are written."""
        from verglas.cli.reconstruct_files import note_resolution, save
        from verglas.report import write_report

        note_resolution(result, run)
        sections = self.sections(result, run)  # first: planes of maps would wait for all that is saved
        with Behind(1) as behind:
            if not written:
                behind.do(partial(save, result, run))
            title = f"Reconstruction, {self.options.sym.upper()}"
            write_report(run.path("report.html"), title, [*sections, self._views.result()], run.facts(), draw=self._draw)

    def sections(self, result: Reconstruction, run: RunFolder) -> list[Section]:
        """Resolution, FSC, slices; views come after them."""
        from verglas.maximization.reconstruction import frequency_S
        from verglas.report import Curve, KeyFigures, Slices

        figures = self._evenness.result()
        if not figures:
            run.log(f"{len(self.table)} views are too few to say how evenly they cover Fourier space")
        for name, value in figures.items():
            run.figure(name, value)
        sections: list[Section] = [KeyFigures("What came out", run.figures)]
        if result.fsc_S is not None and result.fsc_masked_S is not None and result.ssnr_S is not None:
            frequency = frequency_S(result).numpy()
            curves = [result.fsc_S.cpu().numpy(), result.fsc_masked_S.cpu().numpy()]
            sections.append(
                Curve("Fourier shell correlation of the half maps", frequency, curves, ["whole box", "within the mask"],
                      "resolution", "FSC", (0.143, 0.5), True, True, (-0.1, 1.05),
                      caption="The mask's own correlation is not removed here: `verglas postprocess` does that.")
            )  # fmt: skip
        if result.wiener_ZYX is not None:
            sections.append(Slices("Wiener map", planes(result.wiener_ZYX), result.pixel_size))
        sections.append(Slices("Map without prior", planes(result.map_ZYX), result.pixel_size))
        return sections


def planes(map_ZYX: torch.Tensor) -> tuple[np.ndarray, ...]:
    """The three planes of a map that a report shows."""
    middle = map_ZYX.shape[0] // 2
    cuts = map_ZYX[middle], map_ZYX[:, middle], map_ZYX[:, :, middle]
    return tuple(one_YX.contiguous().cpu().numpy() for one_YX in cuts)


def evenness(table: ParticleTable, options: Reconstruct) -> dict[str, float]:
    """How evenly the views cover Fourier space (from at most 5,000 particles), as key figures; nothing if they are too few."""
    import torch

    from verglas.core.symmetry import symmetry_matrices
    from verglas.postprocess.orientations import fourier_sampling, orientation_efficiency

    views = table.rotations()
    if len(views) > 5000:
        views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(options.seed))[:5000]]
    group = symmetry_matrices(options.sym)
    if len(views) < FEWEST_VIEWS:
        return {}
    return {
        "sampling_compensation_factor": round(fourier_sampling(views, group).scf, 3),
        "orientation_efficiency": round(orientation_efficiency(views, group), 3),
    }
