"""From a host name to the addresses to try: refreshed while in use, served stale when lookups fail.

P2.8 to P2.14 of the proxy specification. The operating system's resolver is asked, in a thread; it hides the time to
live, so that names are looked up again every few seconds while they are in use. One lookup runs at a time for a name,
and nobody who has addresses waits for it.
"""

import logging
import random
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from ipaddress import ip_address

import trio

from proxy.names import IpAddress, NameError_, canonical, literal

logger = logging.getLogger("vsock_proxy.dns")

REFRESH = 5.0  # seconds that a lookup is good for
FIRST_RETRY, MAX_RETRY = 1.0, 30.0  # seconds between lookups that fail
FAILURE_MEMORY = 30.0  # seconds that an address which didn't answer comes last
_MAX_LOOKUPS = 16  # threads

Lookup = Callable[[str], Awaitable[list[IpAddress]]]
Accept = Callable[[Sequence[IpAddress]], list[IpAddress]]


class LookupFailedError(Exception):
    """The name has no address now; the text is the reason."""


_limiter: trio.CapacityLimiter | None = None


async def system_lookup(host: str) -> list[IpAddress]:
    """The addresses of *host* in the order of the system's resolver; raises `LookupFailedError`."""
    global _limiter  # noqa: PLW0603  # made in the first event loop that needs it; it holds no state of ours
    if (address := literal(host)) is not None:
        return [address]
    try:
        name = canonical(host)
    except NameError_ as exc:
        raise LookupFailedError(str(exc)) from exc
    _limiter = _limiter or trio.CapacityLimiter(_MAX_LOOKUPS)
    try:
        found = await trio.to_thread.run_sync(
            lambda: socket.getaddrinfo(name, None, type=socket.SOCK_STREAM), abandon_on_cancel=True, limiter=_limiter
        )
    except (OSError, UnicodeError, RuntimeError) as exc:  # RuntimeError: the system has no thread to give
        text = exc.strerror if isinstance(exc, OSError) and exc.strerror else str(exc)
        raise LookupFailedError(f"DNS lookup failed! ({name}: {text})") from exc
    addresses = [ip_address(str(item[4][0]).partition("%")[0]) for item in found]
    if not addresses:
        raise LookupFailedError("DNS lookup returned no IP addresses!")
    return list(dict.fromkeys(addresses))


def of_family(addresses: Sequence[IpAddress], version: int | None) -> list[IpAddress]:
    """Those of IP *version* 4 or 6; all for None. Raises `LookupFailedError` where none is left."""
    kept = [address for address in addresses if version in (None, address.version)]
    if not kept:
        raise LookupFailedError("No accepted IP was found.")
    return kept


def interleaved(addresses: Sequence[IpAddress]) -> list[IpAddress]:
    """IPv4 and IPv6 by turns, in their own order, beginning with IPv4; RFC 8305, section 4."""
    first = [address for address in addresses if address.version == 4]
    second = [address for address in addresses if address.version == 6]
    ordered: list[IpAddress] = []
    while first or second:
        for family in (first, second):
            if family:
                ordered.append(family.pop(0))
    return ordered


@dataclass
class Statistics:
    """Counts for metrics."""

    lookups: int = 0
    failures: int = 0
    last_good: float | None = None  # Trio's clock


@dataclass
class Target:
    """The addresses of *host*, kept fresh by `run`.

    *accept* says which of the addresses found may be used: it raises `LookupFailedError` where none may.
    """

    host: str
    accept: Accept
    lookup: Lookup = system_lookup
    statistics: Statistics = field(default_factory=Statistics)

    def __post_init__(self) -> None:
        self._addresses: list[IpAddress] = []
        self._failed: dict[IpAddress, float] = {}  # until when it comes last
        self._fresh_until = float("-inf")
        self._wanted = trio.Event()
        self._hurried = trio.Event()  # a back-off is to be cut short
        self._again = False  # whatever a lookup that runs now brings
        self._settled = trio.Event()  # the lookup that runs, or the next one, has ended
        self._retry = FIRST_RETRY
        self._failing = False
        self.reason = "not looked up yet"

    @property
    def addresses(self) -> list[IpAddress]:
        """The addresses known, good or stale."""
        return list(self._addresses)

    @property
    def age(self) -> float | None:
        """Seconds since the last lookup that succeeded."""
        last = self.statistics.last_good
        return None if last is None else trio.current_time() - last

    def use(self, addresses: Sequence[IpAddress]) -> None:
        """Take addresses that were looked up; raises `LookupFailedError` where none of them may be used."""
        accepted = self.accept(addresses)
        if not accepted:
            raise LookupFailedError("DNS lookup returned no IP addresses!")
        self._take(accepted)

    async def candidates(self) -> list[IpAddress]:
        """The addresses to try, best first; waits for a lookup only where none is known.

        Raises `LookupFailedError`. The deadline is the caller's.
        """
        if trio.current_time() >= self._fresh_until:
            self._wanted.set()
        if not self._addresses:
            self._hurried.set()
            await self._settled.wait()
        else:
            await trio.lowlevel.checkpoint()
        if not self._addresses:
            raise LookupFailedError(self.reason)
        return self._ordered()

    def known(self) -> list[IpAddress] | None:
        """Like `candidates` where addresses are known; None where a lookup must be waited for."""
        if trio.current_time() >= self._fresh_until:
            self._wanted.set()
        return self._ordered() if self._addresses else None

    def failed(self, address: IpAddress) -> None:
        """Nobody answered at *address*: for a while it comes last."""
        self._failed[address] = trio.current_time() + FAILURE_MEMORY

    def worked(self, address: IpAddress) -> None:
        self._failed.pop(address, None)

    def refresh(self) -> None:
        """Look the name up again soon."""
        self._fresh_until = float("-inf")
        self._again = True
        self._wanted.set()
        self._hurried.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look up what is wanted, until cancelled."""
        task_status.started()
        while True:
            await self._wanted.wait()
            self._again = False
            if not await self._look_up():
                await self._back_off()  # and goes on in the background, wanted or not
            elif not self._again:
                self._wanted = trio.Event()  # who wanted it meanwhile has been served

    async def _back_off(self) -> None:
        """Wait before the next lookup; for one second only where somebody has no address to go on with."""
        shortest, longest = max(self._retry / 2, FIRST_RETRY), min(self._retry * 1.5, MAX_RETRY)
        delay = random.uniform(shortest, longest)  # noqa: S311  # jitter, not a secret
        self._retry = min(2 * self._retry, MAX_RETRY)
        self._hurried = trio.Event()
        if self._again:  # asked for in the middle of the lookup
            self._hurried.set()
        with trio.move_on_after(delay):
            await trio.sleep(FIRST_RETRY)
            await self._hurried.wait()

    def _ordered(self) -> list[IpAddress]:
        if not self._failed:
            return self._addresses
        now = trio.current_time()
        self._failed = {address: until for address, until in self._failed.items() if until > now}
        return sorted(self._addresses, key=lambda address: self._failed.get(address, 0.0))

    async def _look_up(self) -> bool:
        logger.info("Resolving hostname: %s.", self.host)
        self.statistics.lookups += 1
        try:
            self.use(await self.lookup(self.host))
        except LookupFailedError as exc:
            self.statistics.failures += 1
            self.reason = str(exc)
            if not self._failing:
                kept = ", ".join(map(str, self._addresses))
                action = f"going on with {kept}" if kept else "connections to it fail until it is found"
                logger.warning("%s: %s; %s", self.host, exc, action)
            self._failing = True
            return False
        finally:
            self._settled.set()
            self._settled = trio.Event()
        return True

    def _take(self, addresses: list[IpAddress]) -> None:
        now = trio.current_time()
        found = interleaved(addresses)
        if self._failing:
            logger.warning("%s is found again", self.host)
        if found != self._addresses or self._failing:
            ttl = 86400 if literal(self.host) else round(REFRESH)
            logger.info('Using IP "%s" for the given server "%s". (TTL: %d secs)', found[0], self.host, ttl)
        self._addresses, self._failing, self._retry = found, False, FIRST_RETRY
        self.statistics.last_good = now
        self._fresh_until = float("inf") if literal(self.host) else now + REFRESH
