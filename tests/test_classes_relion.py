"""One iteration of a classification with two references beside relion_refine on the same files."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from verglas.cli.main import main
from verglas.core.masks import soft_sphere
from verglas.core.rotations import angular_distance, matrix_from_euler
from verglas.core.shells import fsc
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import StarBlock, read_star, write_star
from verglas.maximization.reference import initial_reference
from verglas.particles.table import ParticleTable
from verglas.refinement import classes
from verglas.refinement.config import ClassifyConfig
from verglas.refinement.driver import Session
from verglas.refinement.step import Iteration

ROOT = Path(__file__).resolve().parent.parent
pytestmark = [
    pytest.mark.interop,
    pytest.mark.skipif(shutil.which("relion_refine") is None, reason="needs relion_refine"),
    pytest.mark.skipif(not (ROOT / "benchmarks").is_dir(), reason="needs the benchmarks of the checkout"),
]


@dataclass(frozen=True)
class Both:
    """The same iteration by both programs; particles, classes, noise_S, maps: RELION's."""

    ours: Iteration
    particles: pd.DataFrame
    classes: pd.DataFrame
    noise_S: torch.Tensor
    maps: list[torch.Tensor]


def config_of(correlate: bool) -> ClassifyConfig:
    return ClassifyConfig(
        diameter=130, initial_resolution=30, healpix_order=1, classes=2, perturbation=0.0, correct_scale=False,
        relion_offset_prior=True, absolute_greyscale=not correlate, max_iterations=1,
    )  # fmt: skip


def unmasked(session: Session, references: list[Map], config: ClassifyConfig) -> Session:
    """RELION is not asked for masks of its maps here, neither before nor after the iteration."""
    box, pixel_size = session.state.box, session.state.pixel_size
    maps = [initial_reference(one, box, pixel_size, config.initial_resolution)[0].float() for one in references]
    halves = [replace(one, map_ZYX=map_ZYX) for one, map_ZYX in zip(session.state.halves, maps, strict=True)]
    return replace(session, state=replace(session.state, halves=halves), mask_ZYX=torch.ones(box, box, box))


def both_iterations(folder: Path, config: ClassifyConfig) -> Both:
    from benchmarks.first_iteration_vs_relion import NOT_SMALLER
    from benchmarks.relion_iteration import Case, prepare, read_run
    from benchmarks.relion_rules import relion_rules

    table = prepare(ParticleTable.read(folder / "set/normalised/particles.star"), folder, False, False)
    references = [read_map(folder / f"set/set/truth_class00{k}.mrc") for k in (1, 2)]
    references = [Map(one.data_ZYX, one.pixel_size * NOT_SMALLER) for one in references]
    for k, one in enumerate(references, 1):
        write_map(folder / f"reference{k}.mrc", one)
    frame = pd.DataFrame({"rlnReferenceImage": ["reference1.mrc", "reference2.mrc"]})
    write_star(folder / "references.star", {"model_classes": StarBlock.table("model_classes", frame)})
    (folder / "relion").mkdir()
    words = Case(config).words()
    words[words.index("--K") + 1] = "2"
    command = ["relion_refine", "--i", "particles.star", "--ref", "references.star", "--o", "relion/run", *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    theirs = read_run(folder / "relion/run", table)
    maps = [torch.from_numpy(read_map(folder / f"relion/run_it001_class00{k}.mrc").data_ZYX.copy()).double() for k in (1, 2)]
    with nullcontext() if config.absolute_greyscale else relion_rules():
        (ours,) = classes.iterations(unmasked(classes.prepare(table, references, config), references, config))
    return Both(ours, theirs.particles, theirs.model["model_classes"], next(iter(theirs.noise.values())), maps)


@pytest.fixture(scope="module", params=[False, True], ids=["likelihood", "correlation"])
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """120 particles of 40 px, two conformations."""
    folder = tmp_path_factory.mktemp("classes")
    words = ["--n", "120", "--box", "40", "--pixel", "4", "--snr", "0.1", "--seed", "5", "--device", "cpu", "--model", "demo"]
    (folder / "set").mkdir()
    assert main(["simulate", *words, "--model", "demo-open", "--out", str(folder / "set/set")]) == 0
    stack = ["stack", "--particles", str(folder / "set/set/particles.star"), "--normalise", "140"]
    assert main([*stack, "--out", str(folder / "set/normalised")]) == 0
    return both_iterations(folder, config_of(request.param))


def test_particles_go_to_the_same_classes_and_poses(both: Both) -> None:
    poses = both.ours.state.poses
    same_class = poses.class_B.numpy() + 1 == both.particles["rlnClassNumber"].to_numpy()
    assert same_class.mean() >= 0.98 and 0.2 < poses.class_B.double().mean() < 0.8
    angles = torch.tensor(both.particles[["rlnAngleRot", "rlnAngleTilt", "rlnAnglePsi"]].to_numpy(float))
    assert float((angular_distance(poses.rotation_B33, matrix_from_euler(*angles.T)) < 0.01).double().mean()) >= 0.98


def test_shares_likelihoods_and_noise_agree(both: Both) -> None:
    state = both.ours.state
    shares = np.array([one.share for one in classes.class_figures(state)])
    np.testing.assert_allclose(shares, both.classes["rlnClassDistribution"], atol=0.01)
    pmax = both.particles["rlnMaxValueProbDistribution"].to_numpy()
    if pmax.min() == 1:  # by correlation
        assert bool((state.poses.pmax_B == 1).all())
        return
    assert np.corrcoef(state.poses.pmax_B.numpy(), pmax)[0, 1] >= 0.99
    for ours_B, label in ((state.poses.significant_B, "rlnNrOfSignificantSamples"),
                          (state.poses.log_likelihood_B, "rlnLogLikeliContribution")):  # fmt: skip
        assert np.corrcoef(ours_B.double().numpy(), both.particles[label].to_numpy(float))[0, 1] >= 0.99, label
    ratio_S = state.halves[0].sigma2_noise_GS[0, 1:] / both.noise_S[1:]
    assert float((ratio_S - 1).abs().max()) < 0.01


def test_maps_of_the_classes_agree(both: Both) -> None:
    """But for RELION's voxels at the very radius, as in benchmarks/first_iteration_vs_relion.py."""
    from benchmarks.first_iteration_vs_relion import without_edge

    state, correlate = both.ours.state, bool(both.ours.state.poses.pmax_B.min() == 1)
    radius, mask_ZYX = state.current_size // 2, soft_sphere(state.box, state.box / 2 - 4, 3).double()
    for one, theirs_ZYX in zip(state.halves, both.maps, strict=True):
        map_ZYX = one.map_ZYX.double()
        same_ZYX = theirs_ZYX if correlate else without_edge(theirs_ZYX, map_ZYX, radius, 2.0)
        curve_S = fsc(map_ZYX * mask_ZYX, same_ZYX * mask_ZYX)
        assert float(curve_S[1 : state.shell_of(30.0) if correlate else radius + 1].min()) >= 0.999
        assert float((map_ZYX * same_ZYX).sum() / same_ZYX.square().sum()) == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_relion_goes_on_from_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next iteration finds the shares that verglas's next one finds (grids are turned otherwise)."""
    monkeypatch.chdir(tmp_path)
    words = ["--n", "200", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "1", "--device", "cpu", "--model", "demo"]
    assert main(["simulate", *words, "--model", "demo-open", "--weights", "0.7", "0.3", "--out", "set"]) == 0
    options = ["--diameter", "150", "--initial-resolution", "40", "--healpix-order", "1", "--iterations", "4", "--device", "cpu"]
    references = [f"set/truth_class00{k}.mrc" for k in (1, 2)]
    given = ["classify3d", "--particles", "set/particles.star", "--reference", *references, *options]
    assert main([*given, "--out", "out"]) == 0
    command = ["relion_refine", "--continue", "out/run_it003_optimiser.star", "--iter", "4", "--o", "out/relion"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    ours, theirs = (read_star(Path(f"out/{name}_it004_model.star"))["model_classes"].frame for name in ("run", "relion"))
    np.testing.assert_allclose(theirs["rlnClassDistribution"], ours["rlnClassDistribution"], atol=0.03)
    own, other = (ParticleTable.read(Path(f"out/{name}_it004_data.star")).frame for name in ("run", "relion"))
    other = other.set_index("rlnImageName").loc[own["rlnImageName"]]
    assert (own["rlnClassNumber"].to_numpy() == other["rlnClassNumber"].to_numpy()).mean() >= 0.85  # the conformations are alike
