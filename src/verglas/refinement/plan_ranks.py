"""What a run takes on several ranks (one per GPU): the part of each, what they say to one another, and how well that pays."""

from __future__ import annotations

from dataclasses import dataclass, replace

from verglas.refinement import costs
from verglas.refinement.config import RefineConfig
from verglas.refinement.plan import RunPlan, plan
from verglas.refinement.plan_memory import batch_items
from verglas.refinement.plan_sizes import Machine, Problem

WHOLE_ON_EACH = ("reference, packed", "sums of all maps")


@dataclass(frozen=True)
class OnRanks:
    """A run on so many ranks: the plan of one of them. alone: seconds of the same run on one."""

    ranks: int
    one: RunPlan
    alone: float

    @property
    def host_bytes(self) -> float:
        """Memory of the host at its peak, of all ranks together (on one host)."""
        return self.ranks * self.one.peak("host")

    @property
    def whole_on_each(self) -> float:
        """Bytes of what every rank holds as a whole, however many there are: references and sums of all half-sets or classes, if
        these are not in layers."""
        if self.one.in_layers:
            return 0.0
        last = self.one.iterations[-1]  # while its particles are worked on, which need not be when memory has its peak
        return sum(item.bytes for item in batch_items(self.one, last.sizes, last.batch) if item.name in WHOLE_ON_EACH)

    @property
    def efficiency(self) -> float:
        """Of the whole run, its start apart: how much of the ranks' time does what one rank would have to do."""
        start = costs.STARTING_SECONDS[self.one.machine.kind]
        return (self.alone - start) / (self.ranks * (self.one.seconds - start))

    @property
    def between_ranks(self) -> float:
        """Seconds that ranks talk and wait for one another."""
        return sum(one.times * one.seconds.get("ranks", 0.0) for one in self.one.iterations)


def plan_on(problem: Problem, config: RefineConfig, machine: Machine, ranks: int) -> RunPlan:
    """The plan of one of `ranks` processes that share all particles of `problem` and the host of `machine`, each on a device such
    as `machine` has."""
    part = replace(problem, n_particles=-(-problem.n_particles // ranks))
    cores = max(1, machine.cores // ranks)
    return plan(part, config, replace(machine, host_memory=machine.host_memory / ranks, cores=cores, ranks=ranks))


def plans_up_to(problem: Problem, config: RefineConfig, machine: Machine, most: int) -> list[OnRanks]:
    """The run on 1, 2, 4, ... ranks, and on `most` of them."""
    counts = sorted({most} | {2**power for power in range(most.bit_length()) if 2**power <= most})
    plans = [plan_on(problem, config, machine, ranks) for ranks in counts]
    return [OnRanks(ranks, one, plans[0].seconds) for ranks, one in zip(counts, plans, strict=True)]
