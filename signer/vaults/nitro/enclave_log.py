"""What the enclave's program says of itself, in the host's log and metrics; section 10.7 of the enclave specification.

Its log stream is followed while there is an enclave, and nothing depends on it: an enclave without one (tee-signer, an
older image) is no fault. What comes is somebody else's text: it is bounded in length and rate, and shown escaped.

A stream begins with lines that were kept, told before or not. So each has a number, and the mark of the life that it
belongs to: none is told twice, and those that are missing are counted.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol, TypeGuard

import structlog
import trio

from proxy.address import Address, UnixAddress, VsockAddress

logger = structlog.get_logger(__name__)

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]

MAX_LINE = 8192  # bytes; all counters together have some two thousand
RATE = 50.0  # lines a second; further ones are counted
BURST = 512  # lines at once: a stream begins with the 256 that were kept
PENALTY = 0.1  # seconds for which nothing is read after a line had to be dropped: signatures need the processor, too
PAUSE = 30.0  # seconds before an enclave without a stream is asked again
SILENCE = 180.0  # seconds after which a stream is dead; counters come every minute
TELL_INTERVAL = 10.0  # seconds between two warnings of lines that were dropped
_CONNECT_TIMEOUT = 5.0  # seconds
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_COUNTERS = ("calls", "errors", "kms_calls", "kms_failures", "nsm_failures")
_GAUGES = ("uptime", "sessions", "sessions_total", "clock_offset", "clock_steps", "import_keys")
_MAX_NAMES = 64  # of one counter; further ones are added up as `other`
_OTHER = "other"
_MAX_TEXT = 400  # characters
_MAX_NUMBER = 1e15  # of a counter, and of a line


class CounterObserver(Protocol):
    """Hears of the enclave's numbers; called in the Trio thread."""

    def enclave_counted(self, vault: str, numbers: Mapping[tuple[str, str], float]) -> None:
        """All there are now, by counter, which is one of a few, and name, one of at most 65 of each."""

    def enclave_lines_dropped(self, vault: str, lines: int) -> None:
        """So many more *lines* were missing, too many, or no lines of a log."""


class EnclaveLog:
    """Follows the stream at *port* of the enclave whose address *find* tells, None while there is none."""

    def __init__(
        self,
        name: str,
        port: int,
        *,
        connect: Connect,
        find: Callable[[], Address | None],
        wait_change: Callable[[], Awaitable[None]],
        observer: CounterObserver | None = None,
    ) -> None:
        self._name = name
        self._port = port
        self._connect = connect
        self._find = find
        self._wait_change = wait_change
        self._observer = observer
        self._names: dict[str, set[str]] = {}
        self._place = _Place()
        self._dropped = 0  # lines that nobody was told, since that was told
        self._tell_at = float("-inf")  # Trio's clock

    async def follow(self) -> None:
        """Until cancelled."""
        told_full = False
        while True:
            found = self._find()
            if found is None:
                await self._wait_change()
                continue
            address = _at(found, self._port)
            if address is None:
                return
            try:
                with trio.fail_after(_CONNECT_TIMEOUT):
                    stream = await self._connect(address)
            except (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                logger.debug("no log stream of the enclave", vault_name=self._name, error=str(exc))
            else:
                async with stream:
                    said_something = await self._read(stream)
                self._count({})  # what an enclave counted that is not heard of is no news
                if not (said_something or told_full):
                    logger.warning(
                        "the enclave closes its log stream at once: do four others read it? It takes no more",
                        vault_name=self._name,
                    )
                told_full = not said_something
            await trio.sleep(PAUSE)

    async def _read(self, stream: trio.abc.Stream) -> bool:
        """Returns whether anything came before the end."""
        budget, buffer, said_something = _Budget(trio.current_time()), b"", False
        try:
            while chunk := await _next_chunk(stream):
                said_something = True
                *lines, buffer = (buffer + chunk).split(b"\n")
                dropped = sum(not self._take(line, budget) for line in lines)
                if len(buffer) > MAX_LINE:
                    logger.warning(
                        f"what comes from the enclave's log port is no log; it is tried again in {PAUSE:g} s",
                        vault_name=self._name,
                    )
                    break
                if dropped:
                    self._drop(dropped)
                    await trio.sleep(PENALTY)
                elif trio.current_time() >= self._tell_at:  # the rest of a flood; counters come every minute
                    self._tell_dropped()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            logger.debug("the log stream of the enclave was cut off", vault_name=self._name, error=str(exc))
        self._tell_dropped()
        return said_something

    def _take(self, line: bytes, budget: "_Budget") -> bool:
        """Returns whether the line was worth reading."""
        fields = _fields(line) if budget.spend(trio.current_time()) else None
        event = None if fields is None else fields.get("event")
        if fields is None or not isinstance(event, str):
            self._place.passed_over += 1
            return False
        if "counters" in fields:
            self._count(self._numbers(fields))
            return True
        is_new, missing = self._place.reached(fields)
        if missing:
            self._drop(missing)
        if is_new:
            level = _LEVELS.get(str(fields.get("level")), _LEVELS["info"])
            at = fields.get("time")
            logger.log(
                level,
                f"enclave: {_shown(event)}",
                vault_name=self._name,
                enclave_time=_shown(at) if isinstance(at, str) else "",
            )
        return True

    def _drop(self, lines: int) -> None:
        self._dropped += lines
        if self._observer is not None:
            self._observer.enclave_lines_dropped(self._name, lines)
        if trio.current_time() >= self._tell_at:
            self._tell_dropped()

    def _tell_dropped(self) -> None:
        if self._dropped:
            logger.warning("lines of the enclave's log were dropped", vault_name=self._name, lines=self._dropped)
            self._dropped, self._tell_at = 0, trio.current_time() + TELL_INTERVAL

    # -- counters

    def _count(self, numbers: Mapping[tuple[str, str], float]) -> None:
        if self._observer is not None:
            self._observer.enclave_counted(self._name, numbers)

    def _numbers(self, fields: Mapping[str, object]) -> dict[tuple[str, str], float]:
        numbers: dict[tuple[str, str], float] = {}
        for counter in _COUNTERS:
            for name, value in _entries(_entries(fields.get("counters")).get(counter)).items():
                if _is_number(value) and value >= 0:
                    place = counter, self._label(counter, _shown(name))
                    numbers[place] = numbers.get(place, 0) + value
        for gauge in _GAUGES:
            value = _entries(fields.get("gauges")).get(gauge)
            if _is_number(value):
                numbers[gauge, ""] = value
        return numbers

    def _label(self, counter: str, name: str) -> str:
        """*name*, or `other` once there were too many: whoever keeps the metrics keeps each name for long."""
        names = self._names.setdefault(counter, set())
        if len(names) < _MAX_NAMES:
            names.add(name)
        return name if name in names else _OTHER


class _Place:
    """Up to which line the log was told."""

    def __init__(self) -> None:
        self._life = ""  # of an enclave, as it calls it
        self._number = 0  # of the latest line
        self.passed_over = 0  # lines since then that were not read, each counted by whoever did not

    def reached(self, fields: Mapping[str, object]) -> tuple[bool, int]:
        """Whether the line of *fields* is new, and how many are missing before it. One without a number is new."""
        life, number = fields.get("life"), fields.get("n")
        if not isinstance(life, str) or type(number) is not int or not 0 < number < _MAX_NUMBER:
            return True, 0
        life = life[:_MAX_TEXT]
        if life != self._life:  # of the first life that is met, older lines were not ours to tell
            self._number = 0 if self._life else number - 1
            self._life, self.passed_over = life, 0  # what was not read of the old life is none of this one's lines
        if number <= self._number:
            return False, 0
        missing = max(0, number - self._number - 1 - self.passed_over)
        self._number, self.passed_over = number, 0
        return True, missing


class _Budget:
    """How many lines may pass: `RATE` a second, and `BURST` at once. Times are those of Trio's clock."""

    def __init__(self, now: float) -> None:
        self._left = float(BURST)
        self._at = now

    def spend(self, now: float) -> bool:
        """Whether one more may pass at *now*."""
        self._left = min(float(BURST), self._left + (now - self._at) * RATE)
        self._at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True


async def _next_chunk(stream: trio.abc.Stream) -> bytes:
    """Empty at the end, and after so long a silence that this has to be one."""
    with trio.move_on_after(SILENCE):
        return bytes(await stream.receive_some(MAX_LINE))
    return b""


def _fields(line: bytes) -> Mapping[str, object] | None:
    """The members of a line; None for one that is too long, or none at all."""
    try:
        fields = json.loads(line) if len(line) <= MAX_LINE else None
    except (ValueError, RecursionError):
        fields = None
    return fields if isinstance(fields, dict) else None


def _entries(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


def _is_number(value: object) -> TypeGuard[int | float]:
    """Finite and of a sane size; NaN compares as neither."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MAX_NUMBER


def _at(address: Address, port: int) -> Address | None:
    return replace(address, port=port) if isinstance(address, VsockAddress | UnixAddress) else None


def _shown(text: str) -> str:
    """Short, printable ASCII: it goes to terminals and into labels."""
    return ascii(text)[1:-1][:_MAX_TEXT]
