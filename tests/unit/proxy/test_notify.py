"""Point 26: what a service manager and the proxy tell each other."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from proxy import notify
from proxy.notify import Notifier, inherited_listeners


@pytest.fixture
def manager(tmp_path: Path) -> socket.socket:
    receiver = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    receiver.bind(str(tmp_path / "notify"))
    receiver.setblocking(False)
    return receiver


def test_p26_states(manager: socket.socket) -> None:
    environ = {"NOTIFY_SOCKET": manager.getsockname(), "OTHER": "stays"}
    with manager:
        notifier = Notifier(environ)
        said: list[Callable[[], None]] = [notifier.ready, notifier.reloading, notifier.stopping, notifier.alive]
        for say in said:
            say()
        states = [manager.recv(1000).decode() for _ in said]
    assert states[0::2] == ["READY=1", "STOPPING=1"]
    assert states[3] == "WATCHDOG=1"
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", states[1])
    assert environ == {"OTHER": "stays"}  # children must not speak for us


def test_p26_a_status_is_one_line_and_no_other_field(manager: socket.socket) -> None:
    with manager:
        notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
        notifier.status("waiting:\n  STOPPING=1\udcff" + 5000 * "x")
        notifier.ready("signing")
        text, ready = manager.recv(5000).decode(), manager.recv(1000)
    assert text.startswith("STATUS=waiting: STOPPING=1?xxx")
    assert len(text) < 1100
    assert ready == b"READY=1\nSTATUS=signing"


def test_p26_an_abstract_socket() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind("")  # the kernel picks an abstract name
        receiver.setblocking(False)
        Notifier({"NOTIFY_SOCKET": "@" + receiver.getsockname()[1:].decode()}).ready()
        assert receiver.recv(100) == b"READY=1"


@pytest.mark.parametrize("path", ["", "/nonexistent/socket", "a" * 5000, "@" + "a" * 5000, "vsock:2:1", "\udcff"])
def test_p26_without_a_manager_nothing_happens(path: str) -> None:
    Notifier({"NOTIFY_SOCKET": path}).ready()
    Notifier({}).ready()


def test_p26_a_manager_that_does_not_read_holds_nothing_up(manager: socket.socket) -> None:
    with manager:
        notifier = Notifier({"NOTIFY_SOCKET": manager.getsockname()})
        for _ in range(1000):  # more than the queue of a datagram socket holds
            notifier.alive()


@pytest.mark.parametrize(
    ("environ", "seconds"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": str(os.getpid())}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, 0.0),
        ({"WATCHDOG_USEC": "0"}, 0.0),
        ({"WATCHDOG_USEC": ""}, 0.0),
        ({"WATCHDOG_USEC": "-5"}, 0.0),
        ({"WATCHDOG_USEC": "²"}, 0.0),
        ({"WATCHDOG_USEC": "９"}, 0.0),
        ({"WATCHDOG_USEC": "9" * 5000}, 0.0),
        ({"WATCHDOG_USEC": "5 s"}, 0.0),
        ({}, 0.0),
    ],
)
def test_p26_watchdog(environ: dict[str, str], seconds: float) -> None:
    assert Notifier(environ | {"NOTIFY_SOCKET": "/run/x"}).watchdog_interval == seconds
    assert Notifier(dict(environ)).watchdog_interval == 0.0


@pytest.mark.parametrize("number", ["", "0", "-1", "²", "x", "9" * 5000, "99999999999", "1.0", " 1"])
def test_p26_a_bad_number_of_sockets_is_none(number: str) -> None:
    assert inherited_listeners({"LISTEN_FDS": number, "LISTEN_PID": str(os.getpid())}) == []


def test_p26_inherited_sockets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A listening socket, one that doesn't listen, a datagram socket, a pipe, and a number that isn't open."""
    listener, silent = socket.create_server(("127.0.0.1", 0)), socket.socket()
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    reader, writer = os.pipe()
    base = 900  # far from what the test runner has open
    sources = [listener.fileno(), silent.fileno(), datagrams.fileno(), reader]
    for offset, number in enumerate(sources):
        os.dup2(number, base + offset, inheritable=True)
    monkeypatch.setattr(notify, "_FIRST_DESCRIPTOR", base)
    environ = {"LISTEN_FDS": "5", "LISTEN_PID": str(os.getpid()), "LISTEN_FDNAMES": "a:b", "OTHER": "stays"}
    try:
        (found,) = inherited_listeners(environ)
        with found:
            assert found.getsockname() == listener.getsockname()
            assert found.gettimeout() == 0
            assert not os.get_inheritable(base)
        assert environ == {"OTHER": "stays"}
    finally:
        for offset in range(1, 4):
            os.close(base + offset)
        for one in (listener, silent, datagrams):
            one.close()
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("pid", ["", "1", "x", str(2**70)])
def test_p26_sockets_for_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch, pid: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setattr(notify, "_FIRST_DESCRIPTOR", listener.fileno())
        environ = {"LISTEN_FDS": "1", "LISTEN_PID": pid}
        assert inherited_listeners(environ) == []
        assert environ == {}
