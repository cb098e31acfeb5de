"""cryoSPARC files: poses against scipy, round trips, optics groups, what is kept and what is said."""

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.transform import Rotation

from verglas.errors import InputError
from verglas.io.cryosparc import read_cs, write_cs
from verglas.io.cs_file import load_cs, save_cs
from verglas.io.cs_pose import euler_from_pose, pose_from_euler
from verglas.io.star import read_star, write_star

RNG = np.random.default_rng(0)


def rotation_of(euler_B3):
    """A^T of RELION's angles, by scipy alone: intrinsic Z, Y', Z'' turns by rot, tilt, psi take the image to the object frame."""
    return Rotation.from_euler("ZYZ", euler_B3, degrees=True)


def degrees_between(a, b):
    return np.rad2deg((a.inv() * b).magnitude())


def special_poses():
    half_turns = np.pi * np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]])
    about_z = np.array([[0, 0, a] for a in (0, 1e-9, 1e-4, 1, -3, 3.14159, 4)])
    return np.concatenate([np.zeros((1, 3)), half_turns, about_z, RNG.normal(0, 1e-5, (5, 3)), RNG.normal(0, 2, (500, 3))])


def test_poses_agree_with_scipy():
    pose_B3 = special_poses()
    euler_B3 = euler_from_pose(pose_B3)
    assert degrees_between(Rotation.from_rotvec(pose_B3), rotation_of(euler_B3)).max() < 1.5e-4  # poles are snapped to tilt 0
    assert (euler_B3[:, 1] >= 0).all() and (euler_B3[:, 1] <= 180).all()


def test_poses_come_back():
    euler_B3 = np.column_stack([RNG.uniform(-180, 180, 500), RNG.uniform(0, 180, 500), RNG.uniform(-180, 180, 500)])
    euler_B3[:4] = [[0, 0, 30], [0, 180, -40], [10, 0, 20], [10, 180, 20]]
    pose_B3 = pose_from_euler(euler_B3)
    assert degrees_between(Rotation.from_rotvec(pose_B3), rotation_of(euler_B3)).max() < 1e-6
    assert degrees_between(rotation_of(euler_from_pose(pose_B3)), rotation_of(euler_B3)).max() < 1.5e-4


def some_fields(n=12):
    """Fields as cryoSPARC writes them: two exposure groups, float32 values."""
    group = np.arange(n) % 2
    return {
        "uid": RNG.integers(1, 2**63, n).astype("<u8") * 2 + 1,
        "blob/path": np.array([b">J1/extract/123456_mic.mrc"] * n),
        "blob/idx": np.arange(n, dtype="<u4"),
        "blob/shape": np.full((n, 2), 64, "<u4"),
        "blob/psize_A": np.full(n, 1.06, "<f4"),
        "ctf/exp_group_id": (5 + group).astype("<u4"),
        "ctf/accel_kv": np.full(n, 300, "<f4"),
        "ctf/cs_mm": np.full(n, 2.7, "<f4"),
        "ctf/amp_contrast": np.full(n, 0.1, "<f4"),
        "ctf/df1_A": RNG.uniform(8e3, 2e4, n).astype("<f4"),
        "ctf/df2_A": RNG.uniform(8e3, 2e4, n).astype("<f4"),
        "ctf/df_angle_rad": RNG.uniform(-1.5, 1.5, n).astype("<f4"),
        "ctf/phase_shift_rad": RNG.uniform(0, 1.5, n).astype("<f4"),
        "ctf/tilt_A": np.stack([1000.0 * group, np.full(n, -300.0)], 1).astype("<f4"),
        "ctf/trefoil_A": np.full((n, 2), 7.5, "<f4"),
        "alignments3D/split": (np.arange(n) % 3 > 0).astype("<u4"),
        "alignments3D/shift": RNG.normal(0, 5, (n, 2)).astype("<f4"),
        "alignments3D/pose": RNG.normal(0, 2, (n, 3)).astype("<f4"),
        "alignments3D/psize_A": np.full(n, 2.12, "<f4"),
        "alignments3D/class": np.zeros(n, "<u4"),
        "alignments3D/error": RNG.normal(1e3, 10, n).astype("<f4"),
        "location/micrograph_path": np.array([b"J2/motion/a mic.mrc"] * n),
        "location/micrograph_shape": np.tile([3838, 3710], (n, 1)).astype("<u4"),
        "location/center_x_frac": RNG.uniform(0, 1, n).astype("<f4"),
        "location/center_y_frac": RNG.uniform(0, 1, n).astype("<f4"),
    }  # fmt: skip


@pytest.fixture
def fields():
    return some_fields()


def test_what_each_field_becomes(tmp_path, fields):
    save_cs(tmp_path / "a.cs", fields)
    read = read_cs(tmp_path / "a.cs")
    p, optics = read.particles, read.optics
    assert p["rlnImageName"][4] == "000005@>J1/extract/123456_mic.mrc"
    origin = fields["alignments3D/shift"].astype(float) * 2.12
    np.testing.assert_allclose(p[["rlnOriginXAngst", "rlnOriginYAngst"]], origin, rtol=1e-6)
    np.testing.assert_allclose(p["rlnDefocusAngle"], np.rad2deg(fields["ctf/df_angle_rad"]), rtol=1e-6)
    np.testing.assert_allclose(p["rlnPhaseShift"], np.rad2deg(fields["ctf/phase_shift_rad"]), rtol=1e-6)
    np.testing.assert_array_equal(p["rlnDefocusU"].astype("f4"), fields["ctf/df1_A"])
    np.testing.assert_array_equal(p["rlnRandomSubset"], fields["alignments3D/split"] + 1)
    np.testing.assert_array_equal(p["rlnClassNumber"], 1)
    np.testing.assert_allclose(p["rlnCoordinateX"], fields["location/center_x_frac"].astype(float) * 3710)
    np.testing.assert_allclose(p["rlnCoordinateY"], (1 - fields["location/center_y_frac"].astype(float)) * 3838)
    np.testing.assert_array_equal(p["rlnOpticsGroup"], 1 + np.arange(12) % 2)
    assert optics["rlnImagePixelSize"].tolist() == [1.06, 1.06]  # not 1.0599999
    assert optics["rlnVoltage"].tolist() == [300, 300] and optics["rlnImageSize"].tolist() == [64, 64]
    # cryoSPARC's tilt_A is Cs times the tilt: 1000 Å / 2.7 mm = 0.037 mrad.
    np.testing.assert_allclose(optics["rlnBeamTiltX"], [0, 1e3 * 1000 / 2.7e7], rtol=1e-6)
    np.testing.assert_array_equal(p["cs_ctf/exp_group_id"], fields["ctf/exp_group_id"])
    assert p["cs_ctf/trefoil_A"][0] == "[7.5,7.5]"
    assert any("ctf/trefoil_A" in notice for notice in read.notices)
    kept = read_cs(tmp_path / "a.cs", flip_y=False).particles
    np.testing.assert_allclose(kept["rlnCoordinateY"], fields["location/center_y_frac"].astype(float) * 3838)


def round_trip(folder, path, passthrough=()):
    """.cs -> STAR file -> .cs; returns the fields."""
    write_star(folder / "b.star", read_cs(path, passthrough).blocks(), overwrite=True)
    blocks = read_star(folder / "b.star")
    write_cs(folder / "c.cs", blocks["particles"].frame, blocks["optics"].frame, overwrite=True)
    return load_cs(folder / "c.cs")


def assert_fields_came_back(old, new):
    assert set(old) <= set(new)
    for name, values in old.items():
        if name == "alignments3D/pose":
            assert degrees_between(Rotation.from_rotvec(values), Rotation.from_rotvec(new[name])).max() < 1e-3
        elif values.dtype.kind == "f":
            assert new[name].dtype == values.dtype
            np.testing.assert_allclose(new[name], values, rtol=3e-7, atol=1e-7)
        else:
            assert new[name].dtype.kind == values.dtype.kind
            np.testing.assert_array_equal(new[name], values)


def test_round_trip_keeps_every_field(tmp_path, fields):
    save_cs(tmp_path / "a.cs", fields)
    assert_fields_came_back(fields, round_trip(tmp_path, tmp_path / "a.cs"))


def test_real_file_round_trip(tmp_path, shared):
    path = shared / "data/star_cs_variants/cryosparc_P12_J24_001_particles.cs"
    old = load_cs(path)
    assert_fields_came_back(old, round_trip(tmp_path, path))
    angles = read_star(tmp_path / "b.star")["particles"].frame[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy()
    assert degrees_between(Rotation.from_rotvec(old["alignments3D/pose"]), rotation_of(angles)).max() < 1e-3


def test_star_to_cs_and_back_keeps_every_column(tmp_path, shared):
    blocks = read_star(shared / "data/betagal_tutorial/particles_1391_with_poses.star")
    old, optics = blocks["particles"].frame, blocks["optics"].frame
    notices = write_cs(tmp_path / "a.cs", old, optics)
    assert any("rlnAutopickFigureOfMerit" in notice for notice in notices)
    assert any("rlnMtfFileName" in notice for notice in notices)
    new = read_cs(tmp_path / "a.cs").particles
    angles = ["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]
    assert degrees_between(rotation_of(old[angles]), rotation_of(new[angles])).max() < 1e-3
    for label in old.columns:
        if label in angles:
            continue
        if isinstance(old[label].dtype, pd.StringDtype):
            assert old[label].tolist() == new[label].tolist()
        else:  # cryoSPARC holds float32
            np.testing.assert_allclose(new[label], old[label], rtol=2e-7, atol=1e-6)


def test_passthrough_is_joined_by_uid(tmp_path, fields):
    n = len(fields["uid"])
    order = RNG.permutation(n)
    moved = ("blob/path", "blob/idx", "blob/shape", "blob/psize_A")
    save_cs(tmp_path / "main.cs", {name: values for name, values in fields.items() if name not in moved})
    others = {name: fields[name][order] for name in ("uid", "ctf/accel_kv", *moved)}
    others["ctf/accel_kv"] = np.zeros(n, "<f4")  # what the main file holds wins
    save_cs(tmp_path / "pass.cs", others)
    whole = read_cs(tmp_path / "main.cs", [tmp_path / "pass.cs"])
    save_cs(tmp_path / "all.cs", fields)
    pd.testing.assert_frame_equal(whole.particles, read_cs(tmp_path / "all.cs").particles, check_like=True)
    with pytest.raises(InputError, match="no field blob/path"):
        read_cs(tmp_path / "main.cs")
    save_cs(tmp_path / "pass.cs", {name: values[1:] for name, values in others.items()}, overwrite=True)
    with pytest.raises(InputError, match=r"1 of 12 particles of .*main.cs are not in it"):
        read_cs(tmp_path / "main.cs", [tmp_path / "pass.cs"])


def test_two_dimensional_alignments(tmp_path, fields):
    flat = {name.replace("3D", "2D"): values for name, values in fields.items()}
    flat["alignments2D/pose"] = RNG.uniform(-3, 3, 12).astype("<f4")
    save_cs(tmp_path / "a.cs", flat)
    particles = read_cs(tmp_path / "a.cs").particles
    np.testing.assert_allclose(particles["rlnAnglePsi"], np.rad2deg(flat["alignments2D/pose"]), rtol=1e-6)
    assert "rlnAngleRot" not in particles
    assert_fields_came_back(flat, round_trip(tmp_path, tmp_path / "a.cs"))


def test_one_half_only_makes_no_half_sets(tmp_path, fields):
    fields["alignments3D/split"][:] = 0
    save_cs(tmp_path / "a.cs", fields)
    read = read_cs(tmp_path / "a.cs")
    assert "rlnRandomSubset" not in read.particles
    assert any("no half-sets" in notice for notice in read.notices)


def test_uids_of_new_files_are_distinct_and_steady(tmp_path):
    particles = pd.DataFrame({"rlnImageName": ["1@a.mrcs", "2@a.mrcs", "1@a.mrcs"], "rlnOpticsGroup": [1, 1, 1]})
    optics = pd.DataFrame({"rlnOpticsGroup": [1], "rlnImagePixelSize": [1.0]})
    for name in ("a.cs", "b.cs"):
        write_cs(tmp_path / name, particles, optics)
    uid = load_cs(tmp_path / "a.cs")["uid"]
    assert len(set(uid)) == 3
    np.testing.assert_array_equal(uid, load_cs(tmp_path / "b.cs")["uid"])


def bad_files(fields):
    n = len(fields["uid"])
    objects = np.array([(1, {})], [("uid", "<u8"), ("a", object)])
    return {
        "objects": (objects, "Python objects"),
        "plain array": (np.zeros(5), "an array of float64"),
        "no uid": (np.zeros(3, [("a", "<f4")]), "no field uid"),
        "no rows": (np.zeros(0, [("uid", "<u8")]), "holds no particles"),
        "no images": ({"uid": fields["uid"]}, "no field blob/path and no blob/idx"),
        "pose NaN": (fields | {"alignments3D/pose": np.full((n, 3), np.nan, "<f4")}, "in row 1; expected finite"),
        "pose of two": (fields | {"alignments3D/pose": np.zeros((n, 2), "<f4")}, "expected 3 number"),
        "negative index": (fields | {"blob/idx": np.full(n, -1)}, "blob/idx is -1 in row 1"),
    }


@pytest.mark.parametrize("name", bad_files(some_fields()))
def test_bad_files_are_named(tmp_path, name, fields):
    content, text = bad_files(fields)[name]
    if isinstance(content, dict):
        save_cs(tmp_path / "a.cs", content)
    else:
        with open(tmp_path / "a.cs", "wb") as file:
            np.save(file, content, allow_pickle=True)
    with pytest.raises(InputError, match=text):
        read_cs(tmp_path / "a.cs")


def test_damaged_files(tmp_path, fields):
    save_cs(tmp_path / "a.cs", fields)
    whole = (tmp_path / "a.cs").read_bytes()
    (tmp_path / "a.cs").write_bytes(whole[:-10])
    with pytest.raises(InputError, match="truncated"):
        read_cs(tmp_path / "a.cs")
    (tmp_path / "a.cs").write_bytes(whole.replace(b"'shape': (12,)", b"'shape': (9**9,)"[:14]))
    with pytest.raises(InputError):
        read_cs(tmp_path / "a.cs")
    (tmp_path / "a.cs").write_text("data_particles\n")
    with pytest.raises(InputError, match="not a NumPy file"):
        read_cs(tmp_path / "a.cs")


@pytest.mark.parametrize(("particles", "optics", "text"), [
    (pd.DataFrame({"rlnImageName": ["1@a"]}), None, "no optics groups"),
    (pd.DataFrame({"rlnOpticsGroup": [1]}), pd.DataFrame({"rlnOpticsGroup": [1]}), "no column rlnImageName"),
    (pd.DataFrame({"rlnImageName": ["1@a"], "rlnOpticsGroup": [2]}), pd.DataFrame({"rlnOpticsGroup": [1]}), "group 2 is not"),
    (pd.DataFrame({"rlnImageName": ["a@1"], "rlnOpticsGroup": [1]}), pd.DataFrame({"rlnOpticsGroup": [1]}), "number@stack"),
    (pd.DataFrame({"rlnImageName": ["1@a"], "rlnOpticsGroup": [1]}), pd.DataFrame({"rlnOpticsGroup": [1]}), "rlnImagePixelSize"),
])  # fmt: skip
def test_particles_that_cannot_become_cs(tmp_path, particles, optics, text):
    with pytest.raises(InputError, match=text):
        write_cs(tmp_path / "a.cs", particles, optics)
    assert list(tmp_path.iterdir()) == []
