"""The guest's side of hybrid vsock, for development without a hypervisor; section 3.1 of the proxy specification.

Listens on the base socket in place of the device, answers `CONNECT <port>`, and hands the stream on.
"""

import re

import trio

from proxy.address import HANDSHAKE_TIMEOUT

_MIN_LINE, _MAX_LINE = 10, 32  # bytes including the line feed; Firecracker's bounds
_LINE = re.compile(rb"\s*connect\s+([0-9]{1,10})(?:\s.*)?\s*\n", re.IGNORECASE | re.DOTALL)
_FIRST_HOST_PORT = 2**30


class Greeter:
    """Accepts hybrid connections for one *port*."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._next = _FIRST_HOST_PORT

    async def greet(self, stream: trio.SocketStream) -> bool:
        """Read the command and answer it; False (and nothing sent) for anything else than a call to our port."""
        line = b""
        with trio.move_on_after(HANDSHAKE_TIMEOUT):
            while not line.endswith(b"\n") and len(line) < _MAX_LINE:
                byte = await stream.receive_some(1)  # no further: what follows is payload
                if not byte:
                    return False
                line += byte
            match = _LINE.fullmatch(line)
            if len(line) < _MIN_LINE or match is None or int(match[1]) != self._port:
                return False
            self._next = self._next + 1 if self._next < 2**32 - 1 else _FIRST_HOST_PORT
            await stream.send_all(b"OK %d\n" % self._next)
            return True
        return False
