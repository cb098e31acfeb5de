"""verglas simulate as a whole: what it writes, that seeds hold, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro

from verglas.cli.simulate import Simulate
from verglas.core.rotations import matrix_from_euler
from verglas.errors import InputError, OutputError, VerglasError
from verglas.io.mrc import Map, Stack, read_map, write_map
from verglas.io.star import read_star
from verglas.particles.table import ParticleTable
from verglas.simulation.demo import demo_atoms
from verglas.simulation.model import AtomModel
from verglas.simulation.options import MicroscopeOptions, SampleOptions
from verglas.simulation.simulate import choose_method
from verglas.simulation.truth import draw_angles, draw_classes, draw_ctf, draw_truth


def simulate(out: Path, *words: object) -> Path:
    """Run the command as the command line does, on the CPU."""
    config = (tyro.conf.OmitArgPrefixes,)
    arguments = ["--out", str(out), "--device", "cpu", *map(str, words)]
    tyro.cli(Simulate, args=arguments, config=config).run()
    return out


def images(folder: Path, name: str = "particles.mrcs") -> np.ndarray:
    stack = Stack.open(folder / name)
    return stack.read(slice(0, stack.n))


def test_everything_is_written(tmp_path):
    out = simulate(tmp_path / "set", "--n", 30, "--box", 32, "--pixel", 4.5, "--per-micrograph", 10)
    stack = Stack.open(out / "particles.mrcs")
    assert (stack.n, stack.box_yx, stack.mode, round(stack.pixel_size, 4)) == (30, (32, 32), 2, 4.5)
    data, truth = ParticleTable.read(out / "particles.star"), ParticleTable.read(out / "truth.star")
    assert not {"rlnAngleRot", "rlnOriginXAngst", "rlnClassNumber"} & set(data.frame.columns)
    assert data.frame["rlnMicrographName"].nunique() == 3
    assert data.groups[0].box == 32
    assert truth.image_locations() is not None
    assert len(truth.rotations()) == 30
    assert read_map(out / "truth.mrc").box == 32
    assert (out / "start.mrc").is_file() and (out / "report.html").is_file() and (out / "result.json").is_file()


def test_the_batch_changes_nothing(tmp_path):
    """Poses, CTFs, junk and noise of a seed are the same whatever the batch; another seed gives others."""
    words = ("--n", 21, "--box", 32, "--pixel", 4.5, "--junk", 0.3, "--seed", 5)
    one = simulate(tmp_path / "one", *words, "--batch", 21)
    two = simulate(tmp_path / "two", *words, "--batch", 4)
    three = simulate(tmp_path / "three", *words[:-1], 6)
    assert np.abs(images(one) - images(two)).max() < 1e-4
    assert (one / "truth.star").read_bytes() == (two / "truth.star").read_bytes()
    assert (one / "truth.star").read_bytes() != (three / "truth.star").read_bytes()


def test_signal_to_noise_ratio_is_as_asked(tmp_path):
    """The same seed with and without noise: signal variance 1 alone, 0.2 of the noise together, noise variance 1."""
    words = ("--n", 60, "--box", 32, "--pixel", 4.5, "--seed", 2)
    signal_BYX = images(simulate(tmp_path / "clean", *words, "--no-noise"))
    noisy_BYX = images(simulate(tmp_path / "noisy", *words, "--snr", 0.2))
    noise_BYX = noisy_BYX - signal_BYX * np.sqrt(0.2)
    assert signal_BYX.var((1, 2)).mean() == pytest.approx(1.0, rel=1e-3)
    assert noise_BYX.var((1, 2)).mean() == pytest.approx(1.0, rel=0.02)


def test_truth_map_is_in_the_grey_values_of_the_images(tmp_path):
    """Projected by hand at A = 1, without CTF, the truth is what an image would be: here through its zeroth coefficient."""
    out = simulate(tmp_path / "set", "--n", 8, "--box", 32, "--pixel", 4.5, "--no-noise", "--amplitude-contrast", 0.5)
    mean_of_truth = read_map(out / "truth.mrc").data_ZYX.sum() / 32**2
    assert images(out).mean((1, 2)) == pytest.approx(0.5 * mean_of_truth, rel=1e-3)


def test_float16_rounds_the_same_images(tmp_path):
    words = ("--n", 10, "--box", 32, "--pixel", 4.5)
    exact_BYX = images(simulate(tmp_path / "f32", *words))
    out = simulate(tmp_path / "f16", *words, "--float16")
    assert Stack.open(out / "particles.mrcs").mode == 12
    assert np.array_equal(images(out), exact_BYX.astype(np.float16).astype(np.float32))


def test_optics_groups_of_their_own_size(tmp_path):
    words = ("--n", 24, "--box", 32, 40, "--pixel", 4.5, 3.6, "--voltage", 300, 200, "--per-micrograph", 4)
    out = simulate(tmp_path / "set", *words, "--beam-tilt", 0.5, -0.5, "--phase-shift", 20, 90)
    assert images(out, "particles_group01.mrcs").shape == (12, 32, 32)
    assert images(out, "particles_group02.mrcs").shape == (12, 40, 40)
    table = ParticleTable.read(out / "truth.star")
    assert [(g.box, g.pixel_size, g.voltage_kv) for g in table.groups] == [(32, 4.5, 300.0), (40, 3.6, 200.0)]
    assert table.groups[0].beam_tilt_mrad == (0.5, -0.5)
    assert 20 <= float(table.ctf().phase_shift_B.min()) < float(table.ctf().phase_shift_B.max()) <= 90


def test_conformations_and_junk(tmp_path):
    words = ("--model", "demo", "--model", "demo-open", "--weights", 3, 1, "--n", 200, "--box", 32, "--pixel", 4.5)
    out = simulate(tmp_path / "set", *words, "--junk", 0.2)
    counts = read_star(out / "truth.star")["particles"].frame["rlnClassNumber"].value_counts()
    assert counts[0] == pytest.approx(40, abs=20)
    assert counts[1] / counts[2] == pytest.approx(3, rel=0.5)
    first, second = (read_map(out / f"truth_class00{k}.mrc").data_ZYX for k in (1, 2))
    assert not np.allclose(first, second, atol=0.1 * first.max())


def test_real_defoci(tmp_path):
    defoci = np.array([[12000.0 + i, 11000.0, 30.0] for i in range(20)])
    np.save(tmp_path / "defoci.npy", defoci)
    words = ("--n", 15, "--box", 32, "--pixel", 4.5, "--defocus-file", tmp_path / "defoci.npy")
    out = simulate(tmp_path / "set", *words)
    frame = read_star(out / "particles.star")["particles"].frame
    assert np.allclose(frame[["rlnDefocusU", "rlnDefocusV", "rlnDefocusAngle"]], defoci[:15])
    with pytest.raises(InputError, match="20 rows"):
        simulate(tmp_path / "more", *words[2:], "--n", 21)


def test_all_views_are_equally_likely():
    """cos(tilt) is uniform, and so are the third coordinates of all three axes: mean 0, variance 1/3."""
    angles_B3 = torch.from_numpy(draw_angles(SampleOptions(n=20000), seed=1))
    rotation_B33 = matrix_from_euler(*angles_B3.unbind(1))
    assert float(rotation_B33.mean(0).abs().max()) < 0.02
    assert torch.allclose(rotation_B33.square().mean(0), torch.full((3, 3), 1 / 3, dtype=torch.float64), atol=0.01)


def test_preferred_views_gather_about_the_view_asked_for():
    sample = SampleOptions(n=4000, preferred=0.5, preferred_view=(40.0, 70.0), preferred_spread=5.0)
    view_B3 = matrix_from_euler(*torch.from_numpy(draw_angles(sample, seed=1)).unbind(1))[:, 2]
    preferred = matrix_from_euler(*torch.tensor([[40.0], [70.0], [0.0]], dtype=torch.float64))[0, 2]
    angle_B = torch.rad2deg(torch.acos((view_B3 @ preferred).clamp(-1, 1)))
    # 5 degrees in two directions: 95.6 % lie within 12.5 degrees; of the uniform half 1.2 % do.
    assert float((angle_B < 12.5).double().mean()) == pytest.approx(0.5 * 0.956 + 0.5 * 0.012, abs=0.03)


def test_streams_do_not_disturb_one_another():
    few, many = SampleOptions(n=50), SampleOptions(n=50, junk=0.5, preferred=0.5, offset_sigma=9.0)
    plain, changed = (draw_truth(sample, MicroscopeOptions(), 2, seed=3) for sample in (few, many))
    assert torch.equal(plain.ctf.defocus_u_B, changed.ctf.defocus_u_B)
    assert np.array_equal(plain.class_B[changed.class_B > 0], changed.class_B[changed.class_B > 0])
    assert np.allclose(plain.origin_B2 / 2.0, changed.origin_B2 / 9.0)


def test_defocus_belongs_to_the_micrograph():
    options = MicroscopeOptions(defocus=(10000.0, 20000.0), defocus_sigma=0.0, astigmatism=300.0)
    ctf = draw_ctf(options, np.repeat(np.arange(200), 5), seed=1)
    assert torch.equal(ctf.defocus_u_B[::5], ctf.defocus_u_B[4::5])
    mean_B = (ctf.defocus_u_B + ctf.defocus_v_B) / 2
    assert float(mean_B.min()) >= 10000 and float(mean_B.max()) <= 20000
    assert bool((ctf.defocus_u_B >= ctf.defocus_v_B).all())


def test_weights_of_zero_and_classes():
    class_B = draw_classes(SampleOptions(n=1000, weights=(0.0, 1.0, 1.0)), 3, seed=1)
    assert set(class_B.tolist()) == {2, 3}


def test_the_demo_is_about_100_angstrom_and_has_a_second_form():
    closed_N3, weight_N = demo_atoms("demo", 0)
    opened_N3, _ = demo_atoms("demo-open", 0)
    assert 3000 < len(closed_N3) < 6000 and len(weight_N) == len(closed_N3) == len(opened_N3)
    assert 80 < np.ptp(closed_N3, axis=0).max() < 120
    moved_N = np.linalg.norm(closed_N3 - opened_N3, axis=1)
    assert 0.2 < (moved_N > 5).mean() < 0.6 and (moved_N < 1e-9).mean() > 0.4


def test_many_atoms_in_many_images_are_sliced():
    device, cores = torch.device("cpu"), torch.get_num_threads()
    large = AtomModel("large", torch.zeros(200_000, 3), torch.ones(200_000))
    assert choose_method([large], 100, "auto", device)[0] == "atoms"
    assert choose_method([large], 100_000 * cores, "auto", device)[0] == "slices"
    assert choose_method([large], 100_000 * cores, "atoms", device)[0] == "atoms"


SMALL = ("--n", 4, "--box", 32, "--pixel", 4.5)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--n", 0), "--n: 0"), (("--box", 33), "33 px"), (("--pixel", 0), "0 Å"), (("--junk", 1.5), "1.5"),
        (("--preferred", -1), "-1"), (("--snr", 0), "--no-noise"), (("--weights", 1, 2), "2 values"), (("--seed", -1), "--seed"),
        (("--voltage", 300, 200, "--pixel", 1, 2, 3), "2 values"), (("--box", 16, "--pixel", 1), "Use --box"),
        (("--model", "thing.xyz"), "unknown model type"), (("--model", "absent.pdb"), "no such file"),
        (("--sym", "Q7"), "unknown symmetry"),
    ],
)  # fmt: skip
def test_bad_options_leave_nothing_behind(tmp_path, words, said):
    given = SMALL if words[0] not in ("--n", "--box", "--pixel") else ()
    with pytest.raises(InputError, match=said):
        simulate(tmp_path / "set", *given, *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pdb", b"END\n"), ("text.cif", b"nothing"), ("broken.npz", b"PK\x03\x04"), ("text.npz", b"1 2 3"),
        ("hollow.npz", None), ("no_voxel.mrc", None),
    ],
)  # fmt: skip
def test_bad_models(tmp_path, name, content):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    elif name.endswith(".npz"):
        np.savez(path, xyz=np.zeros((0, 3)), w=np.zeros(0))
    else:
        write_map(path, Map(np.ones((8, 8, 8), np.float32), 0.0))
    with pytest.raises(InputError, match=name):
        simulate(tmp_path / "set", *SMALL, "--model", path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [name]


def test_a_folder_that_exists_is_kept(tmp_path):
    out = simulate(tmp_path / "set", *SMALL)
    before = (out / "particles.mrcs").read_bytes()
    with pytest.raises(VerglasError, match="exists"):
        simulate(out, *SMALL, "--seed", 9)
    assert (out / "particles.mrcs").read_bytes() == before
    simulate(out, *SMALL, "--seed", 9, "--overwrite")
    assert (out / "particles.mrcs").read_bytes() != before


def test_a_disk_too_small_is_found_before_writing(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=20_000_000))
    with pytest.raises(OutputError, match=r"only 0\.02 GB free"):
        simulate(tmp_path / "set", "--n", 5000, "--box", 64, "--pixel", 3)
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_writing_thread_reaches_the_caller(tmp_path, monkeypatch):
    from verglas.io.mrc import StackWriter

    def fails(self, images_BYX, statistics):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(StackWriter, "append_measured", fails)
    with pytest.raises(OutputError, match="full"):
        simulate(tmp_path / "set", *SMALL, "--batch", 1)
    assert list(tmp_path.iterdir()) == []


def test_options_of_the_microscope_are_checked_one_by_one():
    with pytest.raises(InputError, match="smaller value first"):
        replace(MicroscopeOptions(), defocus=(2.0, 1.0)).check()


def test_slices_of_atoms_agree_with_atoms(tmp_path):
    """Trilinear slices of the map made of the atoms: their error falls with the square of the padding."""
    words = ("--n", 20, "--box", 48, "--pixel", 4, "--no-noise", "--bfactor", 1000)
    exact_BYX = images(simulate(tmp_path / "atoms", *words, "--method", "atoms"))
    error = {}
    for padding in (1, 2, 4):
        sliced_BYX = images(simulate(tmp_path / f"slices{padding}", *words, "--method", "slices", "--padding", padding))
        error[padding] = np.linalg.norm(sliced_BYX - exact_BYX) / np.linalg.norm(exact_BYX)
    assert error[2] < 0.04
    assert error[2] / error[1] == pytest.approx(1 / 4, rel=0.2)
    assert error[4] / error[2] == pytest.approx(1 / 4, rel=0.2)


def test_a_map_as_model(tmp_path):
    """A set simulated from the truth map of another (no further B-factor) shows the same images."""
    words = ("--n", 12, "--box", 48, "--pixel", 4, "--no-noise")
    first = simulate(tmp_path / "first", *words, "--bfactor", 500, "--method", "slices")
    again = simulate(tmp_path / "again", *words, "--model", first / "truth.mrc")
    assert np.abs(images(first) - images(again)).max() < 1e-3 * images(first).std()
    finer = simulate(tmp_path / "finer", "--n", 12, "--box", 64, "--pixel", 3, "--no-noise", "--model", first / "truth.mrc")
    assert read_map(finer / "truth.mrc").box == 64


def test_maps_of_two_grids_and_exact_images_of_a_map_are_refused(tmp_path):
    blob = np.zeros((32, 32, 32), np.float32)
    blob[14:18, 14:18, 14:18] = 1
    for name, pixel_size in (("one.mrc", 3.0), ("two.mrc", 4.0)):
        write_map(tmp_path / name, Map(blob, pixel_size))
    one, two = ("--model", tmp_path / "one.mrc"), ("--model", tmp_path / "two.mrc")
    with pytest.raises(InputError, match=r"as in one\.mrc"):
        simulate(tmp_path / "set", *SMALL, *one, *two)
    with pytest.raises(InputError, match="the model is a map"):
        simulate(tmp_path / "set", *SMALL, *one, "--method", "atoms")
    with pytest.raises(InputError, match="mixed"):
        simulate(tmp_path / "set", *SMALL, *one, "--model", "demo")


def test_a_map_wider_than_the_images(tmp_path):
    wide = np.zeros((64, 64, 64), np.float32)
    wide[28:36, 28:36, 28:36] = 1
    write_map(tmp_path / "small_in_wide.mrc", Map(wide, 3.0))
    words = ("--n", 4, "--box", 32, "--pixel", 3)
    assert images(simulate(tmp_path / "fits", *words, "--model", tmp_path / "small_in_wide.mrc")).shape == (4, 32, 32)
    wide[4:60, 28:36, 28:36] = 1
    write_map(tmp_path / "long.mrc", Map(wide, 3.0))
    with pytest.raises(InputError, match="lies outside"):
        simulate(tmp_path / "set", *words, "--model", tmp_path / "long.mrc")
