"""One listener: binding, the accept loop, and how many connections are served and wait.

P2.7, P2.15 to P2.18 and P2.26 of the proxy specification. What becomes of a connection is in `proxy.forwarder`.
"""

import errno
import logging
import socket
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import trio

from proxy.address import UnixAddress, listen, remove
from proxy.bind import BindError, explain_bind
from proxy.decision import Decision
from proxy.dial import prepare_tcp
from proxy.forwarder import Forwarder, RefusedError
from proxy.metrics import Metrics
from proxy.peers import Peers
from proxy.resolver import Lookup
from proxy.settings import Forward
from proxy.sockets import Peer, file_at, is_at, is_gone, name_of, peer_of
from proxy.splice import Pump, close

logger = logging.getLogger("vsock_proxy.proxy")

BACKLOG = 1024
TICK = 1.0  # seconds between two looks at live connections, and between two log lines of one kind of refusal
_TURN = 32  # connections that are accepted before others have their turn
_PAUSE = 0.1  # seconds without accepting, when descriptors or memory are used up
TICK = 1.0  # seconds between two looks at live connections, and between two log lines of one kind of refusal
_PASSING = (errno.ECONNABORTED, errno.EINTR, errno.EPROTO)
_PEER_TEXTS = {
    "peer": "its CID is not allowed",
    "peer-connections": "its CID has as many connections as it may have",
    "peer-rate": "its CID opens connections too fast",
}


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


class Listener:
    """One forward at work."""

    _pump: Pump  # once it accepts

    def __init__(self, forward: Forward, decision: Decision, metrics: Metrics, lookup: Lookup) -> None:
        self._forward = forward
        self._metrics = metrics
        self._name = str(forward)
        self.forwarder = Forwarder(forward, decision, metrics, lookup)
        self._peers = Peers(
            allowed=forward.allowed_cids, max_connections=forward.max_connections_per_cid, rate=forward.max_rate_per_cid
        )
        self._slots = trio.Semaphore(forward.num_workers)
        self._active = self._waiting = self._accepted = 0
        self._room = trio.Event()
        self._sockets: list[socket.socket] = []
        self._made: tuple[str, tuple[int, int]] | None = None  # the unix socket to remove: path and file
        self._mentioned: dict[str, tuple[float, int]] = {}  # reason: when it was last logged, how often since

    # -- listening

    async def bind(self, inherited: list[socket.socket], *, only: bool) -> None:
        """Take over what fits of *inherited*, all if this is the *only* listener; else bind."""
        fitting = [one for one in inherited if only or is_at(one, self._forward.listen)]
        if fitting:
            for one in fitting:
                inherited.remove(one)
            self._sockets = fitting
        else:
            await self._listen()
        for one in self._sockets:
            logger.info("Bound to %s", name_of(one))

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
            self._made = (address.listener_path, file_at(address.listener_path))

    def close(self) -> None:
        """Stop listening; connections in the backlog are reset."""
        if self._made is not None:
            path, file = self._made
            with suppress(FileNotFoundError):
                if file_at(path) == file:  # and not that of a successor, which found ours gone
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
        peer = peer_of(connection, where)
        self._accepted += 1
        self._metrics.accepted.labels(self._name, self._metrics.cid(peer.cid)).inc()
        logger.info("Accepted connection on %s", peer.text)
        reason = self._peers.admit(peer.cid, trio.current_time())
        if reason is not None:
            self._refuse(peer, RefusedError(reason, f"refused {peer.text}: {_PEER_TEXTS[reason]}"))
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
                if has_slot or not is_gone(connection):
                    await self.forwarder.forward(connection, peer, self._pump)
            finally:
                self._active -= 1
                self._slots.release()
                self._make_room()
        except RefusedError as exc:
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
            raise RefusedError("queue", text)

    def _make_room(self) -> None:
        self._room.set()
        self._room = trio.Event()

    # -- the account of it

    def _refuse(self, peer: Peer, refusal: RefusedError) -> None:
        self._metrics.refused.labels(self._name, self._metrics.cid(peer.cid), refusal.reason).inc()
        self._mention(refusal.reason, str(refusal), logging.WARNING)

    def _mention(self, reason: str, text: str, level: int) -> None:
        """Log *text*, but each kind of refusal at most once a second."""
        now = trio.current_time()
        last, since = self._mentioned.get(reason, (float("-inf"), 0))
        if now - last < TICK:
            self._mentioned[reason] = (last, since + 1)
            return
        self._mentioned[reason] = (now, 0)
        logger.log(level, "%s%s", text, f" (and {since} more since the last such line)" if since else "")

    async def account(self) -> None:
        """Keep the metrics up to date, until cancelled."""
        while True:
            self.collect()
            await trio.sleep(TICK)

    def collect(self) -> None:
        self._metrics.active.labels(self._name).set(self._active)
        self._metrics.waiting.labels(self._name).set(self._waiting)
        self.forwarder.collect()

    def status(self) -> Status:
        return Status(
            self._name,
            tuple(name_of(one) for one in self._sockets),
            self._active,
            self._waiting,
            self._accepted,
            tuple(map(str, self.forwarder.target.addresses)),
            self.forwarder.target.age,
        )
