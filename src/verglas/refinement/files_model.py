"""The model.star of a refinement: what one half-set (or all particles together, in classes) knows besides poses and maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from verglas.io.atomic import atomic_path
from verglas.io.star import StarBlock, write_star
from verglas.io.star_block import Value
from verglas.maximization.halves import Solution
from verglas.refinement.config import RefineConfig
from verglas.refinement.files_data import FileGroups, shown_path
from verglas.refinement.state import HalfModel, State

NO_RESOLUTION = 999.0  # Å; how RELION writes infinity
TRILINEAR = 1
NO_PRIOR, PRIOR_ON_ANGLES = 0, 1
STAR_VERSION = 50001


@dataclass(frozen=True)
class ModelFile:
    """What one model.star describes. classes: one model, or one per class; map_paths: their maps; members_B: bool, the
    particles behind it; spectra: those of the one map, where they are not those of its model; planes: the one path is a stack
    of class averages, which have no direction."""

    state: State
    classes: list[HalfModel]
    map_paths: list[Path]
    groups: FileGroups
    members_B: Tensor
    spectra: Solution | None = None
    planes: bool = False

    @property
    def half(self) -> HalfModel:
        """Where everything stands that classes share."""
        return self.classes[0]

    @property
    def references(self) -> list[str]:
        """Names of the maps or averages, as files say them."""
        if self.planes:
            return [f"{k:06d}@{shown_path(self.map_paths[0])}" for k in range(1, len(self.classes) + 1)]
        return [shown_path(path) for path in self.map_paths]

    def spectra_of(self, number: int) -> HalfModel | Solution:
        """Spectra of the map of a class (0 for the first)."""
        return self.spectra or self.classes[number]


def write_model(path: Path, model: ModelFile, config: RefineConfig) -> None:
    """Write `model`, replacing a file of that name.

    The noise is written per optics group (RELION 4 and 5) and again per scale group, where RELION 3.1 looks for it.
    """
    state, half, numbers = model.state, model.half, range(len(model.classes))
    frames = {"model_classes": _class_frame(model)}
    frames |= {f"model_class_{k + 1}": _spectra_frame(model, k) for k in numbers}
    frames["model_groups"] = _groups_frame(model)
    if not model.planes:
        priors = [one.direction_prior_D.cpu().numpy() for one in model.classes]
        frames |= {f"model_pdf_orient_class_{k + 1}": pd.DataFrame({"rlnOrientationDistribution": priors[k]}) for k in numbers}
    blocks = {"model_general": StarBlock.pairs("model_general", _general(model, config))}
    blocks |= {name: StarBlock.table(name, frame) for name, frame in frames.items()}
    with atomic_path(path, overwrite=True) as part:
        write_star(part, blocks, version=STAR_VERSION)
        with open(part, "a", encoding="ascii") as file:
            tables = [_noise_table(spectrum_S, state) for spectrum_S in half.sigma2_noise_GS.double().cpu().numpy()]
            for number, optics in enumerate(model.groups.optics_order_G.tolist(), 1):
                file.write(_named(f"model_optics_group_{number}", tables[optics]))
            counts_M = _counts(model)
            for number, group in enumerate(model.groups.order_M.tolist(), 1):
                if counts_M[group] > 0:
                    file.write(_named(f"model_group_{number}", tables[model.groups.optics_M[group]]))


def _general(model: ModelFile, config: RefineConfig) -> dict[str, Value]:
    state, half = model.state, model.half
    local = state.schedule.local_sigma
    return {
        "rlnReferenceDimensionality": 2 if model.planes else 3,
        "rlnDataDimensionality": 2,
        "rlnOriginalImageSize": state.box,
        "rlnCurrentResolution": in_angstrom(state.current_resolution),
        "rlnCurrentImageSize": state.current_size,
        "rlnPaddingFactor": config.padding,
        "rlnIsHelix": 0,
        "rlnFourierSpaceInterpolator": TRILINEAR,
        "rlnMinRadiusNnInterpolation": 10,
        "rlnPixelSize": state.pixel_size,
        "rlnNrClasses": len(model.classes),
        "rlnNrBodies": 1,
        "rlnNrGroups": len(half.scale_M),
        "rlnNrOpticsGroups": len(half.sigma2_noise_GS),
        "rlnTau2FudgeFactor": config.tau2_fudge,
        "rlnNormCorrectionAverage": half.norm_average,
        "rlnSigmaOffsetsAngst": half.offset_sigma,
        "rlnOrientationalPriorMode": PRIOR_ON_ANGLES if local > 0 else NO_PRIOR,
        "rlnSigmaPriorRotAngle": local,
        "rlnSigmaPriorTiltAngle": local,
        "rlnSigmaPriorPsiAngle": local,
        "rlnLogLikelihood": half.log_likelihood,
        "rlnAveragePmax": half.average_pmax,
    }


def _class_frame(model: ModelFile) -> pd.DataFrame:
    state, figures = model.state, []
    for number in range(len(model.classes)):
        spectra = model.spectra_of(number)
        shell = _last_shell_with_signal(_per_shell(spectra.ssnr_S, state))
        covered_S = _per_shell(spectra.coverage_S, state)[: shell + 1]
        volume_S = np.diff(np.arange(shell + 2.0) ** (2 if model.planes else 3))  # as a disc or a ball holds the shells
        figures.append((in_angstrom(state.resolution_of(shell)), float((covered_S * volume_S).sum() / volume_S.sum())))
    shares = [float(one.direction_prior_D.sum()) for one in model.classes] if len(model.classes) > 1 else [1.0]
    frame = pd.DataFrame({
        "rlnReferenceImage": model.references,
        "rlnClassDistribution": shares,
        "rlnAccuracyRotations": state.schedule.accuracy_angles,
        "rlnAccuracyTranslationsAngst": state.schedule.accuracy_offsets,
        "rlnEstimatedResolution": [resolution for resolution, _ in figures],
        "rlnOverallFourierCompleteness": [covered for _, covered in figures],
    })  # fmt: skip
    return frame.assign(rlnClassPriorOffsetX=0.0, rlnClassPriorOffsetY=0.0) if model.planes else frame


def _spectra_frame(model: ModelFile, number: int) -> pd.DataFrame:
    state = model.state
    spectra = model.spectra_of(number)
    shells = range(state.shells)
    return pd.DataFrame({
        "rlnSpectralIndex": list(shells),
        "rlnResolution": [shell / (state.box * state.pixel_size) for shell in shells],
        "rlnAngstromResolution": [in_angstrom(state.resolution_of(shell)) for shell in shells],
        "rlnSsnrMap": _per_shell(spectra.ssnr_S, state),
        "rlnGoldStandardFsc": _per_shell(state.fsc_S, state),
        "rlnFourierCompleteness": _per_shell(spectra.coverage_S, state),
        "rlnReferenceSigma2": _per_shell(spectra.sigma2_S, state),
        "rlnReferenceTau2": _per_shell(spectra.tau2_S, state),
    })  # fmt: skip


def _groups_frame(model: ModelFile) -> pd.DataFrame:
    order_M = model.groups.order_M
    return pd.DataFrame({
        "rlnGroupNumber": np.arange(1, len(order_M) + 1),
        "rlnGroupName": [model.state.micrographs[group] for group in order_M],
        "rlnGroupNrParticles": _counts(model)[order_M],
        "rlnGroupScaleCorrection": model.half.scale_M.double().cpu().numpy()[order_M],
    })  # fmt: skip


def _counts(model: ModelFile) -> np.ndarray:
    """Particles of this model in each scale group, int64 [M]."""
    group_B = model.state.poses.micrograph_B.cpu()[model.members_B.cpu()].numpy()
    return np.bincount(group_B, minlength=len(model.half.scale_M))


def _noise_table(sigma2_S: np.ndarray, state: State) -> str:
    """Loop of a noise spectrum, shells with sigma^2 > 0 only; RELION takes missing ones as 0."""
    rows = [
        f"{shell:4d} {shell / (state.box * state.pixel_size)!r:>24} {value!r:>24}\n"
        for shell, value in enumerate(sigma2_S.tolist())
        if value > 0
    ]
    return "loop_\n_rlnSpectralIndex #1\n_rlnResolution #2\n_rlnSigma2Noise #3\n" + "".join(rows) + "\n"


def _named(name: str, table: str) -> str:
    return f"\n# version {STAR_VERSION}\n\ndata_{name}\n\n{table}"


def _per_shell(spectrum: Tensor, state: State) -> np.ndarray:
    """A spectrum on all shells of the box, float64 [S]: 0 beyond its end."""
    values = spectrum.double().cpu().numpy()
    return np.pad(values, (0, state.shells - len(values)))


def _last_shell_with_signal(ssnr_S: np.ndarray) -> int:
    """Last shell before the SSNR first falls below 1 (0: there is none)."""
    weak = np.flatnonzero(ssnr_S < 1)
    return max(int(weak[0]) - 1, 0) if len(weak) else len(ssnr_S) - 1


def in_angstrom(resolution: float) -> float:
    """A resolution in Å as RELION's files say it: 999 for infinity."""
    return resolution if np.isfinite(resolution) else NO_RESOLUTION
