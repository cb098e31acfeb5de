"""What a refinement asks of its input: counts, halves, diameter, CTF, mask, symmetry, contrast, normalisation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from verglas.cli.main import main
from verglas.core.masks import soft_sphere
from verglas.errors import InputError
from verglas.io.mrc import Map, Stack, StackWriter, read_map, write_map
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig
from verglas.refinement.inputs import bad_rows, centre_of_mass, check_inputs, density_skewness, look_at, mean_view

BOX, PIXEL, N, DIAMETER = 32, 4.5, 240, 110.0


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated set with particles.star and start.mrc."""
    out = tmp_path_factory.mktemp("simulated") / "set"
    words = ["simulate", "--n", N, "--box", BOX, "--pixel", PIXEL, "--snr", 0.1, "--seed", 2, "--device", "cpu", "--out", out]
    assert main([str(word) for word in words]) == 0
    return out


@pytest.fixture
def table(data: Path) -> ParticleTable:
    return ParticleTable.read(data / "particles.star")


@pytest.fixture
def reference(data: Path) -> Map:
    return read_map(data / "start.mrc")


def config(**options: object) -> RefineConfig:
    return RefineConfig(**({"diameter": DIAMETER} | options))  # type: ignore[arg-type]


def changed(table: ParticleTable, folder: Path, change) -> ParticleTable:
    """The particles with other images: change(image_BYX) -> image_BYX."""
    where = table.image_locations()
    image_BYX = change(Stack.open(where.paths[0]).read(slice(0, len(table))).copy())
    with StackWriter(folder / "changed.mrcs", len(table), (BOX, BOX), PIXEL) as writer:
        writer.append(image_BYX.astype(np.float32))
    names = [f"{i + 1:06d}@changed.mrcs" for i in range(len(table))]
    return replace(table.with_columns(rlnImageName=names), folder=folder)


def test_good_input_has_no_notices(table, reference):
    assert check_inputs(table, reference, config(seed=3)) == ["240 particles are few: a refinement may not find their poses, "
                                                              "and its map will be coarse"]  # fmt: skip


@pytest.mark.parametrize("n", [1, 39])
def test_too_few_particles_are_counted(table, reference, n):
    with pytest.raises(InputError, match=f"{n} particles; expected at least 40"):
        check_inputs(table.select(slice(0, n)), reference, config())


def test_half_sets(table, reference):
    with pytest.raises(InputError, match="all 240 particles are in one half"):
        check_inputs(table.with_columns(rlnRandomSubset=np.ones(N, int)), reference, config())
    with pytest.raises(InputError, match="half-sets of 230 and 10 particles"):
        check_inputs(table.with_columns(rlnRandomSubset=np.where(np.arange(N) < 230, 1, 2)), reference, config())
    notices = check_inputs(table.with_columns(rlnRandomSubset=np.where(np.arange(N) < 160, 1, 2)), reference, config())
    assert any("160 and 80" in notice for notice in notices)


@pytest.mark.parametrize("diameter", [0.0, -5.0, float("nan"), BOX * PIXEL + 1])
def test_diameter(table, reference, diameter):
    with pytest.raises(InputError, match="at most 144 Å, the width of the box"):
        check_inputs(table, reference, config(diameter=diameter))


def test_a_diameter_as_wide_as_the_box_leaves_the_corners(table, reference):
    assert len(check_inputs(table, reference, config(diameter=BOX * PIXEL))) == 1


def test_ctf_columns(table, reference):
    without = replace(table, frame=table.frame.drop(columns="rlnDefocusU"))
    with pytest.raises(InputError, match="rlnDefocusU"):
        check_inputs(without, reference, config())
    without = replace(table, optics_frame=table.optics_frame.drop(columns="rlnVoltage"))
    with pytest.raises(InputError, match="rlnVoltage"):
        check_inputs(without, reference, config())


@pytest.mark.parametrize(
    ("box", "values", "said"),
    [(BOX, 0.0, "empty"), (BOX, 2.0, "values from"), (BOX, -1.0, "values from"), (16, 1.0, "box")],
)
def test_masks_that_cannot_serve(table, reference, tmp_path, box, values, said):
    mask = soft_sphere(box, box / 3, 2).numpy() * values
    write_map(tmp_path / "mask.mrc", Map(mask, PIXEL))
    with pytest.raises(InputError, match=said):
        check_inputs(table, reference, config(mask=tmp_path / "mask.mrc"))


def test_a_good_mask_passes(table, reference, tmp_path):
    write_map(tmp_path / "mask.mrc", Map(soft_sphere(BOX, 12.0, 2).numpy(), PIXEL))
    assert len(check_inputs(table, reference, config(mask=tmp_path / "mask.mrc"))) == 1


def test_symmetry_that_the_reference_does_not_have(data, table):
    """The demo has none; its half turned onto the other half by C2 has that, but no fourfold axis."""
    reference = read_map(data / "truth.mrc")
    with_c2 = next(n for n in check_inputs(table, reference, config(symmetry="C2")) if "symmetry" in n)
    assert "does not have the symmetry C2" in with_c2 and "0." in with_c2
    turned_ZYX = np.roll(reference.data_ZYX[:, ::-1, ::-1], (1, 1), (1, 2))
    symmetric = replace(reference, data_ZYX=reference.data_ZYX + turned_ZYX)
    assert not any("symmetry" in n for n in check_inputs(table, symmetric, config(symmetry="C2")))
    assert any("symmetry" in n for n in check_inputs(table, symmetric, config(symmetry="C4")))


@pytest.mark.parametrize("pixel_size", [1e-9, 0.5, 100.0])
def test_voxel_sizes_that_cannot_be_meant(table, reference, pixel_size):
    """0.5 Å: a box of 16 Å for a particle of 110 Å; the message says how to put it right."""
    with pytest.raises(InputError, match=r"--reference: a box .* 55 to 1100 Å .* verglas map --map MAP --pixel"):
        check_inputs(table, replace(reference, pixel_size=pixel_size), config())


def test_a_reference_off_the_centre_is_told_with_the_way_back(table, reference):
    assert np.hypot.reduce(centre_of_mass(reference)) < 0.05 * DIAMETER
    moved = replace(reference, data_ZYX=np.roll(reference.data_ZYX, (0, -2, 5), (0, 1, 2)))
    x, y, z = np.subtract(centre_of_mass(moved), centre_of_mass(reference))
    assert (x, y, z) == pytest.approx((5 * PIXEL, -2 * PIXEL, 0), abs=0.5)
    (notice,) = [notice for notice in check_inputs(table, moved, config()) if "centred" in notice]
    back = [float(word) for word in notice.split("--shift ")[1].split("`")[0].split()]
    assert np.allclose(np.add(back, centre_of_mass(moved)), 0, atol=0.5)


def test_missing_columns_are_named_once(table, reference):
    without = replace(table, frame=table.frame.drop(columns="rlnDefocusU"))
    with pytest.raises(InputError) as caught:
        check_inputs(without, reference, config())
    assert str(caught.value).endswith("no column rlnDefocusU. Use the output of a job that determines it.")


# Contrast


@pytest.mark.parametrize("offset", [0.0, 7.0, -3.0])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_inverted_reference(table, reference, offset, noise):
    """Whatever the background's level, and in noise as strong as the density itself."""
    size = noise * reference.data_ZYX.std()
    noisy_ZYX = reference.data_ZYX + size * np.random.default_rng(0).standard_normal((BOX,) * 3).astype(np.float32)
    good, bad = (Map(sign * noisy_ZYX + np.float32(offset), PIXEL) for sign in (1, -1))
    assert density_skewness(good, DIAMETER) > 0.8 and density_skewness(bad, DIAMETER) < -0.8
    assert not any("contrast" in notice for notice in check_inputs(table, good, config()))
    with pytest.raises(InputError, match="--reference: its contrast is inverted"):
        check_inputs(table, bad, config())
    assert any("inverted" in notice for notice in check_inputs(table, bad, config(), ignore_contrast=True))


def test_a_reference_of_noise_or_of_nothing(table):
    noise = Map(np.random.default_rng(1).standard_normal((64, 64, 64)).astype(np.float32), 3.0)
    assert any("cannot be told" in notice for notice in check_inputs(table, noise, config()))
    with pytest.raises(InputError, match="one value"):
        check_inputs(table, Map(np.ones((BOX,) * 3, np.float32), PIXEL), config())


def test_inverted_images(table, reference, tmp_path):
    with pytest.raises(InputError, match="their contrast is inverted: protein is dark"):
        check_inputs(changed(table, tmp_path, lambda image_BYX: -image_BYX), reference, config())


def test_the_sign_of_the_ctf_is_heeded(table, reference):
    """Overfocused images, or ones with a phase plate half a turn off, show protein dark, and rightly so."""
    good = look_at(table, DIAMETER, mean_view(reference, DIAMETER)).contrast
    flipped = look_at(table.with_columns(rlnPhaseShift=np.full(N, 180.0)), DIAMETER, mean_view(reference, DIAMETER)).contrast
    assert good > 8 and flipped == pytest.approx(-good, rel=1e-3)


def test_a_hollow_particle_is_not_called_inverted(table, tmp_path):
    """A shell of protein is brightest near its rim: in its views the middle is dark beside it."""
    axis = (np.arange(BOX) - BOX // 2) * PIXEL
    radius_ZYX = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    shell = Map(np.exp(-(((radius_ZYX - 48) / 6) ** 2)).astype(np.float32), PIXEL)
    ring_YX = shell.data_ZYX.sum(0) / 3
    noise = np.random.default_rng(1).standard_normal((N, BOX, BOX))
    no_contrast = table.with_columns(rlnPhaseShift=np.full(N, 90.0), rlnSphericalAberration=np.zeros(N))
    in_focus = no_contrast.with_columns(rlnDefocusU=np.zeros(N), rlnDefocusV=np.zeros(N))
    made = changed(in_focus, tmp_path, lambda _: ring_YX + noise)
    bright, ball = mean_view(shell, DIAMETER), mean_view(Map((radius_ZYX < 50).astype(np.float32), PIXEL), DIAMETER)
    assert look_at(made, DIAMETER, bright).contrast > 8
    assert look_at(made, DIAMETER, bright).contrast > 2 * look_at(made, DIAMETER, ball).contrast


def test_images_of_noise_are_not_called_inverted(table, reference, tmp_path):
    """Over 12 seeds the measure stays within what noise gives, |z| < 4, so that nothing stops the run."""
    for seed in range(12):
        noise = np.random.default_rng(seed).standard_normal((N, BOX, BOX))
        made = changed(table, tmp_path / str(seed) if (tmp_path / str(seed)).mkdir() is None else tmp_path, lambda _, n=noise: n)
        assert abs(look_at(made, DIAMETER, mean_view(reference, DIAMETER)).contrast) < 4
        assert check_inputs(made, reference, config())


def test_images_that_are_not_normalised_are_named_and_their_contrast_still_found(table, reference, tmp_path):
    made = changed(table, tmp_path, lambda image_BYX: 30 + 5 * image_BYX)
    (notice,) = [notice for notice in check_inputs(made, reference, config()) if "normalised" in notice]
    assert "100 %" in notice and "their mean is 29.9 and" in notice
    view = mean_view(reference, DIAMETER)
    assert look_at(made, DIAMETER, view).contrast == pytest.approx(look_at(table, DIAMETER, view).contrast, rel=1e-3)


def test_unusable_images_are_found(table, tmp_path):
    def spoil(image_BYX: np.ndarray) -> np.ndarray:
        image_BYX[7, 3, 3], image_BYX[11] = np.nan, 2.0
        return image_BYX

    found = bad_rows(changed(table, tmp_path, spoil))
    assert [row for row, _, _ in found] == [7, 11] and "not finite" in found[0][2] and "constant" in found[1][2]


@pytest.mark.interop
def test_real_particles_and_maps_are_bright(shared):
    table = ParticleTable.read(shared / "data/betagal_tutorial/particles_1391_no_poses.star")
    names = ("5a1a_64px_3.54A.mrc", "relion_tests_ref_model_betagal_10017.mrc", "EMD-1997_GroEL.map")
    assert all(density_skewness(read_map(shared / "data/maps" / name, cubic=False), 200.0) > 0.9 for name in names)
    reference = read_map(shared / "data/maps/relion_tests_ref_model_betagal_10017.mrc")
    assert look_at(table.subset(300, 1), 200.0, mean_view(reference, 200.0)).contrast > 6
    assert check_inputs(table, reference, RefineConfig(diameter=200.0, symmetry="D2")) == []
