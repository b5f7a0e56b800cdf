"""Which fault meets which frame between signer and enclave. Pure: a seed goes in, scripts come out.

A script is the list of steps by which the relay delivers one frame. Faults know frames (a length of 4 bytes, then the
payload) only so far that they can cut and forge at chosen places. Each connection draws from a generator of its own,
so that the same seed gives the same faults to the same connection, whatever the others do meanwhile.
"""

import random
from collections import Counter, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum

from signer.rpc.frames import LENGTH, MAX_FRAME

MAX_DELAY = 0.05  # seconds of an ordinary delay
_REMEMBERED = 64  # replies that may turn up on another connection
_GARBAGE = 64  # bytes at most


@dataclass(frozen=True, slots=True)
class Send:
    """Deliver these bytes, in one write."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Wait:
    """Deliver nothing for so long."""

    seconds: float


class End(Enum):
    """What ends a direction, and perhaps the connection."""

    CUT = "both sides are closed"
    HALF_CLOSE = "end of file this way, the other way stays open"
    SILENCE = "nothing more comes this way, and nothing is closed"


Step = Send | Wait | End
Script = tuple[Step, ...]


class Fault(Enum):
    """A fault that the relay injects; the value is its name in the table."""

    REFUSED = "connection refused"
    DELAY = "delayed"
    BYTES = "one byte at a time"
    CUT_IN_REQUEST = "cut inside the request"
    CUT_AFTER_REQUEST = "cut after the request"
    GARBAGE_REQUEST = "garbage before the request"
    CUT_IN_REPLY = "reply truncated, then closed"
    CUT_AFTER_REPLY = "cut after the reply"
    GARBAGE_BEFORE = "garbage before the reply"
    GARBAGE_INSTEAD = "garbage in place of the reply"
    FRAMED_GARBAGE = "garbage in a good frame"
    FLIPPED = "one bit of the reply flipped"
    DUPLICATED = "reply duplicated"
    SWALLOWED = "reply swallowed"
    SWAPPED = "two replies swapped"
    FOREIGN = "reply of another connection"
    HUGE = "huge length announced"
    HALF_CLOSED = "half-closed"
    SILENT = "silent from here on"


REQUEST_FAULTS = (
    Fault.DELAY,
    Fault.BYTES,
    Fault.CUT_IN_REQUEST,
    Fault.CUT_AFTER_REQUEST,
    Fault.GARBAGE_REQUEST,
)
REPLY_FAULTS = (
    Fault.DELAY,
    Fault.BYTES,
    Fault.CUT_IN_REPLY,
    Fault.CUT_AFTER_REPLY,
    Fault.GARBAGE_BEFORE,
    Fault.GARBAGE_INSTEAD,
    Fault.FRAMED_GARBAGE,
    Fault.FLIPPED,
    Fault.DUPLICATED,
    Fault.SWALLOWED,
    Fault.SWAPPED,
    Fault.FOREIGN,
    Fault.HUGE,
    Fault.HALF_CLOSED,
    Fault.SILENT,
)
SLOW = frozenset({Fault.SWALLOWED, Fault.HALF_CLOSED, Fault.SILENT})
"""Faults that may be noticed only when time is up: they are drawn seldom, so that many others find their place."""
_SLOW_WEIGHT = 0.15
_GRACED = 0.8  # share of connections; the others meet faults from their first frame on


@dataclass(slots=True)
class Rates:
    """How probable a fault is, and which kinds there are; may be changed while the relay runs."""

    connection: float = 0.0  # per connection: refused
    request: float = 0.0  # per frame to the enclave
    reply: float = 0.0  # per frame to the signer
    faults: frozenset[Fault] = frozenset(Fault)
    grace: int = 0  # frames each way that a connection gets unharmed, in _GRACED of all connections


class Plan:
    """Hands out the scripts of connections; counts the faults that it has handed out."""

    def __init__(self, seed: int, rates: Rates) -> None:
        self.rates = rates
        self.faults: Counter[Fault] = Counter()
        self._seed = seed
        self._connections = 0
        self._recent: deque[tuple[int, bytes]] = deque(maxlen=_REMEMBERED)  # connection and reply

    def calm(self) -> None:
        """No more faults: every new connection and every further frame passes."""
        self.rates = Rates()

    def connection(self) -> "ConnectionPlan":
        """The plan of the next connection."""
        self._connections += 1
        return ConnectionPlan(self, self._connections, random.Random(f"{self._seed}/{self._connections}"))

    def remember(self, number: int, frame: bytes) -> None:
        self._recent.append((number, frame))

    def foreign(self, number: int, chance: random.Random) -> bytes | None:
        """A reply that another connection than *number* got lately; one of its own while there is no other."""
        others = [frame for owner, frame in self._recent if owner != number] or [frame for _, frame in self._recent]
        return chance.choice(others) if others else None


class ConnectionPlan:
    """The faults of one connection."""

    def __init__(self, plan: Plan, number: int, chance: random.Random) -> None:
        self._plan = plan
        self._number = number
        self._chance = chance
        self._held: bytes | None = None  # a reply that waits for the next one, to come after it
        self._requests = self._replies = 0
        self._grace = plan.rates.grace if chance.random() < _GRACED else 0

    def refused(self) -> bool:
        """Whether the connection ends before it has begun."""
        rates = self._plan.rates
        if Fault.REFUSED not in rates.faults or self._chance.random() >= rates.connection:
            return False
        self._plan.faults[Fault.REFUSED] += 1
        return True

    def request(self, frame: bytes) -> Script:
        """How *frame* reaches the enclave."""
        self._requests += 1
        fault = self._draw(self._plan.rates.request, REQUEST_FAULTS, self._requests)
        return (Send(frame),) if fault is None else _REQUEST[fault](frame, self._chance)

    def reply(self, frame: bytes) -> Script:
        """How *frame* reaches the signer, and what is delivered behind it."""
        self._replies += 1
        held, self._held = self._held, None
        if held is not None:
            return (Send(frame), Send(held))
        fault = self._draw(self._plan.rates.reply, REPLY_FAULTS, self._replies)
        foreign = self._plan.foreign(self._number, self._chance) if fault is Fault.FOREIGN else None
        self._plan.remember(self._number, frame)
        match fault:
            case None:
                return (Send(frame),)
            case Fault.SWAPPED:
                self._held = frame
                return ()
            case Fault.FOREIGN:
                return (Send(foreign or frame),)
            case _:
                return _REPLY[fault](frame, self._chance)

    def _draw(self, rate: float, kinds: tuple[Fault, ...], frames: int) -> Fault | None:
        rates = self._plan.rates
        allowed = [fault for fault in kinds if fault in rates.faults]
        if not allowed or frames <= self._grace or self._chance.random() >= rate:
            return None
        weights = [_SLOW_WEIGHT if fault in SLOW else 1.0 for fault in allowed]
        (fault,) = self._chance.choices(allowed, weights)
        self._plan.faults[fault] += 1
        return fault


_Make = Callable[[bytes, random.Random], Script]


def _delayed(frame: bytes, chance: random.Random) -> Script:
    return (Wait(chance.uniform(0, MAX_DELAY)), Send(frame))


def _bytes(frame: bytes, _: random.Random) -> Script:
    return tuple(Send(frame[index : index + 1]) for index in range(len(frame)))


def _cut_inside(frame: bytes, chance: random.Random) -> Script:
    return (Send(frame[: chance.randrange(1, len(frame))]), End.CUT)


def _cut_after(frame: bytes, _: random.Random) -> Script:
    return (Send(frame), End.CUT)


def _garbage_before(frame: bytes, chance: random.Random) -> Script:
    return (Send(chance.randbytes(chance.randint(1, _GARBAGE)) + frame),)


def _garbage_instead(_: bytes, chance: random.Random) -> Script:
    return (Send(chance.randbytes(chance.randint(1, _GARBAGE))),)


def _framed_garbage(_: bytes, chance: random.Random) -> Script:
    length = chance.randint(0, _GARBAGE)
    return (Send(LENGTH.pack(length) + chance.randbytes(length)),)


def _flipped(frame: bytes, chance: random.Random) -> Script:
    """The length stays as it is: a wrong one is what `HUGE` and garbage are for."""
    forged = bytearray(frame)
    if len(frame) > LENGTH.size:
        forged[chance.randrange(LENGTH.size, len(frame))] ^= 1 << chance.randrange(8)
    return (Send(bytes(forged)),)


def _duplicated(frame: bytes, _: random.Random) -> Script:
    return (Send(frame), Send(frame))


def _swallowed(_frame: bytes, _: random.Random) -> Script:
    return ()


def _huge(frame: bytes, chance: random.Random) -> Script:
    length = chance.choice([MAX_FRAME, MAX_FRAME + 1, 2**31 - 1, 2**31, 2**32 - 1])
    return (Send(LENGTH.pack(length) + frame),)


def _half_closed(frame: bytes, chance: random.Random) -> Script:
    return (Send(frame), End.HALF_CLOSE) if chance.random() < 0.5 else (End.HALF_CLOSE,)


def _silent(_frame: bytes, _: random.Random) -> Script:
    return (End.SILENCE,)


_REQUEST: Mapping[Fault, _Make] = {
    Fault.DELAY: _delayed,
    Fault.BYTES: _bytes,
    Fault.CUT_IN_REQUEST: _cut_inside,
    Fault.CUT_AFTER_REQUEST: _cut_after,
    Fault.GARBAGE_REQUEST: _garbage_before,
}
_REPLY: Mapping[Fault, _Make] = {
    Fault.DELAY: _delayed,
    Fault.BYTES: _bytes,
    Fault.CUT_IN_REPLY: _cut_inside,
    Fault.CUT_AFTER_REPLY: _cut_after,
    Fault.GARBAGE_BEFORE: _garbage_before,
    Fault.GARBAGE_INSTEAD: _garbage_instead,
    Fault.FRAMED_GARBAGE: _framed_garbage,
    Fault.FLIPPED: _flipped,
    Fault.DUPLICATED: _duplicated,
    Fault.SWALLOWED: _swallowed,
    Fault.HUGE: _huge,
    Fault.HALF_CLOSED: _half_closed,
    Fault.SILENT: _silent,
}
