"""A fake enclave for tests without processes: real rules and real codec over memory streams, and every way to fail."""

from collections.abc import Awaitable, Callable

import trio
import trio.testing

from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session
from signer.rpc.frames import FrameDecoder, encode_frame

Tamper = Callable[[bytes], Awaitable[bytes]]
"""Turns a reply's frame into the bytes that are really sent; may wait."""


async def honest(frame: bytes) -> bytes:
    return frame


class FakeEnclave:
    """Serves sessions on memory streams; `connect` takes the place of `proxy.address.connect`.

    *tamper* sees every reply from the second on: the first answers `Initialize`. `up` says whether it listens, `kill`
    ends all sessions, as a restart would.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._sealing = LocalSealing(bytes(32))
        self._scopes: list[trio.CancelScope] = []
        self.tamper: Tamper = honest
        self.up = True
        self.connections = 0
        self.calls = 0

    async def connect(self, _address: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if not self.up:
            raise ConnectionRefusedError(111, "Connection refused")
        ours, theirs = trio.testing.memory_stream_pair()
        self.connections += 1
        self._nursery.start_soon(self._serve, theirs)
        return ours

    def kill(self) -> None:
        for scope in self._scopes:
            scope.cancel()
        self._scopes.clear()

    async def _serve(self, stream: trio.abc.Stream) -> None:
        session, decoder, answered = Session(self._sealing), FrameDecoder(), 0
        with trio.CancelScope() as scope:
            self._scopes.append(scope)
            try:
                while chunk := await stream.receive_some(65536):
                    decoder.receive_data(chunk)
                    while (payload := decoder.next_payload()) is not None:
                        frame = encode_frame(await session.answer(payload))
                        answered += 1
                        self.calls += 1
                        await stream.send_all(frame if answered == 1 else await self.tamper(frame))
            except (trio.BrokenResourceError, trio.ClosedResourceError, EOFError):
                pass
        with trio.CancelScope(shield=True):
            await trio.aclose_forcefully(stream)
