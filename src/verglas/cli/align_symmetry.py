"""`verglas align-symmetry`: the point group of a map, found and laid on the standard axes. torch is imported in `run`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Flag, Threads
from verglas.errors import InputError

if TYPE_CHECKING:
    from verglas.io.mrc import Map
    from verglas.io.runfolder import RunFolder
    from verglas.postprocess.find_symmetry import Candidate, FoundSymmetry
    from verglas.report.sections import Section


@dataclass(kw_only=True)
class AlignSymmetry:
    """Find the point group of a map, turn the map onto its standard axes, and average over it.

    --sym auto compares the map with turned copies of itself at --resolution and proposes C1-C12, D2-D12, T, O or I, with scores
    (1: as good as noise allows; the best group needs 0.65, others 0.75 of that). A group that is given is laid on the map where
    it fits best. A map may have a symmetry at 15 Å that it lacks at 3 Å: compare refinements with and without it.

    Writes aligned.mrc, symmetrised.mrc, candidates.csv, the maps of --other-maps and the poses of --particles turned along.

    Example: verglas align-symmetry --map abinitio/class001.mrc --particles abinitio/data.star --out upright
    """

    map: Annotated[Path, arg(metavar="MAP")]
    """Map, density positive; anywhere in its box."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder to be made."""
    sym: Annotated[str, arg(metavar="auto|GROUP")] = "auto"
    """Find the group, or lay this one on the map."""
    resolution: Annotated[float, arg(metavar="Å")] = 15.0
    """Detail that takes part in the comparison."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: what the files say)")] = None
    """Pixel size."""
    particles: Annotated[Path | None, arg(metavar="STAR", help_behavior_hint="(default: none)")] = None
    """Particles whose poses belong to the map."""
    other_maps: Annotated[tuple[Path, ...], arg(metavar="MAP ...")] = ()
    """Maps to turn in the same way: half-maps, a mask."""
    overwrite: Flag = False
    """Replace the folder of an earlier run."""
    threads: Threads = None
    """CPU threads."""

    def run(self) -> None:
        """Find or lay on, turn, average, write."""
        self._check()
        import torch

        from verglas.cli.common import set_threads
        from verglas.io.mrc import read_map
        from verglas.io.runfolder import RunFolder
        from verglas.postprocess.find_symmetry import align_to_group, find_symmetry
        from verglas.postprocess.inputs import check_density

        set_threads(self.threads)
        source = read_map(self.map, pixel_size=self.pixel)
        check_density(self.map, source)
        with RunFolder.create(self.out, "align-symmetry", self, self.overwrite) as run:
            run.provenance(device="cpu", kernels="torch", precision="float32")
            map_ZYX = torch.tensor(source.data_ZYX).double()
            if self.sym.lower() == "auto":
                with run.progress("Comparing the map with turned copies"):
                    found = find_symmetry(map_ZYX, source.pixel_size, self.resolution)
                self._tell(run, found)
                self._write(run, source, found.best, self._sections(found))
            else:
                best = align_to_group(map_ZYX, source.pixel_size, self.sym, self.resolution)
                self._write(run, source, best, [])

    def _check(self) -> None:
        from verglas.cli.flip import check_names
        from verglas.core.symmetry_names import normalise_name

        if self.sym.lower() != "auto" and normalise_name(self.sym) == "C1":
            raise InputError("--sym", "C1", "auto, or a group with an axis")
        if not self.resolution > 0:
            raise InputError("--resolution", f"{self.resolution:g} Å", "a value above 0")
        check_names((*self.other_maps, Path("aligned.mrc"), Path("symmetrised.mrc")))

    def _tell(self, run: RunFolder, found: FoundSymmetry) -> None:
        """Scores to the log and candidates.csv."""
        import pandas as pd

        from verglas.postprocess.output import write_csv

        columns = ["group", "operations", "weakest", "mean", "centre_x_A", "centre_y_A", "centre_z_A"]
        rows = [(one.name, one.order, one.weakest, one.mean, *one.centre_3.tolist()) for one in found.candidates]
        write_csv(run.path("candidates.csv"), pd.DataFrame(rows, columns=columns))
        for one in found.candidates[:5]:
            run.log(f"{one.name}: worst operation {one.weakest:.2f}, mean {one.mean:.2f}")
        if found.best.name == "C1":
            run.log("No group holds: C1. The maps are written as they came.")

    def _sections(self, found: FoundSymmetry) -> list[Section]:
        from verglas.report.sections import Curve, Table

        rows = [(one.name, one.weakest, one.mean) for one in found.candidates]
        curves = [found.agreement_S.numpy(), found.control_S.numpy()]
        return [
            Table("Groups tried", rows, ["Group", "Worst operation", "Mean of all"], "1: as good as noise allows."),
            Curve("Agreement with turned copies", found.frequency_S.numpy(), curves, [found.best.name, "turned at random"],
                  "1/Å", "FSC", resolution_axis=True, y_range=(-0.2, 1.05)),
        ]  # fmt: skip

    def _write(self, run: RunFolder, source: Map, best: Candidate, sections: list[Section]) -> None:
        """Maps, poses, figures, report."""
        import torch

        from verglas.core.rotations import euler_from_matrix
        from verglas.core.symmetry import symmetry_matrices
        from verglas.io.mrc import read_map, write_map
        from verglas.postprocess.find_symmetry import aligned
        from verglas.postprocess.mapops import symmetrise
        from verglas.report.page import write_report
        from verglas.report.sections import KeyFigures, Slices

        for name, value, unit in self._figures(best, euler_from_matrix(best.rotation_33[None])[0].tolist()):
            run.figure(name, value, unit)
        turned_ZYX = aligned(torch.tensor(source.data_ZYX).double(), source.pixel_size, best)
        even_ZYX = symmetrise(turned_ZYX, symmetry_matrices(best.name)).float().numpy()
        write_map(run.path("aligned.mrc"), replace(source, data_ZYX=turned_ZYX.float().numpy()))
        write_map(run.path("symmetrised.mrc"), replace(source, data_ZYX=even_ZYX))
        for path in self.other_maps:
            other = read_map(path, pixel_size=self.pixel)
            turned_ZYX = aligned(torch.tensor(other.data_ZYX).double(), other.pixel_size, best)
            write_map(run.path(path.name), replace(other, data_ZYX=turned_ZYX.float().numpy()))
        if self.particles is not None:
            self._write_poses(run, self.particles, best)
        slices = Slices("Averaged over the group", even_ZYX, source.pixel_size)
        write_report(run.path("report.html"), "Point group", [KeyFigures("Result", run.figures), *sections, slices], run.facts())

    def _figures(self, best: Candidate, angles: list[float]) -> list[tuple[str, float | str, str]]:
        figures: list[tuple[str, float | str, str]] = [("symmetry", best.name, "")]
        figures += [("worst_operation", best.weakest, ""), ("mean_operation", best.mean, "")]
        figures += [(name, angle, "degrees") for name, angle in zip(("rot", "tilt", "psi"), angles)]
        return figures + [(f"centre_{axis}", value, "Å") for axis, value in zip("xyz", best.centre_3.tolist())]

    def _write_poses(self, run: RunFolder, particles: Path, best: Candidate) -> None:
        from verglas.cli.flip import star_name
        from verglas.particles.frames import turned_poses
        from verglas.particles.table import ParticleTable

        table = ParticleTable.read(particles)
        table = turned_poses(table, best.rotation_33, best.centre_3).named_from(self.out)
        table.write(run.path(star_name(particles)))
        run.figure("particles", len(table))
