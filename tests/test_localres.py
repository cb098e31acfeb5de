"""Local resolution: windows against their definition and against relion_postprocess --locres."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from verglas.core.masks import radius_grid, raised_cosine, soft_sphere
from verglas.io.mrc import Map, read_map, write_map
from verglas.postprocess.curves import half_transform, last_good_shell, shell_correlation
from verglas.postprocess.local import (
    Window,
    WindowSum,
    filter_locally,
    local_curves,
    local_resolution,
    resample_shells,
    shell_gains,
    window_box,
    window_centres,
    window_of,
    windowed_fsc,
)
from verglas.postprocess.mapops import low_passed
from verglas.postprocess.options import LocalOptions
from verglas.postprocess.random_phases import squared_radius

PIXEL = 3.0
OPTIONS = LocalOptions(sampling=21.0, window_edge=15.0, randomise_at=20.0)


def noise(box: int, n: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, box, box, box, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def two_resolutions(box: int = 48) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Signal to 8 Å where x < centre and to 20 Å where x > centre, and two half-maps of it with independent noise."""
    common, first, second = noise(box, 3)
    left = (torch.arange(box) < box // 2).double()
    signal = low_passed(common, PIXEL, 8.0) * left + low_passed(common, PIXEL, 20.0) * (1 - left)
    return signal, signal + 0.3 * first, signal + 0.3 * second


def test_window_curves_are_those_of_the_windowed_maps():
    """In the map's own box a window's curve is the FSC of the two maps times the window, window not wrapped around."""
    first, second = noise(24, 2) + noise(24, 1, seed=1)
    window = Window(radius=4, edge=5)
    centres = torch.tensor([[12, 12, 12], [3, 12, 18]])
    actual = windowed_fsc((first, second), centres, window, padding=9.0)
    axis = torch.arange(24, dtype=torch.float64)
    shells = (squared_radius(24).double().sqrt() + 0.5).floor().long()
    for centre, curve in zip(centres, actual):
        z, y, x = torch.meshgrid(*(axis - c for c in centre), indexing="ij")
        weight = raised_cosine((z * z + y * y + x * x).sqrt(), 4, 5)
        expected = shell_correlation(half_transform(first * weight), half_transform(second * weight), shells)
        assert (curve - expected).abs().max() < 1e-10


def test_grid_and_boxes():
    window, step = window_of(OPTIONS, PIXEL)
    assert (window.radius, window.edge, step) == (4, 5, 7)  # 3.5 is rounded up
    centres = window_centres(48, window, step)
    assert ((centres - 24).double().norm(dim=1) < 20).all() and (centres % 7 == 0).all()
    assert window_box(48, window) in (20, 24) and window_box(48, window, 9.0) == 48


def test_resampled_curves_are_linear_in_frequency():
    curve = torch.arange(9, dtype=torch.float64)[None]
    assert torch.allclose(resample_shells(curve, 16, 64)[0], torch.arange(33, dtype=torch.float64) / 4)


def test_window_sum_is_the_sum_of_windows():
    window = Window(radius=3, edge=4)
    centres = torch.tensor([[0, 8, 8], [15, 2, 9], [8, 8, 8]])
    values = torch.tensor([1.0, 2.0, -0.5], dtype=torch.float64)
    expected = torch.zeros(16, 16, 16, dtype=torch.float64)
    axis = torch.arange(16, dtype=torch.float64)
    for centre, value in zip(centres, values):
        z, y, x = torch.meshgrid(*(axis - c for c in centre), indexing="ij")
        expected += value * raised_cosine((z * z + y * y + x * x).sqrt(), 3, 4)
    actual = WindowSum(16, centres, window, torch.device("cpu"))(values)
    assert (actual - expected).abs().max() < 1e-10


def test_equal_gains_everywhere_filter_like_one_filter():
    box = 32
    one = noise(box, 1)[0]
    window = Window(radius=4, edge=6)
    centres = window_centres(box, window, 5)
    weigh = WindowSum(box, centres, window, torch.device("cpu"))
    fsc = torch.linspace(1, 0, 17, dtype=torch.float64).clamp_min(0)
    gains = shell_gains(fsc.expand(len(centres), -1), torch.full((len(centres),), 96.0 / 10), 96.0)
    shells = (squared_radius(box).double().sqrt() + 0.5).floor().long().clamp_max(17)
    whole = torch.fft.irfftn(half_transform(one) * torch.cat([gains[0], gains.new_zeros(1)])[shells], s=[box] * 3, norm="forward")
    covered = weigh(torch.ones(len(centres)))
    inside = covered > 1e-6
    blended = filter_locally(half_transform(one), gains, weigh) / covered.clamp_min(1e-6)
    assert (blended - whole)[inside].abs().max() < 1e-9


def test_two_halves_of_a_map_get_their_resolutions():
    signal, first, second = two_resolutions()
    found = local_resolution(first, second, PIXEL, OPTIONS)
    inside, x = radius_grid(48, 3) < 18, torch.arange(48).expand(48, 48, 48)
    sides = [inside & where for where in (x < 18, x > 30)]
    left, right = (float(found.resolution_ZYX[side].median()) for side in sides)
    # A window 37 Å wide blurs frequencies by 1/37 Å: a true 20 Å may read as 1/(1/20 + 1/37) = 13 Å, 8 Å as 6.6 Å.
    assert 6.5 < left < 8.5 and 12.0 < right < 20.5
    for side, most in zip(sides, (0.7, 0.3)):
        remaining = (found.filtered_ZYX - signal)[side].std() / ((first + second) / 2 - signal)[side].std()
        assert remaining < most


@pytest.mark.interop
@pytest.mark.skipif(shutil.which("relion_postprocess") is None, reason="needs relion_postprocess")
def test_agrees_with_relion_window_by_window(shared, tmp_path):
    names = [f"half{i}.mrc" for i in (1, 2)]
    maps = [read_map(shared / f"data/betagal_relion_refine/run_half{i}_class001_unfil.mrc") for i in (1, 2)]
    for name, one in zip(names, maps):
        write_map(tmp_path / name, Map(one.data_ZYX, one.pixel_size))
    command = ["relion_postprocess", "--locres", "--i", names[0], "--i2", names[1], "--o", str(tmp_path / "l")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    first, second = (torch.tensor(m.data_ZYX) for m in maps)
    box, pixel = maps[0].box, maps[0].pixel_size
    theirs = relion_windows((tmp_path / "l_locres_fscs.star").read_text(), box)
    # Transformed in the map's own box, as RELION does: the same windows, phases, curves and maps.
    exact = local_resolution(first, second, pixel, LocalOptions(window_padding=9.0))
    expected = np.array([theirs[tuple(centre)] for centre in exact.centre_P3.tolist()])
    assert len(theirs) == len(expected)
    assert np.abs(box * pixel / exact.resolution_P.numpy() - box * pixel / expected).max() < 1e-3
    compare_maps(tmp_path, exact)
    # In boxes just larger than the windows, the default: within one shell nearly everywhere.
    curves = local_curves(first, second, pixel, LocalOptions())[1]
    shells = np.array([max(last_good_shell(curve), box * pixel / 50) for curve in curves])
    share = float((np.abs(shells - box * pixel / expected) <= 1.01).mean())
    print(f"windows within one shell of RELION's: {share:.3f}")
    assert share > 0.9


def relion_windows(text: str, box: int) -> dict[tuple[int, int, int], float]:
    """(z, y, x) in pixels -> resolution in Å. Its windows stand at x = kk, z = jj of the coordinates it prints."""
    found = re.findall(r"kk= (\S+) ii= (\S+) jj= (\S+) local resolution= (\S+)", text)
    return {(int(j) + box // 2, int(i) + box // 2, int(k) + box // 2): float(r) for k, i, j, r in found}


def compare_maps(folder, local) -> None:
    """The resolution map agrees voxel by voxel; the filtered map is half of RELION's, which sums the half-maps."""
    theirs = read_map(folder / "l_locres.mrc").data_ZYX
    ours = local.resolution_ZYX.numpy()
    assert ((theirs > 0) == (ours > 0)).mean() > 0.999
    both = (theirs > 0) & (ours > 0)
    assert np.abs(1 / ours[both] - 1 / theirs[both]).max() < 1e-5
    filtered = read_map(folder / "l_locres_filtered.mrc").data_ZYX[both] / 2
    assert np.linalg.norm(local.filtered_ZYX.numpy()[both] - filtered) < 0.02 * np.linalg.norm(filtered)


def test_a_window_larger_than_the_map_is_cut_to_it():
    assert window_box(16, Window(8, 8)) == 16
    first, second = noise(16, 2)
    sphere = soft_sphere(16, 6, 2).double()
    curves = windowed_fsc((first * sphere, second * sphere), torch.tensor([[8, 8, 8]]), Window(8, 8))
    assert curves.shape == (1, 9) and torch.isfinite(curves).all()
