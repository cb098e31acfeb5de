"""verglas reconstruct from the command line: a simulated set whose truth is known, real particles, and RELION beside it."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.core.fourier import centred_rfft3
from verglas.core.masks import soft_sphere
from verglas.core.shells import fsc, fsc_of_transforms, shell_sum
from verglas.io.mrc import Map, read_map, write_map
from verglas.particles.table import ParticleTable
from verglas.testing.for_relion import as_one_stack

BOX, PIXEL, N = 32, 4.5, 600


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folder of a simulated set with truth.star (poses and CTF, no half sets) and halves.star (with half sets)."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--snr", 0.5, "--seed", 1, "--device", "cpu", "--out", out]
    assert main([str(word) for word in words]) == 0
    table = ParticleTable.read(out / "truth.star")
    frame = table.frame.drop(columns="rlnRandomSubset", errors="ignore")
    replace(table, frame=frame).write(out / "truth.star", overwrite=True)
    replace(table, frame=frame.assign(rlnRandomSubset=np.where(np.arange(N) % 3, 1, 2))).write(out / "halves.star")
    return out


def reconstruct(out: Path, particles: Path, *words: object) -> Path:
    """Run the command on the CPU; it must succeed."""
    arguments = ["--particles", particles, "--out", out, "--device", "cpu", *words]
    assert main(["reconstruct", *map(str, arguments)]) == 0
    return out


def volume(path: Path) -> torch.Tensor:
    return torch.from_numpy(read_map(path).data_ZYX).double()


def figures(out: Path) -> dict[str, float]:
    return {name: entry["value"] for name, entry in json.loads((out / "result.json").read_text())["figures"].items()}


def curves(out: Path) -> dict[str, torch.Tensor]:
    rows = list(csv.DictReader((out / "fsc.csv").open()))
    return {name: torch.tensor([float(row[name]) for row in rows]) for name in ("fsc_unmasked", "fsc_masked")}


def names(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()}


RECORD = {"config.json", "events.jsonl", "report.html", "result.json", "run.log"}
HALVES = {"half1.mrc", "half2.mrc", "fsc.csv", "map_wiener.mrc"}


def test_a_set_without_half_sets_gives_one_map(data, tmp_path):
    out = reconstruct(tmp_path / "out", data / "truth.star")
    assert names(out) == RECORD | {"map.mrc"}
    found, truth = read_map(out / "map.mrc"), volume(data / "truth.mrc")
    assert found.pixel_size == pytest.approx(PIXEL) and found.data_ZYX.shape == (BOX,) * 3
    result = json.loads((out / "result.json").read_text())
    assert result["command"] == "reconstruct" and result["figures"]["pixel_size"] == {"value": PIXEL, "unit": "Å"}
    assert (figures(out)["particles"], figures(out)["box"]) == (N, BOX) and "resolution_masked" not in figures(out)
    assert 0 < figures(out)["orientation_efficiency"] <= 1 and 0.7 < figures(out)["sampling_compensation_factor"] <= 1
    a, b = centred_rfft3(torch.from_numpy(found.data_ZYX).double()), centred_rfft3(truth)
    assert float(fsc_of_transforms(a, b)[1:7].min()) > 0.99  # further out the noise shows
    gain_S = shell_sum((a * b.conj()).real, BOX) / shell_sum(b.abs().square(), BOX)
    # truth.mrc has the grey values of the images; the mean of the box is hardly seen through the CTF.
    assert float((gain_S[1:16] - 1).abs().max()) < 0.08 and float(gain_S[1:16].mean()) == pytest.approx(1, abs=0.02)


def test_half_sets_of_the_file_give_half_maps(data, tmp_path):
    out = reconstruct(tmp_path / "out", data / "halves.star", "--mask-diameter", 90)
    assert names(out) == RECORD | HALVES | {"map.mrc"}
    half1, half2, truth = volume(out / "half1.mrc"), volume(out / "half2.mrc"), volume(data / "truth.mrc")
    mask = soft_sphere(BOX, 10.0, 3).double()
    assert torch.allclose(fsc(half1, half2).float(), curves(out)["fsc_unmasked"], atol=1e-4)
    assert torch.allclose(fsc(half1 * mask, half2 * mask).float(), curves(out)["fsc_masked"], atol=1e-4)
    for masked, name in (("fsc_unmasked", "resolution_unmasked"), ("fsc_masked", "resolution_masked")):
        below = (curves(out)[masked][1:] < 0.143).nonzero()
        last = int(below[0]) if len(below) else BOX // 2
        assert figures(out)[name] == pytest.approx(BOX * PIXEL / last, abs=1e-3)
    assert float(fsc(half1, half2)[1:6].min()) > 0.8
    errors = [float((volume(out / name) * mask - truth * mask).norm()) for name in ("map.mrc", "map_wiener.mrc", "half2.mrc")]
    assert errors[1] < errors[0] < errors[2]  # the prior helps; 200 of 600 images are worse


def test_half_maps_and_subset_are_what_they_say(data, tmp_path):
    """--subset 2 is a map of the images of half set 2 alone, which is also what a file of only these gives."""
    subset = reconstruct(tmp_path / "subset", data / "halves.star", "--subset", 2)
    assert names(subset) == RECORD | {"map.mrc"} and figures(subset)["particles"] == N / 3
    table = ParticleTable.read(data / "truth.star")
    table.select(np.arange(0, N, 3)).write(data / "second.star", overwrite=True)
    alone = reconstruct(tmp_path / "alone", data / "second.star")
    assert torch.allclose(volume(subset / "map.mrc"), volume(alone / "map.mrc"), atol=1e-4)
    other = reconstruct(tmp_path / "other", data / "halves.star", "--subset", 1)
    assert figures(other)["particles"] == N * 2 / 3
    assert float((volume(other / "map.mrc") - volume(subset / "map.mrc")).abs().max()) > 0.01


def test_half_maps_on_request_and_not_at_all(data, tmp_path):
    drawn = reconstruct(tmp_path / "drawn", data / "truth.star", "--half-maps", "--seed", 3)
    again = reconstruct(tmp_path / "again", data / "truth.star", "--half-maps", "--seed", 3)
    else_ = reconstruct(tmp_path / "else", data / "truth.star", "--half-maps", "--seed", 4)
    assert names(drawn) == RECORD | HALVES | {"map.mrc"}
    assert torch.equal(volume(drawn / "half1.mrc"), volume(again / "half1.mrc"))
    assert not torch.allclose(volume(drawn / "half1.mrc"), volume(else_ / "half1.mrc"), atol=1e-3)
    none = reconstruct(tmp_path / "none", data / "halves.star", "--no-half-maps")
    assert names(none) == RECORD | {"map.mrc"}
    assert torch.allclose(volume(none / "map.mrc"), volume(drawn / "map.mrc"), atol=1e-4)  # all the images in both


def test_max_resolution_leaves_out_what_lies_beyond(data, tmp_path):
    """15 Å is shell 9.6 of a 144 Å box, rounded up to 10: nothing is left of shells 12 and above."""
    whole = reconstruct(tmp_path / "whole", data / "truth.star")
    low = reconstruct(tmp_path / "low", data / "truth.star", "--max-resolution", 15)
    a, b = volume(low / "map.mrc"), volume(whole / "map.mrc")
    assert float(fsc(a, b)[1:7].min()) > 0.999  # the map's soft edge mixes the outer shells with those beyond

    def power(map_ZYX: torch.Tensor) -> float:
        f = torch.fft.fftfreq(BOX) * BOX
        beyond = f[:, None, None] ** 2 + f[:, None] ** 2 + f**2 > 12**2
        return float(torch.fft.fftn(map_ZYX)[beyond].abs().square().sum())

    assert power(a) < 5e-3 * power(b)  # what the soft edge of the map spreads


def test_a_mask_of_the_user_is_where_the_masked_fsc_is_taken(data, tmp_path):
    sphere = soft_sphere(BOX, 10.0, 3)
    write_map(data / "sphere.mrc", Map(sphere.numpy(), PIXEL), overwrite=True)
    given = reconstruct(tmp_path / "given", data / "halves.star", "--mask", data / "sphere.mrc")
    named = reconstruct(tmp_path / "named", data / "halves.star", "--mask-diameter", 90)
    whole = reconstruct(tmp_path / "whole", data / "halves.star")
    assert torch.allclose(curves(given)["fsc_masked"], curves(named)["fsc_masked"], atol=1e-5)
    assert not torch.allclose(curves(whole)["fsc_masked"], curves(named)["fsc_masked"], atol=1e-2)


def test_without_ctf_the_map_is_worse(data, tmp_path):
    truth = volume(data / "truth.mrc")
    with_ctf = reconstruct(tmp_path / "with", data / "truth.star")
    without = reconstruct(tmp_path / "without", data / "truth.star", "--no-ctf")
    means = [float(fsc(volume(out / "map.mrc"), truth)[1:12].mean()) for out in (with_ctf, without)]
    assert means[0] > 0.9 > means[1] + 0.1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--half-maps", "--no-half-maps"), "--no-half-maps"),
        (("--subset", "3"), "--subset"),
        (("--subset", "1"), "rlnRandomSubset"),  # truth.star has none
        (("--max-resolution", "-4"), "--max-resolution"),
        (("--mask", "truth.mrc", "--mask-diameter", "90"), "--mask-diameter"),
        (("--padding", "9"), "--padding"),
    ],
)
def test_options_that_make_no_sense(data, tmp_path, capsys, monkeypatch, words, said):
    monkeypatch.chdir(data)
    assert main(["reconstruct", "--particles", "truth.star", "--out", str(tmp_path / "out"), "--device", "cpu", *words]) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


# Real particles


@pytest.fixture(scope="module")
def betagal(shared, tmp_path_factory) -> Path:
    """The 1,391 particles of beta-galactosidase with published poses, reconstructed with D2 within a sphere of 28 px."""
    star = shared / "data/betagal_tutorial/particles_1391_with_poses.star"
    return reconstruct(tmp_path_factory.mktemp("betagal") / "out", star, "--sym", "D2", "--mask-diameter", 198.24)


def turned_truths(truth: np.ndarray):
    """The 24 ways to lay the axes of a map along x, y, z without mirroring it, about the centre voxel."""
    for order in itertools.permutations(range(3)):
        for signs in itertools.product((1, -1), repeat=3):
            if np.linalg.det(np.eye(3)[list(order)]) * np.prod(signs) > 0:
                turned = truth.transpose(order)
                for axis in range(3):
                    turned = np.roll(np.flip(turned, axis), 1, axis) if signs[axis] < 0 else turned
                yield turned


@pytest.mark.interop
def test_betagal_reaches_the_resolution_of_its_poses(betagal):
    assert figures(betagal)["particles"] == 1391
    assert figures(betagal)["resolution_unmasked"] <= 9.1
    assert figures(betagal)["resolution_masked"] <= 8.1


@pytest.mark.interop
def test_betagal_looks_like_its_atomic_model(betagal, shared):
    """Mean FSC over shells 1-31 within a soft sphere of 28 px with the map of 5A1A, whose axes may be permuted."""
    found = read_map(betagal / "map.mrc").data_ZYX.astype(float)
    truth = read_map(shared / "data/maps/5a1a_64px_3.54A.mrc").data_ZYX.astype(float)
    best = torch.from_numpy(max(turned_truths(truth), key=lambda turned: float(np.vdot(turned, found))).copy())
    grid = np.indices(found.shape) - 32
    mask = torch.from_numpy(np.clip((28 + 5 - np.sqrt((grid**2).sum(0))) / 5, 0, 1))
    mean = float(fsc(torch.from_numpy(found) * mask, best * mask)[1:32].mean())
    mirrored = float(fsc(torch.from_numpy(found[::-1].copy()) * mask, best * mask)[1:32].mean())
    print(f"mean FSC with 5A1A {mean:.4f}, of the mirror image {mirrored:.4f}")
    assert mean >= 0.72 > mirrored + 0.2


@pytest.mark.interop
@pytest.mark.parametrize("star", ["betagal_tutorial/particles_1391_with_poses.star", "betagal_relion_refine/run_data.star"])
def test_the_map_is_that_of_relion_reconstruct(shared, tmp_path, star):
    if shutil.which("relion_reconstruct") is None:
        pytest.skip("relion_reconstruct is not installed")
    folder = shared / "data/betagal_tutorial"
    ours = reconstruct(tmp_path / "ours", shared / "data" / star, "--folder", folder, "--sym", "D2", "--no-half-maps")
    as_one_stack(ParticleTable.read(shared / "data" / star, folder), tmp_path)
    command = "relion_reconstruct --i all.star --o theirs.mrc --ctf --sym D2 --skip_gridding"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)
    curve = fsc(volume(ours / "map.mrc"), volume(tmp_path / "theirs.mrc"))
    resolution = 64 * 3.54 / torch.arange(33).clamp(min=1)
    lowest = {limit: float(curve[1:][resolution[1:] >= limit].min()) for limit in (10.0, 7.5)}
    print(f"{star}: FSC with relion_reconstruct at least {lowest[10.0]:.5f} to 10 Å, {lowest[7.5]:.5f} to 7.5 Å")
    assert lowest[10.0] >= 0.999 and lowest[7.5] >= 0.995
    a, b = volume(ours / "map.mrc"), volume(tmp_path / "theirs.mrc")
    assert float((a * b).sum() / b.square().sum()) == pytest.approx(1, abs=0.02)  # the same grey values
