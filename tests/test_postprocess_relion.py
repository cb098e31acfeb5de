"""Post-processing against RELION's programs on the same half-maps and masks."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import read_star
from verglas.optics.mtf import MtfCurve
from verglas.postprocess.automask import make_mask
from verglas.postprocess.curves import half_map_curves
from verglas.postprocess.options import FscOptions, MaskOptions, SharpenOptions
from verglas.postprocess.random_phases import squared_radius
from verglas.postprocess.sharpening import sharpen

pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="needs relion_postprocess"),
]
FSC = "rlnFourierShellCorrelation"
BETAGAL, GROEL = "betagal", "groel"


def relion(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def case(shared, tmp_path_factory):
    """Name -> folder with half1.mrc, half2.mrc, mask.mrc (64 px real beta-galactosidase; 100 px GroEL with noise)."""
    folders = {name: tmp_path_factory.mktemp(name) for name in (BETAGAL, GROEL)}
    for i in (1, 2):
        real = read_map(shared / f"data/betagal_relion_refine/run_half{i}_class001_unfil.mrc")
        write_map(folders[BETAGAL] / f"half{i}.mrc", real)
    groel = read_map(shared / "data/maps/EMD-1997_GroEL.map")
    write_noisy_halves(groel, folders[GROEL])
    for folder, threshold in ((folders[BETAGAL], "0.02"), (folders[GROEL], "0.3")):
        source = ["--i", "half1.mrc", "--o", "mask.mrc", "--lowpass", "15", "--ini_threshold", threshold]
        relion(["relion_mask_create", *source, "--extend_inimask", "3", "--width_soft_edge", "6"], folder)
    return folders


def write_noisy_halves(truth: Map, folder: Path) -> None:
    """The map damped by a B-factor of 150 Å^2 plus independent white noise in each half."""
    box = truth.box
    u2 = squared_radius(box).double() / (box * truth.pixel_size) ** 2
    damped = torch.fft.irfftn(torch.fft.rfftn(torch.tensor(truth.data_ZYX).double()) * torch.exp(-150 / 4 * u2), s=[box] * 3)
    generator = torch.Generator().manual_seed(3)
    for i in (1, 2):
        noise = 0.25 * damped.std() * torch.randn(damped.shape, generator=generator, dtype=torch.float64)
        write_map(folder / f"half{i}.mrc", Map((damped + noise).float().numpy(), truth.pixel_size))


def theirs(folder: Path, extra: list[str]) -> tuple[dict, dict]:
    (folder / "theirs").mkdir(exist_ok=True)
    halves = ["--i", "half1.mrc", "--i2", "half2.mrc", "--mask", "mask.mrc"]
    relion(["relion_postprocess", *halves, "--o", "theirs/post", "--verb", "0", *extra], folder)
    star = read_star(folder / "theirs/post.star")
    return star["general"].values, {name: star["fsc"].frame[name].to_numpy() for name in star["fsc"].frame}


def ours(folder: Path, fsc: FscOptions, sharpening: SharpenOptions, seed: int, mtf: Path | None):
    halves = [read_map(folder / f"half{i}.mrc") for i in (1, 2)]
    pixel = halves[0].pixel_size
    first, second, mask = (torch.tensor(m.data_ZYX) for m in (*halves, read_map(folder / "mask.mrc")))
    curves = half_map_curves(first, second, mask, pixel, fsc, seed)
    transfer = None
    if mtf is not None:
        curve = MtfCurve.read(mtf)
        transfer = lambda u: curve.at(u, sharpening.mtf_pixel or pixel)  # noqa: E731
    return curves, sharpen(0.5 * (first.double() + second.double()), curves, sharpening, transfer)


CASES = [
    (BETAGAL, ["--auto_bfac"], {}, {}, 0),
    (BETAGAL, ["--auto_bfac", "--autob_lowres", "15", "--autob_highres", "8"], {}, {"autob_lowres": 15, "autob_highres": 8}, 0),
    (BETAGAL, ["--auto_bfac", "--mtf", "MTF", "--mtf_angpix", "0.885"], {}, {"mtf_pixel": 0.885}, 0),
    (BETAGAL, ["--auto_bfac", "--mtf", "MTF"], {}, {}, 0),
    (BETAGAL, ["--adhoc_bfac", "-200", "--low_pass", "8"], {}, {"bfactor": -200, "low_pass": 8.0}, 0),
    (BETAGAL, ["--auto_bfac", "--low_pass", "-1", "--skip_fsc_weighting"], {}, {"low_pass": -1, "skip_fsc_weighting": True}, 0),
    (BETAGAL, ["--auto_bfac", "--randomize_at_fsc", "0.9", "--random_seed", "5"], {"randomise_at_fsc": 0.9}, {}, 5),
    (BETAGAL, ["--auto_bfac", "--randomize_at_A", "20"], {"randomise_at": 20.0}, {}, 0),
    (GROEL, ["--auto_bfac"], {}, {}, 0),
    (GROEL, ["--auto_bfac", "--random_seed", "7", "--autob_lowres", "15"], {}, {"autob_lowres": 15}, 7),
]


@pytest.mark.parametrize("name, extra, fsc, sharpening, seed", CASES)
def test_curves_resolution_bfactor_and_map_agree(case, shared, name, extra, fsc, sharpening, seed):
    folder, mtf = case[name], None
    if "MTF" in extra:
        mtf = shared / "data/betagal_tutorial/mtf_k2_200kV.star"
        extra = [str(mtf) if word == "MTF" else word for word in extra]
    general, table = theirs(folder, extra)
    curves, sharpened = ours(folder, FscOptions(**fsc), SharpenOptions(**sharpening), seed, mtf)
    pairs = {
        f"{FSC}UnmaskedMaps": curves.unmasked_S,
        f"{FSC}MaskedMaps": curves.masked_S,
        "rlnCorrectedFourierShellCorrelationPhaseRandomizedMaskedMaps": curves.random_S,
        f"{FSC}Corrected": curves.best_S,
        f"{FSC}ParticleMaskFraction": curves.particle_S,
    }
    difference = {label: np.abs(curve.numpy() - table[label])[1:].max() for label, curve in pairs.items()}
    bfactor = float(general["rlnBfactorUsedForSharpening"])
    expected = read_map(folder / "theirs/post.mrc").data_ZYX
    map_error = np.linalg.norm(sharpened.map_ZYX.numpy() - expected) / np.linalg.norm(expected)
    figures = [f"{difference[label]:.0e}" for label in pairs]
    print(name, *extra[:4], "| unmasked masked random corrected fraction:", *figures, "| resolution", curves.resolution,
          general["rlnFinalResolution"], "| B", round(sharpened.bfactor, 2), bfactor, "| map", f"{map_error:.0e}")  # fmt: skip
    # RELION prints six digits, and the same random numbers are drawn: far below the 0.01 that would be good enough.
    assert max(difference.values()) < 1e-4
    assert curves.resolution == pytest.approx(float(general["rlnFinalResolution"]), rel=1e-5)
    assert sharpened.bfactor == pytest.approx(bfactor, rel=0.01)
    assert map_error < 2e-3


def test_mask_is_that_of_relion_mask_create(case):
    folder = case[GROEL]
    options = MaskOptions(mask_lowpass=15, mask_threshold=0.3, mask_extend=3, mask_edge=6)
    half = read_map(folder / "half1.mrc")
    mask, _ = make_mask(torch.tensor(half.data_ZYX), half.pixel_size, options)
    assert np.abs(mask.numpy() - read_map(folder / "mask.mrc").data_ZYX).max() < 1e-5


@pytest.mark.parametrize("name", [BETAGAL, GROEL])
def test_relion_accepts_and_agrees_under_our_automatic_mask(case, name, tmp_path):
    for i in (1, 2):
        shutil.copy(case[name] / f"half{i}.mrc", tmp_path)
    first, second = (read_map(tmp_path / f"half{i}.mrc") for i in (1, 2))
    mask, _ = make_mask(torch.tensor(first.data_ZYX + second.data_ZYX) / 2, first.pixel_size, MaskOptions())
    write_map(tmp_path / "mask.mrc", Map(mask.numpy(), first.pixel_size))
    general, table = theirs(tmp_path, ["--auto_bfac"])
    curves, sharpened = ours(tmp_path, FscOptions(), SharpenOptions(), 0, None)
    assert np.abs(curves.best_S.numpy() - table[f"{FSC}Corrected"])[1:].max() < 1e-4
    assert sharpened.bfactor == pytest.approx(float(general["rlnBfactorUsedForSharpening"]), rel=0.01)


@pytest.mark.parametrize("name", [BETAGAL, GROEL])
def test_our_star_holds_what_theirs_holds(case, name):
    """Block by block: every label RELION writes is there, with its value (paths apart)."""
    folder, out = case[name], case[name] / "ours"
    theirs(folder, ["--auto_bfac"])
    halves = ["--half1", str(folder / "half1.mrc"), "--half2", str(folder / "half2.mrc"), "--mask", str(folder / "mask.mrc")]
    assert main(["postprocess", *halves, "--out", str(out)]) == 0
    expected, actual = read_star(folder / "theirs/post.star"), read_star(out / "postprocess.star")
    for label, value in expected["general"].values.items():
        if not isinstance(value, str):
            assert actual["general"].values[label] == pytest.approx(value, rel=1e-4), label
        else:
            assert label in actual["general"].values
    for block in ("fsc", "guinier"):
        for label in expected[block].frame:
            values = actual[block].frame[label].to_numpy()
            assert np.abs(values - expected[block].frame[label].to_numpy())[1:].max() < 1e-4, label
    ours_ZYX, theirs_ZYX = read_map(out / "map_masked.mrc").data_ZYX, read_map(folder / "theirs/post_masked.mrc").data_ZYX
    assert np.linalg.norm(ours_ZYX - theirs_ZYX) < 1e-5 * np.linalg.norm(theirs_ZYX)
