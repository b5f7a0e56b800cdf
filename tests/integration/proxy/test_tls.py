"""Point 33 with a real process: the server name of a ClientHello is checked, nothing is consumed."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from contextlib import ExitStack, suppress

import pytest

from tests.integration.proxy.conftest import ProxyProcess, Remote, Starter, is_cut, receive


def client_hello(name: str | None) -> bytes:
    context = ssl.create_default_context()
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name).do_handshake()
    return outgoing.read()


@pytest.fixture(scope="module")
def checking(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ProxyProcess, Remote]]:
    """A proxy to `localhost` that checks the name."""
    with ExitStack() as stack:
        starter = Starter(tmp_path_factory.mktemp("t"), stack)
        remote = starter.remote()
        config = starter.allow_list(("LocalHost.", remote.port))
        arguments = ("--listen", "tcp:127.0.0.1:0", "localhost", str(remote.port), "--config", str(config), "-4")
        yield starter.start(*arguments, "--check-tls-name", "--metrics", "127.0.0.1:0"), remote


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST"])
def test_p33_the_listed_name_passes(checking: tuple[ProxyProcess, Remote], name: str) -> None:
    proxy, remote = checking
    hello = client_hello(name)
    client = proxy.connect()
    client.sendall(hello + b"and more")
    far = remote.accept()
    assert receive(far, len(hello) + 8) == hello + b"and more"  # nothing was consumed
    far.sendall(b"answer")
    assert receive(client, 6) == b"answer"


def test_p33_in_pieces_of_one_byte(checking: tuple[ProxyProcess, Remote]) -> None:
    proxy, remote = checking
    hello = client_hello("localhost")
    client = proxy.connect()
    for number in range(len(hello)):
        client.sendall(hello[number : number + 1])
    assert receive(remote.accept(), len(hello)) == hello


@pytest.mark.parametrize(
    "data",
    [
        client_hello("other.example"),
        client_hello("localhost.example"),
        client_hello(None),
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        bytes(100),
        b"\x16\x03\x01\xff\xff" + b"\x01\x00\xff\xff" + bytes(20_000),
    ],
)
def test_p33_anything_else_is_reset(checking: tuple[ProxyProcess, Remote], data: bytes) -> None:
    proxy, _ = checking
    before = proxy.metric("vsock_proxy_refused_total", 'reason="tls-name"')
    client = proxy.connect()
    with suppress(ConnectionError):  # it may be reset before we have sent it all
        client.sendall(data)
    assert is_cut(client)
    assert proxy.metric("vsock_proxy_refused_total", 'reason="tls-name"') == before + 1
    if before == 0:  # lines of one kind come at most once a second
        assert proxy.lines("the ClientHello asks for 'other.example', allowed is 'localhost'")


def test_p33_silent_and_garbage_clients_cost_the_others_nothing(checking: tuple[ProxyProcess, Remote]) -> None:
    proxy, remote = checking
    for _ in range(5):
        proxy.connect()
    for _ in range(50):
        with suppress(ConnectionError):
            proxy.connect().sendall(b"\x16garbage" * 100)
    hello = client_hello("localhost")
    client = proxy.connect()
    client.sendall(hello)
    assert receive(remote.accept(), len(hello)) == hello
    assert not proxy.lines("internal error")
