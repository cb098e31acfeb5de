"""Classification without a search: poses and offsets, or orientations alone, stay those of the particles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expectation_world import ROWS, world
from test_classes import BOTH, accuracy, session_of, simulated  # noqa: F401
from verglas.cli.main import main
from verglas.expectation.given import GivenPoses
from verglas.expectation.sampling import OffsetGrid, OrientationGrid
from verglas.io.mrc import Map, read_map, write_map
from verglas.io.star import StarBlock, read_star, write_star
from verglas.particles.table import ParticleTable
from verglas.refinement import classes
from verglas.refinement.driver import Session
from verglas.refinement.expect import HalfExpectation
from verglas.testing.log_probability import REFERENCE


def test_one_product_a_class_gives_the_posterior() -> None:
    """Scores by hand: Re sum P* X exp(-2 pi i k.t / N) - 1/2 sum W |P|^2 at the particle's own pose and offset."""
    problem = world().problem
    problem = replace(problem, config=replace(problem.config, adaptive_fraction=1 - 1e-13))
    poses = replace(problem.poses, rotation_B33=problem.plan.grid.child_rotations(torch.tensor([7, 100, 333])))
    plan = replace(problem.plan, align="none", offsets=OffsetGrid.build(0.0, 4.0, 0))
    shares = [0.3, 0.7]
    turned = replace(problem.model, map_ZYX=1.2 * problem.model.map_ZYX.flip(0, 1))
    models = [replace(one, direction_prior_D=share * one.direction_prior_D)
              for one, share in zip((problem.model, turned), shares)]  # fmt: skip
    half = HalfExpectation(models, problem.data, poses, plan, problem.config, REFERENCE)
    rows, results = zip(*half.run(ROWS))
    order = torch.cat(rows).argsort()
    pmax_B, class_B, rotation_B33, origin_B2 = (
        torch.cat([getattr(one, name) for one in results])[order] for name in ("pmax_B", "class_B", "rotation_B33", "origin_B2")
    )
    searcher, still = HalfExpectation(models, problem.data, poses, problem.plan, problem.config, REFERENCE).prepared(ROWS, 0)
    pixels = searcher.preparer.pixels
    pixel_size, box = problem.data.groups[0].pixel_size, problem.data.groups[0].box
    rest_B2 = poses.origin_B2 / pixel_size - torch.round(poses.origin_B2 / pixel_size)
    assert float(rest_B2.abs().max()) > 0.2
    turn_BK = torch.exp(-2j * torch.pi / box * (rest_B2[:, :1] * pixels.x_K + rest_B2[:, 1:] * pixels.y_K))
    image_BK = torch.complex(*still.scored_B2K.unbind(1)) * turn_BK
    score_BC = torch.empty(3, 2, dtype=torch.float64)
    for k, volume in enumerate(half.volumes):
        slice_B2K = volume.slices(poses.rotation_B33, searcher.preparer.coordinates_K3) * searcher.full.inverse_K
        cross_B = (torch.complex(*slice_B2K.unbind(1)).conj() * image_BK).real.sum(1)
        score_BC[:, k] = cross_B - 0.5 * (still.weight_BK * slice_B2K.square().sum(1)).sum(1) + np.log(shares[k])
    posterior_BC = score_BC.softmax(1)
    assert float(posterior_BC.amin(1).max()) > 0.001, "one class explains each image: nothing is tested"
    torch.testing.assert_close(pmax_B, posterior_BC.amax(1), rtol=0, atol=1e-5)
    assert torch.equal(class_B, posterior_BC.argmax(1))
    directions = half.grid.n_directions // 2
    torch.testing.assert_close(half.sums.direction_D.view(2, directions).sum(1), posterior_BC.sum(0), rtol=0, atol=2e-3)
    assert torch.equal(rotation_B33, poses.rotation_B33)
    torch.testing.assert_close(origin_B2, poses.origin_B2, rtol=0, atol=1e-12)


def test_directions_of_given_poses_are_the_nearest_up_to_symmetry() -> None:
    grid = OrientationGrid.build(1, 1, "D2")
    index = torch.tensor([5, 77, 130])
    turned = grid.rotations(index) @ torch.diag(torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))  # a mate of D2
    given = GivenPoses.of(grid, turned, torch.device("cpu"))
    assert torch.equal(given.direction_B, grid.direction_of(index))
    assert given.direction_of(torch.tensor([1, 4])).tolist() == [
        int(given.direction_B[1]), grid.n_directions + int(given.direction_B[1])
    ]  # fmt: skip


def posed(session: Session, folder: Path, origins: bool) -> Session:
    """With the true orientations, and the true offsets or none."""
    truth = ParticleTable.read(folder / "truth.star")
    origin_B2 = truth.origins() if origins else torch.zeros(len(truth), 2, dtype=torch.float64)
    poses = replace(session.state.poses, rotation_B33=truth.rotations(), origin_B2=origin_B2)
    return replace(session, state=replace(session.state, poses=poses))


@pytest.mark.parametrize("greyscale", [True, False])
def test_without_a_search_the_molecules_part_and_poses_stay(simulated: Path, greyscale: bool) -> None:  # noqa: F811
    session = posed(session_of(simulated, BOTH, align="none", absolute_greyscale=greyscale), simulated, origins=True)
    *_, last = classes.iterations(session)
    assert accuracy(simulated, last.state) > 0.97
    torch.testing.assert_close(last.state.poses.origin_B2, session.state.poses.origin_B2, rtol=0, atol=1e-9)
    assert torch.equal(last.state.poses.rotation_B33, session.state.poses.rotation_B33)
    assert not torch.equal(last.state.halves[0].map_ZYX, session.state.halves[0].map_ZYX)


@pytest.mark.parametrize("greyscale", [True, False])
def test_offsets_are_found_while_orientations_stay(simulated: Path, greyscale: bool) -> None:  # noqa: F811
    session = posed(session_of(simulated, BOTH, align="offsets", absolute_greyscale=greyscale), simulated, origins=False)
    *_, last = classes.iterations(session)
    error_B = (last.state.poses.origin_B2 - ParticleTable.read(simulated / "truth.star").origins()).norm(dim=1)
    assert float(error_B.median()) < 0.5 * 6.0 and accuracy(simulated, last.state) > 0.95
    assert torch.equal(last.state.poses.rotation_B33, session.state.poses.rotation_B33)


def test_a_first_iteration_by_correlation_searches_near_the_poses(simulated: Path) -> None:  # noqa: F811
    session = session_of(simulated, BOTH, max_iterations=1, local_sigma=5.0, healpix_order=2)
    state = next(classes.iterations(posed(session, simulated, origins=True))).state
    cosine = ((state.poses.rotation_B33 * ParticleTable.read(simulated / "truth.star").rotations()).sum((1, 2)) - 1) / 2
    assert float(cosine.min()) > np.cos(np.radians(40))


# The command


def command(folder: Path, particles: str, *words: str) -> int:
    fixed = ["--diameter", "150", "--initial-resolution", "40", "--iterations", "2", "--device", "cpu", "--out", "out"]
    return main(["classify3d", "--particles", str(folder / particles), *fixed, *words])


def test_the_command_keeps_poses_and_takes_a_list_of_references(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    names = {"rlnReferenceImage": [str(simulated / BOTH[0]), BOTH[1]]}
    frame = ParticleTable.read(simulated / "truth.star").frame.iloc[:2][[]].assign(**names)
    (simulated / "list.star").unlink(missing_ok=True)
    write_star(simulated / "list.star", {"model_classes": StarBlock.table("model_classes", frame)})
    assert command(simulated, "truth.star", "--skip-align", "--reference", str(simulated / "list.star")) == 0
    found, truth = ParticleTable.read(Path("out/run_it002_data.star")), ParticleTable.read(simulated / "truth.star")
    torch.testing.assert_close(found.rotations(), truth.rotations(), rtol=0, atol=1e-4)
    torch.testing.assert_close(found.origins(), truth.origins(), rtol=0, atol=1e-4)
    same = (found.frame["rlnClassNumber"] == truth.frame["rlnClassNumber"]).mean()
    assert same > 0.97
    options = read_star(Path("out/run_it002_optimiser.star"))["optimiser_general"].values
    assert options["rlnDoSkipAlign"] == 1 and options["rlnDoSkipRotate"] == 0


def test_what_cannot_be_is_refused(
    simulated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]  # noqa: F811
) -> None:
    monkeypatch.chdir(tmp_path)
    both = ["--reference", *(str(simulated / name) for name in BOTH)]
    assert command(simulated, "particles.star", "--skip-align", *both) == 2
    assert "no poses" in capsys.readouterr().err
    assert command(simulated, "truth.star", "--skip-align", "--skip-rotate", *both) == 2
    assert "--skip-rotate" in capsys.readouterr().err
    assert command(simulated, "truth.star", "--skip-align", "--local-search", "5", *both) == 2
    assert "--local-search" in capsys.readouterr().err
    small = read_map(simulated / BOTH[1])
    write_map(Path("small.mrc"), Map(small.data_ZYX[2:30, 2:30, 2:30].copy(), small.pixel_size))
    assert command(simulated, "truth.star", "--reference", str(simulated / BOTH[0]), "small.mrc") == 2
    text = capsys.readouterr().err
    assert "28 px" in text and "32 px" in text and not Path("out").exists()
    assert command(simulated, "truth.star", "--reference", str(simulated / "truth.star")) == 2
    assert "rlnReferenceImage" in capsys.readouterr().err
