"""The built-in proxy: the enclave's way to a host outside, in the signer's own nursery."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import pytest

from signer.tezos.keys import Curve
from tests.integration.conftest import DEADLINE, Setup, attestation, free_port, wait_for

PROXY_PORT = 8000


@contextmanager
def shouting_host() -> Iterator[int]:
    """A host that returns what it got in capitals, once the client has ended; yields its port."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with closing(connection):
                data = b""
                while part := connection.recv(65536):
                    data += part
                connection.sendall(data.upper())

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join()


def ask(setup: Setup, text: bytes) -> bytes:
    """What the host answers to *text*, by the way that the enclave goes: the socket for port 8000 of the parent."""
    with closing(socket.socket(socket.AF_UNIX)) as enclave:
        enclave.settimeout(DEADLINE)
        enclave.connect(f"{setup.socket}_{PROXY_PORT}")
        enclave.sendall(text)
        enclave.shutdown(socket.SHUT_WR)
        answer = b""
        while part := enclave.recv(65536):
            answer += part
        return answer


def state(setup: Setup) -> Any:
    """What the signer says of its proxy."""
    return setup.utility.get("/healthz?verbose")[1]["tasks"]["proxy nitro"]


@pytest.fixture
def host() -> Iterator[int]:
    with shouting_host() as port:
        yield port


def test_the_enclave_reaches_the_host(setup: Setup, host: int) -> None:
    (pkh,) = setup.generate("tz1")
    setup.nitro |= {"proxy_remote_address": f"127.0.0.1:{host}", "proxy_local_port": PROXY_PORT}
    setup.write_config()
    process = setup.start_signer()
    assert ask(setup, b"ciphertext") == b"CIPHERTEXT"
    assert setup.api.sign(pkh, attestation(Curve.ED25519, 1))[0] == 200
    metrics = setup.utility.request("GET", "/metrics")[1].decode()
    assert f'vsock_proxy_accepted_total{{cid="unknown",listener="{setup.socket}_{PROXY_PORT}"}} 1.0' in metrics
    assert setup.stop(process) == 0
    log = setup.log.read_text()
    assert f'msg="Proxying connections to 127.0.0.1:{host}..."' in log
    assert "disconnected" in log
    assert not setup.socket.with_name(f"{setup.socket.name}_{PROXY_PORT}").exists()


def test_a_host_that_nobody_reaches_ends_the_connection_at_once(setup: Setup) -> None:
    setup.generate("tz1")
    setup.nitro |= {"proxy_remote_address": f"127.0.0.1:{free_port()}"}
    setup.write_config()
    setup.start_signer()
    with pytest.raises((ConnectionResetError, BrokenPipeError)):  # as it comes before or after what we send
        ask(setup, b"ciphertext")
    assert "no connection to" in setup.log.read_text()


def test_a_command_beside_the_server_uses_the_servers_proxy(setup: Setup, host: int) -> None:
    setup.generate("tz1")
    setup.nitro |= {"proxy_remote_address": f"127.0.0.1:{host}"}
    setup.write_config()
    first = setup.start_signer()
    done = setup.run("generate", "-v", "nitro")
    assert done.returncode == 0, done.stderr
    assert "in use by a proxy that accepts connections, which is used" in done.stderr.decode()
    assert ask(setup, b"still there") == b"STILL THERE"

    setup.port = free_port()  # a second signer takes over when the first one ends
    setup.utility_port = free_port()
    setup.write_config()
    setup.start_signer()
    assert state(setup)["state"] == "running", "another proxy does the work"
    setup.stop(first)
    wait_for(lambda: "Proxying connections to" in setup.log.read_text().rpartition("which is used")[2], "our turn")
    assert ask(setup, b"again") == b"AGAIN"


def test_a_file_in_the_way_is_an_error_that_is_said(setup: Setup, host: int) -> None:
    (pkh,) = setup.generate("tz1")
    setup.nitro |= {"proxy_remote_address": f"127.0.0.1:{host}"}
    setup.write_config()
    place = setup.socket.with_name(f"{setup.socket.name}_{PROXY_PORT}")
    place.write_text("notes")
    setup.start_signer()
    assert "another kind of file" in setup.log.read_text()
    assert setup.api.sign(pkh, attestation(Curve.ED25519, 1))[0] == 200, "the keys are open already"
    assert place.read_text() == "notes"
    assert state(setup)["state"] == "failing"
    assert "another kind of file" in state(setup)["last_fault"]
    place.unlink()
    wait_for(place.exists, "the proxy steps in")
    wait_for(lambda: state(setup)["state"] == "running", "the proxy")
