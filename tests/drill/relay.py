"""Stands between signer and enclave and plays the plan: takes frames in, delivers what the script says.

Runs over any streams that can be half-closed: sockets in the drill, memory streams in the tests.
"""

from collections.abc import Awaitable, Callable

import trio

from signer.rpc.frames import LENGTH
from tests.drill.plan import ConnectionPlan, End, Plan, Script, Send, Wait

_CHUNK = 65536  # bytes of one read
LOST = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)

Dial = Callable[[], Awaitable[trio.abc.HalfCloseableStream]]
Greet = Callable[[], Awaitable[bool]]
Decide = Callable[[bytes], Script]


class FrameCutter:
    """Cuts a stream into whole frames, lengths included; does no I/O.

    Without a limit, unlike the decoder of either side: what is announced here was written by them.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | bytearray) -> list[bytes]:
        """The frames that *data* completes."""
        self._buffer += data
        frames = []
        while len(self._buffer) >= LENGTH.size:
            end = LENGTH.size + LENGTH.unpack_from(self._buffer)[0]
            if len(self._buffer) < end:
                break
            frames.append(bytes(self._buffer[:end]))
            del self._buffer[:end]
        return frames


class Relay:
    """Hands connections on to whatever *dial* reaches, as *plan* wants it."""

    def __init__(self, plan: Plan, dial: Dial) -> None:
        self.plan = plan
        self.connections = 0
        self._dial = dial
        self._scopes: set[trio.CancelScope] = set()

    def cut_all(self) -> None:
        """End every connection that there is."""
        for scope in self._scopes:
            scope.cancel(reason="all connections are cut")

    async def handle(self, host: trio.abc.HalfCloseableStream, greet: Greet | None = None) -> None:
        """Relay one connection of the signer's to its end; closes *host*.

        *greet* answers the signer once the enclave is reached, and says whether to go on: where nobody listens the
        signer must see a connection refused, as without a relay.
        """
        self.connections += 1
        plan = self.plan.connection()
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                async with host:
                    if not plan.refused():
                        await self._connect(host, greet, plan)
            except LOST:
                pass
            finally:
                self._scopes.discard(scope)

    async def _connect(self, host: trio.abc.HalfCloseableStream, greet: Greet | None, plan: ConnectionPlan) -> None:
        async with await self._dial() as enclave:
            if greet is None or await greet():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, host, enclave, plan.request, nursery.cancel_scope)
                    nursery.start_soon(self._pump, enclave, host, plan.reply, nursery.cancel_scope)

    async def _pump(
        self,
        source: trio.abc.HalfCloseableStream,
        sink: trio.abc.HalfCloseableStream,
        decide: Decide,
        connection: trio.CancelScope,
    ) -> None:
        """One direction, until its source ends or a script ends it."""
        cutter = FrameCutter()
        try:
            while chunk := await source.receive_some(_CHUNK):
                for frame in cutter.feed(chunk):
                    end = await play(decide(frame), sink)
                    if end is End.CUT:
                        connection.cancel(reason="cut by the plan")
                    if end is End.HALF_CLOSE:
                        await sink.send_eof()
                    if end is not None:
                        await _drain(source)
            await sink.send_eof()
        except LOST:
            connection.cancel(reason="one side is gone")


async def play(script: Script, sink: trio.abc.HalfCloseableStream) -> End | None:
    """Deliver a script's steps; returns how it ended the direction, if it did."""
    for step in script:
        match step:
            case Send(data):
                await sink.send_all(data)
            case Wait(seconds):
                await trio.sleep(seconds)
            case End():
                return step
    return None


async def _drain(source: trio.abc.HalfCloseableStream) -> None:
    """Read on and deliver nothing: a peer must not block in its write only because this direction has ended."""
    while await source.receive_some(_CHUNK):
        pass
