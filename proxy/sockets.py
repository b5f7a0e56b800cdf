"""What the sockets of listeners and their clients tell about themselves, for the log and for comparing."""

import select
import socket
from dataclasses import dataclass
from pathlib import Path

from proxy.address import Address, UnixAddress, VsockAddress


@dataclass(frozen=True, slots=True)
class Peer:
    """Who connected; *cid* is None where the transport hides it."""

    cid: int | None
    text: str  # for the log


def peer_of(connection: socket.socket, where: object) -> Peer:
    if connection.family == socket.AF_UNIX or not isinstance(where, tuple):
        return Peer(None, "cid: unknown port: 0")
    first, port = where[:2]
    if connection.family == socket.AF_VSOCK:
        return Peer(int(first), f"cid: {first} port: {port}")
    return Peer(None, f"tcp: [{first}]:{port}" if ":" in str(first) else f"tcp: {first}:{port}")


def name_of(listening: socket.socket) -> str:
    """`cid: 3 port: 8000`, as the original writes it."""
    name = listening.getsockname()
    if listening.family == socket.AF_VSOCK:
        return f"cid: {name[0]} port: {name[1]}"
    if listening.family == socket.AF_UNIX:
        return f"unix: {name}"
    return f"tcp: [{name[0]}]:{name[1]}" if listening.family == socket.AF_INET6 else f"tcp: {name[0]}:{name[1]}"


def file_at(path: str) -> tuple[int, int]:
    """Which file is at *path*: device and inode."""
    found = Path(path).lstat()
    return found.st_dev, found.st_ino


def is_at(listening: socket.socket, address: Address) -> bool:
    """Whether a socket that listens already is bound to *address*."""
    name = listening.getsockname()
    match address:
        case VsockAddress(cid, port):
            return listening.family == socket.AF_VSOCK and tuple(name) == (cid, port)
        case UnixAddress():
            return listening.family == socket.AF_UNIX and name == address.listener_path
        case _:
            is_tcp = listening.family in (socket.AF_INET, socket.AF_INET6)
            return is_tcp and tuple(name[:2]) == (address.host, address.port)


def is_gone(connection: socket.socket) -> bool:
    """Whether a client that had to wait has left for good, and left nothing: for it we don't call on the target."""
    poll = select.poll()
    poll.register(connection, 0)  # POLLERR and POLLHUP always count
    if not poll.poll(0):
        return False
    try:
        return not connection.recv(1, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
