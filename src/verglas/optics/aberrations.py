"""Higher-order aberrations of an optics group as Zernike polynomials (Zivanov, Nakane & Scheres 2020, IUCrJ 7, 253).

The radius of the polynomials is the frequency itself in 1/Å, not scaled to a unit disc; angles run from x to y.
Even polynomials add to the phase of the CTF; odd ones turn the phase of the image: observed = P CTF exp(i phi_odd).
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from verglas.optics.group import OpticsGroup


def zernike(n: int, m: int, xy_K2: Tensor) -> Tensor:
    """Z_n^m [K] at points (x, y) [K, 2]: R_n^|m|(r) times cos(m phi) for m >= 0, sin(|m| phi) for m < 0.

    Z_2^0 = 2 r^2 - 1, Z_3^1 = (3 r^3 - 2 r) cos phi.
    """
    r = torch.linalg.vector_norm(xy_K2, dim=-1)
    phi = torch.atan2(xy_K2[..., 1], xy_K2[..., 0])
    angular = torch.cos(m * phi) if m >= 0 else torch.sin(-m * phi)
    return radial_polynomial(n, abs(m), r) * angular


def radial_polynomial(n: int, m: int, r: Tensor) -> Tensor:
    """Radial part R_n^m, m >= 0, n - m even."""
    total = torch.zeros_like(r)
    for k in range((n - m) // 2 + 1):
        below = math.factorial(k) * math.factorial((n + m) // 2 - k) * math.factorial((n - m) // 2 - k)
        total += (-1) ** k * math.factorial(n - k) / below * r ** (n - 2 * k)
    return total


def even_order(index: int) -> tuple[int, int]:
    """(n, m) of rlnEvenZernike's entry: 0 -> (0, 0); 1..3 -> n = 2; 4..8 -> n = 4; m from -n to n in steps of 2."""
    k = math.isqrt(index)
    return 2 * k, 2 * (index - k * k - k)


def odd_order(index: int) -> tuple[int, int]:
    """(n, m) of rlnOddZernike's entry: 0, 1 -> n = 1; 2..5 -> n = 3; m from -n to n in steps of 2."""
    k = (math.isqrt(1 + 4 * index) - 1) // 2
    n = 2 * k + 1
    return n, 2 * (index - k * k - k) - n


def odd_coefficients(group: OpticsGroup) -> list[float]:
    """rlnOddZernike with the beam tilt added as pure coma, radians; empty when there is neither.

    A tilt of t mrad turns the phase by -2 pi Cs lambda^2 u^2 (t . u) 1e-3, u in 1/Å.
    """
    coefficients = list(group.odd_zernike)
    tilt_x, tilt_y = group.beam_tilt_mrad
    if tilt_x or tilt_y:
        coefficients += [0.0] * (6 - len(coefficients))
        third = -1e-3 * 2 * math.pi * group.cs_angstrom * group.wavelength_angstrom**2 / 3
        # u^2 x = (Z_3^1 + 2 Z_1^1) / 3, and the same for y with Z_3^-1, Z_1^-1.
        coefficients[1] += 2 * third * tilt_x
        coefficients[0] += 2 * third * tilt_y
        coefficients[4] += third * tilt_x
        coefficients[3] += third * tilt_y
    return coefficients


def aberration_phase_K(frequency_K2: Tensor, group: OpticsGroup) -> Tensor | None:
    """Odd phase phi [K] in radians at frequencies in 1/Å (magnification applied here), or None where there is none.

    Divide the image's transform by exp(i phi) before comparing it with a projection.
    """
    terms = [(odd_order(i), c) for i, c in enumerate(odd_coefficients(group)) if c != 0]
    return _sum(terms, group.magnified(frequency_K2)) if terms else None


def even_phase_K(magnified_K2: Tensor, group: OpticsGroup) -> Tensor | None:
    """Even phase [K] in radians at frequencies in 1/Å after the magnification matrix, or None where there is none."""
    terms = [(even_order(i), c) for i, c in enumerate(group.even_zernike) if c != 0]
    return _sum(terms, magnified_K2) if terms else None


def _sum(terms: Iterable[tuple[tuple[int, int], float]], xy_K2: Tensor) -> Tensor:
    total = torch.zeros_like(xy_K2[..., 0])
    for (n, m), coefficient in terms:
        total += coefficient * zernike(n, m, xy_K2)
    return total
