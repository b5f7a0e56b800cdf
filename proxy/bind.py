"""Why an address can't be listened on, and what to do about it: P2.28 of the proxy specification."""

import errno
import fcntl
import socket
import struct
from pathlib import Path

import trio

from proxy.address import Address, UnixAddress, VsockAddress, connect

_PACKAGED_UNIT = "nitro-enclaves-vsock-proxy.service"
_PROBE = 2.0  # seconds for somebody who listens to accept


class BindError(Exception):
    """A listener can't listen; *number* is the system's error number."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def explain_bind(address: Address, exc: OSError) -> str:
    """`Could not bind to cid: 3 port: 8000: …`, and what to do."""
    match address:
        case VsockAddress(cid, port):
            return f"Could not bind to cid: {cid} port: {port}: {exc.strerror or exc}{_vsock_advice(cid, exc)}"
        case UnixAddress():
            return f"Could not bind to unix: {address.listener_path}: {exc.strerror or exc}{_unix_advice(exc)}"
        case _:
            advice = ""
            if exc.errno == errno.EADDRINUSE:
                advice = f"; another program listens there, see which: ss -ltnp 'sport = :{address.port}'"
            return f"Could not bind to {address}: {exc.strerror or exc}{advice}"


def _vsock_advice(cid: int, exc: OSError) -> str:
    match exc.errno:
        case errno.EADDRINUSE:
            return f"; another proxy has the port, perhaps {_PACKAGED_UNIT}: systemctl stop {_PACKAGED_UNIT}"
        case errno.EADDRNOTAVAIL:
            known = local_cid()
            shown = "unknown" if known is None else str(known)
            return f"; the CID of this kernel is not {cid} but {shown}: use --bind-cid {shown if known else 'any'}"
        case errno.EAFNOSUPPORT | errno.EPERM | errno.EPROTONOSUPPORT:
            return (
                "; this kernel or container has no AF_VSOCK: load the module (modprobe vhost_vsock, or vsock), "
                "and in a container allow AF_VSOCK in the seccomp profile"
            )
        case errno.EACCES:
            return "; ports up to 1023 need the capability CAP_NET_BIND_SERVICE"
        case _:
            return ""


def _unix_advice(exc: OSError) -> str:
    match exc.errno:
        case errno.EEXIST:
            return "; move the file away, or take another base path"
        case errno.EADDRINUSE:
            return "; another proxy serves this base path"
        case errno.ENOENT:
            return "; make the directory first"
        case _:
            return ""


def local_cid(device: str = "/dev/vsock") -> int | None:
    """The CID of this machine; None where the kernel doesn't tell."""
    try:
        with Path(device).open("rb") as file:
            answer = fcntl.ioctl(file, socket.IOCTL_VM_SOCKETS_GET_LOCAL_CID, bytes(4))
    except OSError:
        return None
    return int(struct.unpack("=I", answer)[0])


async def is_served(address: Address) -> bool | None:
    """Whether somebody accepts connections at *address*; None where that can't be found out."""
    if isinstance(address, VsockAddress):
        return None  # a connection to the own CID needs a loopback, which this kernel may lack: it would hang
    if isinstance(address, UnixAddress):
        return await _accepts_unix(address.listener_path)
    with trio.move_on_after(_PROBE):
        try:
            stream = await connect(address)
        except OSError:
            return False
        await trio.aclose_forcefully(stream)
        return True
    return False


async def _accepts_unix(path: str) -> bool:
    with trio.move_on_after(_PROBE):
        try:
            stream = await trio.open_unix_socket(path)
        except OSError:
            return False
        await trio.aclose_forcefully(stream)
        return True
    return False
