"""Points 22 to 26, 28 and 31 with a real process: signals, the service manager, lists, what is in the way."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
import subprocess
import sys

import pytest

from tests.integration.conftest import DEADLINE
from tests.integration.proxy.conftest import (
    ENVIRONMENT,
    READY,
    Remote,
    ServiceManager,
    Starter,
    is_cut,
    receive_all,
)
from tests.integration.proxy.test_limits import check_exchange

LINE = r"\[\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ (ERROR|WARN |INFO |DEBUG) vsock_proxy::(proxy|dns)\] .*"


def test_p24_term_drains(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote)
    client, far = proxy.connect(), remote.accept()
    check_exchange(client, far)
    proxy.send_signal(signal.SIGTERM)
    proxy.wait_for_log("SIGTERM: no new connections; up to 10 s for the others")
    check_exchange(client, far)
    with pytest.raises(ConnectionRefusedError):
        proxy.connect()
    client.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    far.close()
    assert receive_all(client) == b""
    assert proxy.wait() == 0
    assert proxy.lines("ended first: client, reason: closed)")
    assert proxy.output == ""


def test_p24_the_drain_limit_resets(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote, "--drain-timeout", "0.3")
    client, far = proxy.connect(), remote.accept()
    check_exchange(client, far)
    assert proxy.stop() == 0
    assert is_cut(client)
    assert is_cut(far)
    assert proxy.lines("ended first: neither, reason: cancelled)")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_p24_a_second_signal_ends_at_once(starter: Starter, remote: Remote, number: signal.Signals) -> None:
    proxy = starter.forward(remote, "--drain-timeout", "1000")
    client, far = proxy.connect(), remote.accept()
    check_exchange(client, far)
    proxy.send_signal(number)
    proxy.wait_for_log(f"{number.name}: no new connections")
    assert proxy.stop(number) == 0
    assert is_cut(client)
    assert is_cut(far)
    assert proxy.lines(f"{number.name} again")
    assert not proxy.lines("Traceback")


def test_p25_hup_with_a_good_a_bad_and_a_refusing_list(starter: Starter, remote: Remote) -> None:
    manager = starter.manager()
    proxy = starter.forward(remote, environ=manager.environ)
    assert manager.next() == "READY=1"
    client, far = proxy.connect(), remote.accept()
    check_exchange(client, far)

    starter.allow_list(("127.0.0.1", remote.port), ("localhost", 443))
    proxy.send_signal(signal.SIGHUP)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", manager.next())
    assert manager.next() == "READY=1"
    assert proxy.lines("SIGHUP: allow list read again, 2 entries")
    check_exchange(client, far)
    check_exchange(proxy.connect(), remote.accept())

    (starter.root / "allow.yaml").write_text("allowlist: [")
    proxy.send_signal(signal.SIGHUP)
    assert manager.next().startswith("RELOADING=1\n")
    assert manager.next() == "READY=1"
    assert proxy.lines(
        "ERROR vsock_proxy::proxy] SIGHUP: the new allow list is bad, the old one stays: Bad yaml format"
    )
    check_exchange(proxy.connect(), remote.accept())

    starter.allow_list(("127.0.0.1", remote.port % 65535 + 1))
    proxy.send_signal(signal.SIGHUP)
    assert manager.next().startswith("RELOADING=1\n")
    assert manager.next() == "STOPPING=1"
    proxy.wait_for_log("SIGHUP: the target is not allowed any more, stopping")
    check_exchange(client, far)  # what lives is let go on
    proxy.send_signal(signal.SIGTERM)
    proxy.wait_for_log("SIGTERM: no new connections")
    check_exchange(client, far)  # also after the first signal
    for end in (*proxy._sockets, far):
        end.close()
    remote.close()
    assert proxy.wait() == 1


@pytest.mark.parametrize("family", ["tcp", "unix"])
def test_p26_inherits_its_socket(starter: Starter, remote: Remote, family: str) -> None:
    path = starter.root / "inherited.sock"
    if family == "tcp":
        listener, address = socket.create_server(("127.0.0.1", 0)), "vsock:3:8000"
    else:
        listener, address = socket.socket(socket.AF_UNIX), "unix:/anywhere:1"
        listener.bind(str(path))
        listener.listen()
    with listener, socket.socket(listener.family) as client:
        client.settimeout(DEADLINE)
        client.connect(listener.getsockname())  # before the proxy is there: it stays in the backlog
        proxy = starter.forward(remote, listen=[address], descriptor=listener.fileno())
        far = remote.accept()
        check_exchange(client, far)
        far.close()
    assert proxy.stop() == 0
    assert path.exists() == (family == "unix")  # it belongs to the service manager


def test_p26_an_inherited_socket_for_another_process_is_left_alone(starter: Starter, remote: Remote) -> None:
    environ = {"LISTEN_FDS": "1", "LISTEN_PID": "1"}
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = starter.forward(remote, environ=environ)
        assert proxy.ports[0] != listener.getsockname()[1]
        check_exchange(proxy.connect(), remote.accept())


def test_p26_ready_stopping_and_signs_of_life(starter: Starter, remote: Remote) -> None:
    manager = starter.manager()
    proxy = starter.forward(remote, environ=manager.environ | {"WATCHDOG_USEC": "400000"})
    states = [manager.next_of_all() for _ in range(6)]
    assert states.count("READY=1") == 1
    assert states.count("WATCHDOG=1") == 5
    proxy.send_signal(signal.SIGTERM)
    assert manager.next() == "STOPPING=1"
    assert proxy.wait() == 0


def test_p26_without_listening_it_is_not_ready(starter: Starter, remote: Remote) -> None:
    manager = ServiceManager(starter.root)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        proxy = starter.forward(remote, listen=[address], environ=manager.environ, wait=False)
        assert proxy.wait() == 1
    manager._socket.setblocking(False)
    with pytest.raises(BlockingIOError):
        manager.next()
    manager.close()
    port = address.rpartition(":")[2]
    assert proxy.log.splitlines()[-1] == (
        f'Error: "Could not listen for connections: Could not bind to {address}: Address already in use; '
        f"another program listens there, see which: ss -ltnp 'sport = :{port}'\""
    )


def test_unix_socket_is_made_private_and_removed(starter: Starter, remote: Remote) -> None:
    base, path = starter.root / "v.sock", starter.root / "v.sock_8000"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    proxy = starter.forward(remote, listen=[f"unix:{base}:8000"])
    assert stat.S_IMODE(path.stat().st_mode) == 0o660
    check_exchange(proxy.connect_unix(path), remote.accept())
    second = starter.forward(remote, listen=[f"unix:{base}:8000"], wait=False)
    assert second.wait() == 1
    assert second.lines("another proxy serves this base path")
    assert path.exists()  # it is the other's
    proxy.send_signal(signal.SIGTERM)
    proxy.wait_for_log("SIGTERM")
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert not path.exists()


def test_unix_socket_of_a_successor_is_not_removed(starter: Starter, remote: Remote) -> None:
    base, path = starter.root / "v.sock", starter.root / "v.sock_8000"
    proxy = starter.forward(remote, listen=[f"unix:{base}:8000"])
    path.unlink()
    successor = starter.forward(remote, listen=[f"unix:{base}:8000"])
    assert proxy.stop() == 0
    check_exchange(successor.connect_unix(path), remote.accept())


def test_another_file_in_the_way_stays(starter: Starter, remote: Remote) -> None:
    path = starter.root / "v.sock_8000"
    path.write_text("precious")
    proxy = starter.forward(remote, listen=[f"unix:{starter.root}/v.sock:8000"], wait=False)
    assert proxy.wait() == 1
    assert path.read_text() == "precious"
    assert proxy.lines(f"Could not listen for connections: Could not bind to unix: {path}: ")
    assert proxy.lines("move the file away, or take another base path")


def test_p31_a_healthy_start_is_visible(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote)
    client, far = proxy.connect(), remote.accept()
    check_exchange(client, far)
    client.close()
    far.close()
    proxy.wait_for_log("disconnected")
    name = r"tcp: 127\.0\.0\.1:\d+"
    texts = [
        "Checking allowlist configuration",
        rf'Matched with host name "127\.0\.0\.1" and port "{remote.port}"',
        r"descriptor limit: raised from \d+ to \d+",
        rf"Bound to {name}",
        READY,
        r"Resolving hostname: 127\.0\.0\.1\.",
        r'Using IP "127\.0\.0\.1" for the given server "127\.0\.0\.1"\. \(TTL: 86400 secs\)',
        rf"Accepted connection on {name}",
        rf"Connected client from {name} to 127\.0\.0\.1:{remote.port}",
        rf"Client on {name} disconnected \(.*\)",
    ]
    lines = proxy.log.splitlines()
    assert len(lines) == len(texts)
    for line, text in zip(lines, texts, strict=True):
        assert re.fullmatch(LINE, line), line
        assert re.fullmatch(text, line.partition("] ")[2]), line


def test_p31_rust_log_overrides(starter: Starter, remote: Remote) -> None:
    manager = starter.manager()
    environ = manager.environ | {"RUST_LOG": "hyper=trace,warn"}
    proxy = starter.forward(remote, environ=environ, listen=[f"unix:{starter.root}/v:1"], wait=False)
    assert manager.next() == "READY=1"
    check_exchange(proxy.connect_unix(starter.root / "v_1"), remote.accept())
    assert proxy.log == ""


def test_a_malformed_environment_is_as_good_as_none(starter: Starter, remote: Remote) -> None:
    environ = {
        "RUST_LOG": "=,=x,/",
        "RUST_LOG_STYLE": "\udcff",
        "NOTIFY_SOCKET": "\udcff" * 200,
        "WATCHDOG_USEC": "²",
        "WATCHDOG_PID": "x",
        "LISTEN_FDS": "9" * 5000,
        "LISTEN_PID": "-",
    }
    proxy = starter.forward(remote, environ=environ)
    check_exchange(proxy.connect(), remote.accept())
    assert "Traceback" not in proxy.log


def test_p11_p13_a_name_is_resolved_by_the_system(starter: Starter, remote: Remote) -> None:
    config = starter.allow_list(("LOCALHOST.", remote.port))
    arguments = ("--listen", "tcp:127.0.0.1:0", "-4", "localhost", str(remote.port), "--config", str(config))
    proxy = starter.start(*arguments)
    check_exchange(proxy.connect(), remote.accept())
    assert proxy.lines(f'Matched with host name "LOCALHOST." and port "{remote.port}"')
    assert proxy.lines("Resolving hostname: localhost.")
    assert proxy.lines('Using IP "127.0.0.1" for the given server "localhost". (TTL: 5 secs)')


def test_rust_log_style_always_colours(starter: Starter) -> None:
    missing = str(starter.root / "missing.yaml")
    environ = {"RUST_LOG_STYLE": "always"}
    proxy = starter.start("8000", "localhost", "443", "--config", missing, environ=environ, wait=False)
    assert proxy.wait() == 1
    assert " \x1b[32mINFO \x1b[0m vsock_proxy::proxy] " in proxy.log


def test_a_closed_standard_error_is_not_fatal(starter: Starter, remote: Remote) -> None:
    """A broken pipe: whoever read the log has gone."""
    base = starter.root / "v.sock"
    config = starter.allow_list(("127.0.0.1", remote.port))
    command = [sys.executable, "-m", "proxy", "--listen", f"unix:{base}:1", "127.0.0.1", str(remote.port)]
    reader, writer = os.pipe()
    with subprocess.Popen([*command, "--config", str(config)], stderr=writer, env=ENVIRONMENT) as process:
        os.close(writer)
        try:
            log = b""
            while READY.encode() not in log:
                log += os.read(reader, 65536)
            os.close(reader)
            for _ in range(3):
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(DEADLINE)
                    client.connect(f"{base}_1")
                    far = remote.accept()
                    check_exchange(client, far)
                    far.close()
                    assert receive_all(client) == b""
            process.terminate()
            assert process.wait(DEADLINE) == 0
        finally:
            process.kill()


def test_p28_bind_cid_is_for_the_local_port(starter: Starter) -> None:
    proxy = starter.start("--listen", "tcp:127.0.0.1:0", "--bind-cid", "any", "localhost", "443", wait=False)
    assert proxy.wait() == 2
    assert "--bind-cid" in proxy.log
