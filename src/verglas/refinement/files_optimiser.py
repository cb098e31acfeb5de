"""optimiser.star and sampling.star of a refinement: its options, grids and convergence, and the names of its other files."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from torch import Tensor

import verglas
from verglas.io.atomic import atomic_path
from verglas.io.star import StarBlock, write_star
from verglas.io.star_block import Value
from verglas.refinement.config import ClassifyConfig, RefineConfig
from verglas.refinement.files_data import shown_path
from verglas.refinement.state import State

UNLIMITED = -1.0
NO_TILT_LIMIT = -91.0  # degrees
NO_FILE = "None"


@dataclass(frozen=True)
class OptimiserFile:
    """What an optimiser.star names. root: how the files of the run begin; models: one per half-set, or one for all."""

    root: Path
    models: list[Path]
    data: Path
    sampling: Path
    command_line: str


def write_optimiser(path: Path, names: OptimiserFile, state: State, config: RefineConfig) -> None:
    """Write the optimiser.star, replacing a file of that name; version and command line stand in comments at its top."""
    values = _names(names, state) | _options(config) | _progress(state) | dict.fromkeys(_SWITCHED_OFF, 0)
    comment = f"# verglas optimiser; version {verglas.__version__}\n# {' '.join(names.command_line.split())}\n"
    with atomic_path(path, overwrite=True) as part:
        write_star(part, {"optimiser_general": StarBlock.pairs("optimiser_general", values)})
        part.write_bytes(comment.encode() + part.read_bytes())


def write_sampling(path: Path, state: State, config: RefineConfig, directions_D2: Tensor) -> None:
    """Write the sampling.star, replacing a file of that name. directions_D2: (rot, tilt), degrees."""
    schedule = state.schedule
    first_step = schedule.psi_step or 360.0 / (6 * 2**config.healpix_order)
    values: dict[str, Value] = {
        "rlnIs3DSampling": int(not schedule.psi_step),
        "rlnIs3DTranslationalSampling": 0,
        "rlnHealpixOrder": schedule.healpix_order,
        "rlnSymmetryGroup": config.symmetry,
        "rlnTiltAngleLimit": NO_TILT_LIMIT,
        "rlnPsiStep": schedule.angular_step,
        "rlnOffsetRange": schedule.offset_range,
        "rlnOffsetStep": schedule.offset_step,
        "rlnHelicalOffsetStep": UNLIMITED,
        "rlnSamplingPerturbInstance": schedule.perturbation,
        "rlnSamplingPerturbFactor": config.perturbation,
        "rlnHealpixOrderOriginal": config.healpix_order,
        "rlnPsiStepOriginal": first_step,
        "rlnOffsetRangeOriginal": config.offset_range * state.pixel_size,
        "rlnOffsetStepOriginal": config.offset_step * state.pixel_size,
    }
    degrees_2D = directions_D2.double().cpu().numpy().T
    directions = pd.DataFrame(dict(zip(("rlnAngleRot", "rlnAngleTilt"), degrees_2D)))
    blocks = {
        "sampling_general": StarBlock.pairs("sampling_general", values),
        "sampling_directions": StarBlock.table("sampling_directions", directions),
    }
    write_star(path, blocks, overwrite=True)


def _names(names: OptimiserFile, state: State) -> dict[str, Value]:
    labels = ("rlnModelStarFile", "rlnModelStarFile2")
    split = len(names.models) > 1
    return {
        "rlnOutputRootName": shown_path(names.root),
        **{label: shown_path(model) for label, model in zip(labels, names.models)},
        "rlnExperimentalDataStarFile": shown_path(names.data),
        "rlnOrientSamplingStarFile": shown_path(names.sampling),
        "rlnCurrentIteration": state.iteration,
        "rlnDoSplitRandomHalves": int(split),
        "rlnDoAutoRefine": int(split or state.solved),  # RELION's needs half-sets, but keeps the word in its final file
    }


def _options(config: RefineConfig) -> dict[str, Value]:
    align = config.align if isinstance(config, ClassifyConfig) else "all"
    return {
        "rlnDoSkipAlign": int(align == "none"),
        "rlnDoSkipRotate": int(align == "offsets"),
        "rlnNumberOfIterations": config.max_iterations,
        "rlnJoinHalvesUntilThisResolution": config.join_resolution,
        "rlnAdaptiveOversampleOrder": config.oversampling,
        "rlnAdaptiveOversampleFraction": config.adaptive_fraction,
        "rlnRandomSeed": config.seed,
        "rlnParticleDiameter": config.diameter,
        "rlnWidthMaskEdge": round(config.mask_edge),
        "rlnDoZeroMask": 1,
        "rlnDoSolventFlattening": 1,
        "rlnDoSolventFscCorrection": int(config.solvent_corrected_fsc),
        "rlnSolventMaskName": shown_path(config.mask) if config.mask else NO_FILE,
        "rlnSolventMask2Name": NO_FILE,
        "rlnBodyStarFile": NO_FILE,
        "rlnTauSpectrumName": NO_FILE,
        "rlnFourierMask": NO_FILE,
        "rlnLocalSymmetryFile": NO_FILE,
        "rlnMaximumCoarseImageSize": -1,
        "rlnHighresLimitExpectation": config.limit_resolution or UNLIMITED,
        "rlnLowresLimitExpectation": UNLIMITED,
        "rlnDoMapEstimation": 1,
        "rlnAutoLocalSearchesHealpixOrder": config.local_from_order,
        "rlnDoCorrectNorm": int(config.correct_norm),
        "rlnDoCorrectScale": int(config.correct_scale),
        "rlnDoCorrectCtf": 1,
        "rlnRefsAreCtfCorrected": 1,
        "rlnMaxNumberOfPooledParticles": 1,
    }


def _progress(state: State) -> dict[str, Value]:
    schedule = state.schedule
    best = 1 / schedule.best_resolution if math.isfinite(schedule.best_resolution) else 0.0
    return {
        "rlnIncrementImageSize": schedule.size_increment,
        "rlnNumberOfIterWithoutResolutionGain": schedule.iterations_without_gain,
        "rlnBestResolutionThusFar": best,  # 1/Å, unlike rlnCurrentResolution
        "rlnNumberOfIterWithoutChangingAssignments": schedule.iterations_without_changes,
        "rlnOverallAccuracyRotations": schedule.accuracy_angles,
        "rlnOverallAccuracyTranslationsAngst": schedule.accuracy_offsets,
        "rlnChangesOptimalOrientations": schedule.changes_angles,
        "rlnChangesOptimalOffsets": schedule.changes_offsets,
        "rlnChangesOptimalClasses": schedule.changes_classes,
        "rlnSmallestChangesOrientations": schedule.smallest_angles,
        "rlnSmallestChangesOffsets": schedule.smallest_offsets,
        "rlnSmallestChangesClasses": 0,
        "rlnHasConverged": int(schedule.converged or state.solved),
        "rlnHasHighFscAtResolLimit": int(schedule.high_fsc_at_limit),
        "rlnHasLargeSizeIncreaseIterationsAgo": 0,
    }


_SWITCHED_OFF = (
    "rlnDoFastSubsetOptimisation", "rlnDoExternalReconstruct", "rlnDoStochasticGradientDescent", "rlnDoHelicalRefine",
    "rlnIgnoreHelicalSymmetry", "rlnDoIgnoreCtfUntilFirstPeak", "rlnCtfDataArePhaseFlipped", "rlnDoOnlyFlipCtfPhases",
    "rlnFixSigmaNoiseEstimates", "rlnFixSigmaOffsetEstimates",
)  # fmt: skip
