"""What the program in the enclave says: on standard error, and to whoever reads its log stream (`stream`).

A production enclave has no console, so the stream is all that an operator sees of it; section 10.7 of the enclave
specification. Never a secret, nor text from outside: an event is made of words of this program, of numbers and of names
of types, and a counter has a name that stands in this program.
"""

import json
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from typing import Literal

import trio

Level = Literal["debug", "info", "warning", "error"]

KEPT = 256  # lines that a new reader is told
_BACKLOG = 256  # lines that a reader may be behind
_MAX_EVENT = 1000  # characters: a reader takes lines of 8,192 bytes, and JSON escapes make six of one character
_MAX_NAMES = 64  # of one counter; further ones are counted as `other`
OTHER = "other"


class Journal:
    """The lines and counters of one process."""

    def __init__(self, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._now = now
        self._began = time.monotonic()
        self._life = f"{time.time_ns():x}"  # tells one life from the next; needs no entropy, which is drawn later
        self._number = 0  # of the latest line
        self._kept: deque[bytes] = deque(maxlen=KEPT)
        self._readers: set[trio.MemorySendChannel[bytes]] = set()
        self._counters: dict[str, Counter[str]] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def say(self, event: str, level: Level = "info") -> None:
        """One line to all readers, numbered from 1; a reader that is too far behind is left."""
        self._number += 1
        line = self._line(level, n=self._number, event=event[:_MAX_EVENT])
        self._kept.append(line)
        for reader in tuple(self._readers):
            try:
                reader.send_nowait(line)
            except (trio.WouldBlock, trio.BrokenResourceError):
                self._readers.discard(reader)
                reader.close()

    def count(self, counter: str, name: str, number: int = 1) -> None:
        """*counter* and *name* are words of this program."""
        names = self._counters.setdefault(counter, Counter())
        names[name if name in names or len(names) < _MAX_NAMES else OTHER] += number

    def gauge(self, name: str, read: Callable[[], float]) -> None:
        """A number that is read when counters are told."""
        self._gauges[name] = read

    def counters(self) -> bytes:
        """The line of all numbers."""
        gauges = {name: read() for name, read in self._gauges.items()} | {"uptime": self.uptime}
        return self._line("debug", event="counters", gauges=gauges, counters=self._counters)

    @property
    def uptime(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self._began, 3)

    @contextmanager
    def reading(self) -> Iterator[tuple[list[bytes], trio.MemoryReceiveChannel[bytes]]]:
        """The lines that are kept, and a channel for those that come; it ends where its reader is too slow."""
        sending, receiving = trio.open_memory_channel[bytes](_BACKLOG)
        self._readers.add(sending)
        try:
            yield list(self._kept), receiving
        finally:
            self._readers.discard(sending)
            sending.close()
            receiving.close()

    def _line(self, level: Level, **fields: object) -> bytes:
        at = self._now().isoformat(timespec="milliseconds")
        return json.dumps({"life": self._life, "time": at, "level": level, **fields}).encode()


journal = Journal()
"""That of this process."""


def say(text: str, level: Level = "info") -> None:
    """Write one line. Nobody may be there to read it: that must not end a session."""
    with suppress(OSError, ValueError):
        print(f"enclave: {text}", file=sys.stderr, flush=True)
    journal.say(text, level)


def count(counter: str, name: str) -> None:
    """Count in the journal of this process."""
    journal.count(counter, name)
