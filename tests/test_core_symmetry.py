"""core/symmetry.py: point groups by their axioms, the axes that docs/conventions.md names, and RELION's own operators."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch

from verglas.core.rotations import rotation_about_axis
from verglas.core.symmetry import order, symmetry_matrices
from verglas.core.symmetry_names import normalise_name
from verglas.errors import InputError

ORDERS = {"C1": 1, "C2": 2, "C3": 3, "C7": 7, "C13": 13, "D1": 2, "D2": 4, "D3": 6, "D4": 8, "D7": 14, "T": 12, "O": 24,
          "I": 60, "I1": 60, "I2": 60, "I3": 60, "I4": 60}  # fmt: skip

Z, X, Y = (0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0)
S, L = 0.525731112119134, 0.850650808352040  # sine and cosine of the angle between a 2-fold and a 5-fold axis
AXES = [
    ("C7", 7, Z), ("D3", 3, Z), ("D3", 2, X), ("D4", 4, Z), ("D4", 2, X), ("T", 3, Z), ("T", 2, (0.0, 2**0.5, 1.0)),
    ("O", 4, X), ("O", 4, Y), ("O", 4, Z), ("O", 3, (1.0, 1.0, 1.0)), ("I1", 2, X), ("I1", 2, Y), ("I1", 2, Z),
    ("I1", 5, (L, 0.0, -S)), ("I2", 2, X), ("I2", 2, Y), ("I2", 2, Z), ("I2", 5, (S, 0.0, L)), ("I", 5, (S, 0.0, L)),
    ("I3", 5, Z), ("I3", 2, Y), ("I3", 2, (-S, 0.0, L)), ("I4", 5, Z), ("I4", 2, Y), ("I4", 2, (S, 0.0, L)),
]  # fmt: skip


def contains(group: torch.Tensor, matrices: torch.Tensor, error: float = 1e-9) -> bool:
    """Whether every one of `matrices` is in `group`."""
    difference = (matrices.reshape(-1, 1, 3, 3) - group).abs().amax((-1, -2))
    return bool((difference.amin(1) < error).all())


@pytest.mark.parametrize("name, n", ORDERS.items())
def test_groups_are_groups(name: str, n: int) -> None:
    group = symmetry_matrices(name)
    assert len(group) == order(name) == n
    assert torch.equal(group[0], torch.eye(3, dtype=torch.float64))
    assert torch.allclose(group @ group.mT, torch.eye(3).double().expand_as(group), atol=1e-12)
    assert torch.allclose(torch.det(group), torch.ones(n).double())
    apart = (group[:, None] - group).abs().amax((-1, -2)) + 9 * torch.eye(n)
    assert float(apart.min()) > 0.1  # all different
    assert contains(group, group[:, None] @ group) and contains(group, group.mT)


@pytest.mark.parametrize("name, fold, axis", AXES)
def test_axes_lie_where_the_conventions_say(name: str, fold: int, axis: tuple[float, float, float]) -> None:
    assert contains(symmetry_matrices(name), rotation_about_axis(axis, 360 / fold))


@pytest.mark.parametrize("name", ["D3", "T", "O", "I2"])
def test_only_the_octahedron_has_a_fourfold_axis(name: str) -> None:
    assert contains(symmetry_matrices(name), rotation_about_axis(Z, 90)) == (name == "O")


def test_the_two_settings_of_the_icosahedron_differ_by_a_quarter_turn() -> None:
    turn = rotation_about_axis(Z, 90)
    assert contains(symmetry_matrices("I1"), turn @ symmetry_matrices("I2") @ turn.mT)
    assert not contains(symmetry_matrices("I1"), symmetry_matrices("I2"))


def test_names() -> None:
    assert [normalise_name(name) for name in ("c1", " C07", "d2 ", "I", "i3", "t")] == ["C1", "C7", "D2", "I2", "I3", "T"]
    for wrong in ("", "C0", "C", "D-2", "I5", "C1000", "E7", "C2v", "TH"):
        with pytest.raises(InputError, match="unknown symmetry"):
            normalise_name(wrong)


@pytest.mark.interop
@pytest.mark.parametrize("name", ["C1", "C2", "C7", "D2", "D3", "D7", "T", "O", "I", "I1", "I2", "I3", "I4"])
def test_operators_are_those_of_relion(name: str) -> None:
    if shutil.which("relion_refine") is None:
        pytest.skip("relion_refine is not installed")
    done = subprocess.run(["relion_refine", "--sym", name, "--print_symmetry_ops"], capture_output=True, text=True, check=True)
    number = r"\s+(-?[\d.]+(?:e-?\d+)?)"
    found = re.findall(r"R\(\d+\)=" + 9 * number, done.stdout)
    theirs = torch.from_numpy(np.array(found, dtype=float).reshape(-1, 3, 3))
    ours = symmetry_matrices(name)
    assert len(theirs) == len(ours)
    assert contains(ours, theirs, error=2e-5) and contains(theirs, ours, error=2e-5)  # printed to five digits
