"""CTF and aberrations against RELION itself, through the image of a point."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import mrcfile
import numpy as np
import pytest
import torch

from verglas.core.fourier import centred_irfft2, centred_rfft2, half_plane_pixels
from verglas.optics.aberrations import aberration_phase_K
from verglas.optics.ctf import CtfParameters, ctf_reference_BK
from verglas.optics.group import OpticsGroup

BOX, PIXEL = 64, 1.5
GROUP = OpticsGroup(
    "g1", 1, voltage_kv=200.0, cs_mm=1.4, amplitude_contrast=0.1, pixel_size=PIXEL, box=BOX,
    even_zernike=(0.1, 0.5, -2.0, 1.0, 0.3, -0.2, 4.0, 0.7, -1.1), odd_zernike=(0.1, 0.2, 8.0, 0.0, 0.0, 6.0),
    beam_tilt_mrad=(0.5, -0.8), magnification=((1.02, 0.004), (-0.01, 0.985)),
)  # fmt: skip
PARTICLES = [(15000, 14000, 33, 0, 0, 1), (22000, 18000, -71, 40, 50, 0.8), (-9000, -9500, 10, 90, 0, 1)]
PARTICLE_LABELS = ["DefocusU", "DefocusV", "DefocusAngle", "PhaseShift", "CtfBfactor", "CtfScalefactor"]


def table(name: str, rows: list[dict[str, object]]) -> str:
    text = f"\n# version 30001\n\ndata_{name}\n\nloop_\n" + "".join(f"_rln{label}\n" for label in rows[0])
    return text + "".join(" ".join(map(str, row.values())) + "\n" for row in rows) + "\n"


def star_text(particles: list[tuple[float, ...]], pose: tuple[float, float, float]) -> str:
    (m00, m01), (m10, m11) = GROUP.magnification
    optics = {
        "OpticsGroupName": "g1", "OpticsGroup": 1, "Voltage": 200.0, "SphericalAberration": 1.4, "AmplitudeContrast": 0.1,
        "ImagePixelSize": PIXEL, "ImageSize": BOX, "ImageDimensionality": 2, "BeamTiltX": GROUP.beam_tilt_mrad[0],
        "BeamTiltY": GROUP.beam_tilt_mrad[1], "OddZernike": str(list(GROUP.odd_zernike)).replace(" ", ""),
        "EvenZernike": str(list(GROUP.even_zernike)).replace(" ", ""),
        "MagMat00": m00, "MagMat01": m01, "MagMat10": m10, "MagMat11": m11,
    }  # fmt: skip
    rows = []
    for number, values in enumerate(particles, 1):
        angles = dict(zip(["AngleRot", "AngleTilt", "AnglePsi"], pose))
        rows.append({"ImageName": f"{number:06d}@s.mrcs", "OpticsGroup": 1, **dict(zip(PARTICLE_LABELS, values)), **angles})
    return table("optics", [optics]) + table("particles", rows)


def run(command: str, folder: Path) -> None:
    if shutil.which(command.split()[0]) is None:
        pytest.skip(f"{command.split()[0]} is not installed")
    subprocess.run(command.split(), cwd=folder, check=True, capture_output=True)


def parameters(particles: list[tuple[float, ...]]) -> CtfParameters:
    return CtfParameters(*torch.tensor(particles, dtype=torch.float64).T)


@pytest.mark.interop
def test_transform_of_a_projected_point_is_our_ctf(tmp_path):
    point = np.zeros((BOX, BOX, BOX), np.float32)
    point[BOX // 2, BOX // 2, BOX // 2] = 1e4
    mrcfile.write(tmp_path / "point.mrc", point, voxel_size=PIXEL)
    (tmp_path / "poses.star").write_text(star_text(PARTICLES, (10, 20, 30)))
    run(f"relion_project --i point.mrc --ang poses.star --ctf --angpix {PIXEL} --o out", tmp_path)
    images = torch.from_numpy(mrcfile.read(tmp_path / "out.mrcs")).double()
    pixels = half_plane_pixels(BOX, BOX // 2 - 1)
    theirs = pixels.gather(centred_rfft2(images)) * BOX * BOX / 1e4
    ours = ctf_reference_BK(pixels.frequency_K2(PIXEL, torch.float64), parameters(PARTICLES), GROUP)
    assert (theirs - ours).abs().max() < 1e-6


@pytest.mark.interop
@pytest.mark.parametrize("sign, is_real", [(1, True), (-1, False)])
def test_relion_undoes_our_odd_aberrations(tmp_path, sign, is_real):
    """The image of a point, aberrated by us, comes out of relion_reconstruct without any phase; with the wrong sign it does not.

    The third-order terms of rlnOddZernike are 0 here: RELION 3.1 replaces them by the beam tilt, RELION 5 adds the two.
    """
    particle = [(8000.0, 8000.0, 0.0, 0.0, 0.0, 1.0)]
    pixels = half_plane_pixels(BOX, BOX // 2 - 1)
    frequency = pixels.frequency_K2(PIXEL, torch.float64)
    phase = aberration_phase_K(frequency, GROUP)
    assert phase.abs().max() > 1.5
    fourier = ctf_reference_BK(frequency, parameters(particle), GROUP) * torch.exp(1j * sign * phase)
    with mrcfile.new(tmp_path / "s.mrcs") as file:
        file.set_data(centred_irfft2(pixels.scatter(fourier), BOX).float().numpy())
        file.set_image_stack()
        file.voxel_size = PIXEL
    (tmp_path / "s.star").write_text(star_text(particle, (0, 0, 0)))
    run("relion_reconstruct --i s.star --o r.mrc --ctf --skip_gridding", tmp_path)
    map_ZYX = torch.from_numpy(mrcfile.read(tmp_path / "r.mrc")).double()
    inside = half_plane_pixels(BOX, BOX // 2 - 6)
    central_K = inside.gather(centred_rfft2(map_ZYX.sum(0)))
    imaginary_share = float(central_K.imag.norm() / central_K.real.norm())
    assert imaginary_share < 0.02 if is_real else imaginary_share > 0.2
