"""Copies bytes between two connected sockets, both ways, as far as the kernel can without copying them here.

A `Relay` is one connection: two directions, each with its own end, back pressure and byte count. It is a state machine
over non-blocking sockets that is told which of them is ready; it waits for nothing itself. A `Pump` tells many relays
so: one epoll, edge-triggered, inside one Trio task, since a task for each direction would cost more than the copying.

A direction begins with a buffer that all share (an idle connection holds none). When it proves to be bulk, it is given
a pipe, and the kernel moves the pages (`splice(2)`); where the kernel can't, it stays with the buffer. Data that the
receiver doesn't take stays in the pipe or in one buffer, and nothing more is read: a peer that stops reading blocks its
own direction only.

The end of one direction becomes a write-shutdown, the other goes on (P2.1). A reset on one side becomes a reset on the
other, so that a truncated stream never looks like a complete one (P2.2); what the other kinds of sockets than TCP can
tell of a reset is said at `close`.
"""

import errno
import fcntl
import logging
import os
import resource
import select
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import StrEnum
from time import perf_counter

import trio

logger = logging.getLogger("vsock_proxy.proxy")

PIECE = 64 * 1024  # bytes of one read: measured best
_BULK = 4  # full pieces in a row after which a direction is bulk
_TURN = 1024 * 1024  # bytes after which a direction makes way for others
_TURN_TIME = 0.005  # seconds after which Trio's other tasks have their turn
_MAX_EVENTS = 512  # that are asked for at once
_PIPE_SIZE = 1024 * 1024  # bytes; sockets hand over pages that are not full, so that 64 KiB would hold too little
_MAX_PIPES = 512  # of all relays together: descriptors are for connections first
_RETRY_PIPE = 256  # full pieces after which a pipe is asked for again, where there was none
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close sends a reset and drops what wasn't sent
_INTEREST = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLET
_READ = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLHUP | select.EPOLLERR
_WRITE = select.EPOLLOUT | select.EPOLLHUP | select.EPOLLERR
_PLAIN = select.EPOLLIN | select.EPOLLOUT
_ENDING = select.EPOLLRDHUP | select.EPOLLPRI | select.EPOLLHUP | select.EPOLLERR
_LINGER = 4
"""Rounds of Trio's loop, some 20 microseconds each, that the pump looks for more before it sleeps, except with bulk.
The answer to a message often comes within them, and waking up costs more: a ping-pong takes 0.09 instead of 0.18 ms."""
_SPLICE_FLAGS = 0x01 | 0x02  # SPLICE_F_MOVE, SPLICE_F_NONBLOCK
# The kernel's word for "not with these two", and EPERM, a system call filter's.
_NO_SPLICE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)
_RESETS = (errno.ECONNRESET, errno.EPIPE, errno.ECONNABORTED, errno.ENOTCONN)
_NOTHING = memoryview(b"")


class Reason(StrEnum):
    """Why a relay ended."""

    CLOSED = "closed"  # both directions came to their end
    RESET = "reset"  # by one side
    IDLE = "idle"  # no bytes for too long
    HALF_CLOSED = "half-closed"  # one direction ended, and no bytes in the other for too long
    LIFETIME = "lifetime"
    CANCELLED = "cancelled"  # by us
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class Times:
    """Limits in seconds; 0 stands for none."""

    idle: float = 600.0
    half_closed: float = 60.0
    lifetime: float = 0.0


@dataclass(frozen=True, slots=True)
class Ended:
    """How a relay ended."""

    reason: Reason
    first: str  # which side ended first: "client", "target", or "" for neither
    up: int  # bytes from client to target
    down: int  # bytes from target to client
    seconds: float
    detail: str = ""


class _Pipes:
    """Gives out pipes for splicing, as many as leave room for connections.

    None is used twice: making one takes 10 microseconds, and what one connection left behind can't reach another.
    """

    def __init__(self) -> None:
        self.open = 0

    def take(self) -> tuple[int, int] | None:
        """The two ends of an empty pipe; None where the system has none to give, or no large one."""
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if self.open >= min(_MAX_PIPES, limit // 16):  # with two ends each, an eighth of all descriptors
            return None
        try:
            reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        try:
            fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
        except OSError:  # the user's share of pipe memory is used up, and a small one is slower than the buffer
            os.close(reader)
            os.close(writer)
            return None
        self.open += 1
        return reader, writer

    def close(self, pipe: tuple[int, int]) -> None:
        self.open -= 1
        for end in pipe:
            os.close(end)


class _Direction:
    """Bytes from *source* to *sink*."""

    __slots__ = (
        "_bulk",
        "_can_splice",
        "_pipe",
        "_pipes",
        "_scratch",
        "at_end",
        "broken",
        "done",
        "first_byte_at",
        "in_pipe",
        "moved",
        "pending",
        "readable",
        "sink",
        "source",
        "trusts_short_reads",
    )

    def __init__(
        self, source: socket.socket, sink: socket.socket, pipes: _Pipes, scratch: memoryview, pending: bytes
    ) -> None:
        self.source = source
        self.sink = sink
        self.pending = memoryview(pending)  # read, and not taken by the sink yet
        self.in_pipe = 0  # likewise, in the pipe
        self.readable = True  # as far as is known
        # A short read proves that there is no more, except where the source is about to be at its end or broken, where
        # it has urgent data (a read stops before it), and on AF_UNIX (a read stops behind descriptors passed along).
        self.trusts_short_reads = source.family != socket.AF_UNIX
        self.at_end = False  # of the source
        self.done = False  # and the sink has been told
        self.broken: socket.socket | None = None  # the side that an error came from
        self.moved = 0  # bytes that the sink took
        self.first_byte_at = 0.0  # Trio's clock; 0 until then
        self._bulk = 0  # full pieces in a row
        self._pipe: tuple[int, int] | None = None
        self._can_splice = True
        self._pipes = pipes
        self._scratch = scratch

    def move(self) -> bool:
        """Move what can be moved; returns whether there may be more to do at once. Raises `OSError`."""
        limit = self.moved + _TURN
        while self.moved < limit:
            if not self._flush():
                return False
            if self.at_end:
                self._finish()
                return False
            if not self.readable:
                return False
            self._fill()
        return True

    def move_little(self) -> bool:
        """The usual case in few steps: a short read that the sink takes whole; False where `move` has to go on."""
        if self.pending or self._pipe is not None or self.at_end:
            return False
        self.readable = True
        self._fill()
        return not (self.readable or self.pending or self.at_end)

    def salvage(self) -> None:
        """Hand on what a broken source still holds, as far as the sink takes it at once, and never its end.

        Without the proxy the peer could read these bytes before it sees the reset.
        """
        self.readable = True
        limit = self.moved + _TURN
        with suppress(OSError):
            while self.moved < limit and self._flush() and self.readable and not self.at_end:
                self._fill()

    def without_splice(self) -> None:
        """Go on by the buffer: `splice` never gets past urgent data."""
        self._can_splice = False
        if not self.in_pipe:
            self.release()

    def _flush(self) -> bool:
        """Hand over what was read; False while the sink doesn't take it."""
        try:
            while self.pending:
                taken = self.sink.send(self.pending)
                self.moved += taken
                # the empty end of a view would hold the whole buffer
                self.pending = self.pending[taken:] if taken < len(self.pending) else _NOTHING
            while self.in_pipe:
                assert self._pipe is not None
                taken = os.splice(self._pipe[0], self.sink.fileno(), self.in_pipe, flags=_SPLICE_FLAGS)
                self.moved += taken
                self.in_pipe -= taken
        except BlockingIOError:
            return False
        except OSError as exc:
            if self.in_pipe and exc.errno in _NO_SPLICE:
                self._drain_pipe()
                return self._flush()
            self.broken = self.sink
            raise
        return True

    def _fill(self) -> None:
        """Read one piece."""
        try:
            if self._pipe is not None:
                count = self.in_pipe = self._splice_in(self._pipe)
            else:
                count = self._read()
        except BlockingIOError:
            self.readable = False
            self._bulk = min(self._bulk, 0)
            return
        except OSError as exc:
            if self._pipe is not None and exc.errno in _NO_SPLICE:
                self.without_splice()
                return
            self.broken = self.broken or self.source
            raise
        if count == 0:
            self.at_end = True
        elif count < PIECE and self.trusts_short_reads and self._pipe is None:
            self.readable = False  # a short read: there was no more
            self._bulk = min(self._bulk, 0)

    def _splice_in(self, pipe: tuple[int, int]) -> int:
        return os.splice(self.source.fileno(), pipe[1], _PIPE_SIZE, flags=_SPLICE_FLAGS)

    def _read(self) -> int:
        count = self.source.recv_into(self._scratch)
        if not count:
            return 0
        if not self.first_byte_at:
            self.first_byte_at = trio.current_time()
        data = self._scratch[:count]
        try:
            taken = self.sink.send(data)
        except BlockingIOError:
            taken = 0
        except OSError:
            self.broken = self.sink
            raise
        self.moved += taken
        if taken < count:
            self.pending = memoryview(bytes(data[taken:]))  # the scratch buffer is everybody's
        if count == PIECE:
            self._bulk += 1
            if self._bulk >= _BULK and self._can_splice:
                self._pipe = self._pipes.take()
                if self._pipe is None:
                    self._bulk = -_RETRY_PIPE
        return count

    def _drain_pipe(self) -> None:
        """The sink can't be spliced to: what is in the pipe goes by the buffer."""
        assert self._pipe is not None
        self.pending = memoryview(os.read(self._pipe[0], self.in_pipe))
        self.in_pipe -= len(self.pending)
        self.without_splice()

    def _finish(self) -> None:
        self.done = True
        self.release()
        with suppress(OSError):  # not connected any more: the other side has ended, too
            self.sink.shutdown(socket.SHUT_WR)

    def release(self) -> None:
        """Close the pipe, which is empty, or nobody wants what is in it."""
        if self._pipe is not None:
            pipe, self._pipe = self._pipe, None
            self._pipes.close(pipe)
        self._bulk = 0

    @property
    def idle_pipe(self) -> bool:
        return self._pipe is not None and not self.in_pipe


class Relay:
    """One connection between *client* and *target*, both connected and non-blocking, which it closes at its end.

    *early* is what was read of the client before. *on_end* is called once, with the outcome.
    """

    def __init__(
        self,
        client: socket.socket,
        target: socket.socket,
        *,
        times: Times,
        pipes: _Pipes,
        scratch: memoryview,
        early: bytes,
        on_end: Callable[[Ended], None],
    ) -> None:
        self.client = client
        self.target = target
        self._times = times
        self._on_end = on_end
        self._up = _Direction(client, target, pipes, scratch, early)
        self._down = _Direction(target, client, pipes, scratch, b"")
        self._began = self._active = trio.current_time()
        self._moved = 0
        self._first = ""
        self.ended: Ended | None = None

    @property
    def bytes(self) -> tuple[int, int]:
        """Moved so far: up, down."""
        return self._up.moved, self._down.moved

    @property
    def first_answer_after(self) -> float | None:
        """Seconds from the start to the target's first byte."""
        return self._down.first_byte_at - self._began if self._down.first_byte_at else None

    def ready(self, end: socket.socket, events: int, now: float) -> bool:
        """*events* happened at *end*; returns whether it should be called again soon, with no new events."""
        reads, writes = (self._up, self._down) if end is self.client else (self._down, self._up)
        is_plain = events & select.EPOLLIN and not (events & ~_PLAIN or writes.pending or writes.in_pipe or self._first)
        if is_plain and self._move_little(end, reads, now):
            return False
        if events & select.EPOLLERR and (fault := self._fault(end)) is not None:
            reads.salvage()
            self._fail(fault, end)
            return False
        again = False
        try:
            if events & _READ:
                reads.readable = True
                if events & _ENDING:
                    reads.trusts_short_reads = False
                if events & select.EPOLLPRI:
                    reads.without_splice()
            if events & _WRITE and (writes.pending or writes.in_pipe):
                again |= writes.move()
            if not reads.done:
                again |= reads.move()
        except OSError as exc:
            self._fail(exc, self._up.broken or self._down.broken or end)
            return False
        if reads.moved + writes.moved != self._moved:
            self._moved, self._active = reads.moved + writes.moved, now
        if not self._first and (reads.at_end or writes.at_end):
            self._first = "client" if self._up.at_end else "target"
            self._active = now
        if reads.done and writes.done:
            self._end(Reason.CLOSED)
            return False
        return again

    def _move_little(self, end: socket.socket, reads: _Direction, now: float) -> bool:
        """Whether that was all there was to do."""
        before = reads.moved
        try:
            is_all = reads.move_little()
        except OSError as exc:
            self._fail(exc, reads.broken or end)
            return True
        if reads.moved != before:
            self._moved += reads.moved - before
            self._active = now
        return is_all

    def resume(self, now: float) -> bool:
        """Go on with what had to make way for others."""
        return self.ready(self.client, 0, now) | (self.ended is None and self.ready(self.target, 0, now))

    def sweep(self, now: float) -> None:
        """End the relay if its time is up; give pipes back that are not used."""
        quiet, times = now - self._active, self._times
        if times.lifetime and now - self._began > times.lifetime:
            self._end(Reason.LIFETIME, reset=True)
        elif self._first and times.half_closed and quiet > times.half_closed:
            self._end(Reason.HALF_CLOSED, reset=True)
        elif times.idle and quiet > times.idle:
            self._end(Reason.IDLE, reset=True)
        elif quiet > 1.0:
            for direction in (self._up, self._down):
                if direction.idle_pipe:
                    direction.release()

    def abort(self, reason: Reason = Reason.CANCELLED) -> None:
        """Reset both sides now; no effect on a relay that has ended."""
        if self.ended is None:
            self._end(reason, reset=True)

    def fail(self, exc: OSError) -> None:
        """End the relay, which can't begin."""
        self._end(Reason.ERROR, reset=True, detail=exc.strerror or str(exc))

    @staticmethod
    def _fault(end: socket.socket) -> OSError | None:
        number = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        return OSError(number, os.strerror(number)) if number else None

    def _fail(self, exc: OSError, end: socket.socket) -> None:
        reason = Reason.RESET if exc.errno in _RESETS else Reason.ERROR
        if not self._first:
            self._first = "client" if end is self.client else "target"
        self._end(reason, reset=True, detail=exc.strerror or str(exc))

    def _end(self, reason: Reason, *, reset: bool = False, detail: str = "") -> None:
        for end in (self.client, self.target):
            close(end, reset=reset)
        for direction in (self._up, self._down):
            direction.release()
        seconds = trio.current_time() - self._began
        self.ended = Ended(reason, self._first, self._up.moved, self._down.moved, seconds, detail)
        self._on_end(self.ended)


def close(end: socket.socket, *, reset: bool) -> None:
    """Close a socket, with a reset if its peer must not take it for a clean end.

    Only TCP has a reset that is always seen. On AF_UNIX the peer sees ECONNRESET if we close before we have read all
    that it sent, else an end of file; nothing else that we could do makes it see one. AF_VSOCK has no abortive close:
    SO_LINGER changes nothing, unread data neither, the peer sees an end of file, and a reset that it sends looks the
    same to us (tried with Linux 6.1). In both families the peer can still tell: before an abortive close we send no
    write-shutdown, so that once it reads the end of file even a send of no bytes gives EPIPE; after a half-close, with
    which a complete stream ends, such a send succeeds as long as the other direction is open.
    """
    with suppress(OSError):  # the peer may be gone already
        # Python takes no struct as an option of an AF_VSOCK socket, it raises TypeError
        if reset and end.family in (socket.AF_INET, socket.AF_INET6):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    with suppress(OSError):  # whatever it reports, the descriptor is free again
        end.close()


class Pump:
    """Drives relays; `run` must be running."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._pipes = _Pipes()
        self._scratch = memoryview(bytearray(PIECE))
        self._ends: dict[int, tuple[Relay, socket.socket]] = {}
        # What is left to do: events at an end, or None for a relay that had to make way. It holds the relay and not the
        # number of a descriptor, which may be another connection's by then.
        self._work: deque[tuple[Relay, socket.socket | None, int]] = deque()
        self._unfinished: set[Relay] = set()  # those in `_work` with None

    @property
    def relays(self) -> set[Relay]:
        """Those that run now."""
        return {relay for relay, _ in self._ends.values()}

    async def relay(
        self,
        client: socket.socket,
        target: socket.socket,
        *,
        times: Times,
        early: bytes = b"",
        on_start: Callable[[Relay], None] | None = None,
    ) -> Ended:
        """Copy both ways until the end, and return how it ended; takes over both sockets.

        Cancelled, or `run` is: both sides are reset.
        """
        done = trio.Event()
        relay = Relay(
            client,
            target,
            times=times,
            pipes=self._pipes,
            scratch=self._scratch,
            early=early,
            on_end=lambda _: done.set(),
        )
        numbers = client.fileno(), target.fileno()
        try:
            if on_start is not None:
                on_start(relay)
            self._watch(relay)
            await done.wait()
        finally:
            relay.abort()
            for number in numbers:  # closed by the relay: the kernel has forgotten them
                if (known := self._ends.get(number)) is not None and known[0] is relay:
                    del self._ends[number]
        assert relay.ended is not None
        return relay.ended

    def _watch(self, relay: Relay) -> None:
        if self._epoll.closed:
            relay.abort()
            return
        try:
            for end in (relay.client, relay.target):
                number = end.fileno()
                self._epoll.register(number, _INTEREST)
                self._ends[number] = (relay, end)
        except OSError as exc:  # the kernel has no memory, or no watches, for one more
            relay.fail(exc)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Move bytes until cancelled; relays that still run are reset then."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._sweep)
                task_status.started()
                while True:
                    await trio.lowlevel.wait_readable(self._epoll.fileno())
                    quiet = 0
                    while quiet < _LINGER:
                        quiet = 0 if self._turn() else quiet + 1
                        await trio.lowlevel.checkpoint()
                        if self._pipes.open and not self._work:
                            break
        finally:
            self._epoll.close()
            for relay in self.relays:
                relay.abort()

    def _turn(self) -> bool:
        """Work off what is ready, for a few milliseconds at most; whether there was anything."""
        now, until = trio.current_time(), perf_counter() + _TURN_TIME
        work, ends = self._work, self._ends
        for _ in range(len(work)):
            self._advance(*work.popleft(), now)
            if perf_counter() > until:
                return True
        happened = self._epoll.poll(0, _MAX_EVENTS)  # whose they are must be known before any of them is worked off
        for known, events in [(ends[number], events) for number, events in happened if number in ends]:
            if perf_counter() > until:
                work.append((*known, events))
            else:
                self._advance(*known, events, now)
        return bool(happened or work)

    def _advance(self, relay: Relay, end: socket.socket | None, events: int, now: float) -> None:
        """Tell *relay* about events at *end*, or let it go on; a bug in it ends no other."""
        if end is None:
            self._unfinished.discard(relay)
        if relay.ended is not None:
            return
        try:
            again = relay.resume(now) if end is None else relay.ready(end, events, now)
        except Exception:
            self._bug(relay)
            return
        if again and relay not in self._unfinished:
            self._unfinished.add(relay)
            self._work.append((relay, None, 0))

    @staticmethod
    def _bug(relay: Relay) -> None:
        logger.exception("internal error: a connection was reset")
        relay.abort(Reason.ERROR)

    async def _sweep(self) -> None:
        while True:
            await trio.sleep(1.0)
            now = trio.current_time()
            for relay in self.relays:
                if relay.ended is None:
                    try:
                        relay.sweep(now)
                    except Exception:
                        self._bug(relay)
