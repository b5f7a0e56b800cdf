"""What a service manager and this process tell each other: sd_notify(3), sd_listen_fds(3); P2.26.

Outside of a service manager all of it does nothing.
"""

import os
import socket
import time
from collections.abc import MutableMapping
from contextlib import suppress

_FIRST_DESCRIPTOR = 3  # SD_LISTEN_FDS_START
_MAX_STATUS = 1000  # characters; a person reads it in one line
_MAX_DESCRIPTORS = 4096  # FileDescriptorStoreMax and sockets of one unit are far fewer


def _number(text: str, maximum: int) -> int:
    """What a decimal number in the environment says; 0 for anything else, as if it weren't there."""
    if not (text.isascii() and text.isdigit()) or len(text) > 20 or int(text) > maximum:
        return 0
    return int(text)


def _line(text: str) -> str:
    """One line that is no other field, short enough for a datagram."""
    return " ".join(text.split())[:_MAX_STATUS]


class Notifier:
    """Sends states to the service manager at NOTIFY_SOCKET; a manager that doesn't listen is no error."""

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        self._path = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        is_ours = self._path and pid in ("", str(os.getpid()))
        wanted = _number(microseconds, 2**64 - 1) if is_ours else 0
        self.watchdog_interval = wanted / 2_000_000  # seconds from one sign of life to the next; 0: none is wanted

    def ready(self, status: str = "") -> None:
        self._send("READY=1" + (f"\nSTATUS={_line(status)}" if status else ""))

    def status(self, text: str) -> None:
        """What `systemctl status` shows beside the state."""
        self._send(f"STATUS={_line(text)}")

    def reloading(self) -> None:
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self) -> None:
        self._send("STOPPING=1")

    def alive(self) -> None:
        self._send("WATCHDOG=1")

    def _send(self, state: str) -> None:
        if not self._path:
            return
        address = "\0" + self._path[1:] if self._path.startswith("@") else self._path
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sender:
            sender.sendto(state.encode(errors="replace"), address)


def inherited_listeners(environ: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The listening stream sockets that the service manager passes on; the variables are taken away for children."""
    number, pid = environ.pop("LISTEN_FDS", ""), environ.pop("LISTEN_PID", "")
    environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()):
        return []
    found: list[socket.socket] = []
    for descriptor in range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + _number(number, _MAX_DESCRIPTORS)):
        try:
            listener = socket.socket(fileno=descriptor)
        except OSError:
            continue  # no socket: not for us
        os.set_inheritable(descriptor, False)
        if listener.type == socket.SOCK_STREAM and listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            listener.setblocking(False)
            found.append(listener)
        else:
            listener.detach()
    return found
