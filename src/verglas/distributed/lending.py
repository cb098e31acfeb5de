"""How many particles a helper gets, a process on CPU cores beside GPUs: those it is back with before the GPUs are done.

A helper gives its sums of an expectation back as a whole. If it is not back when all else is done, its particles are worked on
without it: that is all it can cost. So it is given fewer than it would manage, and none if that saves hardly anything.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

TRIAL = 64  # particles, at most, on which a helper first shows how quick it is
MARGIN = 0.7  # of the expectation: when it is to be back
LEAST = 0.005  # of all particles: fewer are not lent
WORTH = 2.0  # seconds saved for each second that lending takes
SHORTEST = 2.0  # seconds of an expectation: no helper is back from a shorter one, and none is started or tried in it
RESTS = 5  # expectations until one that gets nothing is tried again; twice as many each time
LATE = 2  # times in a row after which it rests


@dataclass(frozen=True)
class Found:
    """Seconds of a helper's last job: from the order to its first particle (begin), of a particle, from its last particle until
    its sums are here (give)."""

    begin: float
    per_row: float
    give: float


@dataclass
class Lending:
    """Decides for one helper. told: the last decision in words. cost: seconds that lending took of those who lend."""

    told: str = "the CPU has not shown yet how quick it is"
    cost: float = 0.0
    found: Found | None = None
    _per_row: deque[float] = field(default_factory=lambda: deque(maxlen=2))  # seconds of all ranks together, of expectations
    _late: int = 0
    _rested: int = 0  # expectations since it was last given something
    _rests: int = RESTS  # until it is tried again
    _barred: bool = False  # was late too often: rests as long as that says

    def wants_trial(self, total: int) -> bool:
        """Whether the helper is to show how quick it is: not known, or long ago, and an expectation of `total` rows takes long
        enough for it to be of use: trials, too, take cores and memory that the ranks want. Asked once in every expectation."""
        self._rested += 1
        if self._per_row and total * self._per_row[-1] < SHORTEST:
            return False
        if self._rested < self._rests and (self.found is not None or self._barred):
            return False
        self._rests *= 1 if self.found is None else 2
        self._rested, self._late, self._barred = 0, 0, False
        return True

    def rows(self, total: int, most: int) -> int:
        """How many rows to lend, at most `most`, of an expectation of `total` rows."""
        if self.found is None or self._barred or len(self._per_row) < 2:  # the first expectation compiles: it tells nothing
            return 0
        each, found = min(self._per_row), self.found
        left = MARGIN * total * each / 2**self._late - found.begin - found.give
        count = min(max(0, int(left / found.per_row)), most)
        many = f"{count} of {total} particles ({100 * count / total:.2g} %)"
        if count < LEAST * total or count * each < WORTH * self.cost:
            pace = f"it takes {found.begin + found.give:.2g} s and {found.per_row:.2g} s for each"
            self.told = f"the CPU rests: in {total * each:.2g} s it could take {many}; {pace}"
            return 0
        self.told, self._rested, self._rests = f"the CPU took {many}", 0, RESTS
        return count

    def passed(self, total: int, seconds: float) -> None:
        """An expectation of so many rows took all ranks so long."""
        self._per_row.append(seconds / max(1, total))

    def heard(self, found: Found, lent: bool) -> None:
        """The helper is done with a job. lent: its sums counted (else it was a trial)."""
        self.found = found
        self._late = 0 if lent else self._late

    def late(self) -> None:
        """It was not back in time: half as much the next time, then none for a while."""
        self.told = "the CPU was not back in time: its particles were worked on without it"
        self._late += 1
        self._barred = self._late >= LATE
