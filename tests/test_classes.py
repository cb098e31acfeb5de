"""Classification: the class axis of the expectation against separate searches, and two molecules told apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expectation_world import ROWS, world
from verglas.cli.main import main
from verglas.errors import InputError
from verglas.expectation.classes import ClassGrid, runs_of
from verglas.expectation.sampling import OrientationGrid
from verglas.io.mrc import Map, read_map
from verglas.particles.table import ParticleTable
from verglas.refinement import checkpoint, classes
from verglas.refinement.batches import runs_within
from verglas.refinement.config import ClassifyConfig
from verglas.refinement.driver import Session
from verglas.refinement.expect import HalfExpectation
from verglas.refinement.state import State
from verglas.testing.log_probability import REFERENCE
from verglas.testing.made_up import shell_of_domains

# The class axis


def expectation(shares: list[float], number: int | None = None) -> tuple[HalfExpectation, list[torch.Tensor]]:
    """The three particles of `world` against two references (or one of them), all samples kept; evidence and best classes."""
    problem = world().problem
    turned = replace(problem.model, map_ZYX=1.2 * problem.model.map_ZYX.flip(0, 1))
    models = [
        replace(one, direction_prior_D=share * one.direction_prior_D)
        for one, share in zip((problem.model, turned), shares, strict=True)
    ]
    config = replace(problem.config, adaptive_fraction=1 - 1e-13)
    chosen = models if number is None else [models[number]]
    half = HalfExpectation(chosen, problem.data, problem.poses, problem.plan, config, REFERENCE)
    found = [result for _, result in half.run(ROWS)]
    half.release()
    return half, [torch.cat([one.log_likelihood_B for one in found]), torch.cat([one.class_B for one in found])]


def test_two_classes_are_the_mixture_of_two_searches() -> None:
    """Evidence, shares, residuals and maps follow from those of each reference alone, weighted by its posterior."""
    shares = [0.3, 0.7]
    both, (evidence_B, class_B) = expectation(shares)
    alone = [expectation(shares, number) for number in (0, 1)]
    log_BC = torch.stack([found[0] + np.log(2 * share) for (_, found), share in zip(alone, shares)], 1)
    torch.testing.assert_close(evidence_B, torch.logsumexp(log_BC, 1), rtol=0, atol=1e-5)  # the coarse cut
    posterior_BC = log_BC.softmax(1)
    assert float(posterior_BC.amin(1).max()) > 0.01, "one class explains each image: nothing is tested"
    directions = both.grid.grid.n_directions
    torch.testing.assert_close(both.sums.direction_D.view(2, directions).sum(1), posterior_BC.sum(0), rtol=1e-4, atol=0)
    assert both.sums.weight == pytest.approx(3)
    assert set(class_B.tolist()) <= {0, 1}


def test_sums_of_each_class_are_those_of_its_own_reference() -> None:
    """With a share so small that one class never counts, the other's sums are those of a search without it."""
    both, _ = expectation([1 - 1e-300, 1e-300])
    alone, _ = expectation([1.0, 1e-300], 0)
    torch.testing.assert_close(both.sums.noise_GS, alone.sums.noise_GS, rtol=1e-9, atol=0)
    torch.testing.assert_close(both.sums.direction_D[:12], alone.sums.direction_D, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(both.sums.power_M, alone.sums.power_M, rtol=1e-9, atol=0)
    torch.testing.assert_close(both.accumulators[0].total(), alone.accumulators[0].total(), rtol=1e-9, atol=1e-9)
    largest = float(both.accumulators[0].total().abs().max())
    assert float(both.accumulators[1].total().abs().max()) < 1e-9 * largest


def test_numbers_of_all_classes_lead_back_to_class_and_pose() -> None:
    grid = OrientationGrid.build(1, 1, "C1", 0.2)
    classed = ClassGrid(grid, 3)
    assert classed.count == 3 * grid.count and classed.n_directions == 3 * 48
    index = torch.tensor([5, grid.count + 7, 2 * grid.count + 11])
    assert classed.class_of(index).tolist() == [0, 1, 2]
    assert torch.equal(classed.rotations(index), grid.rotations(torch.tensor([5, 7, 11])))
    assert classed.direction_of(index).tolist() == [5 // 12, 48 + 7 // 12, 96 + 11 // 12]
    children = index * 8 + 3
    assert classed.class_of_child(children).tolist() == [0, 1, 2]
    assert torch.equal(classed.child_rotations(children), grid.child_rotations(torch.tensor([43, 59, 91])))
    assert runs_of(torch.tensor([0, 0, 2, 2, 2]), 4) == [0, 2, 2, 5, 5]


def test_local_lists_are_repeated_for_every_class() -> None:
    grid = OrientationGrid.build(1, 1, "C1")
    ptr, orientation, value = torch.tensor([0, 2, 2, 5]), torch.tensor([3, 9, 1, 4, 8]), torch.arange(5.0)
    ptr2, orientation2, value2 = ClassGrid(grid, 2).in_every_class(ptr, orientation, value, torch.tensor([0.0, -10.0]))
    o = grid.count
    assert ptr2.tolist() == [0, 4, 4, 10]
    assert orientation2.tolist() == [3, 9, 3 + o, 9 + o, 1, 4, 8, 1 + o, 4 + o, 8 + o]
    assert value2.tolist() == [0, 1, -10, -9, 2, 3, 4, -8, -7, -6]


def test_runs_of_particles_stay_within_their_memory() -> None:
    used, rows = torch.tensor([4.0, 3, 9, 1, 1, 1]), torch.tensor([1.0, 1, 1, 5, 5, 1])
    runs = runs_within(used.cumsum(0), rows.cumsum(0), 6.0, 10.0)
    assert runs == [(0, 2), (2, 3), (3, 6)]  # the last one: 3 and, since slices are shared, 6 of 11
    assert runs_within(used.cumsum(0), rows.cumsum(0), 6.0, 0.5) == [(i, i + 1) for i in range(6)]


# Classification


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 images of two molecules with nothing in common, half of each; truth_class001.mrc and _class002.mrc are theirs."""
    folder = tmp_path_factory.mktemp("two")
    words = ["simulate", "--n", "200", "--box", "32", "--pixel", "6", "--snr", "1", "--seed", "2", "--device", "cpu"]
    for number, atoms in enumerate((shell_of_domains(4000, 25.0, 50.0, 3), shell_of_domains(3000, 0.0, 30.0, 8))):
        np.savez(folder / f"{number}.npz", xyz=atoms.xyz_N3.numpy(), w=np.full(len(atoms.xyz_N3), 6.7))
        words += ["--model", str(folder / f"{number}.npz")]
    assert main([*words, "--out", str(folder / "set")]) == 0
    return folder / "set"


def session_of(folder: Path, references: list[str], **options: object) -> Session:
    chosen = {"diameter": 150.0, "initial_resolution": 40.0, "healpix_order": 1, "classes": 2, "max_iterations": 3} | options
    maps = [read_map(folder / name) for name in references]
    return classes.prepare(ParticleTable.read(folder / "particles.star"), maps, ClassifyConfig(**chosen))  # type: ignore[arg-type]


def accuracy(folder: Path, state: State) -> float:
    """Share of the particles in their own class, whatever the classes are called."""
    truth_B = ParticleTable.read(folder / "truth.star").frame["rlnClassNumber"].to_numpy() - 1
    same = float((state.poses.class_B.numpy() == truth_B).mean())
    return max(same, 1 - same)


BOTH = ["truth_class001.mrc", "truth_class002.mrc"]


def test_two_references_draw_their_own_particles(simulated: Path) -> None:
    *_, last = classes.iterations(session_of(simulated, BOTH, max_iterations=5))
    assert last.state.iteration == 5 and accuracy(simulated, last.state) >= 0.95
    schedule = last.state.schedule
    assert (schedule.healpix_order, schedule.perturbation) == (2, 0.0) and schedule.local_sigma > 0  # about the poses, finer
    figures = classes.class_figures(last.state)
    assert sum(one.share for one in figures) == pytest.approx(1) and sum(one.particles for one in figures) == 200
    for one, name in zip(last.state.halves, BOTH):
        truth = torch.tensor(read_map(simulated / name).data_ZYX)
        assert float(torch.corrcoef(torch.stack([one.map_ZYX.flatten(), truth.flatten()]))[0, 1]) > 0.7


def test_one_reference_is_divided_at_random_and_the_molecules_part(simulated: Path, tmp_path: Path) -> None:
    """The start is the mean of both molecules; the first iteration needs one reference, the second divides the particles."""
    mean = sum(read_map(simulated / name).data_ZYX for name in BOTH) / 2
    session = session_of(simulated, BOTH[:1], max_iterations=9, start="random")
    start = torch.tensor(mean).float()
    session = replace(session, state=replace(session.state, halves=[replace(one, map_ZYX=start) for one in session.state.halves]))
    done = list(classes.iterations(session))
    first, second, last = done[0].state, done[1].state, done[-1].state
    assert torch.equal(first.halves[0].map_ZYX, first.halves[1].map_ZYX)
    assert float(first.halves[0].direction_prior_D.sum()) == pytest.approx(0.5)
    assert torch.bincount(second.poses.class_B).tolist() == [100, 100] and "at random" in done[1].notes[0]
    assert not torch.equal(second.halves[0].map_ZYX, second.halves[1].map_ZYX)
    assert accuracy(simulated, second) < 0.6 and accuracy(simulated, last) > 0.9


def test_a_run_goes_on_from_a_checkpoint_as_if_never_stopped(simulated: Path, tmp_path: Path) -> None:
    session = session_of(simulated, BOTH[:1])
    whole = [done.state for done in classes.iterations(session)]
    checkpoint.save(tmp_path / "one", whole[0], session.config, "x")
    state, config, _ = checkpoint.load(tmp_path / "one")
    assert config == session.config
    again = [done.state for done in classes.iterations(replace(session, state=state))]
    checkpoint.save(tmp_path / "a", whole[-1], config, "x")
    checkpoint.save(tmp_path / "b", again[-1], config, "x")
    assert len(again) == 2 and (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_empty_class_is_kept_and_told_of(simulated: Path) -> None:
    session = session_of(simulated, BOTH, absolute_greyscale=True)
    one, other = session.state.halves
    tiny = replace(other, direction_prior_D=1e-200 * other.direction_prior_D)
    session = replace(session, state=replace(session.state, halves=[one, tiny]))
    done = list(classes.iterations(session))
    assert done[0].notes == ["Class 2 has no particles any more: it stays empty, its map is the last one it had."]
    assert all("no particles" not in note for later in done[1:] for note in later.notes)
    last = done[-1].state
    assert torch.equal(last.halves[1].map_ZYX, other.map_ZYX) and classes.class_figures(last)[1].particles == 0
    assert all(bool(model.map_ZYX.isfinite().all()) for model in last.halves)


def test_detail_beyond_the_limit_is_not_compared(simulated: Path) -> None:
    """Coefficients beyond it are not in the scores: images that differ there only get the same poses."""
    session = session_of(simulated, BOTH, limit_resolution=40.0, absolute_greyscale=True, max_iterations=1)
    state = next(classes.iterations(session)).state
    images = session.data.images[0]
    fourier = torch.fft.rfft2(images)
    frequency = (torch.fft.fftfreq(32)[:, None] ** 2 + torch.fft.rfftfreq(32) ** 2).sqrt() * 32
    fourier[:, frequency > 32 * 6 / 40.0 + 2] *= 0.5
    blurred = replace(session, data=replace(session.data, images=[torch.fft.irfft2(fourier, s=(32, 32))]))
    other = next(classes.iterations(blurred)).state
    same = (state.poses.rotation_B33 - other.poses.rotation_B33).abs().amax((1, 2)) < 1e-6
    assert float(same.double().mean()) > 0.9
    without = next(classes.iterations(session_of(simulated, BOTH, absolute_greyscale=True, max_iterations=1))).state
    assert float(((without.poses.rotation_B33 - state.poses.rotation_B33).abs().amax((1, 2)) > 1e-6).double().mean()) > 0.1


def test_a_wrong_number_of_references_is_refused(simulated: Path) -> None:
    with pytest.raises(InputError, match="2 maps for 3 classes"):
        session_of(simulated, BOTH, classes=3)


def test_local_searches_stay_near_the_poses(simulated: Path) -> None:
    session = session_of(simulated, BOTH, absolute_greyscale=True, max_iterations=1, local_sigma=5.0, healpix_order=2)
    truth = ParticleTable.read(simulated / "truth.star")
    poses = replace(session.state.poses, rotation_B33=truth.rotations(), origin_B2=truth.origins())
    state = next(classes.iterations(replace(session, state=replace(session.state, poses=poses)))).state
    cosine = ((state.poses.rotation_B33 * truth.rotations()).sum((1, 2)) - 1) / 2
    assert float(cosine.min()) > np.cos(np.radians(40))
    assert accuracy(simulated, state) > 0.95


def test_maps_of_other_sizes_are_brought_to_the_particles(simulated: Path) -> None:
    small = read_map(simulated / BOTH[1])
    maps = [read_map(simulated / BOTH[0]), Map(small.data_ZYX[4:28, 4:28, 4:28].copy(), 6.0)]
    config = ClassifyConfig(diameter=130.0, initial_resolution=40.0, classes=2)
    session = classes.prepare(ParticleTable.read(simulated / "particles.star"), maps, config)
    assert session.state.halves[1].map_ZYX.shape == (32, 32, 32)
    assert any(text.startswith("Reference 2: ") for text in session.notices)
