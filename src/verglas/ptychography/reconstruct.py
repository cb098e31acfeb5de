"""A reconstruction, pass by pass: `reconstruct` yields what each pass found and says nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.positions import corrected_positions
from verglas.ptychography.problem import Problem
from verglas.ptychography.scan import Reconstruction, Scan
from verglas.ptychography.start import as_reconstruction, as_unknowns, first_guess
from verglas.ptychography.unknowns import Unknowns


class Engine(Protocol):
    """One way to fit. `memory` and the unknowns are all that the next pass depends on."""

    memory: dict[str, Tensor]

    def run_pass(self, x: Unknowns, number: int) -> tuple[Unknowns, float]:
        """Pass `number` (1 is the first): new unknowns, and the error that it met before it changed them."""

    def forget(self) -> None:
        """Something else has changed the unknowns."""


@dataclass(frozen=True)
class PassDone:
    """Pass `number` (1 is the first) is done. error: sum (sqrt(I) - sqrt(n))^2 / sum n over good pixels as the pass met it,
    before its changes; object_change, probe_change: rms of the change over rms; memory: what the engine remembers."""

    number: int
    error: float
    object_change: float
    probe_change: float
    seconds: float
    found: Reconstruction
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False)


def engine_of(problem: Problem, memory: dict[str, Tensor]) -> Engine:
    """The engine that the options name."""
    from verglas.ptychography.conjugate_gradients import ConjugateGradients
    from verglas.ptychography.minibatch import MiniBatches
    from verglas.ptychography.projections import Projections

    name = problem.options.engine
    if name == "cg":
        return ConjugateGradients(problem, memory)
    return Projections(problem, memory) if name in ("dm", "raar") else MiniBatches(problem, memory)


def reconstruct(
    scan: Scan, options: PtychoOptions, device: torch.device | str = "cpu", after: PassDone | None = None
) -> Iterator[PassDone]:
    """Passes of the engine that the options name. after: goes on behind that pass, to the same result as without a pause.

    InputError for data that no fit is possible with.
    """
    problem = Problem(scan, options, device)
    if after is None:
        x, origin_2 = first_guess(scan, problem.counts, options, problem.like)
        errors: tuple[float, ...] = ()
        engine = engine_of(problem, {})
    else:
        x, origin_2, errors = as_unknowns(after.found, scan, problem.like), after.found.origin_2, after.found.error_P
        engine = engine_of(problem, {name: value.to(device) for name, value in after.memory.items()})
    for number in range(len(errors) + 1, options.passes + 1):
        start, before = time.monotonic(), x
        if problem.begin(number):
            engine.forget()
        x, error = engine.run_pass(x, number)
        x = _within_limits(x, options)
        if options.positions_from and number >= options.positions_from:
            x = corrected_positions(problem, x, number)
        errors += (error,)
        of_object, of_probe = (_change(before[name], x[name]) for name in ("object_OLYX", "probe_MYX"))
        found = as_reconstruction(x, scan, origin_2, errors)
        yield PassDone(number, error, of_object, of_probe, time.monotonic() - start, found, engine.memory)


def _change(before: Tensor, after: Tensor) -> float:
    """rms of the change over rms."""
    return float(((after - before).abs().square().sum() / before.abs().square().sum()).sqrt())


def _within_limits(x: Unknowns, options: PtychoOptions) -> Unknowns:
    """Transmission no greater than its limit; no negative background; scales of mean 1 (the probe takes the rest)."""
    if options.amplitude_limit:
        amplitude = x["object_OLYX"].abs()
        x = x.changed(object_OLYX=x["object_OLYX"] * (options.amplitude_limit / amplitude.clamp_min(options.amplitude_limit)))
    if options.fit_background:
        x = x.changed(background_YX=x["background_YX"].clamp_min(0))
    if options.fit_scale:
        mean = x["scale_B"].mean()
        root = float(mean.sqrt())
        x = x.changed(scale_B=x["scale_B"] / mean, probe_MYX=x["probe_MYX"] * root)
        if x.opr_BK is not None:
            x = x.changed(opr_BK=x.opr_BK * root)
    return x
