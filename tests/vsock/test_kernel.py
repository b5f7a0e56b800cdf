"""What AF_VSOCK itself does: what the proxy is built on, and cannot do better than."""

import os
import socket

import pytest

from proxy.bind import local_cid
from tests.vsock.harness import DEADLINE, LOCAL, free_port


def pair() -> tuple[socket.socket, socket.socket]:
    """Two ends of a connection, of which the second stands for the proxy."""
    port = free_port()
    client = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    client.settimeout(DEADLINE)
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as listener:
        listener.bind((LOCAL, port))
        listener.listen()
        client.connect((LOCAL, port))
        accepted, where = listener.accept()
    assert where[0] == LOCAL  # the peer's CID
    accepted.settimeout(DEADLINE)
    return client, accepted


def linger(one: socket.socket) -> None:
    """SO_LINGER with a time of 0: on TCP, close would now send a reset. (Python takes only numbers on AF_VSOCK.)"""
    one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 1)


def make_unread(one: socket.socket) -> None:
    """*one* can read something that it has not read."""
    one.recv(1, socket.MSG_PEEK)


@pytest.mark.parametrize("unread", [False, True])
@pytest.mark.parametrize("lingering", [False, True])
@pytest.mark.parametrize("sent", [b"", b"on its way"])
def test_p2_no_close_is_abortive(sent: bytes, unread: bool, lingering: bool) -> None:
    """The peer reads what was sent, then the end of file, no error: ever."""
    client, accepted = pair()
    with client:
        if unread:
            client.send(b"x")
            make_unread(accepted)
        accepted.sendall(sent)
        if lingering:
            linger(accepted)
        accepted.close()
        assert client.makefile("rb").read() == sent
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        with pytest.raises(BrokenPipeError):
            client.send(b"")


def test_p2_a_killed_process_looks_like_one_that_closed() -> None:
    client, accepted = pair()
    child = os.fork()
    if child == 0:
        accepted.sendall(b"half of it")
        client.close()
        os.kill(os.getpid(), 9)
    accepted.close()
    os.waitpid(child, 0)
    with client:
        assert client.makefile("rb").read() == b"half of it"
        with pytest.raises(BrokenPipeError):
            client.send(b"")


def test_p2_after_a_half_close_the_way_back_is_open() -> None:
    client, accepted = pair()
    with client, accepted:
        accepted.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        assert client.send(b"") == 0
        client.sendall(b"answer")
        assert accepted.recv(6) == b"answer"


def test_p2_closed_after_a_half_close_the_way_back_is_closed() -> None:
    client, accepted = pair()
    with client:
        accepted.shutdown(socket.SHUT_WR)
        assert client.recv(1) == b""
        accepted.close()
        with pytest.raises(BrokenPipeError):
            send_until_broken(client)


def send_until_broken(one: socket.socket) -> None:
    while True:  # the kernel needs a moment to hear of it
        one.send(b"x")


def test_p28_nobody_listens_is_a_reset() -> None:
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as client:
        client.settimeout(DEADLINE)
        with pytest.raises(ConnectionResetError):
            client.connect((LOCAL, free_port()))


def test_p28_the_local_cid_is_known() -> None:
    assert local_cid() == LOCAL
