"""`along`: a misfit and its derivatives along a step. README.md gives the formula; `reference.py` is its plain definition."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from verglas.kernels import choose, implementation_of

FLOOR = 1e-10  # counts: predictions are no lower, so that a dark pixel has a finite slope


class NoiseOfPixels(Protocol):
    """What is asked of a likelihood; README.md."""

    @property
    def offset(self) -> float:
        """Counts added to both sides before square roots are taken."""

    @property
    def poisson(self) -> bool:
        """Whether counts are those of photons, not their square roots Gaussian."""

    def loss(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """Minus the logarithm of the likelihood."""

    def slope(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """First derivative of `loss` with respect to the intensity."""

    def curvature(self, intensity: Tensor, counts: Tensor) -> Tensor:
        """Second derivative."""


def along(
    coefficients_DBYX: Tensor, counts_BYX: Tensor, weight_YX: Tensor, step: float, noise: NoiseOfPixels,
    implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """[3] float64: misfit at t = step, first and second derivative (see `along_reference`).

    implementation: "auto", "reference" or "cpu"; a GPU runs the reference.
    """
    name = choose(counts_BYX.device, counts_BYX.dtype, implementation).name
    run = implementation_of("along", "reference" if name == "triton" else name)
    return run(coefficients_DBYX, counts_BYX, weight_YX, step, noise)  # type: ignore[no-any-return]
