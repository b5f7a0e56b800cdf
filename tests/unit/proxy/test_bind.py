"""Point 28: why an address can't be listened on, and what to do about it."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from proxy import bind
from proxy.address import VSOCK_ANY, Address, TcpAddress, UnixAddress, VsockAddress
from proxy.bind import explain_bind, is_served, local_cid

VSOCK, UNIX, TCP = VsockAddress(3, 8000), UnixAddress("/run/v.sock", 8000), TcpAddress("127.0.0.1", 80)


def explained(address: Address, number: int) -> str:
    return explain_bind(address, OSError(number, os.strerror(number)))


@pytest.mark.parametrize(
    ("address", "number", "start", "advice"),
    [
        (VSOCK, errno.EADDRINUSE, "cid: 3 port: 8000: ", "systemctl stop nitro-enclaves-vsock-proxy.service"),
        (VSOCK, errno.EAFNOSUPPORT, "cid: 3 port: 8000: ", "modprobe vhost_vsock"),
        (VSOCK, errno.EPERM, "cid: 3 port: 8000: ", "seccomp profile"),
        (VSOCK, errno.EPROTONOSUPPORT, "cid: 3 port: 8000: ", "no AF_VSOCK"),
        (VSOCK, errno.EACCES, "cid: 3 port: 8000: ", "CAP_NET_BIND_SERVICE"),
        (UNIX, errno.EADDRINUSE, "unix: /run/v.sock_8000: ", "another proxy serves this base path"),
        (UNIX, errno.EEXIST, "unix: /run/v.sock_8000: ", "move the file away"),
        (UNIX, errno.ENOENT, "unix: /run/v.sock_8000: ", "make the directory first"),
        (TCP, errno.EADDRINUSE, "tcp:127.0.0.1:80: ", "ss -ltnp 'sport = :80'"),
    ],
)
def test_p28_each_fault_has_its_advice(address: Address, number: int, start: str, advice: str) -> None:
    text = explained(address, number)
    assert text.startswith(f"Could not bind to {start}{os.strerror(number)}; ")
    assert advice in text


@pytest.mark.parametrize("address", [VSOCK, UNIX, TCP])
def test_p28_other_faults_stand_alone(address: Address) -> None:
    assert explained(address, errno.EIO).endswith(f": {os.strerror(errno.EIO)}")
    assert explain_bind(address, OSError("odd")).endswith(": odd")


@pytest.mark.parametrize(("known", "shown"), [(16, "but 16: use --bind-cid 16"), (None, "unknown: use --bind-cid any")])
def test_p28_a_foreign_cid(monkeypatch: pytest.MonkeyPatch, known: int | None, shown: str) -> None:
    monkeypatch.setattr(bind, "local_cid", lambda: known)
    text = explained(VSOCK, errno.EADDRNOTAVAIL)
    assert "the CID of this kernel is not 3" in text
    assert shown in text


def test_p28_a_machine_that_does_not_tell_its_cid(tmp_path: Path) -> None:
    assert local_cid(str(tmp_path / "none")) is None
    (tmp_path / "file").write_bytes(b"no device")
    assert local_cid(str(tmp_path / "file")) is None


async def test_is_served_by_tcp() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = TcpAddress("127.0.0.1", listener.getsockname()[1])
        assert await is_served(address)
    assert not await is_served(address)


async def test_is_served_by_unix(tmp_path: Path) -> None:
    address = UnixAddress(str(tmp_path / "v"), 1)
    assert not await is_served(address)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address.listener_path)
        assert not await is_served(address)  # left behind: nobody listens
        listener.listen()
        assert await is_served(address)


async def test_is_served_by_vsock_is_not_asked() -> None:
    assert await is_served(VsockAddress(VSOCK_ANY, 1)) is None
