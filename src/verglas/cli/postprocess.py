"""`verglas postprocess`: two half-maps in, a sharpened map and an honest resolution out."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import arg

from verglas.cli.common import Computing, Flag
from verglas.postprocess.options import FscOptions, MaskOptions, SharpenOptions

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

    from verglas.io.runfolder import RunFolder
    from verglas.postprocess.curves import FscCurves
    from verglas.postprocess.directional import DirectionalFsc
    from verglas.postprocess.inputs import HalfMaps
    from verglas.postprocess.sharpening import Mtf, Sharpened
    from verglas.report.sections import Section


@dataclass(kw_only=True)
class Postprocess:
    """Resolution, sharpening and masking of a reconstruction from its half-maps.

    FSC unmasked, masked and with randomised phases; division by the detector's MTF; FSC weighting; B-factor from the
    Guinier plot; final filter. Curves agree shell by shell with relion_postprocess for the same mask and seed, and
    postprocess.star can be given to RELION's CTF refinement and polishing.

    Example: verglas postprocess --half1 run/half1.mrc --half2 run/half2.mrc --out post --mtf mtf.star --mtf-pixel 0.885
    """

    half1: Annotated[Path, arg(metavar="MAP")]
    """Unfiltered map of the first half-set."""
    half2: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: --half1 with half1 -> half2)")] = None
    """Unfiltered map of the second half-set."""
    out: Annotated[Path, arg(metavar="DIR")]
    """Folder for the results."""
    mask: Annotated[Path | None, arg(metavar="MAP", help_behavior_hint="(default: made from the mean of the half-maps)")] = None
    """Soft mask, 1 inside the particle."""
    no_mask: Flag = False
    """Use no mask at all."""
    pixel: Annotated[float | None, arg(metavar="Å", help_behavior_hint="(default: what the files say)")] = None
    """Pixel size."""
    fsc: FscOptions = field(default_factory=FscOptions)
    automatic_mask: MaskOptions = field(default_factory=MaskOptions)
    sharpen: SharpenOptions = field(default_factory=SharpenOptions)
    half_maps: Flag = False
    """Write both half-maps with the same sharpening, too."""
    directional: Flag = False
    """Measure the resolution in cones over all directions."""
    cone: Annotated[float, arg(metavar="DEGREES")] = 20.0
    """Half angle of the cones."""
    seed: int = 0
    """Of the random phases."""
    overwrite: Flag = False
    """Replace an existing run in --out."""
    computing: Computing = field(default_factory=Computing)

    def run(self) -> None:
        """Read, compute, write maps, tables and the report."""
        self._check()
        device, reason = self.computing.start()  # first, as it imports PyTorch while the GPU wakes
        from verglas.io.runfolder import RunFolder
        from verglas.postprocess.inputs import read_half_maps

        with RunFolder.create(self.out, "postprocess", self, self.overwrite) as run:
            run.provenance(device=device, kernels="torch FFT", precision="float64", reason=reason)
            halves = read_half_maps(self.half1, self.half2, self.pixel)
            self._process(run, halves, device)

    def _check(self) -> None:
        from verglas.errors import InputError

        if self.mask is not None and self.no_mask:
            raise InputError("--no-mask", "given together with --mask", "one of the two")
        if not 0 < self.cone <= 90:
            raise InputError("--cone", f"{self.cone:g} degrees", "a half angle above 0 and up to 90 degrees")
        if not 0 < self.fsc.randomise_at_fsc < 1:
            raise InputError("--randomise-at-fsc", f"{self.fsc.randomise_at_fsc:g}", "a value between 0 and 1")

    def _process(self, run: RunFolder, halves: HalfMaps, device: torch.device) -> None:
        import torch

        from verglas.postprocess.curves import half_map_curves
        from verglas.postprocess.sharpening import sharpen

        first, second = (torch.tensor(m.data_ZYX, device=device) for m in (halves.first, halves.second))
        mtf = read_mtf(self.sharpen.mtf, self.sharpen.mtf_pixel or halves.pixel_size)
        mask = self._mask(run, halves)
        mask_ZYX = None if mask is None else torch.tensor(mask, device=device)
        with run.progress("Correlating and sharpening", total=2 + self.directional, unit="steps") as bar:
            curves = half_map_curves(first, second, mask_ZYX, halves.pixel_size, self.fsc, self.seed)
            bar.advance()
            sharpened = sharpen(0.5 * (first.double() + second.double()), curves, self.sharpen, mtf)
            bar.advance()
            directional = self._directional((first, second), mask_ZYX, halves.pixel_size) if self.directional else None
            bar.advance(int(self.directional))
        warnings = halves.warnings + curves.warnings + sharpened.warnings
        for warning in warnings:
            run.log(f"Warning: {warning}")
        self._write_maps(run, halves, sharpened, mask)
        if self.half_maps:
            self._write_half_maps(run, halves, curves, sharpened, mtf)
        self._write_tables(run, curves, sharpened, directional, mask is not None)
        self._figures(run, curves, sharpened, directional, mask)
        self._report(run, halves.pixel_size, curves, sharpened, directional, warnings)

    def _mask(self, run: RunFolder, halves: HalfMaps) -> np.ndarray | None:
        import torch

        from verglas.io.mrc import Map, write_map
        from verglas.postprocess.automask import make_mask
        from verglas.postprocess.inputs import read_mask

        if self.no_mask:
            return None
        if self.mask is not None:
            return read_mask(self.mask, halves.first)
        mean_ZYX = torch.tensor(halves.first.data_ZYX + halves.second.data_ZYX) / 2
        mask_ZYX, threshold = make_mask(mean_ZYX, halves.pixel_size, self.automatic_mask)
        run.log(f"Automatic mask: density above {threshold:.4g} after a low pass at {self.automatic_mask.mask_lowpass:g} Å")
        write_map(run.path("mask.mrc"), Map(mask_ZYX.numpy(), halves.pixel_size, halves.first.origin))
        return mask_ZYX.numpy()

    def _directional(self, halves: tuple[Tensor, Tensor], mask_ZYX: Tensor | None, pixel_size: float) -> DirectionalFsc:
        from verglas.postprocess.curves import half_transform
        from verglas.postprocess.directional import directional_fsc

        weight = 1.0 if mask_ZYX is None else mask_ZYX.double()
        first, second = (half_transform(half.double() * weight) for half in halves)
        return directional_fsc(first, second, pixel_size, half_angle=self.cone)

    def _write_maps(self, run: RunFolder, halves: HalfMaps, sharpened: Sharpened, mask: np.ndarray | None) -> None:
        from verglas.io.mrc import Map, write_map

        data = sharpened.map_ZYX.float().cpu().numpy()
        write_map(run.path("map.mrc"), Map(data, halves.pixel_size, halves.first.origin))
        if mask is not None:
            write_map(run.path("map_masked.mrc"), Map(data * mask, halves.pixel_size, halves.first.origin))

    def _write_half_maps(
        self, run: RunFolder, halves: HalfMaps, curves: FscCurves, sharpened: Sharpened, mtf: Mtf | None
    ) -> None:
        from dataclasses import replace

        import torch

        from verglas.io.mrc import Map, write_map
        from verglas.postprocess.sharpening import sharpen

        # The B-factor found on the mean is applied to each half; the fit is not repeated.
        options = replace(self.sharpen, bfactor=sharpened.bfactor)
        for name, half in (("half1_sharpened.mrc", halves.first), ("half2_sharpened.mrc", halves.second)):
            data = sharpen(torch.tensor(half.data_ZYX, device=curves.best_S.device), curves, options, mtf).map_ZYX
            write_map(run.path(name), Map(data.float().cpu().numpy(), half.pixel_size, half.origin))

    def _write_tables(
        self, run: RunFolder, curves: FscCurves, sharpened: Sharpened, directional: DirectionalFsc | None, masked: bool
    ) -> None:
        from verglas.postprocess import output
        from verglas.postprocess.inputs import other_half

        output.write_csv(run.path("fsc.csv"), output.fsc_table(curves))
        output.write_csv(run.path("guinier.csv"), output.guinier_table(sharpened.guinier))
        output.write_emdb_xml(run.path("fsc.xml"), curves)
        if directional is not None:
            output.write_csv(run.path("directional_fsc.csv"), output.directional_table(directional))
        mask = (self.mask or self.out / "mask.mrc") if masked else None
        files = output.RunFiles(
            self.half1, self.half2 or other_half(self.half1), self.out / "map.mrc",
            self.out / "map_masked.mrc" if masked else None, mask,
        )  # fmt: skip
        output.write_relion_star(run.path("postprocess.star"), curves, sharpened, files)

    def _figures(
        self, run: RunFolder, curves: FscCurves, sharpened: Sharpened, directional: DirectionalFsc | None, mask: np.ndarray | None
    ) -> None:  # fmt: skip
        from verglas.postprocess.curves import last_good_shell

        run.figure("resolution", curves.resolution, "Å")
        run.figure("resolution_unmasked", curves.angstrom(last_good_shell(curves.unmasked_S)), "Å")
        run.figure("bfactor", sharpened.bfactor, "Å²")
        if sharpened.low_pass is not None:
            run.figure("low_pass", sharpened.low_pass, "Å")
        if mask is not None:
            run.figure("mask_share_of_box", 100 * float((mask > 0.5).mean()), "%")
        if curves.randomised_from is not None:
            run.figure("phases_randomised_from", curves.angstrom(curves.randomised_from), "Å")
        if directional is not None:
            run.figure("resolution_best_direction", directional.best, "Å")
            run.figure("resolution_worst_direction", directional.worst, "Å")
            run.figure("sphericity", directional.sphericity)
            run.figure("cone_area_ratio", directional.area_ratio)

    def _report(
        self, run: RunFolder, pixel_size: float, curves: FscCurves, sharpened: Sharpened,
        directional: DirectionalFsc | None, warnings: list[str],
    ) -> None:  # fmt: skip
        import html

        from verglas.io.mrc import read_map
        from verglas.report.page import write_report
        from verglas.report.pictures import map_picture, write_png
        from verglas.report.sections import KeyFigures, Pictures, Slices, Text

        sections: list[Section] = [KeyFigures("Result", run.figures)]
        if warnings:
            sections.append(Text("Warnings", "<br>".join(html.escape(warning) for warning in warnings)))
        sections += [fsc_section(curves), guinier_section(sharpened)]
        if directional is not None:
            sections += directional_sections(directional, curves)
        map_ZYX = sharpened.map_ZYX.float().cpu().numpy()
        masked = run.path("map_masked.mrc")  # sharpening brings out the noise around the particle
        shown = map_picture(read_map(masked).data_ZYX if masked.exists() else map_ZYX)
        write_png(run.path("map.png"), shown)
        sections.append(Slices("Sharpened map", map_ZYX, pixel_size))
        line = "surface, projections and central slices, seen along z, y and x"
        sections.append(Pictures("Sharpened map, seen from three sides", {line: shown}))
        sections.append(shell_table(curves))
        write_report(run.path("report.html"), "Post-processing", sections, run.facts())


def read_mtf(path: Path | None, pixel_size: float) -> Mtf | None:
    """The MTF as a function of frequency (1/Å), for a detector pixel of `pixel_size` Å; None without a file."""
    if path is None:
        return None
    from verglas.optics.mtf import MtfCurve

    curve = MtfCurve.read(path)
    return lambda frequency: curve.at(frequency, pixel_size)


def fsc_section(curves: FscCurves) -> Section:
    """All FSC curves with the 0.143 line."""
    import numpy as np

    from verglas.report.sections import Curve

    found = [
        ("corrected", curves.best_S if curves.masked_S is not None else None), ("unmasked", curves.unmasked_S),
        ("masked", curves.masked_S), ("phases randomised", curves.random_S),
    ]  # fmt: skip
    drawn = [(label, curve.cpu().numpy()) for label, curve in found if curve is not None]
    x = np.arange(len(curves.unmasked_S)) / (curves.box * curves.pixel_size)
    return Curve(
        "Fourier shell correlation", x, [y for _, y in drawn], [label for label, _ in drawn], "resolution (Å)",
        "correlation of the half-maps", thresholds=(0.143,), resolution_axis=True, y_range=(-0.1, 1.05),
    )  # fmt: skip


def guinier_section(sharpened: Sharpened) -> Section:
    """ln(amplitude) over 1/d^2 after each step, with the fitted line."""
    import numpy as np

    from verglas.report.sections import Curve

    guinier = sharpened.guinier
    steps = [
        ("original", guinier.original_S), ("MTF corrected", guinier.mtf_S), ("FSC weighted", guinier.weighted_S),
        ("sharpened", guinier.sharpened_S),
    ]  # fmt: skip
    x = guinier.resolution_squared_S.cpu().numpy()
    drawn = [(label, np.where(y.cpu().numpy() > -99, y.cpu().numpy(), np.nan)) for label, y in steps if y is not None]
    caption = f"B-factor applied: {sharpened.bfactor:.1f} Å²."
    if guinier.line is not None:
        drawn.append(("fit", np.where(np.isfinite(drawn[-1][1]), guinier.line.intercept + guinier.line.slope * x, np.nan)))
        caption += f" Line through {guinier.line.points} shells, r² {guinier.line.correlation:.3f}."
    return Curve(
        "Guinier plot", x[1:], [y[1:] for _, y in drawn], [label for label, _ in drawn], "1/d² (1/Å²)", "ln(mean amplitude)",
        caption=caption,
    )  # fmt: skip


def directional_sections(directional: DirectionalFsc, curves: FscCurves) -> list[Section]:
    """Spread of the cones' FSC and of their resolutions."""
    import numpy as np

    from verglas.report.sections import Curve, Histogram

    fsc_DS = directional.fsc_DS.numpy()
    x = np.arange(fsc_DS.shape[1]) / (curves.box * curves.pixel_size)
    spread = Curve(
        "FSC in cones", x, [fsc_DS.max(0), np.median(fsc_DS, 0), fsc_DS.min(0)], ["highest", "median", "lowest"],
        "resolution (Å)", "correlation of the half-maps", thresholds=(0.143,), resolution_axis=True, y_range=(-0.1, 1.05),
        caption=f"{len(fsc_DS)} cones of half angle {directional.half_angle:g} degrees, not corrected for the mask; "
        f"sphericity {directional.sphericity:.3f}, area ratio {directional.area_ratio:.3f}.",
    )  # fmt: skip
    return [spread, Histogram("Resolution over directions", directional.resolution_D.numpy(), "resolution (Å)", bins=30)]


def shell_table(curves: FscCurves) -> Section:
    """FSC at every shell, or at about 40 of them."""
    from verglas.postprocess.output import fsc_table
    from verglas.report.sections import Table

    frame = fsc_table(curves)
    rows = frame.iloc[1 :: max(len(frame) // 40, 1)]
    header = [name.removeprefix("fsc_").replace("_", " ") for name in frame.columns]
    return Table("FSC by shell", [[int(row[0]), *(float(v) for v in row[1:])] for row in rows.to_numpy()], header)
