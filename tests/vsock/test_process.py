"""The command over real AF_VSOCK: P24, P26 and P28."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from proxy.address import VsockAddress
from proxy.bind import BindError
from proxy.service import Proxy, forward_without_list
from proxy.settings import Forward
from tests.vsock.harness import DEADLINE, LOCAL, free_port


async def refusal(listen: VsockAddress) -> str:
    """Why a proxy can't listen there."""
    forward = Forward(listen=listen, remote_host="127.0.0.1", remote_port=9)
    with pytest.raises(BindError) as caught, trio.fail_after(DEADLINE):
        await Proxy([forward_without_list(forward)]).run()
    return str(caught.value)


async def test_p28_a_cid_that_is_not_ours() -> None:
    assert await refusal(VsockAddress(3, 8000)) == (
        "Could not bind to cid: 3 port: 8000: Cannot assign requested address; "
        "the CID of this kernel is not 3 but 1: use --bind-cid 1"
    )


async def test_p28_a_port_in_use() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as other:
        other.bind((LOCAL, 8000))
        other.listen()
        text = await refusal(VsockAddress(LOCAL, 8000))
    assert text == (
        "Could not bind to cid: 1 port: 8000: Address already in use; another proxy has the port, perhaps "
        "nitro-enclaves-vsock-proxy.service: systemctl stop nitro-enclaves-vsock-proxy.service"
    )


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(DEADLINE)
        yield listener


def arguments(target: socket.socket, directory: Path, port: int) -> list[str]:
    """The command line that the original would take."""
    remote_port = target.getsockname()[1]
    allow = directory / "allow.yaml"
    allow.write_text(f"allowlist: [{{address: 127.0.0.1, port: {remote_port}}}]\n")
    return [sys.executable, "-m", "proxy", str(port), "127.0.0.1", str(remote_port), "--config", str(allow)]


def test_p28_without_a_cid_it_is_3(target: socket.socket, tmp_path: Path) -> None:
    done = subprocess.run(
        arguments(target, tmp_path, 8000), capture_output=True, text=True, timeout=DEADLINE, check=False
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == (
        'Error: "Could not listen for connections: Could not bind to cid: 3 port: 8000: Cannot assign requested '
        'address; the CID of this kernel is not 3 but 1: use --bind-cid 1"'
    )


@contextmanager
def manager(path: Path) -> Iterator[socket.socket]:
    """What the service manager hears."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(path))
        receiver.settimeout(DEADLINE)
        yield receiver


@contextmanager
def activated(command: list[str], listener: socket.socket, notify: Path) -> Iterator[subprocess.Popen[bytes]]:
    """*command*, started as the service manager starts it: with *listener* as its descriptor 3."""
    shell = f'exec 3<&{listener.fileno()}; LISTEN_PID=$$ LISTEN_FDS=1 exec "$@"'
    environment = os.environ | {"NOTIFY_SOCKET": str(notify)}
    process = subprocess.Popen(
        ["/bin/bash", "-c", shell, "bash", *command], pass_fds=[listener.fileno()], env=environment
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def connected(port: int) -> socket.socket:
    client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    client.settimeout(DEADLINE)
    try:
        client.connect((LOCAL, port))
    except BaseException:
        client.close()
        raise
    return client


def test_p26_p24_an_inherited_vsock_socket_is_served_and_drained(target: socket.socket, tmp_path: Path) -> None:
    port, notify = free_port(), tmp_path / "notify"
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener, manager(notify) as states:
        listener.bind((socket.VMADDR_CID_ANY, port))
        listener.listen()
        with activated(arguments(target, tmp_path, port), listener, notify) as process:
            listener.close()
            assert states.recv(100) == b"READY=1"
            client = connected(port)
            accepted, _ = target.accept()
            process.send_signal(signal.SIGTERM)
            assert states.recv(100) == b"STOPPING=1"
            client.sendall(b"request")
            assert accepted.recv(7) == b"request"
            accepted.sendall(b"answer")
            accepted.close()
            assert client.makefile("rb").read() == b"answer"
            client.close()
            assert process.wait(DEADLINE) == 0
    with pytest.raises(ConnectionResetError):
        connected(port)
