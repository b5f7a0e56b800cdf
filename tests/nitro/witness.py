"""Runs in the guest beside the enclave program: which sockets does the program have, and who is at their other end?

Whoever connects to the vsock port gets the answer as JSON: a list of [family, own address, peer's address or null].
Nothing but the standard library: it is a script of its own, `witness.py PROCESS PORT`.
"""

import ctypes
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

_PIDFD_GETFD = 438  # the system call's number, the same on every architecture; Python has no function for it

_libc = ctypes.CDLL(None, use_errno=True)


def sockets_of(process: int) -> list[tuple[str, Any, Any]]:
    """The sockets that are open in *process*, as its kernel sees them."""
    found = []
    pidfd = os.pidfd_open(process)
    try:
        for entry in Path(f"/proc/{process}/fd").iterdir():
            if not str(entry.readlink()).startswith("socket:"):
                continue
            descriptor = _libc.syscall(_PIDFD_GETFD, pidfd, int(entry.name), 0)
            if descriptor < 0:
                raise OSError(ctypes.get_errno(), "pidfd_getfd")
            with socket.socket(fileno=descriptor) as copy:
                found.append((copy.family.name, copy.getsockname(), _peer(copy)))
    finally:
        os.close(pidfd)
    return found


def _peer(one: socket.socket) -> Any:
    try:
        return one.getpeername()
    except OSError:
        return None  # a listener


def main(process: int, port: int) -> None:
    """Answer for ever; the guest's end is the end."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen()
        while True:
            asker, _ = listener.accept()
            with asker:
                asker.sendall(json.dumps(sockets_of(process)).encode())


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
