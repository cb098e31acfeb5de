"""Several classes from one reference: what is known of latent coordinates, and a mixture with junk divided at kept poses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verglas.cli.main import main
from verglas.expectation.latent import (
    STRANGE,
    Gaussians,
    Latents,
    Mixture,
    classes_of,
    compared,
    compared_at_once,
    moments,
    strangeness,
)
from verglas.io.mrc import Map, read_map, write_map
from verglas.particles.table import ParticleTable
from verglas.refinement import classes, settle
from verglas.refinement.config import ClassifyConfig
from verglas.refinement.state import State
from verglas.testing.made_up import shell_of_domains

DIAMETER, PIXEL = 150.0, 4.0


def points(z_BQ: torch.Tensor, precision: float, draw: torch.Generator) -> Latents:
    """Particles that say `precision` of their z, with the error that this means."""
    n, q = z_BQ.shape
    gram_BQQ = precision * torch.eye(q, dtype=torch.float64).repeat(n, 1, 1)
    seen_BQ = z_BQ + torch.randn(n, q, generator=draw, dtype=torch.float64) / precision**0.5
    return Latents(precision * seen_BQ, gram_BQQ, torch.full((n,), 100.0, dtype=torch.float64), torch.full((n,), 100.0))


def test_evidence_and_posterior_are_the_integrals() -> None:
    def tensor(values: list[object]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    latents = Latents(tensor([[1.3]]), tensor([[[0.8]]]), tensor([1.0]), tensor([1.0]))
    gaussians = Gaussians(tensor([[0.4], [-2.0]]), tensor([[[0.5]], [[1.5]]]))
    log_BM, mean_QBM, covariance_QQBM = gaussians.seen_by(latents)
    z = torch.linspace(-20, 20, 40001, dtype=torch.float64)
    for m in range(2):
        mean, variance = float(gaussians.mean_MQ[m, 0]), float(gaussians.covariance_MQQ[m, 0, 0])
        prior = torch.exp(-0.5 * (z - mean).square() / variance) / (2 * np.pi * variance) ** 0.5
        joint = prior * torch.exp(1.3 * z - 0.4 * z.square())
        total = float(torch.trapezoid(joint, z))
        assert float(log_BM[0, m]) == pytest.approx(np.log(total), abs=1e-9)
        middle, square = (float(torch.trapezoid(z**power * joint, z)) / total for power in (1, 2))
        assert float(mean_QBM[0, 0, m]) == pytest.approx(middle, abs=1e-9)
        assert float(covariance_QQBM[0, 0, 0, m]) == pytest.approx(square - middle**2, abs=1e-9)


def test_strange_particles_do_not_hide_each_other() -> None:
    draw = torch.Generator().manual_seed(1)
    usual = torch.exp(0.05 * torch.randn(700, generator=draw, dtype=torch.float64))
    strange_B = strangeness(torch.cat([usual, 1.3 + torch.rand(300, generator=draw, dtype=torch.float64)]))
    assert bool((strange_B[700:] > STRANGE).all()) and float((strange_B[:700] > STRANGE).double().mean()) < 0.01
    assert not bool(strangeness(torch.ones(50, dtype=torch.float64)).any())


def test_a_mixture_finds_groups_of_unequal_size_and_spread() -> None:
    draw = torch.Generator().manual_seed(2)
    truth_B = torch.tensor([0] * 400 + [1] * 200 + [2] * 150)
    middle_KQ = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.5]]).double()
    spread_K = torch.tensor([0.05, 0.05, 1.5]).double()
    z_BQ = middle_KQ[truth_B] + spread_K[truth_B, None] * torch.randn(750, 2, generator=draw, dtype=torch.float64)
    latents = points(z_BQ, 40.0, draw)
    wide = Gaussians(torch.zeros(1, 2).double(), torch.eye(2)[None].double())
    mean_BQ, covariance_BQQ = wide.posterior(latents)
    overall = moments(mean_BQ, covariance_BQQ, torch.ones(750, 1).double())
    for seed in (1, 2):
        class_B = classes_of(latents, overall, torch.zeros(750).double(), 3, seed).probability_BK.argmax(1)
        names = [int(torch.mode(class_B[truth_B == k]).values) for k in range(3)]
        assert sorted(names) == [0, 1, 2]
        for k, least in enumerate((0.97, 0.95, 0.7)):
            assert float((class_B[truth_B == k] == names[k]).double().mean()) > least


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """500 images: a shell of twelve domains and the same without some of them, 2:1, 20 % junk; poses are the true ones."""
    folder = tmp_path_factory.mktemp("mixture")
    atoms = shell_of_domains(4000, 25.0, 50.0, 12).xyz_N3.numpy()
    cut = atoms[atoms[:, 2] < 15.0]
    words = ["simulate", "--n", "500", "--box", "48", "--pixel", f"{PIXEL:g}", "--snr", "0.1", "--seed", "4", "--device", "cpu"]
    words += ["--weights", "2", "1", "--junk", "0.2", "--no-recentre", "--out", str(folder / "set")]
    for number, xyz in enumerate((atoms, cut)):
        np.savez(folder / f"{number}.npz", xyz=xyz, w=np.full(len(xyz), 6.7))
        words += ["--model", str(folder / f"{number}.npz")]
    assert main(words) == 0
    return folder / "set"


def last_state(folder: Path, **options: object) -> tuple[State, list[str]]:
    """State and notes of a classification without alignment."""
    chosen = {"diameter": DIAMETER, "initial_resolution": 50.0, "healpix_order": 1, "classes": 3, "align": "none",
              "max_iterations": 8} | options  # fmt: skip
    table, start = ParticleTable.read(folder / "truth.star"), read_map(folder / "truth_class001.mrc")
    session = classes.prepare(table, [start], ClassifyConfig(**chosen))  # type: ignore[arg-type]
    done = list(classes.iterations(session))
    return done[-1].state, [note for one in done for note in one.notes]


def found(folder: Path, state: State) -> tuple[float, float]:
    """Share of the two molecules in two classes of their own, and share of the junk in neither; whatever they are called."""
    truth_B = ParticleTable.read(folder / "truth.star").frame["rlnClassNumber"].to_numpy()
    class_B = state.poses.class_B.numpy()
    count = np.array([[((truth_B == i) & (class_B == k)).sum() for k in range(3)] for i in range(3)])
    pairs = [(a, b) for a in range(3) for b in range(3) if a != b]
    whole, cut = max(pairs, key=lambda pair: count[1, pair[0]] + count[2, pair[1]])
    return (count[1, whole] + count[2, cut]) / count[1:].sum(), 1 - count[0, [whole, cut]].sum() / count[0].sum()


def test_a_mixture_with_junk_is_divided_at_kept_poses(mixture: Path) -> None:
    state, notes = last_state(mixture, seed=1)
    accuracy, junk = found(mixture, state)
    assert accuracy > 0.9 and junk > 0.9
    assert notes[-1].startswith("The particles were divided") and "takes what fits no class" in notes[-1]
    assert len(state.apart_B) == 500 and bool((state.poses.class_B == state.rest).any())


def test_a_random_division_does_not_find_it(mixture: Path) -> None:
    accuracy, junk = found(mixture, last_state(mixture, seed=1, start="random")[0])
    assert accuracy < 0.8 and junk < 0.9


def test_the_class_for_the_rest_is_that_of_strange_particles() -> None:
    probability_BK = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.1, 0.9], [0.2, 0.8]])
    usual, strange = torch.tensor([0.1, -0.5, 0.3, 0.2]), torch.tensor([0.1, -0.5, 6.0, 5.0])
    assert settle.division_of(probability_BK, usual).rest == -1
    division = settle.division_of(probability_BK, strange)
    assert division.rest == 1 and division.class_B.tolist() == [0, 0, 1, 1] and "Class 2 takes" in division.note


def small_state(mixture: Path, **options: object) -> tuple[State, ClassifyConfig]:
    """A state of two classes, the whole molecule and the cut one, in the shares 0.5 and 0.5."""
    config = ClassifyConfig(diameter=DIAMETER, initial_resolution=20.0, healpix_order=1, classes=2, **options)  # type: ignore[arg-type]
    maps = [read_map(mixture / f"truth_class00{k}.mrc") for k in (1, 2)]
    return classes.prepare(ParticleTable.read(mixture / "particles.star"), maps, config).state, config


def test_classes_differ_inside_the_focus_mask_alone(mixture: Path, tmp_path: Path) -> None:
    mask_ZYX = np.zeros((48, 48, 48), np.float32)
    mask_ZYX[30:] = 1
    write_map(tmp_path / "focus.mrc", Map(mask_ZYX, PIXEL))
    state, config = small_state(mixture, focus_mask=tmp_path / "focus.mrc")
    first, second = (model.map_ZYX for model in classes.focused(state, config).halves)
    before = [model.map_ZYX for model in state.halves]
    assert torch.equal(first[30:], before[0][30:]) and torch.equal(second[30:], before[1][30:])
    torch.testing.assert_close(first[:30], (0.5 * (before[0] + before[1]))[:30])
    torch.testing.assert_close(first[:30], second[:30])
    rest = classes.focused(replace(state, rest=1), config).halves
    assert torch.equal(rest[1].map_ZYX, before[1])
    torch.testing.assert_close(rest[0].map_ZYX, before[0])


def test_particles_that_fit_no_class_count_for_the_rest_alone(mixture: Path) -> None:
    state, _ = small_state(mixture, absolute_greyscale=True)
    n = len(state.poses.half_B)
    misfit_B, gain_B = torch.linspace(0.9, 1.1, n, dtype=torch.float64), torch.full((n,), 50.0, dtype=torch.float64)
    poses = replace(state.poses, misfit_B=misfit_B, gain_B=gain_B)
    poses.misfit_B[:50], poses.gain_B[50:80] = 3.0, 1.0
    assert len(settle.with_apart(replace(state, poses=poses)).apart_B) == 0
    apart = settle.with_apart(replace(state, poses=poses, rest=1))
    assert apart.apart_B.nonzero().squeeze(1).tolist() == list(range(80))
    sets = settle.sets_with_rest(apart)
    assert [len(one.rows) for one in sets] == [n - 80, 80]
    classes.name_classes(poses, sets, 1)
    assert bool((poses.class_B[:80] == 1).all())
    unsure = replace(poses, gain_B=0.1 * poses.gain_B)
    assert settle.with_apart(replace(state, poses=unsure, rest=1)).apart_B.sum() == 50


def test_compiled_comparison_with_a_mixture_is_the_plain_one() -> None:
    draw = torch.Generator().manual_seed(5)
    n, q, starts, classes = 70, 4, 3, 2
    mixed_BQQ = torch.randn(n, q, 2 * q, generator=draw, dtype=torch.float64)
    overlap_BQ, misfit_B = torch.randn(n, q, generator=draw, dtype=torch.float64), torch.ones(n, dtype=torch.float64)
    latents = Latents(overlap_BQ, mixed_BQQ @ mixed_BQQ.transpose(1, 2), misfit_B, misfit_B)
    spread_MQQ = torch.randn(starts * classes, q, 2 * q, generator=draw, dtype=torch.float64)
    gaussians = Gaussians(torch.randn(starts * classes, q, generator=draw, dtype=torch.float64), spread_MQQ @ spread_MQQ.mT)
    middle_SK = torch.randn(starts, classes, generator=draw, dtype=torch.float64)
    mixture = Mixture(torch.full((starts, classes), 0.5), gaussians, middle_SK, middle_SK.square() + 0.1)
    strange_B = torch.randn(n, generator=draw, dtype=torch.float64)
    compiled, plain = compared(latents, strange_B, mixture), compared_at_once(latents, strange_B, mixture)
    for one, other in zip(vars(compiled[0]).values(), vars(plain[0]).values(), strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)
    assert torch.allclose(compiled[1], plain[1]) and torch.allclose(compiled[2], plain[2])
