"""report.html of verglas reconstruct."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from verglas.cli.reconstruct import Reconstruct
    from verglas.io.runfolder import RunFolder
    from verglas.maximization.reconstruction import Reconstruction
    from verglas.particles.table import ParticleTable


def write_report_of(result: Reconstruction, table: ParticleTable, options: Reconstruct, run: RunFolder) -> None:
    """report.html: resolution, FSC, slices, views."""
    from verglas.core.symmetry import symmetry_matrices
    from verglas.maximization.reconstruction import frequency_S
    from verglas.report import Curve, KeyFigures, Orientations, Slices, write_report
    from verglas.report.sections import Section

    views = table.rotations()
    symmetry = symmetry_matrices(options.sym)
    note_views(table, options, run)
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
        sections.append(Slices("Wiener map", result.wiener_ZYX.cpu().numpy(), result.pixel_size))
    sections.append(Slices("Map without prior", result.map_ZYX.cpu().numpy(), result.pixel_size))
    sections.append(Orientations("Viewing directions", views.numpy(), symmetry.numpy()))
    write_report(run.path("report.html"), f"Reconstruction, {options.sym.upper()}", sections, run.facts())


def note_views(table: ParticleTable, options: Reconstruct, run: RunFolder) -> None:
    """How evenly the views cover Fourier space, as key figures (from at most 5,000 particles)."""
    import torch

    from verglas.core.symmetry import symmetry_matrices
    from verglas.postprocess.orientations import fourier_sampling, orientation_efficiency

    views = table.rotations()
    if len(views) > 5000:
        views = views[torch.randperm(len(views), generator=torch.Generator().manual_seed(options.seed))[:5000]]
    group = symmetry_matrices(options.sym)
    if len(views) < 20:
        run.log(f"{len(views)} views are too few to say how evenly they cover Fourier space")
        return
    run.figure("sampling_compensation_factor", round(fourier_sampling(views, group).scf, 3))
    run.figure("orientation_efficiency", round(orientation_efficiency(views, group), 3))
