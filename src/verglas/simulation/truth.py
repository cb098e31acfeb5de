"""The truth of a simulated set: poses, offsets, classes, micrographs and CTFs, all drawn before the first image is made.

Every quantity has its own random stream, named by the seed and its name: changing one option (or the batch size, or the
device) leaves all the others as they were.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from verglas.core.rotations import euler_from_matrix, matrix_from_euler, rotation_about_axis
from verglas.errors import InputError
from verglas.optics.ctf import CtfParameters
from verglas.optics.group import OpticsGroup
from verglas.simulation.options import MicroscopeOptions, SampleOptions

MICROGRAPH_EDGE = 4000  # px; particle coordinates are uniform on such a square


@dataclass(frozen=True)
class Truth:
    """What is known of every image; arrays [B], float64 unless said.

    angles_B3: rot, tilt, psi in degrees; origin_B2: Å, the shift that centres the image; class_B: 1-based, 0 = junk;
    group_B: position in `groups`; micrograph_B: 1-based; image_B: 0-based place in the stack of its group;
    coordinate_B2: px on the micrograph.
    """

    groups: list[OpticsGroup]
    angles_B3: np.ndarray
    origin_B2: np.ndarray
    class_B: np.ndarray
    group_B: np.ndarray
    micrograph_B: np.ndarray
    image_B: np.ndarray
    coordinate_B2: np.ndarray
    ctf: CtfParameters

    def __len__(self) -> int:
        return len(self.class_B)

    def rotations(self) -> Tensor:
        """A [B, 3, 3] float64."""
        return matrix_from_euler(*torch.from_numpy(self.angles_B3).unbind(1))

    def stack_name(self, group: int) -> str:
        """File of the images of one optics group (0-based), relative to the run folder."""
        return "particles.mrcs" if len(self.groups) == 1 else f"particles_group{group + 1:02d}.mrcs"

    def data_frame(self, with_truth: bool) -> pd.DataFrame:
        """The particle table in RELION's labels; poses, origins and classes only `with_truth`."""
        names = [f"{image + 1:06d}@{self.stack_name(group)}" for image, group in zip(self.image_B, self.group_B)]
        columns: dict[str, object] = {
            "rlnImageName": names,
            "rlnMicrographName": [f"mic{micrograph:05d}.mrc" for micrograph in self.micrograph_B],
            "rlnCoordinateX": self.coordinate_B2[:, 0],
            "rlnCoordinateY": self.coordinate_B2[:, 1],
            "rlnOpticsGroup": self.group_B + 1,
            "rlnDefocusU": self.ctf.defocus_u_B.numpy(),
            "rlnDefocusV": self.ctf.defocus_v_B.numpy(),
            "rlnDefocusAngle": self.ctf.angle_B.numpy(),
        }
        if bool(self.ctf.phase_shift_B.any()):
            columns["rlnPhaseShift"] = self.ctf.phase_shift_B.numpy()
        if with_truth:
            for axis, label in enumerate(("rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi")):
                columns[label] = self.angles_B3[:, axis]
            columns |= {"rlnOriginXAngst": self.origin_B2[:, 0], "rlnOriginYAngst": self.origin_B2[:, 1]}
            columns["rlnClassNumber"] = self.class_B
        return pd.DataFrame(columns)

    def optics_frame(self) -> pd.DataFrame:
        """The optics table in RELION's labels; beam tilt only where a group has one."""
        tilted = any(group.beam_tilt_mrad != (0.0, 0.0) for group in self.groups)
        rows = []
        for group in self.groups:
            row: dict[str, object] = {
                "rlnOpticsGroupName": group.name, "rlnOpticsGroup": group.number, "rlnVoltage": group.voltage_kv,
                "rlnSphericalAberration": group.cs_mm, "rlnAmplitudeContrast": group.amplitude_contrast,
                "rlnImagePixelSize": group.pixel_size, "rlnImageSize": group.box, "rlnImageDimensionality": 2,
            }  # fmt: skip
            if tilted:
                row |= {"rlnBeamTiltX": group.beam_tilt_mrad[0], "rlnBeamTiltY": group.beam_tilt_mrad[1]}
            rows.append(row)
        return pd.DataFrame(rows)


def draw_truth(sample: SampleOptions, microscope: MicroscopeOptions, n_models: int, seed: int) -> Truth:
    """Draw everything that is random except the noise. Micrographs take their turn through the optics groups."""
    n = sample.n
    groups = optics_groups(microscope, seed)
    micrograph_B = np.arange(n) // microscope.per_micrograph
    group_B = micrograph_B % len(groups)
    pixel_B = np.array([group.pixel_size for group in groups])[group_B]
    image_B = np.empty(n, np.int64)
    for group in range(len(groups)):
        members = np.flatnonzero(group_B == group)
        image_B[members] = np.arange(len(members))
    return Truth(
        groups, draw_angles(sample, seed), stream(seed, "offset").normal(0, sample.offset_sigma, (n, 2)) * pixel_B[:, None],
        draw_classes(sample, n_models, seed), group_B, micrograph_B + 1, image_B,
        stream(seed, "coordinate").uniform(0, MICROGRAPH_EDGE, (n, 2)), draw_ctf(microscope, micrograph_B, seed),
    )  # fmt: skip


def stream(seed: int, name: str) -> np.random.Generator:
    """The random numbers of one quantity."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())])


def optics_groups(options: MicroscopeOptions, seed: int) -> list[OpticsGroup]:
    """One OpticsGroup per value given; a single value serves all."""
    count = options.group_count
    tilt_G2 = np.array(options.beam_tilt) + stream(seed, "beam tilt").normal(0, 1, (count, 2)) * options.beam_tilt_sigma

    def value(values: tuple, index: int) -> float:
        return values[index if len(values) > 1 else 0]

    return [
        OpticsGroup(
            f"opticsGroup{g + 1}", g + 1, value(options.voltage, g), value(options.cs, g), value(options.amplitude_contrast, g),
            value(options.pixel, g), int(value(options.box, g)), beam_tilt_mrad=(float(tilt_G2[g, 0]), float(tilt_G2[g, 1])),
        )
        for g in range(count)
    ]  # fmt: skip


def draw_angles(sample: SampleOptions, seed: int) -> np.ndarray:
    """rot, tilt, psi [B, 3] in degrees: uniform over all rotations, a fraction gathered about the preferred view."""
    uniform_B3 = stream(seed, "angles").random((sample.n, 3))
    rot_B, psi_B = 360 * uniform_B3[:, 0] - 180, 360 * uniform_B3[:, 2] - 180
    angles_B3 = np.stack([rot_B, np.rad2deg(np.arccos(1 - 2 * uniform_B3[:, 1])), psi_B], 1)
    gathered = np.flatnonzero(stream(seed, "preferred").random(sample.n) < sample.preferred)
    if len(gathered) == 0:
        return angles_B3
    # Views scatter about object z first, which is then turned to the preferred view: A = Rz(psi) Ry(tilt) Rz(rot) R.
    spread_B2 = stream(seed, "spread").normal(0, sample.preferred_spread, (sample.n, 2))[gathered]
    rot_P, tilt_P = np.rad2deg(np.arctan2(spread_B2[:, 1], spread_B2[:, 0])), np.hypot(spread_B2[:, 0], spread_B2[:, 1])
    near_z_P33 = matrix_from_euler(*(torch.from_numpy(a) for a in (rot_P, tilt_P, psi_B[gathered] - rot_P)))
    rot, tilt = sample.preferred_view
    to_z = rotation_about_axis((0, 1, 0), -tilt) @ rotation_about_axis((0, 0, 1), -rot)
    angles_B3[gathered] = euler_from_matrix(near_z_P33 @ to_z).numpy()
    return angles_B3


def draw_classes(sample: SampleOptions, n_models: int, seed: int) -> np.ndarray:
    """Class of every image, int64 [B]: 1..n_models by the weights, 0 for junk."""
    weights = np.array(sample.weights or [1.0] * n_models, np.float64)
    edges = np.cumsum(weights / weights.sum())
    class_B = np.searchsorted(edges[:-1], stream(seed, "class").random(sample.n), side="right") + 1
    class_B[stream(seed, "junk").random(sample.n) < sample.junk] = 0
    return class_B.astype(np.int64)


def draw_ctf(options: MicroscopeOptions, micrograph_B: np.ndarray, seed: int) -> CtfParameters:
    """Defocus, astigmatism and phase shift vary from micrograph to micrograph; defocus also within one. float64 [B]."""
    n, n_micrographs = len(micrograph_B), int(micrograph_B.max()) + 1
    phase_shift_M = stream(seed, "phase shift").uniform(*options.phase_shift, n_micrographs)
    if options.defocus_file is not None:
        defocus_B3 = _real_defoci(options.defocus_file, n)
    else:
        random = stream(seed, "defocus")
        mean_M = random.uniform(*options.defocus, n_micrographs)
        angle_M = random.uniform(0, 180, n_micrographs)
        difference_M = np.abs(random.normal(0, 1, n_micrographs)) * options.astigmatism
        height_B = stream(seed, "height").normal(0, 1, n) * options.defocus_sigma
        mean_B = mean_M[micrograph_B] + height_B
        half_B = difference_M[micrograph_B] / 2
        defocus_B3 = np.stack([mean_B + half_B, mean_B - half_B, angle_M[micrograph_B]], 1)
    u_B, v_B, angle_B = torch.from_numpy(np.ascontiguousarray(defocus_B3.T))
    shift_B = torch.from_numpy(phase_shift_M[micrograph_B])
    return CtfParameters(u_B, v_B, angle_B, shift_B, torch.zeros(n).double(), torch.ones(n).double(), has_envelope=False)


def _real_defoci(path: Path, n: int) -> np.ndarray:
    try:
        defocus_B3 = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(path, f"not a readable .npy file ({error})", "an array [N, 3]", "Write it with numpy.save.") from error
    if defocus_B3.ndim != 2 or defocus_B3.shape[1] != 3 or not np.issubdtype(defocus_B3.dtype, np.number):
        raise InputError(path, f"array of shape {defocus_B3.shape}", "[N, 3]: DefocusU, DefocusV (Å), angle (degrees)")
    if len(defocus_B3) < n:
        raise InputError(path, f"{len(defocus_B3)} rows", f"at least {n}, one per particle", "Lower --n or give more rows.")
    if not np.isfinite(defocus_B3[:n]).all():
        raise InputError(path, "values that are not finite", "defoci in Å and angles in degrees")
    return defocus_B3[:n].astype(np.float64)
