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

from proxy import names

VSOCK_ANY = 0xFFFFFFFF
_CIDS = {"any": VSOCK_ANY, "host": 2, "local": 1}
_MAX_UINT32 = 0xFFFFFFFF
_MAX_REPLY = 64  # bytes of the `OK <n>` line
_BACKLOG_PAUSE = 0.02  # seconds between two attempts to connect to a unix socket whose backlog is full
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
        return TcpAddress(_host(text, middle), _port(text, port, 0xFFFF))
    raise AddressError(f"{text!r}: unknown scheme {scheme!r}, expected vsock, unix or tcp")


def _cid(text: str, cid: str) -> int:
    if cid in _CIDS:
        return _CIDS[cid]
    number = _decimal(cid)
    if number is None or number > _MAX_UINT32:
        raise AddressError(f"{text!r}: the CID is a number below 2^32, any, host or local")
    return number


def _port(text: str, port: str, maximum: int) -> int:
    number = _decimal(port)
    if number is None or number > maximum:
        raise AddressError(f"{text!r}: the port is a number of at most {maximum}")
    return number


def _decimal(digits: str) -> int | None:
    if not (digits.isascii() and digits.isdigit()):
        return None
    return int(digits.lstrip("0")[:20] or "0")  # 20 digits are out of every range, and `int` refuses 4,301


def _host(text: str, host: str) -> str:
    address = names.literal(host)
    if address is not None:
        return host.removeprefix("[").removesuffix("]")
    try:
        names.canonical(host)
    except names.NameError_ as exc:
        raise AddressError(f"{text!r}: {host!r} is neither a host name nor an IP address") from exc
    return host


def _unix(text: str, base: str, port: int) -> UnixAddress:
    address = UnixAddress(base, port)
    try:
        length = len(os.fsencode(address.listener_path))
    except UnicodeEncodeError as exc:
        raise AddressError(f"{text!r}: this is no path") from exc
    if "\0" in base or length > MAX_UNIX_PATH:
        raise AddressError(f"{text!r}: a unix socket's path has at most {MAX_UNIX_PATH} bytes")
    return address


async def connect(address: Address) -> trio.SocketStream:
    """Open a stream to *address*; the caller closes it and sets the deadline.

    Raises `OSError`. A hybrid connection that is closed or reset before its `OK` line counts as refused.
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
    while True:
        try:
            stream = _connected_unix(base)
            break
        except BlockingIOError:  # the backlog is full; unix sockets tell nobody when there is room again
            await trio.sleep(_BACKLOG_PAUSE)
    try:
        await _handshake(stream, port)
    except trio.BrokenResourceError as exc:  # closed with our line unread
        stream.socket.close()
        raise _refused(port) from exc
    except BaseException:
        stream.socket.close()
        raise
    return stream


def _connected_unix(path: str) -> trio.SocketStream:
    """Connects at once or not at all; Trio's own `connect` would take a full backlog (EAGAIN) for success."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.connect(path)
        return trio.SocketStream(trio.socket.from_stdlib_socket(connection))
    except BaseException as exc:
        connection.close()
        if isinstance(exc, OSError) and exc.filename is None:
            exc.filename = path
        raise


def _refused(port: int) -> ConnectionRefusedError:
    return ConnectionRefusedError(errno.ECONNREFUSED, f"nobody listens on port {port} of the guest")


async def _handshake(stream: trio.SocketStream, port: int) -> None:
    """Section 3.1 for a client: one write, no payload before the reply, read no byte beyond its line."""
    line = b""
    with trio.move_on_after(HANDSHAKE_TIMEOUT) as limit:
        await stream.send_all(b"CONNECT %d\n" % port)
        while not line.endswith(b"\n"):
            byte = await stream.receive_some(1)
            if not byte:
                raise _refused(port)
            line += byte
            if len(line) >= _MAX_REPLY:
                break
    if limit.cancelled_caught:
        raise TimeoutError(errno.ETIMEDOUT, f"no answer to CONNECT {port} within {HANDSHAKE_TIMEOUT:g} s")
    word, _, number = line.partition(b" ")
    if word != b"OK" or not number.endswith(b"\n") or not number[:-1].isdigit():
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
    _make_way(path)
    await trio.lowlevel.checkpoint()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _bind_with_mode(listener, path, mode)
        listener.listen(backlog)
        listener.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(listener))
    except BaseException:
        listener.close()
        raise


def _bind_with_mode(listener: socket.socket, path: str, mode: int) -> None:
    """Bind so that the socket never has another mode; without an await, since the mask is the whole process's."""
    mask = os.umask(0o777 & ~mode)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)


def _make_way(path: str) -> None:
    """Remove a socket on which nobody listens; raises `OSError` for anything else that is there."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise FileExistsError(errno.EEXIST, "there is another kind of file, which is not replaced", path)
        stream = _connected_unix(path)
    except FileNotFoundError:
        return
    except ConnectionRefusedError:
        remove(path)
        return
    except BlockingIOError:  # its backlog is full: somebody listens
        pass
    else:
        stream.socket.close()
    raise OSError(errno.EADDRINUSE, "another process listens there", path)


def remove(path: str) -> None:
    """Remove a unix socket that is not used any more; no error if it is gone."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108
