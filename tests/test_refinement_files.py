"""Files of a refinement: what stands in them, that verglas and RELION read them back."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from refinement_states import PIXEL, small_config, small_directions, small_state, small_table
from verglas.cli.convert import Convert
from verglas.core.rotations import angular_distance
from verglas.io.mrc import read_map
from verglas.io.star import read_star
from verglas.maximization.halves import Solution
from verglas.particles.table import ParticleTable
from verglas.refinement.files import MAPS_AT_ONCE, FinalMaps, remove_leftovers, write_final, write_iteration

COMMAND = "verglas refine --particles p.star\n --out out"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working folder of a user, with particles in it and an empty folder `out`."""
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    return tmp_path


def written(table: ParticleTable, state=None, config=None) -> dict[str, Path]:
    state, config = state or small_state(table), config or small_config()
    paths = write_iteration(Path("out"), state, table, config, small_directions(), COMMAND)
    assert sorted(paths) == sorted(Path("out").iterdir())
    return {path.name.removeprefix("run_it003_"): path for path in paths}


def test_names_of_the_files(here):
    table = small_table(here)
    halves = [f"half{h}_{name}" for h in (1, 2) for name in ("model.star", "class001.mrc")]
    assert set(written(table)) == {"data.star", "sampling.star", "optimiser.star", *halves}
    shutil.rmtree("out")
    Path("out").mkdir()
    assert set(written(table, small_state(table, halves=1))) == {
        "data.star", "sampling.star", "optimiser.star", "model.star", "class001.mrc"}  # fmt: skip


def test_poses_come_back_and_columns_stay(here):
    table = small_table(here)
    table = table.with_columns(rlnOriginX=99.0, rlnOriginY=98.0, rlnAnglePsi=1.0, rlnAngleRotPrior=5.0)
    state = small_state(table)
    read = ParticleTable.read(written(table, state)["data.star"])
    assert float(angular_distance(read.rotations(), state.poses.rotation_B33).max()) < 1e-10
    torch.testing.assert_close(read.origins(), state.poses.origin_B2, rtol=0, atol=0)
    np.testing.assert_allclose(read.frame["rlnOriginX"], state.poses.origin_B2[:, 0] / PIXEL, rtol=1e-15)
    for label in ("rlnImageName", "rlnMicrographName", "rlnCoordinateX", "rlnDefocusU", "myOwn", "rlnAngleRotPrior"):
        assert read.frame[label].tolist() == table.frame[label].tolist(), label
    assert list(read.frame.columns)[: table.frame.shape[1]] == list(table.frame.columns)
    figures = {
        "rlnNormCorrection": "norm_B", "rlnLogLikeliContribution": "log_likelihood_B", "rlnMaxValueProbDistribution": "pmax_B",
        "rlnNrOfSignificantSamples": "significant_B", "rlnRandomSubset": "half_B", "vglPosteriorEntropy": "entropy_B",
        "vglLogLikelihoodGain": "gain_B", "vglAlignability": "alignability_B",
    }  # fmt: skip
    for label, name in figures.items():
        assert read.frame[label].astype(float).tolist() == getattr(state.poses, name).tolist(), label
    assert read.half_sets(0).tolist() == state.poses.half_B.tolist()
    assert (read.optics_frame["rlnVoltage"] == 300).all() and (read.frame["rlnClassNumber"] == 1).all()
    assert table.frame["rlnOriginX"].iloc[0] == 99, "the table that came in is not changed"


def test_groups_are_numbered_as_relion_meets_them(here):
    """The particles name micrographs b, c, a; RELION sorts them first, and takes the scales of model.star in that order."""
    table = small_table(here)
    state = small_state(table)
    assert state.micrographs == ["mics/b.mrc", "mics/c.mrc", "mics/a.mrc"]
    files = written(table, state)
    groups = read_star(files["half1_model.star"])["model_groups"].frame
    assert groups["rlnGroupNumber"].tolist() == [1, 2, 3]
    assert groups["rlnGroupName"].tolist() == ["mics/a.mrc", "mics/b.mrc", "mics/c.mrc"]
    np.testing.assert_allclose(groups["rlnGroupScaleCorrection"], [1.2, 1.0, 1.1])
    assert groups["rlnGroupNrParticles"].tolist() == [2, 2, 2]
    particles = read_star(files["data.star"])["particles"].frame
    named = dict(zip(particles["rlnMicrographName"], particles["rlnGroupNumber"]))
    assert named == {"mics/a.mrc": 1, "mics/b.mrc": 2, "mics/c.mrc": 3}


def test_numbers_of_frames_do_not_sort_micrographs(here):
    table = small_table(here)
    table = table.with_columns(
        rlnMicrographName=[f"{9 - i % 3}@{name}" for i, name in enumerate(table.frame["rlnMicrographName"])]
    )
    groups = read_star(written(table)["half1_model.star"])["model_groups"].frame
    assert [name[-5] for name in groups["rlnGroupName"]] == ["a", "b", "c"]


def test_model_holds_what_the_half_knows(here):
    table = small_table(here)
    state = small_state(table)
    state.schedule.local_sigma = 3.75
    files = written(table, state)
    for number, half in enumerate(state.halves, 1):
        blocks = read_star(files[f"half{number}_model.star"])
        general, spectra = blocks["model_general"].values, blocks["model_class_1"].frame
        assert general["rlnCurrentResolution"] == 12 and general["rlnCurrentImageSize"] == 14
        assert general["rlnSigmaOffsetsAngst"] == half.offset_sigma, "a standard deviation in Å"
        assert general["rlnSigmaPriorPsiAngle"] == 3.75 and general["rlnOrientationalPriorMode"] == 1
        assert general["rlnTau2FudgeFactor"] == 1.5 and general["rlnNrOpticsGroups"] == 2 and general["rlnNrGroups"] == 3
        columns = {"rlnSsnrMap": half.ssnr_S, "rlnGoldStandardFsc": state.fsc_S, "rlnReferenceTau2": half.tau2_S,
                   "rlnReferenceSigma2": half.sigma2_S, "rlnFourierCompleteness": half.coverage_S}  # fmt: skip
        for label, values in columns.items():
            assert spectra[label].tolist() == values.tolist(), label
        np.testing.assert_allclose(spectra["rlnAngstromResolution"], [999, *(16 * PIXEL / s for s in range(1, 9))])
        prior = blocks["model_pdf_orient_class_1"].frame["rlnOrientationDistribution"]
        assert prior.tolist() == half.direction_prior_D.tolist()
        classes = blocks["model_classes"].frame.iloc[0]
        assert classes["rlnReferenceImage"] == f"out/run_it003_half{number}_class001.mrc"
        assert classes["rlnEstimatedResolution"] == 16 * PIXEL / 4, "the SSNR falls below 1 after shell 4"
        assert read_map(classes["rlnReferenceImage"]).pixel_size == pytest.approx(PIXEL)
        assert (read_map(classes["rlnReferenceImage"]).data_ZYX == half.map_ZYX.numpy()).all()


def test_noise_stands_where_each_relion_looks(here):
    """model_optics_group_N for RELION 4 and 5, model_group_N (scale groups in the files' order) for RELION 3.1."""
    table = small_table(here)
    state = small_state(table)
    state.halves[0].sigma2_noise_GS[:, 0] = 0
    state.poses.half_B[state.poses.micrograph_B == 0] = 2  # micrograph b has no particle of half 1
    blocks = read_star(written(table, state)["half1_model.star"])
    noise_GS = state.halves[0].sigma2_noise_GS[:, 1:].tolist()
    for number, optics in ((1, 0), (2, 1)):
        frame = blocks[f"model_optics_group_{number}"].frame
        assert frame["rlnSigma2Noise"].tolist() == noise_GS[optics]
        assert frame["rlnSpectralIndex"].tolist() == list(range(1, 9)), "shells without noise are left out"
        np.testing.assert_allclose(frame["rlnResolution"], np.arange(1, 9) / (16 * PIXEL))
    assert blocks["model_group_1"].frame["rlnSigma2Noise"].tolist() == noise_GS[1]  # micrograph a: second optics group
    assert "model_group_2" not in blocks
    assert blocks["model_group_3"].frame["rlnSigma2Noise"].tolist() == noise_GS[0]


def test_optics_groups_are_numbered_by_their_numbers(here):
    table = small_table(here)
    table = dataclasses.replace(table, optics_frame=table.optics_frame.iloc[::-1].reset_index(drop=True))
    state = small_state(table)
    first = next(i for i, group in enumerate(table.groups) if group.number == 1)
    blocks = read_star(written(table, state)["half1_model.star"])
    assert blocks["model_optics_group_1"].frame["rlnSigma2Noise"].tolist() == state.halves[0].sigma2_noise_GS[first].tolist()


def test_sampling_is_coarse_and_in_angstrom(here):
    blocks = read_star(written(small_table(here), config=small_config(symmetry="D2"))["sampling.star"])
    values = blocks["sampling_general"].values
    assert values["rlnHealpixOrder"] == 1 and values["rlnPsiStep"] == 30 and values["rlnSymmetryGroup"] == "D2"
    assert values["rlnOffsetRange"] == 15 and values["rlnOffsetStep"] == 6, "those of the schedule"
    assert values["rlnOffsetRangeOriginal"] == 5 * PIXEL and values["rlnOffsetStepOriginal"] == 2 * PIXEL, "options are in px"
    assert values["rlnSamplingPerturbInstance"] == -0.2875
    frame = blocks["sampling_directions"].frame
    np.testing.assert_array_equal(frame[["rlnAngleRot", "rlnAngleTilt"]], small_directions())


def test_optimiser_leads_to_the_other_files(here):
    table = small_table(here)
    state = small_state(table)
    files = written(table, state, small_config(mask=Path("mask.mrc"), correct_scale=False))
    values = read_star(files["optimiser.star"])["optimiser_general"].values
    assert values["rlnOutputRootName"] == "out/run" and values["rlnCurrentIteration"] == 3
    named = {
        "rlnModelStarFile": "half1_model.star",
        "rlnModelStarFile2": "half2_model.star",
        "rlnExperimentalDataStarFile": "data.star",
        "rlnOrientSamplingStarFile": "sampling.star",
    }
    for label, name in named.items():
        assert Path(values[label]).samefile(files[name])
    assert values["rlnBestResolutionThusFar"] == pytest.approx(1 / 12), "in 1/Å"
    assert values["rlnSolventMaskName"] == "mask.mrc" and values["rlnDoCorrectScale"] == 0
    assert values["rlnDoSplitRandomHalves"] == 1 and values["rlnHasConverged"] == 0
    assert "# verglas refine --particles p.star --out out\n" in files["optimiser.star"].read_text(), "one line, whatever came"


def test_nothing_is_known_yet(here):
    """Infinite resolutions of iteration 0 become RELION's 999 Å (or 0 /Å)."""
    table = small_table(here)
    state = small_state(table)
    state.current_resolution = state.schedule.best_resolution = float("inf")
    state.halves[0].ssnr_S = torch.zeros(9, dtype=torch.float64)
    files = written(table, state)
    blocks = read_star(files["half1_model.star"])
    assert blocks["model_general"].values["rlnCurrentResolution"] == 999
    assert blocks["model_classes"].frame["rlnEstimatedResolution"].tolist() == [999]
    assert read_star(files["optimiser.star"])["optimiser_general"].values["rlnBestResolutionThusFar"] == 0


def test_image_names_lead_to_the_stacks_from_where_the_user_is(here, monkeypatch):
    def stack_named(table: ParticleTable) -> str:
        return read_star(written(table)["data.star"])["particles"].frame["rlnImageName"].iloc[0].partition("@")[2]

    assert stack_named(small_table(here)) == "particles.mrcs"
    (here / "extract").mkdir()
    below = small_table(here / "extract")
    assert stack_named(below) == "extract/particles.mrcs"
    (here / "elsewhere" / "out").mkdir(parents=True)
    monkeypatch.chdir(here / "elsewhere")
    assert stack_named(below) == str(here / "extract" / "particles.mrcs")
    read = ParticleTable.read("out/run_it003_data.star")
    assert read.image_locations().paths[0].samefile(here / "extract" / "particles.mrcs")


def test_same_state_same_bytes_and_old_files_are_replaced(here):
    table = small_table(here)
    first = {name: path.read_bytes() for name, path in written(table).items()}
    written(table, small_state(table, seed=6))
    second = {name: path.read_bytes() for name, path in written(table).items()}
    assert first == second


def test_final_files(here):
    table = small_table(here)
    state = small_state(table)
    state.solved = True
    joined = Solution(torch.ones(16, 16, 16), *(torch.full((9,), value, dtype=torch.float64) for value in (2.0, 3.0, 0.5, 1.0)))
    final = FinalMaps(joined, [half.map_ZYX.double() * 2 for half in state.halves])
    paths = write_final(Path("out"), state, table, small_config(), final, small_directions(), COMMAND)
    maps = ["class001.mrc", "half1_class001_unfil.mrc", "half2_class001_unfil.mrc"]
    names = sorted([*maps, "data.star", "model.star", "optimiser.star", "sampling.star"])
    assert sorted(path.name for path in paths) == [f"run_{name}" for name in names] == sorted(os.listdir("out"))
    assert (read_map("out/run_class001.mrc").data_ZYX == 1).all()
    assert (read_map("out/run_half2_class001_unfil.mrc").data_ZYX == 2 * state.halves[1].map_ZYX.numpy()).all()
    model = read_star("out/run_model.star")
    assert (model["model_class_1"].frame["rlnReferenceTau2"] == 2).all()
    assert model["model_groups"].frame["rlnGroupNrParticles"].sum() == len(table), "both halves"
    assert model["model_classes"].frame["rlnReferenceImage"].tolist() == ["out/run_class001.mrc"]
    values = read_star("out/run_optimiser.star")["optimiser_general"].values
    assert values["rlnDoSplitRandomHalves"] == 0 and "rlnModelStarFile2" not in values and values["rlnHasConverged"] == 1


@pytest.mark.parametrize("replaced", range(10))
def test_a_kill_in_the_middle_leaves_whole_files(here, replaced):
    """A child dies when it would give the next file its name: what has a name is whole, what has none is swept up."""
    table = small_table(here)
    child = os.fork()
    if child == 0:
        real, calls = os.replace, itertools.count()
        os.replace = lambda *names: os._exit(9) if next(calls) >= replaced else real(*names)
        written(table)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert 1 <= len(remove_leftovers(Path("out"))) <= MAPS_AT_ONCE + 1  # a table is written beside maps
    for path in Path("out").iterdir():
        assert path.name.startswith("run_it003_")
        whole = read_map(path) if path.suffix == ".mrc" else read_star(path)
        assert whole
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    again = {path.name: path.read_bytes() for path in written(table).values()}
    assert before.items() <= again.items()


def test_cryosparc_file_of_the_final_particles(here):
    table = small_table(here)
    state = small_state(table)
    for source, out in ((written(table, state)["data.star"], "p.cs"), (Path("p.cs"), "back.star")):
        Convert(source=source, out=Path(out)).run()
    back = ParticleTable.read("back.star")
    assert float(angular_distance(back.rotations(), state.poses.rotation_B33).max()) < 1e-3
    torch.testing.assert_close(back.origins(), state.poses.origin_B2, rtol=0, atol=1e-4)
    assert back.half_sets(0).tolist() == state.poses.half_B.tolist()
