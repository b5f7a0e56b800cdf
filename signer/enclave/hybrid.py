"""The guest's side of hybrid vsock, for development without a hypervisor; section 3.1 of the proxy specification.

Listens on the base socket in place of the device, answers `CONNECT <port>`, and hands the stream on.
"""

import re
from collections.abc import Awaitable, Callable, Mapping

import trio

from proxy.address import HANDSHAKE_TIMEOUT

_MIN_LINE, _MAX_LINE = 10, 32  # bytes including the line feed; Firecracker's bounds
_LINE = re.compile(rb"\s*connect\s+([0-9]{1,10})(?:\s.*)?\s*\n", re.IGNORECASE | re.DOTALL)
_FIRST_HOST_PORT = 2**30

Handler = Callable[[trio.SocketStream], Awaitable[None]]


class Greeter:
    """Accepts hybrid connections for one *port*; *others* are handed those for ports of their own."""

    def __init__(self, port: int, others: Mapping[int, Handler] | None = None) -> None:
        self._port = port
        self._others = others or {}
        self._next = _FIRST_HOST_PORT

    async def greet(self, stream: trio.SocketStream) -> bool:
        """Read the command and answer it; False where the stream is none of ours, or was handed on and is done."""
        called = await self._called(stream)
        handle = None if called is None else self._others.get(called)
        if handle is not None:
            await handle(stream)
        return called == self._port

    async def _called(self, stream: trio.SocketStream) -> int | None:
        """The port, accepted; None (and nothing sent) for anything else than a call to one of ours."""
        line = b""
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            while not line.endswith(b"\n") and len(line) < _MAX_LINE:
                byte = await stream.receive_some(1)  # no further: what follows is payload
                if not byte:
                    return None
                line += byte
            match = _LINE.fullmatch(line)
            port = int(match[1]) if match is not None and len(line) >= _MIN_LINE else None
            if port != self._port and port not in self._others:
                return None
            self._next = self._next + 1 if self._next < 2**32 - 1 else _FIRST_HOST_PORT
            await stream.send_all(b"OK %d\n" % self._next)
            return port
        return None
