"""What a rank tells the others every second, and what follows from it: who is dead, silent, or holds all others up.

Nothing here knows how beats travel (verglas.distributed.pulse does).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field

from verglas.core.processes import birth, is_alive
from verglas.errors import VerglasError

BEAT = 1.0  # s between two beats
SILENCE = 45.0  # s without a beat, after which a rank counts as lost; compiling can keep beats back for seconds
PATIENCE = 300.0  # s that ranks wait for one that does not get on
NOBODY = 4.0  # times the patience: when no rank at all gets on (all may be in one long stage)
NAMED = 3  # ranks that a message names at most
STOPPED, LOST = 143, 3  # exit codes: as by SIGTERM; another process of the run was lost


@dataclass(frozen=True)
class Beat:
    """Of one rank. born: of its process (verglas.core.processes); count: beats so far; stage and done: what it is at, and how
    many particles of that are done; number and name: the last collective that it entered; waits: whether it is still in it;
    idle: it waits for something to do, however long; left: it has ended as it should."""

    rank: int
    host: str
    pid: int
    born: str
    count: int = 0
    stage: str = "starting"
    done: int = 0
    number: int = 0
    name: str = ""
    waits: bool = False
    idle: bool = False
    left: bool = False

    @classmethod
    def of(cls, text: str | bytes) -> Beat:
        """From the text that `text` made."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self))

    @property
    def who(self) -> str:
        """'Rank 1 (gpu07, process 4242)'."""
        return f"Rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def sign(self) -> tuple[object, ...]:
        """What changes while the rank gets on."""
        return self.stage, self.done, self.number, self.waits


@dataclass(frozen=True)
class End:
    """Why a run ends: a text for the user, the exit code of all ranks, and the rank that says so."""

    text: str
    code: int = LOST
    speaker: int = 0

    @classmethod
    def of(cls, text: str | bytes) -> End:
        """From JSON."""
        return cls(**json.loads(text))

    def json(self) -> str:
        """As it travels."""
        return json.dumps(asdict(self))


@dataclass
class Judge:
    """Hears the beats of all ranks and says when one is lost. rank: its own; patience: seconds.

    Seconds are counted by those who listen, a few at a time: a job that was suspended as a whole has lost nobody.
    """

    rank: int
    patience: float = PATIENCE
    last: list[Beat] = field(default_factory=list)
    _silent: dict[int, float] = field(default_factory=dict)  # rank -> seconds without a beat
    _still: dict[int, float] = field(default_factory=dict)  # rank -> seconds without getting on
    _seen: set[int] = field(default_factory=set)  # ranks whose processes can be looked at from here

    @property
    def silence(self) -> float:
        """Seconds without a beat after which a rank is lost that cannot be looked at."""
        return min(SILENCE, self.patience)

    def begin(self, beats: Sequence[Beat]) -> None:
        """Take in the first beats of all. Processes of one host see each other unless they are in containers of their own."""
        self.last = list(beats)
        self._seen = {b.rank for b in beats if b.rank != self.rank and b.born and birth(b.pid) == b.born}
        self._silent = self._still = {}

    def gone(self) -> list[int]:
        """Ranks of this host whose processes have ended. Ask before the beats are read: those tell who has left as it should."""
        return [b.rank for b in self.last if b.rank in self._seen and not is_alive(b.pid, b.born)]

    def hear(self, beats: Sequence[Beat], gone: Sequence[int], seconds: float) -> End | None:
        """Why the run has to end, if it has. beats: of all ranks; gone: of `gone`, asked before; seconds: since the last time."""
        known = {beat.rank: beat for beat in self.last}
        self._silent = {b.rank: self._after(self._silent, b, known[b.rank].count == b.count, seconds) for b in beats}
        self._still = {b.rank: self._after(self._still, b, known[b.rank].sign == b.sign, seconds) for b in beats}
        self.last = list(beats)
        others = [beat for beat in beats if not beat.left and beat.rank != self.rank]
        if dead := [beat for beat in others if beat.rank in gone]:
            return End(dead_text(dead), speaker=first_without(dead, beats))
        if silent := [beat for beat in others if self._silent[beat.rank] >= self._limit(beat)]:
            return End(silent_text(silent, self._limit(silent[0])), speaker=first_without(silent, beats))
        there = [beat for beat in beats if not beat.left]
        return None if any(beat.idle for beat in there) else self._stuck(there)

    def _limit(self, beat: Beat) -> float:
        """Seconds without a beat after which a rank is lost: more where its process can be seen to live."""
        return self.patience if beat.rank in self._seen else self.silence

    def _after(self, so_far: Mapping[int, float], beat: Beat, unchanged: bool, seconds: float) -> float:
        return so_far.get(beat.rank, 0.0) + seconds if unchanged else 0.0

    def _stuck(self, there: Sequence[Beat]) -> End | None:
        """One stands still outside of the collective in which others wait; or nothing moves anywhere."""
        waiting = [beat for beat in there if beat.waits]
        missing = [beat for beat in there if not beat.waits]
        still = min((self._still[beat.rank] for beat in missing or there), default=0.0)
        if any(self._silent[beat.rank] > 2 * BEAT for beat in missing):  # it is not even heard: `_limit` says for how long
            return None
        longer = f" If this is slow but sound, allow more: VERGLAS_PATIENCE={2 * self.patience:.0f} (seconds)."
        waited = min((self._still[beat.rank] for beat in waiting), default=0.0)
        if waiting and min(still, waited) >= self.patience:
            return End(stuck_text(waiting, missing, self.patience) + longer)
        if len(there) > 1 and still >= NOBODY * self.patience:
            return End(stuck_text([], there, NOBODY * self.patience) + longer)
        return None


def first_without(lost: Sequence[Beat], beats: Sequence[Beat]) -> int:
    """The first rank that is not lost, which speaks for all."""
    return min({beat.rank for beat in beats if not beat.left} - {beat.rank for beat in lost}, default=0)


def dead_text(dead: Sequence[Beat]) -> str:
    """Of processes that are not there any more and did not say why."""
    return (
        f"{several([f'{beat.who} was killed or died in {beat.stage}' for beat in dead])}. Where memory runs out the system kills "
        "processes (see dmesg, or sacct on Slurm)."
    )


def silent_text(silent: Sequence[Beat], seconds: float) -> str:
    """Of ranks without a beat."""
    text = several([f"{beat.who}, last heard of in {beat.stage}" for beat in silent])
    return f"Nothing was heard for {seconds:.0f} s from {text}: host or process stands still, or the network is cut."


def stuck_text(waiting: Sequence[Beat], missing: Sequence[Beat], seconds: float) -> str:
    """Of ranks that hold others up, or of all."""
    if waiting and missing:
        latest = max(waiting, key=lambda beat: beat.number)
        text = several([f"{one.who} has stood still for {seconds:.0f} s in {one.stage} (after collective {one.number})"
                        for one in missing])  # fmt: skip
        return f"{text}, while the others wait in collective {latest.number} ('{latest.name}')."
    where = several([f"{b.who} in {b.stage}, collective {b.number} ('{b.name}')" for b in waiting or missing])
    return f"No rank has got on for {seconds:.0f} s: {where}. The network between them may be the cause."


def several(texts: Sequence[str]) -> str:
    """The first few, and how many more there are."""
    more = f"; and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return "; ".join(texts[:NAMED]) + more


def patience_of(environment: Mapping[str, str]) -> float:
    """VERGLAS_PATIENCE, seconds; VerglasError if it is none."""
    text = environment.get("VERGLAS_PATIENCE", str(PATIENCE))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise VerglasError(f"VERGLAS_PATIENCE is '{text}', not a number of seconds above 0.")
    return seconds
