"""The best length of a step, without any further Fourier transform.

Along a step every predicted count is a polynomial in the length t (quadratic for the object alone, quartic for object and probe
together), so that the loss is a function of one number, whose derivatives need only the coefficients of each pixel. The minimum
is found by Newton's method, kept within a bracket that shrinks.
"""

from __future__ import annotations

from collections.abc import Callable

ROUNDS = 40  # Newton needs 3 to 6; bisection alone would need some 20 for a digit more than single precision

# t -> (loss, first, second derivative)
Along = Callable[[float], tuple[float, float, float]]


def minimum_along(along: Along, guess: float, tolerance: float = 1e-4) -> tuple[float, float]:
    """(t, loss there) of the first minimum at t > 0 of a function that falls at t = 0; (0, loss) if it does not fall there.

    guess: a length of the right order, > 0. tolerance: the last step of Newton's method relative to t: as it converges
    quadratically, the error is about its square.
    """
    value, slope, _ = along(0.0)
    if not slope < 0:
        return 0.0, value
    low, high, step = 0.0, float("inf"), guess
    best, best_value = 0.0, value
    for _ in range(ROUNDS):
        value, slope, curvature = along(step)
        if value < best_value:
            best, best_value = step, value
        if slope < 0 and value <= best_value:
            low = step
        else:  # beyond the minimum, or over a hill: the first minimum is before
            high = step
        newton = step - slope / curvature if curvature > 0 else float("inf")
        if abs(newton - step) <= tolerance * step:
            return _better(along, newton, step, value, best, best_value)
        if not low < newton < high:
            newton = (low + high) / 2 if high < float("inf") else 4 * step
        step = min(newton, 4 * step)
    return best, best_value


def _better(along: Along, newton: float, step: float, value: float, best: float, best_value: float) -> tuple[float, float]:
    """The last, tiny step of Newton's method is taken without looking: its gain is below the loss' rounding."""
    return (newton, value) if value <= best_value else (best, best_value)
