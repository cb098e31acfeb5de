"""ParticleTable: reading, optics groups, units, halves, and a clear error for every bad table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.errors import InputError
from verglas.io.cryosparc import write_cs
from verglas.io.mrc import StackWriter
from verglas.particles.table import ParticleTable

OPTICS = {
    "rlnOpticsGroupName": "krios", "rlnOpticsGroup": 1, "rlnVoltage": 300.0, "rlnSphericalAberration": 2.7,
    "rlnAmplitudeContrast": 0.1, "rlnImagePixelSize": 1.5, "rlnImageSize": 32, "rlnImageDimensionality": 2,
}  # fmt: skip
PARTICLE = {"rlnImageName": "000001@stack.mrcs", "rlnOpticsGroup": 1, "rlnDefocusU": 10000.0, "rlnMicrographName": "a.mrc"}


def block(name: str, rows: list[dict]) -> str:
    labels = list(rows[0])
    text = f"\n# version 30001\n\ndata_{name}\n\nloop_\n" + "".join(f"_{label}\n" for label in labels)
    return text + "".join(" ".join(str(row[label]) for label in labels) + "\n" for row in rows) + "\n"


def write(path: Path, particles: list[dict], optics: list[dict] | None = None) -> Path:
    path.write_text((block("optics", optics) if optics else "") + block("particles", particles))
    return path


def read(tmp_path: Path, particles: list[dict], optics: list[dict] | None = None) -> ParticleTable:
    return ParticleTable.read(write(tmp_path / "particles.star", particles, optics or [OPTICS]))


def numbered(n: int, **columns) -> list[dict]:
    return [PARTICLE | {"rlnImageName": f"{i + 1:06d}@stack.mrcs"} | {k: v[i] for k, v in columns.items()} for i in range(n)]


def test_optics_group_of_a_full_row(tmp_path):
    optics = OPTICS | {
        "rlnBeamTiltX": 0.5, "rlnBeamTiltY": -0.25, "rlnOddZernike": "[0.1,2,-3e-1]", "rlnEvenZernike": "[1]",
        "rlnMagMat00": 1.01, "rlnMagMat01": 0.02, "rlnMagMat10": -0.03, "rlnMagMat11": 0.99, "rlnMtfFileName": "mtf.star",
        "rlnMicrographOriginalPixelSize": 0.75, "rlnCtfDataAreCtfPremultiplied": 1,
    }  # fmt: skip
    (group,) = read(tmp_path, [PARTICLE], [optics]).groups
    assert (group.name, group.number, group.box, group.pixel_size, group.original_pixel_size) == ("krios", 1, 32, 1.5, 0.75)
    assert (group.voltage_kv, group.cs_mm, group.amplitude_contrast) == (300.0, 2.7, 0.1)
    assert group.beam_tilt_mrad == (0.5, -0.25)
    assert (group.odd_zernike, group.even_zernike) == ((0.1, 2.0, -0.3), (1.0,))
    assert group.magnification == ((1.01, 0.02), (-0.03, 0.99))
    assert (group.ctf_premultiplied, group.ctf_corrected, group.mtf_file) == (True, False, "mtf.star")


def test_groups_follow_their_numbers_not_their_order(tmp_path):
    optics = [OPTICS | {"rlnOpticsGroup": 7, "rlnImageSize": 64}, OPTICS | {"rlnOpticsGroup": 3}]
    table = read(tmp_path, [PARTICLE | {"rlnOpticsGroup": n} for n in (3, 7, 3)], optics)
    assert [table.groups[i].number for i in table.group_index_B] == [3, 7, 3]
    assert [table.groups[i].box for i in table.group_index_B] == [32, 64, 32]


def test_voltage_of_a_particle_overrides_its_group(tmp_path):
    table = read(tmp_path, numbered(3, rlnVoltage=[300.0, 200.0, 300.0]))
    assert [table.groups[i].voltage_kv for i in table.group_index_B] == [300.0, 200.0, 300.0]
    assert len(table.groups) == 2
    assert {group.cs_mm for group in table.groups} == {2.7}


def test_file_before_31_gets_groups_pixels_and_angstroms(tmp_path):
    with StackWriter(tmp_path / "stack.mrcs", 3, (24, 24), 0.0) as stack:
        stack.append(np.random.default_rng(0).normal(size=(3, 24, 24)).astype(np.float32))
    old = {"rlnVoltage": 200.0, "rlnSphericalAberration": 1.4, "rlnAmplitudeContrast": 0.1, "rlnDetectorPixelSize": 5.0}
    rows = [
        row | old | {"rlnMagnification": m, "rlnOriginX": 2.0, "rlnOriginY": -1.5, "rlnOriginXPrior": 4.0}
        for row, m in zip(numbered(3), (50000.0, 25000.0, 50000.0))
    ]
    for row in rows:
        del row["rlnOpticsGroup"]
    table = ParticleTable.read(write(tmp_path / "old.star", rows))
    assert [table.groups[i].pixel_size for i in table.group_index_B] == [1.0, 2.0, 1.0]
    assert {group.box for group in table.groups} == {24}
    assert torch.equal(table.origins(), torch.tensor([[2.0, -1.5], [4.0, -3.0], [2.0, -1.5]], dtype=torch.float64))
    assert table.frame["rlnOriginXPriorAngst"].tolist() == [4.0, 8.0, 4.0]
    assert not {"rlnOriginX", "rlnVoltage", "rlnMagnification"} & set(table.frame.columns)
    table.write(tmp_path / "new.star")
    again = ParticleTable.read(tmp_path / "new.star")
    assert again.groups == table.groups
    assert torch.equal(again.origins(), table.origins())


def test_poses_and_offsets(tmp_path):
    row = PARTICLE | {
        "rlnAngleRot": 0.0,
        "rlnAngleTilt": 0.0,
        "rlnAnglePsi": 90.0,
        "rlnOriginXAngst": 3.0,
        "rlnOriginYAngst": -4.5,
    }
    table = read(tmp_path, [row])
    expected = torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]], dtype=torch.float64)
    assert torch.allclose(table.rotations()[0], expected, atol=1e-15)
    assert torch.equal(table.origins(), torch.tensor([[3.0, -4.5]], dtype=torch.float64))
    assert torch.equal(read(tmp_path, [PARTICLE]).origins(), torch.zeros(1, 2, dtype=torch.float64))


def test_ctf_defaults_and_envelope(tmp_path):
    plain = read(tmp_path, [PARTICLE]).ctf()
    assert [float(t) for t in (plain.defocus_u_B, plain.defocus_v_B, plain.angle_B)] == [10000.0, 10000.0, 0.0]
    assert [float(t) for t in (plain.phase_shift_B, plain.bfactor_B, plain.scale_B)] == [0.0, 0.0, 1.0]
    assert not plain.has_envelope
    assert read(tmp_path, numbered(2, rlnCtfBfactor=[0.0, 5.0])).ctf().has_envelope
    assert read(tmp_path, numbered(2, rlnCtfScalefactor=[1.0, 0.9])).ctf().has_envelope


def test_image_locations(tmp_path):
    names = ["3@b.mrcs", "000001@sub/a.mrcs", "1@b.mrcs", "single.mrc"]
    table = read(tmp_path, [PARTICLE | {"rlnImageName": name} for name in names])
    where = table.image_locations()
    assert [where.paths[i] for i in where.stack_index_B] == [
        tmp_path / n for n in ("b.mrcs", "sub/a.mrcs", "b.mrcs", "single.mrc")
    ]
    assert where.image_index_B.tolist() == [2, 0, 0, 0]
    assert where.name(1) == f"000001@{tmp_path / 'sub/a.mrcs'}"


def test_images_are_found_from_the_project_folder_above(tmp_path):
    job = tmp_path / "Refine3D" / "job012"
    job.mkdir(parents=True)
    (tmp_path / "stack.mrcs").touch()
    assert ParticleTable.read(write(job / "run_data.star", [PARTICLE], [OPTICS])).folder.samefile(tmp_path)


def test_select_keeps_every_column(tmp_path):
    table = read(tmp_path, numbered(5, myOwnColumn=list("abcde")))
    assert table.select(np.array([4, 0])).frame["myOwnColumn"].tolist() == ["e", "a"]
    assert table.select(np.array([True, False, False, True, False])).frame["myOwnColumn"].tolist() == ["a", "d"]
    assert table.select(slice(1, 3)).frame["myOwnColumn"].tolist() == ["b", "c"]
    some = table.subset(3, seed=5).frame["myOwnColumn"].tolist()
    assert some == sorted(some) and len(set(some)) == 3
    assert some == table.subset(3, seed=5).frame["myOwnColumn"].tolist()
    assert len(table.subset(99, seed=5)) == 5


def test_halves_are_kept_or_drawn_evenly(tmp_path):
    given = [1, 2, 2, 1, 2]
    assert read(tmp_path, numbered(5, rlnRandomSubset=given)).half_sets(seed=3).tolist() == given
    table = read(tmp_path, numbered(101, rlnRandomSubset=[0] * 101))
    half_B = table.half_sets(seed=3)
    assert np.bincount(half_B).tolist() == [0, 51, 50]
    assert np.array_equal(half_B, table.half_sets(seed=3))
    assert not np.array_equal(half_B, table.half_sets(seed=4))


def test_halves_never_split_an_image_or_a_tube(tmp_path):
    expanded = read(tmp_path, [row for row in numbered(20) for _ in range(3)])
    assert (expanded.half_sets(seed=1).reshape(20, 3).std(axis=1) == 0).all()
    tubes = read(tmp_path, numbered(40, rlnHelicalTubeID=[i // 4 for i in range(40)]))
    assert (tubes.half_sets(seed=1).reshape(10, 4).std(axis=1) == 0).all()


@pytest.mark.parametrize(
    "halves, said", [([1, 0, 2], "no half"), ([1, 1, 1], "one half"), ([1, 2, 3], "value 3")], ids=["mixed", "empty", "unknown"]
)
def test_bad_halves(tmp_path, halves, said):
    with pytest.raises(InputError, match=said):
        read(tmp_path, numbered(3, rlnRandomSubset=halves)).half_sets(seed=1)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"rlnImageSize": 33}, "odd box of 33"),
        ({"rlnImagePixelSize": 0.0}, "pixel size 0"),
        ({"rlnImagePixelSize": None}, "rlnImagePixelSize"),
        ({"rlnAmplitudeContrast": 1.5}, "amplitude contrast 1.5"),
        ({"rlnOddZernike": "[1,x]"}, "rlnOddZernike"),
        ({"rlnImageDimensionality": 3}, "3-D"),
        ({"rlnVoltage": "nan"}, "rlnVoltage"),
        ({"rlnMagMat00": 0.0}, "cannot be inverted"),
        ({"rlnOpticsGroup": 2}, "refer to optics group 1"),
    ],
)
def test_bad_optics_are_named_at_the_door(tmp_path, change, said):
    optics = {label: value for label, value in (OPTICS | change).items() if value is not None}
    with pytest.raises(InputError, match=said):
        read(tmp_path, [PARTICLE], [optics])


@pytest.mark.parametrize("name", ["0@stack.mrcs", "x@stack.mrcs", "-1@stack.mrcs", "1@", "²@stack.mrcs"])
def test_bad_image_names(tmp_path, name):
    with pytest.raises(InputError, match="image name"):
        read(tmp_path, [PARTICLE | {"rlnImageName": name}]).image_locations()


def test_missing_columns_are_named(tmp_path):
    without_microscope = {k: v for k, v in OPTICS.items() if k not in ("rlnVoltage", "rlnSphericalAberration")}
    with pytest.raises(InputError, match="rlnAngleRot, rlnAngleTilt, rlnAnglePsi"):
        read(tmp_path, [PARTICLE]).rotations()
    with pytest.raises(InputError, match="rlnVoltage"):
        read(tmp_path, [PARTICLE], [without_microscope]).ctf()
    with pytest.raises(InputError, match="rlnDefocusU"):
        read(tmp_path, [{k: v for k, v in PARTICLE.items() if k != "rlnDefocusU"}]).ctf()
    with pytest.raises(InputError, match="rlnImageName"):
        read(tmp_path, [{k: v for k, v in PARTICLE.items() if k != "rlnImageName"}])
    with pytest.raises(InputError, match="rlnOpticsGroup"):
        read(tmp_path, [{k: v for k, v in PARTICLE.items() if k != "rlnOpticsGroup"}])


def test_numbers_that_are_none(tmp_path):
    with pytest.raises(InputError, match="row 2"):
        read(tmp_path, numbered(2, rlnDefocusU=[1e4, "nan"])).ctf()
    flat = OPTICS | {"rlnSphericalAberration": 0.0, "rlnAmplitudeContrast": 0.0}
    with pytest.raises(InputError, match="particle 2"):
        read(tmp_path, numbered(2, rlnDefocusU=[1e4, 0.0]), [flat]).ctf()


@pytest.mark.parametrize(
    "name, n_groups, n",
    [
        ("betagal_tutorial/particles_1391_with_poses.star", 1, 1391),
        ("star_cs_variants/relion31.6opticsgroups.star", 6, None),
        ("star_cs_variants/relion5.star", 1, None),
        ("star_cs_variants/relion31.v2.star", 1, None),
    ],
)
def test_real_files(shared, name, n_groups, n):
    table = ParticleTable.read(shared / "data" / name)
    assert len(table.groups) == n_groups
    assert n is None or len(table) == n
    assert torch.linalg.det(table.rotations()).sub(1).abs().max() < 1e-12
    assert len(table.ctf()) == len(table) == len(table.image_locations().image_index_B)


def test_real_cryosparc_file(shared):
    table = ParticleTable.read(shared / "data/star_cs_variants/cryosparc_P12_J24_001_particles.cs")
    assert len(table) == len(table.ctf()) == 2019
    assert [(group.box, group.voltage_kv) for group in table.groups] == [(180, 200.0)]
    assert torch.linalg.det(table.rotations()).sub(1).abs().max() < 1e-6


def test_notices_of_a_cs_file_are_kept(tmp_path):
    table = read(tmp_path, numbered(2))
    write_cs(tmp_path / "p.cs", table.frame, table.optics_frame)
    back = ParticleTable.read(tmp_path / "p.cs")
    assert table.notices == () and any("No poses" in notice for notice in back.notices)
    assert back.select(slice(1)).notices == back.notices


def test_names_follow_a_file_to_another_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    table = read(tmp_path / "a", numbered(3))
    assert table.named_from(tmp_path / "b") is table  # nothing to lead to
    with StackWriter(tmp_path / "a/stack.mrcs", 3, (8, 8), 1.0) as stack:
        stack.append(np.zeros((3, 8, 8), np.float32))
    assert table.named_from(tmp_path / "a") is table
    assert table.named_from(tmp_path / "a/../a") is table
    moved = table.named_from(tmp_path / "b")
    assert moved.frame["rlnImageName"].tolist() == [f"00000{i}@../a/stack.mrcs" for i in (1, 2, 3)]
    assert moved.image_locations().paths[0].samefile(tmp_path / "a/stack.mrcs")


def test_one_image_makes_no_halves(tmp_path):
    with pytest.raises(InputError, match="one image"):
        read(tmp_path, [PARTICLE, PARTICLE]).half_sets(0)
