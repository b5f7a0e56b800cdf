"""Where a stream is: vsock, hybrid vsock over a unix socket, or TCP; section 3 of the proxy specification.

    vsock:<cid>:<port>      AF_VSOCK; cid is a number, `any`, `host` (2) or `local` (1)
    unix:<base>:<port>      hybrid: a unix socket that stands for all ports of one guest
    tcp:<host>:<port>       for tests and development

Parsing is pure; `connect` and `listen` do the I/O.
"""

import contextlib
import errno
import os
import socket
import stat
from dataclasses import dataclass

import trio

VSOCK_ANY = 0xFFFFFFFF
_CIDS = {"any": VSOCK_ANY, "host": 2, "local": 1}
_MAX_UINT32 = 0xFFFFFFFF
_MAX_REPLY = 64  # bytes of the `OK <n>` line
HANDSHAKE_TIMEOUT = 5.0  # seconds for the line of a hybrid connection
MAX_UNIX_PATH = 107  # bytes that a unix socket's address can hold on Linux


class AddressError(ValueError):
    """The text is not an address; says which forms there are."""


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """A port of the machine with this CID."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{'any' if self.cid == VSOCK_ANY else self.cid}:{self.port}"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    """A port of the guest behind the unix socket *base*."""

    base: str
    port: int

    @property
    def listener_path(self) -> str:
        """The unix socket on which the host listens for the guest's connections to this port."""
        return f"{self.base}_{self.port}"

    def __str__(self) -> str:
        return f"unix:{self.base}:{self.port}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    """A TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"tcp:[{self.host}]:{self.port}" if ":" in self.host else f"tcp:{self.host}:{self.port}"


Address = VsockAddress | UnixAddress | TcpAddress


def parse(text: str) -> Address:
    """The address that *text* writes; raises `AddressError`."""
    scheme, separator, rest = text.partition(":")
    middle, colon, port = rest.rpartition(":")
    if not separator or not colon or not middle:
        raise AddressError(f"{text!r}: expected vsock:<cid>:<port>, unix:<base>:<port> or tcp:<host>:<port>")
    if scheme == "vsock":
        return VsockAddress(_cid(text, middle), _port(text, port, _MAX_UINT32))
    if scheme == "unix":
        return _unix(text, middle, _port(text, port, _MAX_UINT32))
    if scheme == "tcp":
        return TcpAddress(middle.removeprefix("[").removesuffix("]"), _port(text, port, 0xFFFF))
    raise AddressError(f"{text!r}: unknown scheme {scheme!r}, expected vsock, unix or tcp")


def _cid(text: str, cid: str) -> int:
    if cid in _CIDS:
        return _CIDS[cid]
    if not (cid.isascii() and cid.isdigit()) or int(cid) > _MAX_UINT32:
        raise AddressError(f"{text!r}: the CID is a number below 2^32, any, host or local")
    return int(cid)


def _port(text: str, port: str, maximum: int) -> int:
    if not (port.isascii() and port.isdigit()) or int(port) > maximum:
        raise AddressError(f"{text!r}: the port is a number of at most {maximum}")
    return int(port)


def _unix(text: str, base: str, port: int) -> UnixAddress:
    address = UnixAddress(base, port)
    if "\0" in base or len(os.fsencode(address.listener_path)) > MAX_UNIX_PATH:
        raise AddressError(f"{text!r}: a unix socket's path has at most {MAX_UNIX_PATH} bytes")
    return address


async def connect(address: Address) -> trio.SocketStream:
    """Open a stream to *address*; the caller closes it and sets the deadline.

    Raises `OSError`. A hybrid connection that is closed before its `OK` line counts as refused.
    """
    match address:
        case UnixAddress(base, port):
            return await _connect_hybrid(base, port)
        case TcpAddress(host, port):
            return await trio.open_tcp_stream(host, port)
        case VsockAddress(cid, port):
            return await _connected(socket.AF_VSOCK, (cid, port))


async def _connected(family: int, where: str | tuple[int, int]) -> trio.SocketStream:
    connection = trio.socket.socket(family, socket.SOCK_STREAM)
    try:
        await connection.connect(where)
        return trio.SocketStream(connection)
    except BaseException:
        connection.close()
        raise


async def _connect_hybrid(base: str, port: int) -> trio.SocketStream:
    stream = await _connected(socket.AF_UNIX, base)
    try:
        await _handshake(stream, port)
    except BaseException:
        stream.socket.close()
        raise
    return stream


async def _handshake(stream: trio.SocketStream, port: int) -> None:
    """Section 3.1 for a client: one write, no payload before the reply, read no byte beyond its line."""
    line = b""
    with trio.move_on_after(HANDSHAKE_TIMEOUT) as limit:
        await stream.send_all(b"CONNECT %d\n" % port)
        while not line.endswith(b"\n"):
            byte = await stream.receive_some(1)
            if not byte:
                raise ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on port {port} of the guest")
            line += byte
            if len(line) > _MAX_REPLY:
                break
    if limit.cancelled_caught:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer to CONNECT {port} within {HANDSHAKE_TIMEOUT:g} s")
    word, _, number = line.rstrip(b"\n").partition(b" ")
    if word != b"OK" or not number.isdigit():
        raise ConnectionError(errno.EPROTO, f"unexpected answer to CONNECT {port}: {bytes(line)!r}")


async def listen(address: Address, *, backlog: int = 1024) -> list[trio.SocketListener]:
    """Listen on *address*; the caller closes the listeners, then calls `remove` for a unix socket.

    For `unix:<base>:<port>` this is the host's side: the socket `<base>_<port>`. Raises `OSError`.
    """
    match address:
        case UnixAddress():
            return [await listen_unix(address.listener_path, mode=0o660, backlog=backlog)]
        case TcpAddress(host, port):
            return await trio.open_tcp_listeners(port, host=host, backlog=backlog)
        case VsockAddress(cid, port):
            listener = trio.socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
            try:
                await listener.bind((cid, port))
                listener.listen(backlog)
            except BaseException:
                listener.close()
                raise
            return [trio.SocketListener(listener)]


async def listen_unix(path: str, *, mode: int, backlog: int = 1024) -> trio.SocketListener:
    """Listen on the unix socket *path*, created with *mode*.

    A socket left behind by a dead process is replaced; one that answers is `EADDRINUSE`, another kind of file
    `EEXIST`.
    """
    await _make_way(path)
    listener = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    mask = os.umask(0o777 & ~mode)
    try:
        await listener.bind(path)
    except BaseException:
        listener.close()
        raise
    finally:
        os.umask(mask)
    listener.listen(backlog)
    return trio.SocketListener(listener)


async def _make_way(path: str) -> None:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is another kind of file, which is not replaced", path)
    except FileNotFoundError:
        return
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            stream = await _connected(socket.AF_UNIX, path)
    except (ConnectionRefusedError, FileNotFoundError):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)  # noqa: PTH108
        return
    except trio.TooSlowError:
        pass
    else:
        await trio.aclose_forcefully(stream)
    raise OSError(errno.EADDRINUSE, "another process listens there", path)


def remove(path: str) -> None:
    """Remove a unix socket that is not used any more; no error if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108
