"""The data.star of a refinement: the particles as they came, with poses and figures brought up to date."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from verglas.core.rotations import euler_from_matrix
from verglas.particles.table import POSE_LABELS, ParticleTable
from verglas.refinement.state import Poses, State

# Unknown to RELION, which carries such columns along as text; docs/conventions.md says what they are.
ENTROPY_LABEL, GAIN_LABEL, ALIGNABILITY_LABEL = "vglPosteriorEntropy", "vglLogLikelihoodGain", "vglAlignability"
FIT_LABELS, MODEL_LABELS = ("vglClassFit", "vglClassDetailFit"), ("vglModelGain", "vglModelMisfit")
PIXEL_ORIGINS = ("rlnOriginX", "rlnOriginY")


@dataclass(frozen=True)
class FileGroups:
    """Groups as files number them. order_M: positions in state.micrographs, first group of the files first;
    optics_M: position in table.groups of the first particle of each, in the order of state.micrographs;
    optics_order_G: positions in table.groups, smallest rlnOpticsGroup first."""

    order_M: np.ndarray
    optics_M: np.ndarray
    optics_order_G: np.ndarray


def write_data(path: Path, state: State, table: ParticleTable) -> None:
    """Write `table` with the poses and figures of `state`, replacing a file of that name."""
    updated_table(state, table).write(path, overwrite=True)


def updated_table(state: State, table: ParticleTable) -> ParticleTable:
    """All columns of `table`, with those that a refinement determines replaced or added; image names lead from here.

    Origins in pixels (RELION 3.0) stay beside those in Å where they came, with the same values.
    """
    poses = Poses(*(getattr(state.poses, field.name).cpu() for field in fields(Poses)))
    origin_B2 = poses.origin_B2.numpy()
    columns: dict[str, np.ndarray] = dict(zip(POSE_LABELS, euler_from_matrix(poses.rotation_B33).numpy().T))
    columns |= {"rlnOriginXAngst": origin_B2[:, 0], "rlnOriginYAngst": origin_B2[:, 1]}
    pixel_B = np.array([group.pixel_size for group in table.groups])[table.group_index_B]
    columns |= {label: origin_B2[:, i] / pixel_B for i, label in enumerate(PIXEL_ORIGINS) if label in table.frame.columns}
    columns |= {} if state.classified else {"rlnRandomSubset": poses.half_B.numpy()}  # a classification draws no half-sets
    columns |= {
        "rlnClassNumber": 1 + poses.class_B.numpy(),
        "rlnGroupNumber": 1 + np.argsort(groups_in_file_order(state, table).order_M)[poses.micrograph_B.numpy()],
        "rlnNormCorrection": poses.norm_B.numpy(),
        "rlnLogLikeliContribution": poses.log_likelihood_B.numpy(),
        "rlnMaxValueProbDistribution": poses.pmax_B.numpy(),
        "rlnNrOfSignificantSamples": poses.significant_B.numpy(),
        ENTROPY_LABEL: poses.entropy_B.numpy(),
        GAIN_LABEL: poses.gain_B.numpy(),
        ALIGNABILITY_LABEL: poses.alignability_B.numpy(),
    }
    columns |= {} if state.fit_B2 is None else dict(zip(FIT_LABELS, state.fit_B2.numpy().T))
    columns |= {} if state.model_fit_B2 is None else dict(zip(MODEL_LABELS, state.model_fit_B2.numpy().T))
    return named_from(table, Path.cwd()).with_columns(**columns)


@lru_cache(maxsize=1)  # every iteration asks for the same
def named_from(table: ParticleTable, here: Path) -> ParticleTable:
    """Image names that lead to the stacks from the working folder `here`, where RELION starts; self if they do so already.

    Stacks below the working folder get relative names, others absolute ones. Names are kept, too, where the first
    stack is not to be found now: there is nothing to make better names of.
    """
    where = table.image_locations()
    stack, first = where.paths[where.stack_index_B[0]], table.frame["rlnImageName"].iloc[0].rpartition("@")[2]
    if not stack.is_file() or (os.path.exists(first) and os.path.samefile(first, stack)):
        return table
    names = [shown_path(path) for path in where.paths]
    pairs = zip(where.image_index_B.tolist(), where.stack_index_B.tolist())
    renamed = table.with_columns(rlnImageName=[f"{image + 1:06d}@{names[index]}" for image, index in pairs])
    return replace(renamed, folder=here)


def shown_path(path: Path) -> str:
    """A path as files name it: from the working folder if it lies below, absolute otherwise."""
    absolute = Path(os.path.abspath(path))
    here = Path.cwd()
    return str(absolute.relative_to(here) if absolute.is_relative_to(here) else absolute)


def groups_in_file_order(state: State, table: ParticleTable) -> FileGroups:
    """Scale groups in the order in which RELION meets them: it sorts the particles by micrograph before it numbers them.

    RELION looks neither at rlnGroupNumber nor at the names in model.star when it reads a run, only at this order.
    """
    group_B = state.poses.micrograph_B.cpu().numpy()
    n_groups = len(state.halves[0].scale_M)
    seen_B = np.arange(len(table))
    if "rlnMicrographName" in table.frame.columns:
        names = table.frame["rlnMicrographName"].astype(str).to_numpy(object)
        if "@" in names[0]:  # frames of movies: NNNNNN@micrograph
            names = np.array([name.partition("@")[2] for name in names], object)
        seen_B = np.argsort(names, kind="stable")
    met, first = np.unique(group_B[seen_B], return_index=True)
    order = met[np.argsort(first)]
    unmet = np.setdiff1d(np.arange(n_groups), met)
    optics_M = np.zeros(n_groups, np.int64)
    optics_M[met] = table.group_index_B[seen_B[first]]
    optics_order_G = np.argsort([group.number for group in table.groups])
    return FileGroups(np.concatenate([order, unmet]), optics_M, optics_order_G)
