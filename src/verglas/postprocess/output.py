"""Tables of a post-processing run: CSV for people, postprocess.star for RELION's later jobs, fsc.xml for the EMDB."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from verglas.io.atomic import atomic_path
from verglas.io.star_block import StarBlock, Value
from verglas.io.star_write import write_star
from verglas.postprocess.curves import FscCurves
from verglas.postprocess.directional import DirectionalFsc
from verglas.postprocess.sharpening import Guinier, Sharpened

_FSC = "rlnFourierShellCorrelation"
_NO_RESOLUTION = 999.0  # what RELION writes for shell 0


@dataclass(frozen=True)
class RunFiles:
    """Paths named in postprocess.star."""

    half1: Path
    half2: Path
    map: Path
    map_masked: Path | None
    mask: Path | None


def _column(curve_S: Tensor | None) -> np.ndarray | None:
    return None if curve_S is None else curve_S.cpu().numpy()


def _frame(columns: dict[str, np.ndarray | None]) -> pd.DataFrame:
    return pd.DataFrame({name: values for name, values in columns.items() if values is not None})


def fsc_table(curves: FscCurves) -> pd.DataFrame:
    """One row per shell: shell, frequency (1/Å), resolution (Å), and every curve there is."""
    shell = np.arange(len(curves.unmasked_S))
    frequency = shell / (curves.box * curves.pixel_size)
    with np.errstate(divide="ignore"):
        resolution = 1 / frequency
    return _frame(
        {
            "shell": shell, "frequency_1_per_A": frequency, "resolution_A": resolution,
            "fsc_used": _column(curves.best_S), "fsc_unmasked": _column(curves.unmasked_S),
            "fsc_masked": _column(curves.masked_S), "fsc_phase_randomised": _column(curves.random_S),
            "fsc_particle_volume": _column(curves.particle_S), "fsc_particle_mass": _column(curves.particle_mass_S),
        }
    )  # fmt: skip


def guinier_table(guinier: Guinier) -> pd.DataFrame:
    """One row per shell: 1/d^2 (1/Å^2) and ln of the mean amplitude after each step; empty where there is no signal."""
    curves = {
        "resolution_squared_1_per_A2": guinier.resolution_squared_S, "ln_original": guinier.original_S,
        "ln_mtf_corrected": guinier.mtf_S, "ln_weighted": guinier.weighted_S, "ln_sharpened": guinier.sharpened_S,
    }  # fmt: skip
    frame = _frame({name: _column(curve) for name, curve in curves.items()})
    return frame.where(frame > -99)


def directional_table(directional: DirectionalFsc) -> pd.DataFrame:
    """One row per cone: axis (x, y, z), resolution (Å), FSC per shell."""
    frame = pd.DataFrame(directional.direction_D3.numpy(), columns=["x", "y", "z"])
    frame["resolution_A"] = directional.resolution_D.numpy()
    curves = pd.DataFrame(directional.fsc_DS.numpy(), columns=[f"fsc_{s}" for s in range(directional.fsc_DS.shape[1])])
    return pd.concat([frame, curves], axis=1)


def write_csv(path: Path, frame: pd.DataFrame) -> None:
    """Write a table with six significant digits; OutputError if `path` exists."""
    with atomic_path(path, False) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


def _general(curves: FscCurves, sharpened: Sharpened, files: RunFiles) -> dict[str, Value]:
    values: dict[str, Value] = {
        "rlnFinalResolution": curves.resolution,
        "rlnBfactorUsedForSharpening": sharpened.bfactor,
        "rlnUnfilteredMapHalf1": str(files.half1),
        "rlnUnfilteredMapHalf2": str(files.half2),
        "rlnPostprocessedMap": str(files.map),
    }
    if files.mask is not None and curves.mask_fraction is not None:
        values["rlnParticleBoxFractionSolventMask"] = curves.mask_fraction
        values["rlnMaskName"] = str(files.mask)
        values["rlnPostprocessedMapMasked"] = str(files.map_masked)
        if curves.randomised_from is not None:
            values["rlnRandomiseFrom"] = curves.angstrom(curves.randomised_from)
    line = sharpened.guinier.line
    if line is not None:
        values["rlnFittedSlopeGuinierPlot"] = line.slope
        values["rlnFittedInterceptGuinierPlot"] = line.intercept
        values["rlnCorrelationFitGuinierPlot"] = line.correlation
    return values


def write_relion_star(path: Path, curves: FscCurves, sharpened: Sharpened, files: RunFiles) -> None:
    """postprocess.star with the blocks and labels that RELION's CTF refinement and polishing read."""
    shell = np.arange(len(curves.unmasked_S))
    resolution = np.array([_NO_RESOLUTION, *(curves.angstrom(int(s)) for s in shell[1:])])
    fsc = _frame(
        {
            "rlnSpectralIndex": shell, "rlnResolution": 1 / resolution, "rlnAngstromResolution": resolution,
            f"{_FSC}Corrected": _column(curves.best_S), f"{_FSC}ParticleMaskFraction": _column(curves.particle_S),
            f"{_FSC}ParticleMolWeight": _column(curves.particle_mass_S), f"{_FSC}UnmaskedMaps": _column(curves.unmasked_S),
            f"{_FSC}MaskedMaps": _column(curves.masked_S),
            "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": _column(curves.random_S),
        }
    )  # fmt: skip
    guinier = sharpened.guinier
    plot = _frame(
        {
            "rlnResolutionSquared": _column(guinier.resolution_squared_S),
            "rlnLogAmplitudesOriginal": _column(guinier.original_S), "rlnLogAmplitudesMTFCorrected": _column(guinier.mtf_S),
            "rlnLogAmplitudesWeighted": _column(guinier.weighted_S),
            "rlnLogAmplitudesSharpened": _column(guinier.sharpened_S),
        }
    )  # fmt: skip
    if guinier.line is not None:
        plot["rlnLogAmplitudesIntercept"] = guinier.line.intercept
    blocks = [StarBlock.pairs("general", _general(curves, sharpened, files)), StarBlock.table("fsc", fsc)]
    write_star(path, {block.name: block for block in [*blocks, StarBlock.table("guinier", plot)]})


def write_emdb_xml(path: Path, curves: FscCurves) -> None:
    """The curve used, in the form the EMDB takes at deposition."""
    title = "Corrected FSC" if curves.masked_S is not None else "Unmasked FSC"
    lines = [f'<fsc title="{title}" xaxis="Resolution (A-1)" yaxis="Correlation Coefficient">']
    for shell, value in enumerate(curves.best_S.tolist()):
        frequency = shell / (curves.box * curves.pixel_size)
        lines.append(f"  <coordinate>\n    <x>{frequency:.6f}</x>\n    <y>{value:.6f}</y>\n  </coordinate>")
    with atomic_path(path, False) as temporary:
        temporary.write_text("\n".join([*lines, "</fsc>", ""]), encoding="utf-8")
