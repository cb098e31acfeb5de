"""report.html and the pictures of a ptychographic reconstruction. Imported only by what writes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from verglas.ptychography import judge as judging
from verglas.ptychography.phase import levelled, unwrapped
from verglas.ptychography.scan import Reconstruction
from verglas.report import Curve, Field, Histogram, KeyFigures, Moves, Pictures, Table, write_report
from verglas.report.pictures import with_opacity, write_png
from verglas.report.planes import wave_picture
from verglas.report.sections import Section

if TYPE_CHECKING:
    from verglas.cli.ptycho_run import Record
    from verglas.io.runfolder import RunFolder

ARROW = 0.04  # length of the rms arrow of positions, of the scan's extent


@dataclass
class Shown:
    """What a page shows. nominal_B2: positions as the scan has them; history: records of the passes of each part."""

    nominal_B2: np.ndarray
    found: Reconstruction
    history: Mapping[str, Sequence[Record]]
    unwrap: bool = False
    rings: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None  # of the halves: `judge.frc`
    verdict: judging.Judgement | None = None
    difference_YX: np.ndarray | None = field(default=None, repr=False)

    @cached_property
    def seen_YX(self) -> np.ndarray:
        """Where the object got light, bool."""
        return seen(self.found)

    @cached_property
    def object_YX(self) -> np.ndarray:
        """The object's first mode, all slices multiplied, without the phase slope that the data leave open."""
        return levelled(whole_object(self.found), self.seen_YX)

    @property
    def pixel(self) -> float | None:
        """Edge of an object pixel, m."""
        return None if self.found.pixel is None else self.found.pixel[0]

    def compare_halves(self, first: Reconstruction, second: Reconstruction) -> None:
        """Fourier ring correlation of two reconstructions of independent patterns, the second laid on the first."""
        first_YX, second_YX, seen_YX = on_one_grid(first, second)
        aligned_YX, _ = judging.aligned(second_YX, first_YX, seen_YX)
        square = judging.largest_square(seen_YX)
        self.rings = judging.frc(first_YX[square], aligned_YX[square])

    def compare_truth(self, truth: Reconstruction) -> judging.Judgement:
        """Judge the object against the truth."""
        found_YX, truth_YX, seen_YX = on_one_grid(self.found, truth)
        self.verdict, aligned_YX = judging.judge(found_YX, truth_YX, seen_YX)
        self.difference_YX = np.where(seen_YX, np.abs(aligned_YX - truth_YX), np.nan)
        return self.verdict

    def resolution(self) -> tuple[float | str, str]:
        """Period down to which the halves' correlation reaches half a bit, with its unit; ("none", "") if it nowhere does."""
        assert self.rings is not None
        period = judging.resolution(*self.rings)
        if not np.isfinite(period):
            return "none", ""
        return (float(f"{period:.4g}"), "px") if self.pixel is None else (float(f"{1e9 * period * self.pixel:.4g}"), "nm")


def whole_object(found: Reconstruction) -> np.ndarray:
    """First mode of the object, its slices multiplied, complex128 [Y, X]."""
    return found.object_OLYX[0].prod(0).cpu().numpy().astype(complex)


def seen(found: Reconstruction) -> np.ndarray:
    """Where the object got light, bool [Y, X]."""
    shape = (found.object_OLYX.shape[-2], found.object_OLYX.shape[-1])
    return judging.seen_region(found.positions_B2.cpu().numpy(), found.probe_MYX.cpu().numpy(), shape)


def on_one_grid(found: Reconstruction, other: Reconstruction) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both objects where their arrays overlap in the frame of the scan, and where both were seen."""
    corner_2 = np.round(np.array(found.origin_2) - np.array(other.origin_2)).astype(int)  # of found, in pixels of other
    edges = [np.array(one.object_OLYX.shape[-2:]) for one in (found, other)]
    low_2, high_2 = np.maximum(corner_2, 0), np.minimum(corner_2 + edges[0], edges[1])
    in_other = tuple(slice(int(a), int(b)) for a, b in zip(low_2, high_2))
    in_found = tuple(slice(int(a), int(b)) for a, b in zip(low_2 - corner_2, high_2 - corner_2))
    return whole_object(found)[in_found], whole_object(other)[in_other], seen(found)[in_found] & seen(other)[in_other]


def shown_phase(shown: Shown) -> tuple[np.ndarray, bool]:
    """(phase [Y, X], whether it is cyclic)."""
    phase_YX = np.angle(shown.object_YX)
    return (unwrapped(phase_YX), False) if shown.unwrap else (phase_YX, bool(np.abs(phase_YX[shown.seen_YX]).max() > 3.0))


def write_pictures(run: RunFolder, shown: Shown) -> None:
    """amplitude.png and phase.png, one pixel for each of the object, and probe.png."""
    phase_YX, cyclic = shown_phase(shown)
    low, high = (-np.pi, np.pi) if cyclic else np.percentile(phase_YX[shown.seen_YX], [0.5, 99.5])
    amplitude_YX = np.abs(shown.object_YX)
    dark, bright = np.percentile(amplitude_YX[shown.seen_YX], [0.5, 99.5])
    write_png(run.path("amplitude.png"), with_opacity((amplitude_YX - dark) / max(bright - dark, 1e-12)))
    write_png(run.path("phase.png"), with_opacity((phase_YX - low) / max(high - low, 1e-12)))
    write_png(run.path("probe.png"), np.concatenate([wave_picture(one) for one in shown.found.probe_MYX.numpy()], 1))


def write_page(
    path: Path, shown: Shown, figures: Mapping[str, Mapping[str, Any]], facts: Mapping[str, Any], title: str
) -> None:
    """Write report.html."""
    sections: list[Section] = [KeyFigures("What came out", figures), *object_shown(shown)]
    sections += [probe_shown(shown), *curves(shown), positions_shown(shown), *lights(shown)]
    if shown.verdict is not None and shown.difference_YX is not None:
        sections.append(verdict_shown(shown.verdict))
        sections.append(Field("Distance from the truth", shown.difference_YX, "|object - truth|", shown.pixel))
    write_report(path, title, sections, facts, overwrite=True)


def object_shown(shown: Shown) -> list[Section]:
    """Amplitude and phase."""
    rows, columns = (np.flatnonzero(shown.seen_YX.any(axis)) for axis in (1, 0))
    lit = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
    blank_YX = np.where(shown.seen_YX, 1.0, np.nan)[lit]
    phase_YX, cyclic = shown_phase(shown)
    what = "Without jumps of 2 pi. " if shown.unwrap else ""
    caption = f"{what}A constant and a linear slope, which the data leave open, are taken off. Blank: hardly any light."
    return [Field("Amplitude", np.abs(shown.object_YX)[lit] * blank_YX, "transmission", shown.pixel),
            Field("Phase", phase_YX[lit] * blank_YX, "phase / rad", shown.pixel, cyclic=cyclic, caption=caption)]  # fmt: skip


def probe_shown(shown: Shown) -> Section:
    """Modes of the probe, and what it changes by from position to position."""
    power_M = (shown.found.probe_MYX.abs() ** 2).sum((1, 2)).numpy()
    lines = {f"mode {i + 1}: {100 * power / power_M.sum():.1f} % of the light": wave_picture(one)
             for i, (one, power) in enumerate(zip(shown.found.probe_MYX.numpy(), power_M))}  # fmt: skip
    if shown.found.eigen_KYX is not None:
        lines |= {f"change {k + 1} of mode 1": wave_picture(one) for k, one in enumerate(shown.found.eigen_KYX.numpy())}
    return Pictures("Probe", lines, f"Brightness is amplitude, hue is phase. {power_M.sum():.4g} counts in an empty pattern.")


def curves(shown: Shown) -> list[Section]:
    """Error and changes over the passes, and the halves' Fourier ring correlation."""
    records = shown.history["all"]
    made: list[Section] = []
    if records:
        passes = np.array([record["pass"] for record in records], int)
        error, *changes = (column(records, name) for name in ("error", "object_change", "probe_change"))
        caption = "Squared difference of the square roots of model and counts, over the counts, as each pass met it."
        made.append(Curve("Error", passes, [error], [""], "pass", "error", log_y=True, caption=caption))
        labels = ["object", "probe"]
        made.append(Curve("Change from pass to pass", passes, changes, labels, "pass", "rms of the change / rms", log_y=True))
    if shown.rings is not None:
        frequency_S, correlation_S, halfbit_S = shown.rings
        unit, scale = ("px⁻¹", 1.0) if shown.pixel is None else ("nm⁻¹", 1e-9 / shown.pixel)
        period, length = shown.resolution()
        labels = ["halves", "half a bit"]
        agree = "agree nowhere" if period == "none" else f"agree down to a period of {period:g} {length}"
        caption = f"They {agree}. Each has half the light."
        made.append(Curve("Fourier ring correlation of two halves", frequency_S * scale, [correlation_S, halfbit_S], labels,
                          f"spatial frequency / {unit}", "FRC", y_range=(0.0, 1.05), caption=caption))  # fmt: skip
    return made


def column(records: Sequence[Record], name: str) -> np.ndarray:
    """One number of every pass; NaN where it is 0, for scales by powers of ten."""
    return np.array([record[name] or np.nan for record in records], float)


def positions_shown(shown: Shown) -> Section:
    """Where the beam was, and by how much positions were corrected, their mean taken off."""
    nominal_B2 = shown.nominal_B2 - np.array(shown.found.origin_2)
    moved_B2 = shown.found.positions_B2.numpy() - nominal_B2
    moved_B2 = moved_B2 - moved_B2.mean(0)
    rms = float(np.sqrt((moved_B2**2).sum(1).mean()))
    if rms < 1e-6:
        return Moves("Positions", nominal_B2, nominal_B2, "px")
    stretch = max(1.0, float(f"{ARROW * np.ptp(nominal_B2) / rms:.1g}"))
    caption = f"Corrections of {rms:.3g} px rms, their mean taken off; arrows are {stretch:g} times as long."
    return Moves("Positions", nominal_B2, nominal_B2 + moved_B2, "px", stretch, caption)


def lights(shown: Shown) -> list[Section]:
    """What else was fitted: intensities, background."""
    made: list[Section] = []
    scale_B, background_YX = shown.found.scale_B.numpy(), shown.found.background_YX.numpy()
    if np.ptp(scale_B) > 1e-6:
        made.append(Histogram("Intensity of the light at each position", scale_B, "relative to the mean"))
    if background_YX.max() > 0:
        made.append(Field("Background", background_YX, "counts"))
    return made


def verdict_shown(verdict: judging.Judgement) -> Section:
    """How near the truth."""
    removed = verdict.alignment
    rows: list[list[Any]] = [
        ["error (rms of the difference / rms of the truth)", verdict.error],
        ["structural similarity of the amplitude", verdict.ssim_amplitude],
        ["structural similarity of the phase", verdict.ssim_phase],
        ["error of the phase / rad, rms", verdict.phase_error],
        ["shift taken off / px (row, column)", f"{removed.shift_2[0]:.3f}, {removed.shift_2[1]:.3f}"],
        ["phase slope taken off / rad px⁻¹ (row, column)", f"{removed.slope_2[0]:.2e}, {removed.slope_2[1]:.2e}"],
        ["factor taken off", f"{abs(removed.factor):.4f}, {np.angle(removed.factor):.3f} rad"],
    ]
    return Table("Against the truth", rows)
