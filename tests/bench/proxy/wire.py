"""What load and server of the proxy's benchmark say to each other.

A connection begins with a head from the client: how many bytes it will send behind the head, and how many it wants.
The server sends these while it receives, and one more byte when it has received all. With `ECHO` in place of the first
number it sends back whatever comes, the head too. Nothing depends on half-close, which not every proxy has.
"""

import resource
import struct

HEAD = struct.Struct("!QQ")
ECHO = 2**64 - 1
ECHO_HEAD = HEAD.pack(ECHO, 0)
MESSAGE = bytes(1024)  # of the ping-pong
CHUNK = 256 * 1024  # bytes of one read or write: large, so that load and server cost little


def raise_descriptor_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
