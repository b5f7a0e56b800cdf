"""The way of one accepted connection: TLS name, target, relay, and the account of it.

P2.10, P2.12, P2.14 and P2.29 to P2.33 of the proxy specification. How many connections there may be is the business of
`proxy.listener`.
"""

import errno
import logging
import socket
from collections.abc import Sequence

import trio

from proxy.clienthello import MAX_HELLO, NotAClientHelloError, server_name
from proxy.decision import Decision
from proxy.dial import dial
from proxy.metrics import Metrics
from proxy.names import IpAddress, canonical, literal
from proxy.resolver import Lookup, LookupFailedError, Target
from proxy.settings import Forward
from proxy.sockets import Peer
from proxy.splice import Ended, Pump, Relay, Times

logger = logging.getLogger("vsock_proxy.proxy")

RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_HELLO_TIMEOUT = 5.0  # seconds for a ClientHello
_REASONS = {
    errno.ECONNREFUSED: "connect-refused",
    errno.ECONNRESET: "connect-refused",
    errno.ETIMEDOUT: "connect-timeout",
    errno.EHOSTUNREACH: "connect-unreachable",
    errno.ENETUNREACH: "connect-unreachable",
    **dict.fromkeys(RESOURCES, "resources"),
}


class RefusedError(Exception):
    """The connection is not served; *reason* is the label of the metric."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Forwarder:
    """Takes connections to the target of one forward; *decision* says which of its addresses may be used."""

    def __init__(self, forward: Forward, decision: Decision, metrics: Metrics, lookup: Lookup) -> None:
        self._forward = forward
        self._decision = decision
        self._metrics = metrics
        self._name = str(forward)
        self.target = Target(forward.remote_host, self._accept_addresses, lookup)
        self._times = Times(
            idle=forward.idle_timeout, half_closed=forward.half_closed_timeout, lifetime=forward.max_lifetime
        )
        self._counted_failures = 0  # lookups, as the metric has them
        self._live: dict[Relay, _Account] = {}

    async def forward(self, connection: socket.socket, peer: Peer, pump: Pump) -> None:
        """Relay *connection* until it ends; raises `RefusedError` where it doesn't come to that.

        Cancelled: both sides are reset. The caller closes *connection* if it was refused.
        """
        early = await self._check_tls_name(connection, peer) if self._forward.check_tls_name else b""
        upstream, address = await self._connect(peer)
        where = f"[{address}]" if address.version == 6 else str(address)
        target = f"{where}:{self._forward.remote_port}"
        logger.info("Connected client from %s to %s", peer.text, target)
        account = _Account(self._metrics, self._name, self._metrics.cid(peer.cid))
        relay: Relay | None = None

        def started(new: Relay) -> None:
            nonlocal relay
            relay = new
            self._live[new] = account

        try:
            await pump.relay(connection, upstream, times=self._times, early=early, on_start=started)
        finally:  # however it ended: a connection that we cancel has its line, too
            if relay is not None:
                del self._live[relay]
                account.count(relay)
                if relay.ended is not None:
                    self._finish(peer, target, relay.ended, relay.first_answer_after)

    async def _connect(self, peer: Peer) -> tuple[socket.socket, IpAddress]:
        """A connection to the target; raises `RefusedError`."""
        began, limit = trio.current_time(), self._forward.connect_timeout
        target = f"{self._forward.remote_host}:{self._forward.remote_port}"
        try:
            with trio.fail_after(limit):
                addresses = self.target.known() or await self.target.candidates()
                found = await dial(addresses, self._forward.remote_port, report=self._report)
        except trio.TooSlowError:
            raise RefusedError("connect-timeout", f"{peer.text}: no connection to {target} in {limit:g} s") from None
        except LookupFailedError as exc:
            raise RefusedError("lookup", f"{peer.text}: {exc}") from exc
        except OSError as exc:
            reason = _REASONS.get(exc.errno or 0, "connect-error")
            raise RefusedError(reason, f"{peer.text}: no connection to {target}: {exc.strerror or exc}") from exc
        self._metrics.connect.labels(self._name).observe(trio.current_time() - began)
        return found

    def _report(self, address: IpAddress, exc: OSError | None) -> None:
        if exc is None:
            self.target.worked(address)
        elif exc.errno not in RESOURCES:
            self.target.failed(address)

    async def _check_tls_name(self, connection: socket.socket, peer: Peer) -> bytes:
        """What the client has sent, once it is known to ask for the listed host; raises `RefusedError`."""
        wanted = self._wanted_name()
        early = bytearray()
        try:
            with trio.fail_after(_HELLO_TIMEOUT):
                while (name := server_name(bytes(early))) is None:
                    early += await _receive(connection, MAX_HELLO + 1 - len(early))
        except trio.TooSlowError:
            raise RefusedError("tls-name", f"{peer.text}: no ClientHello in {_HELLO_TIMEOUT:g} s") from None
        except (NotAClientHelloError, OSError) as exc:
            raise RefusedError("tls-name", f"{peer.text}: {exc}") from exc
        if name != wanted:
            raise RefusedError("tls-name", f"{peer.text}: the ClientHello asks for {name!r}, allowed is {wanted!r}")
        return bytes(early)

    def _wanted_name(self) -> str:
        """The listed name; the target's own where it is listed by its addresses, or by no list."""
        host = self._forward.remote_host
        return self._decision.name or (canonical(host) if literal(host) is None else host)

    # -- the target

    def _accept_addresses(self, addresses: Sequence[IpAddress]) -> list[IpAddress]:
        return self._decision.accept(addresses)

    def redecide(self, decision: Decision | None) -> None:
        self._decision = decision or self._decision
        self.target.refresh()

    # -- the account of it

    def _finish(self, peer: Peer, target: str, ended: Ended, first_answer_after: float | None) -> None:
        cid = self._metrics.cid(peer.cid)
        self._metrics.ended.labels(self._name, cid, ended.reason.value).inc()
        self._metrics.duration.labels(self._name).observe(ended.seconds)
        if first_answer_after is not None:
            self._metrics.first_byte.labels(self._name).observe(first_answer_after)
        logger.info(
            "Client on %s disconnected (listener: %s, target: %s, bytes up: %d, down: %d, seconds: %.3f, "
            "ended first: %s, reason: %s%s)",
            peer.text,
            self._name,
            target,
            ended.up,
            ended.down,
            ended.seconds,
            ended.first or "neither",
            ended.reason.value,
            f" ({ended.detail})" if ended.detail else "",
        )

    def collect(self) -> None:
        """Bring the metrics of live connections and of the target up to date."""
        for relay, account in self._live.items():
            account.count(relay)
        self._metrics.candidates.labels(self._name).set(len(self.target.addresses))
        failures = self.target.statistics.failures
        self._metrics.lookup_failures.labels(self._name).inc(failures - self._counted_failures)
        self._counted_failures = failures
        age = self.target.age
        self._metrics.lookup_age.labels(self._name).set(float("nan") if age is None else age)


class _Account:
    """The bytes of one connection that the metrics know of already."""

    def __init__(self, metrics: Metrics, listener: str, cid: str) -> None:
        self._up = metrics.bytes.labels(listener, cid, "up")
        self._down = metrics.bytes.labels(listener, cid, "down")
        self._counted = (0, 0)

    def count(self, relay: Relay) -> None:
        up, down = relay.bytes
        self._up.inc(up - self._counted[0])
        self._down.inc(down - self._counted[1])
        self._counted = (up, down)


async def _receive(connection: socket.socket, size: int) -> bytes:
    """At least one byte of what the client sends first; raises `NotAClientHelloError` at its end."""
    while True:
        await trio.lowlevel.wait_readable(connection)
        try:
            data = connection.recv(size)
        except BlockingIOError:
            continue
        if not data:
            raise NotAClientHelloError("the client ended before its ClientHello was complete")
        return data
