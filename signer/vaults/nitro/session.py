"""One connection to the enclave: calls go out in order, replies come back in order.

The rule that everything here serves (weakness 1 of the reference): a reply never reaches another caller than the one
who asked. Several calls may be on the wire; each has a slot in the queue. A caller that is cancelled leaves its slot
behind, so that its late reply is taken from the stream and dropped. Whatever is doubtful (a reply that doesn't fit its
call, one that nobody asked for, a broken frame, a write cut short, a reply overdue) ends the connection for all, who
may repeat: signing is deterministic.
"""

from collections import deque
from collections.abc import Collection

import trio

from signer.rpc.frames import FrameDecoder, FrameError, encode_frame
from signer.rpc.messages import (
    Call,
    MalformedReplyError,
    RemoteError,
    Result,
    RpcErrorChain,
    decode_reply,
    encode_call,
)

_CHUNK = 65536  # bytes of one read
STALLED_AFTER = 0.25  # seconds without the next reply; a signature takes a millisecond or two


class SessionLostError(Exception):
    """The connection ended before the reply came: the call may or may not have been executed."""


class Slot:
    """A call on the wire; *settled* is set when its outcome is known, and may be shared by several calls."""

    __slots__ = ("_result", "call", "done", "error", "settled")

    def __init__(self, call: Call, settled: trio.Event) -> None:
        self.call = call
        self.settled = settled
        self.done = False
        self.error: Exception | None = None  # `RemoteError` or `SessionLostError`
        self._result: Result = None

    def result(self) -> Result:
        """What came of it; raises the error."""
        if self.error is not None:
            raise self.error
        return self._result

    def settle(self, result: Result = None, error: Exception | None = None) -> None:
        self._result, self.error, self.done = result, error, True
        self.settled.set()


class Session:
    """Calls over *stream*, which it takes over.

    The enclave has *timeout* seconds for each reply, counted from the call or from the reply before it: many calls
    that wait in line behind a slow enclave are no reason to give up on it. What it says of an error may quote its
    request to KMS, or the call; *secrets* are taken out of that.

    `run` must be running for calls to be answered; it closes the stream when it ends.
    """

    def __init__(self, stream: trio.abc.Stream, *, timeout: float, secrets: Collection[str] = ()) -> None:
        self._stream = stream
        self._timeout = timeout
        self._secrets = secrets
        self._slots: deque[Slot] = deque()
        self._head_since = 0.0  # Trio's clock: since when the next reply is waited for, while there are slots
        self.answered_at = float("-inf")  # Trio's clock: the last reply
        self.answers = 0  # replies so far
        self._outgoing: list[bytes] = []  # frames of the slots at the end of the queue
        self._wake_writer = trio.Event()
        self._limit = trio.CancelScope()  # its deadline is that of the next reply
        self._failure: str | None = None
        self.overdue: Call | None = None  # whose reply did not come in time, and ended the connection by that
        self.ended = trio.Event()  # set when the connection is of no use any more
        self._idle: trio.Event | None = None  # of those who wait for the end of all calls

    @property
    def alive(self) -> bool:
        return self._failure is None

    @property
    def failure(self) -> str:
        """Why the connection ended, for a person."""
        return self._failure or ""

    @property
    def load(self) -> int:
        """Calls that wait for their replies."""
        return len(self._slots)

    @property
    def stalled(self) -> bool:
        """Whether the next reply takes longer than any that is well."""
        return bool(self._slots) and trio.current_time() > self._head_since + STALLED_AFTER

    async def run(self) -> None:
        """Write calls and read replies until the connection ends, for whatever reason; then settle every call."""
        reason = "the session was closed"
        try:
            with self._limit:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._write)
                    reason = await self._read()
                    nursery.cancel_scope.cancel(reason=reason)
            if self._limit.cancelled_caught:
                if self._failure is None and self._slots:
                    self.overdue = self._slots[0].call
                reason = self._failure or f"the enclave did not answer within {self._timeout:g} s"
        finally:
            self._end(reason)
            await trio.aclose_forcefully(self._stream)

    async def wait_idle(self) -> None:
        """Return when no call waits for its reply."""
        while self._slots:
            if self._idle is None:
                self._idle = trio.Event()
            await self._idle.wait()

    def close(self, reason: str) -> None:
        """End the connection; the calls on it are told that it is lost."""
        self._end(reason)

    def submit(self, call: Call, settled: trio.Event | None = None) -> Slot:
        """Put *call* on the wire; its slot is settled when the reply is there, or the connection is lost.

        Whoever loses interest leaves the slot behind: it keeps its place in the line, and its reply is dropped.
        Raises `FrameError` (the call is too large) or `SessionLostError`.
        """
        frame = encode_frame(encode_call(call))
        if self._failure is not None:
            raise SessionLostError(self._failure)
        slot = Slot(call, trio.Event() if settled is None else settled)
        self._slots.append(slot)
        self._outgoing.append(frame)
        self._wake_writer.set()
        if len(self._slots) == 1:
            self._expect_reply()
        return slot

    async def call(self, call: Call) -> Result:
        """Send *call* and return its result.

        Cancelling the caller disturbs no other call. Raises `FrameError` (the call is too large), `RemoteError` (the
        enclave refused, nothing else happened) or `SessionLostError`.
        """
        slot = self.submit(call)
        await slot.settled.wait()
        return slot.result()

    async def _write(self) -> None:
        """Send what callers left, all there is at once; its own task, so that no caller's end cuts a frame short."""
        try:
            while True:
                await self._wake_writer.wait()
                self._wake_writer = trio.Event()
                frames, self._outgoing = b"".join(self._outgoing), []
                await self._stream.send_all(frames)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            self._end(f"cannot send to the enclave: {exc.__cause__ or type(exc).__name__}")

    async def _read(self) -> str:
        """Settle calls as their replies come; returns why that ended."""
        decoder = FrameDecoder()
        try:
            while chunk := await self._stream.receive_some(_CHUNK):
                decoder.receive_data(chunk)
                while (payload := decoder.next_payload()) is not None:
                    self._settle(payload)
            decoder.receive_eof()
        except (FrameError, MalformedReplyError) as exc:
            return f"the enclave is out of step: {exc}"
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            return f"connection lost: {exc.__cause__ or exc}"
        return "the enclave closed the connection"

    def _settle(self, payload: bytes) -> None:
        if not self._slots:
            raise FrameError("a reply that nobody asked for")
        slot, result, error = self._slots[0], None, None
        try:
            result = decode_reply(slot.call, payload)
        except RemoteError as exc:
            error = self._without_secrets(exc)
        self._slots.popleft()
        self.answered_at = trio.current_time()
        self.answers += 1
        if self._slots:
            self._expect_reply()
        else:
            self._limit.deadline = float("inf")
            self._rest()
        slot.settle(result, error)

    def _without_secrets(self, error: RemoteError) -> RemoteError:
        messages = error.chain.messages
        for secret in self._secrets:
            messages = tuple(message.replace(secret, "(secret)") for message in messages)
        return RemoteError(RpcErrorChain(messages))

    def _expect_reply(self) -> None:
        """From now on the enclave has its time for the next reply."""
        self._head_since = trio.current_time()
        self._limit.deadline = self._head_since + self._timeout

    def _end(self, reason: str) -> None:
        if self._failure is None:
            self._failure = reason
        self.ended.set()
        self._limit.cancel(reason=reason)
        while self._slots:
            self._slots.popleft().settle(error=SessionLostError(self._failure))
        self._rest()

    def _rest(self) -> None:
        if self._idle is not None:
            self._idle.set()
            self._idle = None
