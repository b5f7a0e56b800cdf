"""Serves sessions over streams: one task a connection, frames in order, a fault never touches another session."""

import errno
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress

import trio

from signer.enclave.log import journal, say
from signer.enclave.session import Session
from signer.rpc.frames import FrameDecoder, FrameError, encode_frame

MAX_SESSIONS = 64
_CHUNK = 65536  # bytes of one read
_DRAIN = 2.0  # seconds for the calls that run when the program is told to stop
_SEND_TIMEOUT = 30.0  # seconds for one reply: a host that does not read keeps a session's keys in memory

_PROBE_AFTER, _PROBE_INTERVAL = 60, 15  # seconds of silence before the first probe, and between two
_PROBES = 4  # without an answer, then the connection has ended

_ACCEPT_PAUSE = 0.1  # seconds before the next try when the system lacks something
_LACKING = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}

Greet = Callable[[trio.SocketStream], Awaitable[bool]]


class Server:
    """Runs the sessions of the program; *new_session* makes the state of one connection."""

    def __init__(self, new_session: Callable[[], Session]) -> None:
        self._new_session = new_session
        self._slots = trio.Semaphore(MAX_SESSIONS)
        self._number = 0
        self._open = 0
        journal.gauge("sessions", lambda: self._open)
        journal.gauge("sessions_total", lambda: self._number)
        self._stopping = False
        self._waiting: set[trio.CancelScope] = set()  # of sessions between two calls, and of the accept loop

    def stop(self) -> None:
        """Accept no more; sessions between two calls end now, the others after the call they work on."""
        self._stopping = True
        for scope in self._waiting:
            scope.cancel(reason="the program stops")

    async def serve(self, listener: trio.abc.Listener[trio.SocketStream], *, greet: Greet | None = None) -> None:
        """Serve connections until `stop`; closes *listener*. *greet* says whether a new stream may go on."""
        async with trio.open_nursery() as sessions:
            async with listener:
                await self._accept(listener, greet, sessions)
            sessions.cancel_scope.deadline = trio.current_time() + _DRAIN

    async def _accept(
        self, listener: trio.abc.Listener[trio.SocketStream], greet: Greet | None, sessions: trio.Nursery
    ) -> None:
        while not self._stopping:
            with trio.CancelScope() as scope:
                self._waiting.add(scope)
                try:
                    await self._slots.acquire()  # before accepting: the rest wait in the backlog
                    try:
                        stream = await _accept_one(listener)
                    except BaseException:
                        self._slots.release()
                        raise
                finally:
                    self._waiting.discard(scope)
                sessions.start_soon(self._connection, stream, greet, sessions)

    async def _connection(self, stream: trio.SocketStream, greet: Greet | None, sessions: trio.Nursery) -> None:
        self._number += 1
        number = self._number
        self._open += 1
        try:
            async with stream:
                if greet is not None and not await greet(stream):
                    return
                say(f"session {number}: opened")
                await self._session(stream, number, sessions)
        except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError) as exc:
            say(f"session {number}: connection lost: {type(exc).__name__}")
        finally:
            self._open -= 1
            self._slots.release()

    async def _session(self, stream: trio.SocketStream, number: int, sessions: trio.Nursery) -> None:
        decoder, session = FrameDecoder(), self._new_session()
        try:
            while chunk := await self._receive(stream):
                decoder.receive_data(chunk)
                del chunk
                await _answer_all(decoder, session, stream, sessions)
            if not self._stopping:
                decoder.receive_eof()
        except FrameError as exc:
            say(f"session {number}: {exc}")
        finally:
            keys = session.number_of_keys
            session.close()
        say(f"session {number}: closed, {keys} key(s) forgotten")

    async def _receive(self, stream: trio.SocketStream) -> bytes | bytearray:
        """The next bytes; empty at the end of the stream, and when the program stops."""
        if self._stopping:
            return b""
        with trio.CancelScope() as scope:
            self._waiting.add(scope)
            try:
                return await stream.receive_some(_CHUNK)
            finally:
                self._waiting.discard(scope)
        return b""


async def _answer_all(
    decoder: FrameDecoder, session: Session, stream: trio.SocketStream, sessions: trio.Nursery
) -> None:
    """Answer the calls that have come. They may be long, or hold a key: none is kept while the session waits."""
    calls, fault = _calls(decoder)
    session.foresee(calls, sessions.start_soon)
    for payload in calls:
        reply = await session.answer(payload)
        with trio.fail_after(_SEND_TIMEOUT):
            await stream.send_all(encode_frame(reply))
    if fault is not None:
        raise fault


def _calls(decoder: FrameDecoder) -> tuple[list[bytes], FrameError | None]:
    """The calls that have come, and what is wrong behind them."""
    calls: list[bytes] = []
    try:
        while (payload := decoder.next_payload()) is not None:
            calls.append(payload)
    except FrameError as exc:
        return calls, exc
    return calls, None


async def _accept_one(listener: trio.abc.Listener[trio.SocketStream]) -> trio.SocketStream:
    """The next connection; a lack of descriptors or memory is waited out, it must not end the sessions there are."""
    while True:
        try:
            stream = await listener.accept()
        except OSError as exc:
            if exc.errno not in _LACKING:
                raise
            say(f"cannot accept a connection: {exc.strerror}")
        else:
            _probe(stream)
            return stream
        await trio.sleep(_ACCEPT_PAUSE)


def _probe(stream: trio.abc.Stream) -> None:
    """Probe a TCP connection while it is idle: a host that vanished would keep its slot, and its keys here, for ever.

    Over vsock the hypervisor tells the end of a host, and there are no probes.
    """
    if not isinstance(stream, trio.SocketStream) or stream.socket.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):  # it is gone already
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_AFTER)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_INTERVAL)
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
