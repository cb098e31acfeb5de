"""Each rank tells the others every second that it is alive and what it is at; when one is lost, all end by themselves.

Beats lie in the ranks' common store, one key a rank. Two threads beside the computing: one writes and reads beats (its store is
a connection of its own: the main thread's may be waiting), one sees to it that the first is not held up. They end the process by
os._exit: the main thread may be in the middle of a collective that nobody will ever finish. Files are written so that a process
may be killed at any moment.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from threading import Event, Lock, Thread

import torch.distributed as dist

from verglas.core.processes import birth
from verglas.distributed.beat import BEAT, STOPPED, Beat, End, Judge, dead_text
from verglas.distributed.place import LAST_WORDS
from verglas.distributed.scratch import remove_all
from verglas.errors import VerglasError

MANY = 64  # ranks; more of them beat less often, so that the store keeps up
STOP_LOOK = 3 * BEAT  # s that a rank which is told to stop looks whether that is because another one was lost
FAREWELL = 5.0  # s for closing files and display

Farewell = Callable[[str], str]  # reason -> what to say beside it


class Pulse:
    """Of one rank. store: of its own; hosts: whether the store lives in the process of rank 0, and ends with it.

    `doing` says what it is at; `collective` surrounds what all ranks do together.
    """

    def __init__(self, rank: int, size: int, store: dist.Store, patience: float, hosts: bool) -> None:
        self.rank, self.size, self.store, self.hosts = rank, size, store, hosts
        self.judge = Judge(rank, patience)
        self.stage, self.done, self._part = "starting", 0, ""
        self._farewells: list[Farewell] = []
        self._me = Beat(rank, socket.gethostname(), os.getpid(), birth(os.getpid()))
        self._number, self._name, self._waits, self._idle = 0, "", False, False
        self._count, self._left, self._rounds = 0, False, 0
        self._over, self._ending = Event(), Lock()
        self._interval = BEAT * max(1.0, size / MANY)
        self._threads = [Thread(target=work, name="verglas-pulse", daemon=True) for work in (self._talk, self._see_to_talk)]

    def start(self) -> None:
        """Hear the first beat of every rank, then go on beating."""
        self._beat()
        self.store.wait([_key(rank) for rank in range(self.size)], timedelta(seconds=self.judge.patience))
        self.judge.begin(self._beats())
        for thread in self._threads:
            thread.start()

    # What the main thread calls

    def doing(self, stage: str, done: int, part: str | None) -> None:
        """See Ranks.doing."""
        self._part = self._part if part is None else part
        self.stage, self.done = f"{self._part}, {stage}" if self._part else stage, done

    @contextmanager
    def collective(self, name: str) -> Iterator[None]:
        """What all ranks do together, waiting for each other. Its errors come from other ranks' ends: these are waited for."""
        self._number, self._name, self._waits = self._number + 1, name, True
        try:
            with self._ends_heard(RuntimeError):
                yield
        finally:
            self._waits = False

    @contextmanager
    def idle(self) -> Iterator[None]:
        """This rank waits for something to do, however long that takes."""
        self.rest(True)
        try:
            with self._ends_heard(RuntimeError):
                yield
        finally:
            self.rest(False)

    def rest(self, idle: bool) -> None:
        """Whether this rank is outside of the work that ranks share, where it may take any time."""
        self._idle = idle

    @contextmanager
    def ending(self, farewell: Farewell) -> Iterator[None]:
        """Within, `farewell` is called before the process is ended from here. Errors that may come from another rank's end are
        held back until that is found."""
        self._farewells.insert(0, farewell)
        try:
            with self._ends_heard(dist.DistError):
                yield
        except KeyboardInterrupt:  # of a launcher that ends all, perhaps because it has seen one go
            self.wait_for_end(STOP_LOOK)
            raise
        finally:
            self._farewells.remove(farewell)

    @contextmanager
    def _ends_heard(self, error: type[RuntimeError]) -> Iterator[None]:
        """Within, such an error is most likely another rank's end: there is time to find out whose."""
        try:
            yield
        except error:
            self.wait_for_end(self.judge.silence + LAST_WORDS)
            raise

    def wait_for_end(self, seconds: float) -> None:
        """Give the threads time to find out who was lost, and to end this process; returns if nobody was."""
        self._over.wait(seconds)

    @property
    def over(self) -> bool:
        """Whether this rank has left, or said why it ends."""
        return self._over.is_set()

    def last_words(self, error: BaseException) -> None:
        """This rank ends by an error of its own: tell the others, which end, too, with the same exit code."""
        if isinstance(error, RuntimeError):  # perhaps because of another rank's end
            self.wait_for_end(STOP_LOOK)
        if isinstance(error, KeyboardInterrupt):
            end = End(f"{self._me.who} was stopped in {self.stage}.", STOPPED)
        elif isinstance(error, SystemExit):
            end = End(f"{self._me.who} ended in {self.stage}.", int(error.code or 0))
        else:
            code = 2 if isinstance(error, VerglasError | OSError | MemoryError) else 1
            end = End(f"{self._me.who} ended in {self.stage}: {error or type(error).__name__}", code)
        with self._ending, suppress(RuntimeError):
            if not self.over:
                self._over.set()
                self._said(end)
                self._wait_until_heard(self.size - 1)

    def leave(self) -> None:
        """This rank ends as it should. The lead goes last: the store may be its own."""
        self._left = True
        with suppress(RuntimeError):
            self._beat()
            while self.rank == 0 and not all(beat.left for beat in self._beats()):
                time.sleep(BEAT / 10)
        self._over.set()
        for thread in self._threads:  # one that is in the store when Python ends aborts the process
            thread.join(FAREWELL)

    # The threads

    def _talk(self) -> None:
        last = time.monotonic()
        while not self._over.wait(self._interval):
            now = time.monotonic()
            seconds, last = min(now - last, 2 * self._interval), now  # more: this process was suspended, perhaps all were
            gone = self.judge.gone()
            try:
                self._beat()
                beats, end = self._beats(), self._said(None)
                end = end or self.judge.hear(beats, gone, seconds)
                end = end and self._said(end)
            except RuntimeError:
                end = self._without_store()
            if end is not None:
                self._end(end)
            self._rounds += 1

    def _see_to_talk(self) -> None:
        """End the process if the store does not answer: its host may be off."""
        rounds, held_up = 0, 0.0
        while not self._over.wait(self._interval):
            rounds, held_up = (rounds, held_up + self._interval) if rounds == self._rounds else (self._rounds, 0.0)
            if held_up >= self.judge.silence:
                self._end(self._without_store())

    def _without_store(self) -> End:
        """Why the store does not answer, from what was heard last."""
        host = self.judge.last[0]
        if self.hosts:
            time.sleep(BEAT)  # its connections are closed before it is seen to be gone
            text = f"{host.who} is gone or cannot be reached; last it was in {host.stage}."
            return End(dead_text([host]) if 0 in self.judge.gone() else text, speaker=1)
        return End("The launcher (torchrun) that holds the ranks' store is gone or cannot be reached.")

    def _end(self, end: End) -> None:
        """Say why, close what is open, end the process."""
        with self._ending:
            if self.over:
                return
            closing = Thread(target=self._say_farewell, args=(end,), daemon=True)
            closing.start()
            closing.join(FAREWELL)  # the main thread may hold what it needs
            with suppress(RuntimeError):
                self.store.add("heard", 1)
                if self.rank == 0 and self.hosts:
                    self._wait_until_heard(self.size)
            remove_all()
            if self.rank != end.speaker:
                time.sleep(LAST_WORDS)  # whoever started the ranks ends all when the first one goes: that is to be the speaker
            os._exit(end.code)

    def _say_farewell(self, end: End) -> None:
        text = end.text
        for farewell in list(self._farewells):
            with suppress(Exception):
                text += f" {farewell(end.text)}"
        if self.rank == end.speaker:  # one message is enough
            print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)

    # The store

    def _beat(self) -> None:
        self._count += 1
        me = self._me
        beat = Beat(me.rank, me.host, me.pid, me.born, self._count, self.stage, self.done, self._number, self._name, self._waits,
                    self._idle, self._left)  # fmt: skip
        self.store.set(_key(self.rank), beat.text())

    def _beats(self) -> list[Beat]:
        return [Beat.of(text) for text in self.store.multi_get([_key(rank) for rank in range(self.size)])]

    def _said(self, end: End | None) -> End | None:
        """The reason that was given first, by any rank; `end` if there is none yet."""
        if end is None:
            return End.of(self.store.get("end")) if self.store.check(["end"]) else None
        return End.of(self.store.compare_set("end", "", end.json()))

    def _wait_until_heard(self, ranks: int) -> None:
        until = time.monotonic() + LAST_WORDS
        while self.store.add("heard", 0) < ranks and time.monotonic() < until:
            time.sleep(BEAT / 20)


def _key(rank: int) -> str:
    return f"beat/{rank}"
