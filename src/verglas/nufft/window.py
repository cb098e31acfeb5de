"""The spreading window: Kaiser-Bessel, as wide as the wanted error asks for.

phi(u) = I0(beta sqrt(1 - u²)) / I0(beta), |u| <= 1, has the transform

    integral phi(u) exp(-i xi u) du = 2 sinh(s) / (s I0(beta)),   s = sqrt(beta² - xi²)

On a grid of n cells, W of them touched, mode k is multiplied by phi^(k) = W/2 times that at xi = pi k W / n. What another mode,
k + m n, leaks into it is phi^(k + m n) / phi^(k): the root mean square over the kept modes. Rounding errors of the grid, of the
size of its largest mode, are divided by phi^(k), too. Width and beta are chosen by both together (Jackson et al. 1991, IEEE
Trans. Med. Imaging 10, 473; Barnett, Magland & af Klinteberg 2019, SIAM J. Sci. Comput. 41, C479).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

WIDEST = 16
LEAKS = 30  # how many aliases on either side are summed
MODES = (16, 64)  # of an axis: what leaks rises and falls from mode to mode, and of few the outermost one is a large share
SHARE_OF_FIT = 0.1  # of the wanted error, that the polynomials may add


@dataclass(frozen=True)
class Window:
    """width: cells touched along an axis; beta: shape; error: relative, expected over all axes; taps_DW: float64, polynomials
    of the fraction f for each tap, highest power first (kernels/spread/README.md)."""

    width: int
    beta: float
    error: float
    taps_DW: np.ndarray

    def transform(self, modes: int, cells: int) -> np.ndarray:
        """phi^(k) for k = -(modes // 2) .. (modes - 1) // 2 on a grid of `cells`, float64 [modes]."""
        k = np.arange(modes) - modes // 2
        return _transform(np.pi * k * self.width / cells, self.beta) * (self.width / 2)


def window_for(accuracy: float, upsampling: float, axes: int, rounding: float = 1e-16) -> Window:
    """The narrowest window whose error over all axes is at most `accuracy`; ValueError if none up to `WIDEST` cells is.

    rounding: relative error of a cell of the grid.
    """
    window = _narrowest(accuracy, upsampling, axes, rounding)
    if window is None:
        raise ValueError(f"no window of at most {WIDEST} cells reaches an error of {accuracy:g} with upsampling {upsampling:g}")
    return window


@lru_cache(maxsize=256)
def _narrowest(accuracy: float, upsampling: float, axes: int, rounding: float) -> Window | None:
    wanted = accuracy * (1 - SHARE_OF_FIT)
    for width in range(2, WIDEST + 1):
        best = np.pi * width * (1 - 0.5 / upsampling)
        betas = best * np.linspace(0.8, 1.05, 26)
        errors = [_expected(width, beta, upsampling, axes, rounding) for beta in betas]
        least = int(np.argmin(errors))
        if errors[least] <= wanted:
            taps = _polynomials(width, betas[least], SHARE_OF_FIT * accuracy / np.sqrt(axes))
            return Window(width, float(betas[least]), float(errors[least]), taps)
    return None


def _transform(xi: np.ndarray, beta: float) -> np.ndarray:
    """2 sinh(s) / (s I0(beta)), s = sqrt(beta² - xi²); sin(|s|) / |s| beyond xi = beta."""
    s = np.sqrt(np.abs(beta**2 - xi**2))
    s = np.where(s == 0, 1e-12, s)
    return 2 * np.where(np.abs(xi) < beta, np.sinh(np.where(np.abs(xi) < beta, s, 0)), np.sin(s)) / s / np.i0(beta)


def _expected(width: int, beta: float, upsampling: float, axes: int, rounding: float) -> float:
    """Relative error over all axes: what aliases leave in modes, and rounding."""
    return max(_expected_of(modes, width, beta, upsampling, axes, rounding) for modes in MODES)


def _expected_of(modes: int, width: int, beta: float, upsampling: float, axes: int, rounding: float) -> float:
    k = (np.arange(modes) - modes // 2) / modes / upsampling  # in units of the grid's size
    m = np.concatenate([np.arange(-LEAKS, 0), np.arange(1, LEAKS + 1)])
    own = _transform(np.pi * width * k, beta)
    others = _transform(np.pi * width * (k[:, None] + m), beta)
    if (own <= 0).any():
        return np.inf
    leaks = ((others**2).sum(1) / own**2).mean()
    amplified = (_transform(np.zeros(1), beta)[0] ** 2 / own**2).mean()
    return float(np.sqrt(axes * leaks + rounding**2 * amplified**axes))


def _polynomials(width: int, beta: float, error: float) -> np.ndarray:
    """taps_DW of the lowest degree whose error, summed over taps, is at most `error` of the window's sum; at most degree 20."""
    node = np.cos(np.pi * (np.arange(64) + 0.5) / 64) / 2  # f: Chebyshev's points of -1/2..1/2
    u = (node[:, None] + 0.5 + np.arange(width) - width / 2) / (width / 2)
    exact = np.i0(beta * np.sqrt(np.maximum(0, 1 - u**2))) / np.i0(beta)
    for degree in range(2, 21):
        fits = [np.polynomial.Chebyshev.fit(node, exact[:, t], degree, [-0.5, 0.5]) for t in range(width)]
        off = sum(np.abs(fit(node) - exact[:, t]).max() for t, fit in enumerate(fits))
        if off <= error * exact.sum(1).min():
            break
    powers = [fit.convert(kind=np.polynomial.Polynomial, window=[-1, 1], domain=[-1, 1]).coef for fit in fits]
    taps = np.zeros((degree + 1, width))
    for t, coefficients in enumerate(powers):
        taps[degree + 1 - len(coefficients) :, t] = coefficients[::-1]
    return taps
