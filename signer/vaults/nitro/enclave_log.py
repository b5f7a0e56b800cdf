"""What the enclave's program says of itself, in the host's log and metrics; section 10.7 of the enclave specification.

Its log stream is followed while there is an enclave, and nothing depends on it: an enclave without one (tee-signer, an
older image) is no fault. What comes is somebody else's text: it is bounded in length and rate, and shown escaped.
"""

import json
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Protocol

import structlog
import trio

from proxy.address import Address, UnixAddress, VsockAddress

logger = structlog.get_logger(__name__)

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]

MAX_LINE = 8192  # bytes; all counters together have some two thousand
RATE = 50  # lines told in one second; further ones are counted
PAUSE = 30.0  # seconds before an enclave without a stream is asked again
_CONNECT_TIMEOUT = 5.0  # seconds
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
_COUNTERS = ("calls", "errors", "kms_calls", "kms_failures", "nsm_failures")
_GAUGES = ("uptime", "sessions", "sessions_total", "clock_offset", "clock_steps", "import_keys")
_MAX_NAMES = 64  # of one counter
_KEPT = 256  # lines that a stream begins with at most
_MAX_TEXT = 400  # characters


class CounterObserver(Protocol):
    """Hears of the enclave's numbers; called in the Trio thread."""

    def enclave_counted(self, vault: str, counter: str, name: str, value: float) -> None:
        """*counter* is one of a few; *name* one of at most 64 of each."""


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
        self._told, self._second, self._dropped = 0, 0.0, 0
        self._latest: deque[bytes] = deque(maxlen=_KEPT)  # told already: a new connection begins with what was kept

    async def follow(self) -> None:
        """Until cancelled."""
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
                async with stream:
                    await self._read(stream)
            except (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                logger.debug("no log stream of the enclave", vault_name=self._name, error=str(exc))
            await trio.sleep(PAUSE)

    async def _read(self, stream: trio.abc.Stream) -> None:
        buffer = b""
        while chunk := await stream.receive_some(MAX_LINE):
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                self._take(line)
            if len(buffer) > MAX_LINE:
                logger.warning("the enclave's log stream is none", vault_name=self._name)
                return

    def _take(self, line: bytes) -> None:
        if line in self._latest:
            return
        self._latest.append(line[:MAX_LINE])
        now = trio.current_time()
        if now >= self._second + 1.0:
            if self._dropped:
                logger.warning("lines of the enclave's log were dropped", vault_name=self._name, lines=self._dropped)
            self._told, self._second, self._dropped = 0, now, 0
        if self._told >= RATE or len(line) > MAX_LINE:
            self._dropped += 1
            return
        self._told += 1
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            fields = None
        event = fields.get("event") if isinstance(fields, dict) else None
        if not isinstance(fields, dict) or not isinstance(event, str):
            self._dropped += 1
            return
        if "counters" in fields:
            self._count(fields)
            return
        level = _LEVELS.get(str(fields.get("level")), _LEVELS["info"])
        at = fields.get("time")
        logger.log(
            level,
            f"enclave: {_shown(event)}",
            vault_name=self._name,
            enclave_time=_shown(at) if isinstance(at, str) else "",
        )

    def _count(self, fields: Mapping[str, object]) -> None:
        if self._observer is None:
            return
        counters, gauges = fields.get("counters"), fields.get("gauges")
        for counter in _COUNTERS:
            names = counters.get(counter) if isinstance(counters, dict) else None
            for name, value in names.items() if isinstance(names, dict) else ():
                self._tell(counter, _shown(name), value)
        for gauge in _GAUGES:
            self._tell(gauge, "", gauges.get(gauge) if isinstance(gauges, dict) else None)

    def _tell(self, counter: str, name: str, value: object) -> None:
        names = self._names.setdefault(counter, set())
        if name not in names and len(names) >= _MAX_NAMES:
            return
        if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15:
            names.add(name)
            assert self._observer is not None
            self._observer.enclave_counted(self._name, counter, name, value)


def _at(address: Address, port: int) -> Address | None:
    return replace(address, port=port) if isinstance(address, VsockAddress | UnixAddress) else None


def _shown(text: str) -> str:
    """Short, printable ASCII: it goes to terminals and into labels."""
    return ascii(text)[1:-1][:_MAX_TEXT]
