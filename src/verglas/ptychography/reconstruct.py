"""A reconstruction, pass by pass: `reconstruct` yields what each pass found and says nothing else."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from verglas.distributed.ranks import ALONE, Ranks
from verglas.ptychography.costs import measured
from verglas.ptychography.options import PtychoOptions
from verglas.ptychography.positions import Corrections
from verglas.ptychography.positions_search import REACH
from verglas.ptychography.problem import Problem
from verglas.ptychography.scan import Reconstruction, Scan
from verglas.ptychography.share import Share
from verglas.ptychography.start import as_reconstruction, as_unknowns, first_guess, object_frame
from verglas.ptychography.unknowns import Unknowns


class Engine(Protocol):
    """One way to fit. `memory` and the unknowns are all that the next pass depends on."""

    memory: dict[str, Tensor]

    def run_pass(self, x: Unknowns, number: int) -> tuple[Unknowns, float]:
        """Pass `number` (1 is the first): new unknowns, and the error that it met before it changed them."""

    def forget(self) -> None:
        """Something else has changed the unknowns."""

    def positions_moved(self, distance: float) -> None:
        """Positions have moved by that, px rms, since the last pass."""


@dataclass(frozen=True)
class PassDone:
    """Pass `number` (1 is the first) is done. error: sum (sqrt(I) - sqrt(n))^2 / sum n over good pixels as the pass met it,
    before its changes; object_change, probe_change: rms of the change over rms; memory: what the engine remembers; share: what
    this rank keeps of `found` and `memory`, None of both as a whole; plan: what is kept where, and why."""

    number: int
    error: float
    object_change: float
    probe_change: float
    seconds: float
    found: Reconstruction
    memory: dict[str, Tensor] = field(default_factory=dict, repr=False)
    share: Share | None = field(default=None, repr=False)
    plan: tuple[str, ...] = ()


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
    scan: Scan, options: PtychoOptions, device: torch.device | str = "cpu", after: PassDone | None = None, ranks: Ranks = ALONE
) -> Iterator[PassDone]:
    """Passes of the engine that the options name. after: goes on behind that pass, to the same result as without a pause.

    ranks: share the work; each gives the same scan (and `after`), and gets what it keeps of each pass (`collect.whole` puts the
    parts together). InputError for data that no fit is possible with.
    """
    share = share_of(scan, options, device, after, ranks)
    problem = Problem(share.part(scan), options, device, share)
    plan = plan_of(problem)
    if after is None:
        x, origin_2 = first_guess(scan, problem.counts, options, problem.like, share)
        errors: tuple[float, ...] = ()
        memory: dict[str, Tensor] = {}
    else:
        x, origin_2, errors = as_unknowns(after.found, scan, problem.like, share), after.found.origin_2, after.found.error_P
        memory = {name: share.cut_field(name, value).to(device) for name, value in after.memory.items()}
    corrections = Corrections(problem, memory) if options.positions_from else None
    engine = engine_of(problem, memory)
    for number in range(len(errors) + 1, options.passes + 1):
        ranks.doing("reconstructing", number)
        start, before = time.monotonic(), x
        if problem.begin(number):
            engine.forget()
        x, error = engine.run_pass(x, number)
        x = _within_limits(x, problem)
        of_object, of_probe = _changes(share, before, x)
        if corrections is not None and number >= options.positions_from:
            x = corrections.after_pass(x, number)
            engine.positions_moved(corrections.moved)
            share, x = _kept_with(problem, x, engine, corrections)
        errors += (error,)
        found = as_reconstruction(x, scan, origin_2, errors)
        kept = engine.memory | (corrections.memory if corrections is not None else {})
        yield PassDone(number, error, of_object, of_probe, time.monotonic() - start, found, kept, share, plan)


def share_of(
    scan: Scan, options: PtychoOptions, device: torch.device | str, after: PassDone | None = None, ranks: Ranks = ALONE
) -> Share:
    """What this rank keeps of the scan and its object."""
    if ranks.size == 1:
        return Share.of_one(scan)
    if after is None:
        low_2, shape = object_frame(scan, options)
        position_B2 = scan.positions_B2.double().cpu() - low_2
    else:
        rows, columns = after.found.object_OLYX.shape[-2:]
        shape, position_B2 = (rows, columns), after.found.positions_B2.cpu()
    planes = options.object_modes * (len(scan.geometry.slice_distances) + 1)
    costs = measured(ranks, torch.device(device))
    return Share.of(ranks, position_B2, scan.window, shape, costs, planes, bool(options.positions_from))


def plan_of(problem: Problem) -> tuple[str, ...]:
    """What is kept where and why, for people: sentences; of several ranks that which keeps most."""
    ranks, needs = problem.share.ranks, problem.needs
    text = max(ranks.everyones((needs.patterns + needs.object + needs.exits, problem.kept.text), "plans"))[1]
    why, options = problem.why_not_fused, problem.options
    how = "sums by the far field's kernels" if why is None else f"sums by the model, array by array: {why}"
    if ranks.size == 1:
        return text, how
    few = options.batches == "compact" and options.engine in ("lsq", "rpie", "epie")
    busy = ("mini-batches of neighbours keep one or two ranks busy at a time: --batches sparse is for several",) if few else ()
    return problem.share.reason, f"of one rank, at most: {text}", how, *busy


def _kept_with(problem: Problem, x: Unknowns, engine: Engine, corrections: Corrections) -> tuple[Share, Unknowns]:
    """The share and the unknowns, with boxes that hold what the positions see where they are now."""
    share = problem.share
    if share.holds(x["positions_B2"], REACH + 2):
        return share, x
    following = share.following(x["positions_B2"])
    corrections.regions.follow(following)
    problem.share = problem.regulariser.share = following
    engine.memory = {name: share.moved(name, value, following) for name, value in engine.memory.items()}
    return following, Unknowns(**{name: share.moved(name, value, following) for name, value in x.items()})


def _changes(share: Share, before: Unknowns, after: Unknowns) -> tuple[float, float]:
    """rms of the change over rms, of object and probe."""
    old = [before.only(name) for name in ("object_OLYX", "probe_MYX")]
    steps = [after.only(name).plus(one, -1.0) for name, one in zip(("object_OLYX", "probe_MYX"), old, strict=True)]
    object_step, probe_step, object_now, probe_now = share.dots(*((one, one) for one in steps + old))
    return math.sqrt(object_step / object_now), math.sqrt(probe_step / probe_now)


def _within_limits(x: Unknowns, problem: Problem) -> Unknowns:
    """Transmission no greater than its limit; no negative background; scales of mean 1 (the probe takes the rest)."""
    options, share = problem.options, problem.share
    if options.amplitude_limit:
        amplitude = x["object_OLYX"].abs()
        x = x.changed(object_OLYX=x["object_OLYX"] * (options.amplitude_limit / amplitude.clamp_min(options.amplitude_limit)))
    if options.fit_background:
        x = x.changed(background_YX=x["background_YX"].clamp_min(0))
    if options.fit_scale:
        mean = share.sum_of(float(x["scale_B"].sum(dtype=torch.float64))) / share.positions
        root = math.sqrt(mean)
        x = x.changed(scale_B=x["scale_B"] / mean, probe_MYX=x["probe_MYX"] * root)
        if x.opr_BK is not None:
            x = x.changed(opr_BK=x.opr_BK * root)
    return x
