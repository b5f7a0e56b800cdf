"""Listeners, their limits and their connections: the proxy as an object that runs in somebody's nursery.

    Proxy.run
    ├── pump                   moves the bytes of all connections
    ├── targets                keep the addresses of the remote hosts fresh
    ├── connections            one task each, while it is connected to the target and until it has ended
    └── accept loops           last to start, first to stop

Part 1.5 and P2.7, P2.15 to P2.18, P2.24, P2.27, P2.30 to P2.33 of the proxy specification. What concerns a whole
process (signals, descriptors' limit, service manager) is in `proxy.daemon`.
"""

import errno
import logging
import select
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import trio

from proxy.address import Address, UnixAddress, VsockAddress, listen, remove
from proxy.bind import BindError, explain_bind
from proxy.clienthello import MAX_HELLO, NotAClientHelloError, server_name
from proxy.decision import Decision, without_list
from proxy.dial import dial, prepare_tcp
from proxy.metrics import Metrics
from proxy.names import IpAddress, canonical, literal
from proxy.peers import Peers
from proxy.resolver import Lookup, LookupFailedError, Target, system_lookup
from proxy.settings import Forward
from proxy.splice import Ended, Pump, Relay, Times, close

logger = logging.getLogger("vsock_proxy.proxy")

BACKLOG = 1024
_HELLO_TIMEOUT = 5.0  # seconds for a ClientHello
_TURN = 32  # connections that are accepted before others have their turn
_PAUSE = 0.1  # seconds without accepting, when descriptors or memory are used up
_TICK = 1.0  # seconds between two looks at live connections, and between two log lines of one kind of refusal
_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PASSING = (errno.ECONNABORTED, errno.EINTR, errno.EPROTO)
_REASONS = {
    errno.ECONNREFUSED: "connect-refused",
    errno.ECONNRESET: "connect-refused",
    errno.ETIMEDOUT: "connect-timeout",
    errno.EHOSTUNREACH: "connect-unreachable",
    errno.ENETUNREACH: "connect-unreachable",
    **dict.fromkeys(_RESOURCES, "resources"),
}


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected; *cid* is None where the transport hides it."""

    cid: int | None
    text: str  # for the log


@dataclass(frozen=True, slots=True)
class Status:
    """One listener, as it is now."""

    listener: str
    addresses: tuple[str, ...]  # bound
    active: int
    waiting: int
    accepted: int
    candidates: tuple[str, ...]  # addresses of the target
    lookup_age: float | None  # seconds


class _RefusedError(Exception):
    """The connection is not served; *reason* is the label of the metric."""

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class Proxy:
    """Forwards what arrives at each listener to its target.

    *forwards* go with the decision that allows each of them. *inherited* are sockets that listen already: each is for
    the forward with its address, or for the only one. *on_turn* is called by the accept loops, at least every *turn*
    seconds.
    """

    def __init__(
        self,
        forwards: Sequence[tuple[Forward, Decision]],
        *,
        metrics: Metrics | None = None,
        drain_timeout: float = 10.0,
        lookup: Lookup = system_lookup,
        inherited: Sequence[socket.socket] = (),
        on_turn: Callable[[], None] | None = None,
        turn: float = _TICK,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._listeners = [_Listener(forward, decision, self._metrics, lookup) for forward, decision in forwards]
        self._drain_timeout = drain_timeout  # seconds
        self._inherited = list(inherited)
        self._on_turn = on_turn or (lambda: None)
        self._turn = turn
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then let connections finish within the drain time and reset the rest.

        Started once every listener listens. Raises `BindError`. Cancelled: every connection is reset.
        """
        try:
            await self._bind()
            pump = Pump()
            async with trio.open_nursery() as services:
                await services.start(pump.run)
                for listener in self._listeners:
                    services.start_soon(listener.target.run)
                    services.start_soon(listener.account)
                    listener.target.refresh()  # the first connection need not wait for a lookup
                await self._serve(pump, task_status)
                services.cancel_scope.cancel(reason="drained")
        finally:
            self._close()
            self.collect()  # nothing is active any more

    def stop(self) -> None:
        """Accept no more, and end `run` when the connections have ended or the drain time is over."""
        self._stop.set()

    def status(self) -> list[Status]:
        """The listeners, in the order given."""
        return [listener.status() for listener in self._listeners]

    def redecide(self, decisions: Sequence[Decision | None]) -> None:
        """Go on with new decisions, one for each forward, None for the one it has; connections stay.

        Names are looked up again.
        """
        for listener, decision in zip(self._listeners, decisions, strict=True):
            listener.redecide(decision)

    def collect(self) -> None:
        """Bring the metrics up to date."""
        for listener in self._listeners:
            listener.collect()

    async def _bind(self) -> None:
        for listener in self._listeners:
            await listener.bind(self._inherited, only=len(self._listeners) == 1)
        for left in self._inherited:
            logger.warning("a socket of the service manager fits no listener, and is closed: %s", left.getsockname())
        self._close_inherited()

    def _close_inherited(self) -> None:
        while self._inherited:
            self._inherited.pop().close()

    async def _serve(self, pump: Pump, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in self._listeners:
                    listener.accept_in(accepting, connections, pump, self._on_turn, self._turn)
                logger.info("Proxy is now in listening state")
                task_status.started()
                await self._stop.wait()
                accepting.cancel_scope.cancel(reason="stopping")
            self._close()
            connections.cancel_scope.deadline = trio.current_time() + self._drain_timeout

    def _close(self) -> None:
        self._close_inherited()
        for listener in self._listeners:
            listener.close()


class _Listener:
    """One forward at work."""

    _pump: Pump  # once it accepts

    def __init__(self, forward: Forward, decision: Decision, metrics: Metrics, lookup: Lookup) -> None:
        self._forward = forward
        self._decision = decision
        self._metrics = metrics
        self._name = str(forward)
        self.target = Target(forward.remote_host, self._accept_addresses, lookup)
        self._peers = Peers(
            allowed=forward.allowed_cids, max_connections=forward.max_connections_per_cid, rate=forward.max_rate_per_cid
        )
        self._times = Times(
            idle=forward.idle_timeout, half_closed=forward.half_closed_timeout, lifetime=forward.max_lifetime
        )
        self._slots = trio.Semaphore(forward.num_workers)
        self._active = self._waiting = self._accepted = 0
        self._counted_failures = 0  # lookups, as the metric has them
        self._room = trio.Event()
        self._live: dict[Relay, _Account] = {}
        self._sockets: list[socket.socket] = []
        self._made: tuple[str, tuple[int, int]] | None = None  # the unix socket to remove: path and file
        self._mentioned: dict[str, tuple[float, int]] = {}  # reason: when it was last logged, how often since

    # -- listening

    async def bind(self, inherited: list[socket.socket], *, only: bool) -> None:
        """Take over what fits of *inherited*, all if this is the *only* listener; else bind."""
        fitting = [one for one in inherited if only or _is_at(one, self._forward.listen)]
        if fitting:
            for one in fitting:
                inherited.remove(one)
            self._sockets = fitting
        else:
            await self._listen()
        for one in self._sockets:
            logger.info("Bound to %s", _where(one))

    async def _listen(self) -> None:
        address = self._forward.listen
        try:
            listeners = await listen(address, backlog=BACKLOG)
        except OSError as exc:
            raise BindError(explain_bind(address, exc), exc.errno or 0) from exc
        except ValueError as exc:  # a name that can't be looked up at all
            raise BindError(f"Could not bind to {address}: {exc}", errno.EINVAL) from exc
        self._sockets = [socket.socket(fileno=one.socket.detach()) for one in listeners]
        for one in self._sockets:
            one.setblocking(False)
        if isinstance(address, UnixAddress):
            self._made = (address.listener_path, _file(address.listener_path))

    def close(self) -> None:
        """Stop listening; connections in the backlog are reset."""
        if self._made is not None:
            path, file = self._made
            with suppress(FileNotFoundError):
                if _file(path) == file:  # and not that of a successor, which found ours gone
                    remove(path)
            self._made = None
        for one in self._sockets:
            one.close()
        self._sockets = []

    def accept_in(
        self,
        accepting: trio.Nursery,
        connections: trio.Nursery,
        pump: Pump,
        on_turn: Callable[[], None],
        turn: float,
    ) -> None:
        """Start the accept loops in one nursery; what they accept runs in the other, and on *pump*."""
        self._pump = pump
        for one in self._sockets:
            accepting.start_soon(self._accept, one, connections, on_turn, turn)

    async def _accept(
        self, listening: socket.socket, connections: trio.Nursery, on_turn: Callable[[], None], turn: float
    ) -> None:
        while True:
            on_turn()
            with trio.move_on_after(turn):
                if self._is_full:
                    await self._room.wait()
                else:
                    await trio.lowlevel.wait_readable(listening)
            try:
                for _ in range(_TURN):
                    if self._is_full:
                        break
                    connection, where = listening.accept()
                    self._take(connection, where, connections)
            except BlockingIOError:
                continue
            except OSError as exc:
                await self._after_fault(exc)
            await trio.lowlevel.checkpoint()

    async def _after_fault(self, exc: OSError) -> None:
        """A connection that is gone already is no matter; for anything else we pause and go on."""
        if exc.errno in _PASSING:
            return
        self._mention("accept", f"Could not accept connection: {exc.strerror or exc}; trying again", logging.ERROR)
        await trio.sleep(_PAUSE)

    @property
    def _is_full(self) -> bool:
        """Whether one more connection could neither be served nor wait: then it stays in the backlog."""
        return self._slots.value == 0 and self._waiting >= self._forward.max_waiting

    # -- one connection

    def _take(self, connection: socket.socket, where: object, connections: trio.Nursery) -> None:
        """Count a new connection and see to it, or refuse it."""
        connection.setblocking(False)
        prepare_tcp(connection)
        peer = _peer(connection, where)
        self._accepted += 1
        self._metrics.accepted.labels(self._name, self._metrics.cid(peer.cid)).inc()
        logger.info("Accepted connection on %s", peer.text)
        reason = self._peers.admit(peer.cid, trio.current_time())
        if reason is not None:
            self._refuse(peer, _RefusedError(reason, f"refused {peer.text}: {_PEER_TEXTS[reason]}"))
            close(connection, reset=True)
            return
        try:
            self._slots.acquire_nowait()
            has_slot = True
        except trio.WouldBlock:
            self._waiting += 1
            has_slot = False
        connections.start_soon(self._handle, connection, peer, has_slot)

    async def _handle(self, connection: socket.socket, peer: Peer, has_slot: bool) -> None:
        """See one connection through to its end; nothing that happens to it touches another."""
        try:
            if not has_slot:
                await self._wait_for_slot(peer)
            self._active += 1
            try:
                if has_slot or not _is_gone(connection):
                    await self._connect_and_relay(connection, peer)
            finally:
                self._active -= 1
                self._slots.release()
                self._make_room()
        except _RefusedError as exc:
            self._refuse(peer, exc)
        except Exception:
            logger.exception("internal error: a connection was reset")
        finally:
            close(connection, reset=True)  # no effect on what the relay has closed
            self._peers.release(peer.cid)

    async def _wait_for_slot(self, peer: Peer) -> None:
        try:
            with trio.move_on_after(self._forward.queue_timeout) as limit:
                await self._slots.acquire()
        finally:
            self._waiting -= 1
            self._make_room()
        if limit.cancelled_caught:
            seconds, workers = self._forward.queue_timeout, self._forward.num_workers
            text = f"{peer.text} waited {seconds:g} s for one of {workers} workers, and was reset; raise --num_workers?"
            raise _RefusedError("queue", text)

    def _make_room(self) -> None:
        self._room.set()
        self._room = trio.Event()

    async def _connect_and_relay(self, connection: socket.socket, peer: Peer) -> None:
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
            await self._pump.relay(connection, upstream, times=self._times, early=early, on_start=started)
        finally:  # however it ended: a connection that we cancel has its line, too
            if relay is not None:
                del self._live[relay]
                account.count(relay)
                if relay.ended is not None:
                    self._finish(peer, target, relay.ended, relay.first_answer_after)

    async def _connect(self, peer: Peer) -> tuple[socket.socket, IpAddress]:
        """A connection to the target; raises `_RefusedError`."""
        began, limit = trio.current_time(), self._forward.connect_timeout
        target = f"{self._forward.remote_host}:{self._forward.remote_port}"
        try:
            with trio.fail_after(limit):
                addresses = self.target.known() or await self.target.candidates()
                found = await dial(addresses, self._forward.remote_port, report=self._report)
        except trio.TooSlowError:
            raise _RefusedError("connect-timeout", f"{peer.text}: no connection to {target} in {limit:g} s") from None
        except LookupFailedError as exc:
            raise _RefusedError("lookup", f"{peer.text}: {exc}") from exc
        except OSError as exc:
            reason = _REASONS.get(exc.errno or 0, "connect-error")
            raise _RefusedError(reason, f"{peer.text}: no connection to {target}: {exc.strerror or exc}") from exc
        self._metrics.connect.labels(self._name).observe(trio.current_time() - began)
        return found

    def _report(self, address: IpAddress, exc: OSError | None) -> None:
        if exc is None:
            self.target.worked(address)
        elif exc.errno not in _RESOURCES:
            self.target.failed(address)

    async def _check_tls_name(self, connection: socket.socket, peer: Peer) -> bytes:
        """What the client has sent, once it is known to ask for the listed host; raises `_RefusedError`."""
        wanted = self._wanted_name()
        early = bytearray()
        try:
            with trio.fail_after(_HELLO_TIMEOUT):
                while (name := server_name(bytes(early))) is None:
                    early += await _receive(connection, MAX_HELLO + 1 - len(early))
        except trio.TooSlowError:
            raise _RefusedError("tls-name", f"{peer.text}: no ClientHello in {_HELLO_TIMEOUT:g} s") from None
        except (NotAClientHelloError, OSError) as exc:
            raise _RefusedError("tls-name", f"{peer.text}: {exc}") from exc
        if name != wanted:
            raise _RefusedError("tls-name", f"{peer.text}: the ClientHello asks for {name!r}, allowed is {wanted!r}")
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

    def _refuse(self, peer: Peer, refusal: _RefusedError) -> None:
        self._metrics.refused.labels(self._name, self._metrics.cid(peer.cid), refusal.reason).inc()
        self._mention(refusal.reason, str(refusal), logging.WARNING)

    def _mention(self, reason: str, text: str, level: int) -> None:
        """Log *text*, but each kind of refusal at most once a second."""
        now = trio.current_time()
        last, since = self._mentioned.get(reason, (float("-inf"), 0))
        if now - last < _TICK:
            self._mentioned[reason] = (last, since + 1)
            return
        self._mentioned[reason] = (now, 0)
        logger.log(level, "%s%s", text, f" (and {since} more since the last such line)" if since else "")

    async def account(self) -> None:
        """Keep the metrics of live connections up to date, until cancelled."""
        while True:
            self.collect()
            await trio.sleep(_TICK)

    def collect(self) -> None:
        for relay, account in self._live.items():
            account.count(relay)
        self._metrics.active.labels(self._name).set(self._active)
        self._metrics.waiting.labels(self._name).set(self._waiting)
        self._metrics.candidates.labels(self._name).set(len(self.target.addresses))
        failures = self.target.statistics.failures
        self._metrics.lookup_failures.labels(self._name).inc(failures - self._counted_failures)
        self._counted_failures = failures
        age = self.target.age
        self._metrics.lookup_age.labels(self._name).set(float("nan") if age is None else age)

    def status(self) -> Status:
        return Status(
            self._name,
            tuple(_where(one) for one in self._sockets),
            self._active,
            self._waiting,
            self._accepted,
            tuple(map(str, self.target.addresses)),
            self.target.age,
        )


_PEER_TEXTS = {
    "peer": "its CID is not allowed",
    "peer-connections": "its CID has as many connections as it may have",
    "peer-rate": "its CID opens connections too fast",
}


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


def forward_without_list(forward: Forward) -> tuple[Forward, Decision]:
    """A forward to a target of our own configuration, which no list needs to allow."""
    return forward, without_list(forward.family)


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


def _is_gone(connection: socket.socket) -> bool:
    """Whether a client that had to wait has left for good, and left nothing: for it we don't call on the target."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLERR and POLLHUP always count
    if not poll.poll(0):
        return False
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True


def _peer(connection: socket.socket, where: object) -> Peer:
    if connection.family == socket.AF_UNIX or not isinstance(where, tuple):
        return Peer(None, "cid: unknown port: 0")
    first, port = where[:2]
    if connection.family == socket.AF_VSOCK:
        return Peer(int(first), f"cid: {first} port: {port}")
    return Peer(None, f"tcp: [{first}]:{port}" if ":" in str(first) else f"tcp: {first}:{port}")


def _where(listening: socket.socket) -> str:
    """`cid: 3 port: 8000`, as the original writes it."""
    name = listening.getsockname()
    if listening.family == socket.AF_VSOCK:
        return f"cid: {name[0]} port: {name[1]}"
    if listening.family == socket.AF_UNIX:
        return f"unix: {name}"
    return f"tcp: [{name[0]}]:{name[1]}" if listening.family == socket.AF_INET6 else f"tcp: {name[0]}:{name[1]}"


def _file(path: str) -> tuple[int, int]:
    """Which file is at *path*: device and inode."""
    found = Path(path).lstat()
    return found.st_dev, found.st_ino


def _is_at(listening: socket.socket, address: Address) -> bool:
    """Whether a socket that listens already is bound to *address*."""
    name = listening.getsockname()
    match address:
        case VsockAddress(cid, port):
            return listening.family == socket.AF_VSOCK and tuple(name) == (cid, port)
        case UnixAddress():
            return listening.family == socket.AF_UNIX and name == address.listener_path
        case _:
            is_tcp = listening.family in (socket.AF_INET, socket.AF_INET6)
            return is_tcp and tuple(name[:2]) == (address.host, address.port)
