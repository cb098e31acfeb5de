"""The best length of a step, without any further Fourier transform.

Along a step every predicted count is a polynomial in the length t (quadratic for the object alone, quartic for object and probe
together), so that the loss is a function of one number, whose derivatives need only the coefficients of each pixel. The minimum
is found by Newton's method, kept within a bracket that shrinks.
"""

from __future__ import annotations

from collections.abc import Callable

LENGTHS = (0.4, 0.75, 1.1, 1.7, 3.2)  # of a guess, where a loss is looked at at once
ROUNDS = 40  # Newton needs 3 to 6; bisection alone would need some 20 for a digit more than single precision

# t -> (loss, first, second derivative)
Along = Callable[[float], tuple[float, float, float]]
Samples = Callable[[list[float]], list[list[float]]]  # the same for several t at once


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


def minimum_of_samples(samples: Samples, guess: float) -> float:
    """t of the first minimum at t > 0 of a function that falls at t = 0 and is cheaper at several t together; 0 if there is none.

    Between two whose slopes have opposite signs the slope is the cubic that has their slopes and curvatures. Others are taken
    where the minimum is not among them.
    """
    first = guess
    while 1e-9 * first < guess < 1e9 * first:
        lengths = [share * guess for share in LENGTHS]
        rows = samples(lengths)
        high = 0  # the first that is beyond the minimum, or over a hill
        while high < len(rows) and rows[high][1] < 0 and (high == 0 or rows[high][0] <= rows[high - 1][0]):
            high += 1
        if high == len(rows):
            guess *= LENGTHS[-1] / LENGTHS[0]
        elif high == 0 or rows[high][1] < 0:
            guess *= LENGTHS[high] / (2 * LENGTHS[-1])
        else:
            (_, *low_slopes), (_, *high_slopes) = rows[high - 1], rows[high]
            return _root_of_cubic(lengths[high - 1], lengths[high], low_slopes, high_slopes)
    return 0.0


def _root_of_cubic(low: float, high: float, at_low: list[float], at_high: list[float]) -> float:
    """Where the cubic is 0 that has these (values, derivatives) at low, where it is negative, and high, where it is not."""
    width = high - low
    begin, end = 0.0, 1.0
    for _ in range(60):
        s = (begin + end) / 2
        left, right = (1 + 2 * s) * at_low[0] + s * width * at_low[1], (3 - 2 * s) * at_high[0] + (s - 1) * width * at_high[1]
        if (1 - s) ** 2 * left + s * s * right < 0:
            begin = s
        else:
            end = s
    return low + width * (begin + end) / 2
