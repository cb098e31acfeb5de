"""An engine of refinements whose iterations are made up: for tests of everything around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace

import torch

from verglas.core.rotations import random_rotations
from verglas.io.mrc import Map
from verglas.particles.table import ParticleTable
from verglas.refinement.config import RefineConfig
from verglas.refinement.files import FinalMaps
from verglas.refinement.helpers import NOBODY
from verglas.refinement.state import HalfModel, Poses, Schedule, State

BOX, PIXEL, N, LAST = 32, 4.5, 120, 5
SHELLS = BOX // 2 + 1


@dataclass(frozen=True)
class Iteration:
    """What the engine yields."""

    state: State
    seconds: dict[str, float]
    notes: list[str]
    final: FinalMaps | None
    directions_D2: torch.Tensor
    communication: None = None


@dataclass
class Session:
    """What the engine keeps."""

    table: ParticleTable
    config: RefineConfig
    state: State | None = None
    notices: list[str] = field(default_factory=lambda: ["images are kept in memory"])
    chosen: dict[str, str] = field(default_factory=lambda: {"kernels": "made up", "precision": "single", "reason": "a test"})
    on: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(device=torch.device("cpu"), helpers=NOBODY))


def made_up(n: int, iteration: int, order: int = 2) -> State:
    """A state that depends on nothing but its arguments."""
    generator = torch.Generator().manual_seed(iteration)

    def spectrum(value: float) -> torch.Tensor:
        return torch.full((SHELLS,), value, dtype=torch.float64)

    prior_D = torch.full((12 * 4**order,), 1 / (12 * 4**order), dtype=torch.float64)
    halves = [
        HalfModel(torch.randn(BOX, BOX, BOX, generator=generator), spectrum(1e-3)[None], prior_D, 10.0, 1.0,
                  torch.ones(1, dtype=torch.float64), spectrum(1.0), spectrum(0.1), spectrum(10.0), spectrum(1.0))
        for _ in range(2)
    ]  # fmt: skip
    number_B = torch.arange(n)
    poses = Poses(
        random_rotations(n, generator), torch.randn(n, 2, generator=generator, dtype=torch.float64),
        torch.ones(n, dtype=torch.float64), 100 + torch.randn(n, generator=generator, dtype=torch.float64),
        torch.rand(n, generator=generator, dtype=torch.float64), number_B + 1,
        torch.rand(n, generator=generator, dtype=torch.float64), number_B % 2 + 1, torch.zeros(n, dtype=torch.int64),
        torch.zeros(n, dtype=torch.int64), *torch.rand(3, n, generator=generator, dtype=torch.float64),
    )  # fmt: skip
    schedule = Schedule(order, 1, 5 * PIXEL, 2 * PIXEL, converged=iteration >= LAST - 1)
    if iteration > 1:
        schedule = replace(
            schedule, changes_angles=8.0 / iteration, changes_offsets=2.0, accuracy_angles=2.0, accuracy_offsets=0.9
        )
    fsc_S = torch.linspace(1, 0.1 * iteration / LAST, SHELLS, dtype=torch.float64)
    return State(iteration, halves, poses, schedule, BOX, PIXEL, 40.0 / (iteration + 1), 20, fsc_S, ["group"])


def engine_of(control: SimpleNamespace) -> ModuleType:
    """The made-up engine as a module; control.stop names the iteration that is interrupted, control.refuse the error of
    `prepare`, which is counted in control.prepared."""
    fake = ModuleType("verglas.refinement.driver")

    def prepare(
        table: ParticleTable, reference: Map, config: RefineConfig, device: object, threads: int,
        progress: Callable[[str, int, int], None] | None = None, planned: object = None, ranks: object = None,
    ) -> Session:  # fmt: skip
        control.prepared += 1
        if progress is not None:
            progress("reading images", len(table), len(table))
        if control.refuse is not None:
            raise control.refuse
        return Session(table, config)

    def resume(session: Session, state: State) -> Session:
        return replace(session, state=state)

    def iterations(session: Session, progress: Callable[[str, int, int], None]) -> Iterator[Iteration]:
        n = len(session.table)
        for number in range(session.state.iteration + 1 if session.state else 1, LAST + 1):
            for done in (0, n // 2, n):
                progress("expectation", done, n)
            if control.stop == number:
                raise KeyboardInterrupt
            state = made_up(n, number)
            final = None
            if number == LAST:
                first = state.halves[0]
                final = FinalMaps(first, [half.map_ZYX for half in state.halves])
            notes = ["sampling refined: the resolution does not improve"] if number == 3 else []
            yield Iteration(
                state, {"expectation": 1.5, "maximization": 0.25, "total": 1.9}, notes, final, torch.rand(192, 2) * 180
            )

    fake.prepare, fake.resume, fake.iterations = prepare, resume, iterations  # type: ignore[attr-defined]
    return fake
