"""The CTF against RELION itself: the transform of a projected point is the CTF."""

from __future__ import annotations

import shutil
import subprocess

import mrcfile
import numpy as np
import pytest
import torch

from verglas.core.fourier import centred_rfft2, half_plane_pixels
from verglas.optics.ctf import CtfParameters, ctf_reference_BK
from verglas.optics.group import OpticsGroup

BOX, PIXEL = 64, 1.5
GROUP = OpticsGroup(
    "g1", 1, voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=0.1, pixel_size=PIXEL, box=BOX,
    even_zernike=(0.1, 0.5, -2.0, 1.0, 0.3, -0.2, 4.0, 0.7, -1.1), magnification=((1.02, 0.004), (-0.01, 0.985)),
)  # fmt: skip
PARTICLES = [(15000, 14000, 33, 0, 0, 1), (22000, 18000, -71, 40, 50, 0.8), (-9000, -9500, 10, 90, 0, 1)]
OPTICS_LABELS = [
    "OpticsGroupName",
    "OpticsGroup",
    "Voltage",
    "SphericalAberration",
    "AmplitudeContrast",
    "ImagePixelSize",
    "ImageSize",
    "ImageDimensionality",
    "EvenZernike",
    "MagMat00",
    "MagMat01",
    "MagMat10",
    "MagMat11",
]
PARTICLE_LABELS = [
    "ImageName",
    "OpticsGroup",
    "DefocusU",
    "DefocusV",
    "DefocusAngle",
    "PhaseShift",
    "CtfBfactor",
    "CtfScalefactor",
    "AngleRot",
    "AngleTilt",
    "AnglePsi",
]


def star_text() -> str:
    even = "[" + ",".join(map(str, GROUP.even_zernike)) + "]"
    magnification = [value for row in GROUP.magnification for value in row]
    optics = ["g1", 1, 200.0, 1.4, 0.1, PIXEL, BOX, 2, even, *magnification]
    rows = [[f"{i + 1:06d}@x.mrcs", 1, *values, 10 * i, 20, 30] for i, values in enumerate(PARTICLES)]
    text = ""
    for name, labels, table in (("optics", OPTICS_LABELS, [optics]), ("particles", PARTICLE_LABELS, rows)):
        text += f"\n# version 30001\n\ndata_{name}\n\nloop_\n" + "".join(f"_rln{label}\n" for label in labels)
        text += "".join(" ".join(map(str, row)) + "\n" for row in table) + "\n"
    return text


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("relion_project") is None, reason="relion_project is not installed")
def test_transform_of_a_projected_point_is_our_ctf(tmp_path):
    point = np.zeros((BOX, BOX, BOX), np.float32)
    point[BOX // 2, BOX // 2, BOX // 2] = 1e4
    mrcfile.write(tmp_path / "point.mrc", point, voxel_size=PIXEL)
    (tmp_path / "poses.star").write_text(star_text())
    command = f"relion_project --i point.mrc --ang poses.star --ctf --angpix {PIXEL} --o out"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    images = torch.from_numpy(mrcfile.read(tmp_path / "out.mrcs")).double()
    pixels = half_plane_pixels(BOX, BOX // 2 - 1)
    theirs = pixels.gather(centred_rfft2(images)) * BOX * BOX / 1e4
    parameters = CtfParameters(*torch.tensor(PARTICLES, dtype=torch.float64).T)
    ours = ctf_reference_BK(pixels.frequency_K2(PIXEL, torch.float64), parameters, GROUP)
    assert (theirs - ours).abs().max() < 1e-6
