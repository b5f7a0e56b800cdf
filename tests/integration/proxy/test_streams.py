"""Points 1 to 6, 17 and 30 with a real process: half-closes, resets, back pressure, times, the account of it."""

from __future__ import annotations

import re
import socket
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import yaml

from tests.integration.conftest import DEADLINE, wait_for
from tests.integration.proxy.conftest import (
    Background,
    ProxyProcess,
    Remote,
    Shared,
    Starter,
    is_cut,
    is_quiet,
    receive,
    receive_all,
    reset,
)

MEBIBYTE = bytes(range(256)) * 4096
TRANSPORTS = pytest.mark.parametrize("transport", ["tcp", "unix"])


def peak_memory(proxy: ProxyProcess) -> int:
    """The most memory that the process has used, in bytes."""
    text = Path(f"/proc/{proxy.process.pid}/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", text)
    assert found is not None
    return int(found[1]) * 1024


def peer_text(client: socket.socket) -> str:
    """How the log names the client."""
    return f"tcp: 127.0.0.1:{client.getsockname()[1]}"


def last_line(proxy: ProxyProcess, client: str) -> str:
    """The line about the end of *client*'s connection, without its beginning."""
    start = f"Client on {client} disconnected "
    wait_for(lambda: bool(proxy.lines(start)), "the last line of the connection")
    (line,) = proxy.lines(start)
    return line.partition(start)[2]


@TRANSPORTS
def test_p01_half_close_by_the_client(shared: Shared, transport: str) -> None:
    client, far = shared.pair(transport)
    client.sendall(b"GET")
    client.shutdown(socket.SHUT_WR)
    assert receive_all(far) == b"GET"  # up to the end of file
    Background(far, MEBIBYTE, then_end=True)
    assert receive_all(client) == MEBIBYTE


@TRANSPORTS
def test_p01_half_close_by_the_target(shared: Shared, transport: str) -> None:
    client, far = shared.pair(transport)
    far.sendall(b"hello")
    far.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b"hello"
    Background(client, MEBIBYTE, then_end=True)
    assert receive_all(far) == MEBIBYTE


def test_p02_both_ends_end_the_connection(shared: Shared) -> None:
    client, far = shared.pair("tcp")
    name = peer_text(client)
    client.sendall(b"ab")
    client.shutdown(socket.SHUT_WR)
    assert receive_all(far) == b"ab"
    far.sendall(b"cde")
    far.shutdown(socket.SHUT_WR)
    assert receive_all(client) == b"cde"
    assert "ended first: client, reason: closed)" in last_line(shared.proxy, name)


def test_p02_reset_by_the_target_reaches_the_client(shared: Shared) -> None:
    client, far = shared.pair("tcp")
    name = peer_text(client)
    far.sendall(MEBIBYTE[:1000])
    assert receive(client, 1000) == MEBIBYTE[:1000]
    reset(far)
    assert is_cut(client)
    assert "ended first: target, reason: reset (Connection reset by peer))" in last_line(shared.proxy, name)


def test_p02_reset_by_the_client_reaches_the_target(shared: Shared) -> None:
    client, far = shared.pair("tcp")
    client.sendall(b"half a req")
    assert receive(far, 10) == b"half a req"
    reset(client)
    assert is_cut(far)


def test_p02_reset_by_a_half_closed_client_reaches_the_target(shared: Shared) -> None:
    client, far = shared.pair("tcp")
    client.shutdown(socket.SHUT_WR)
    assert far.recv(1) == b""
    reset(client)
    sender = Background(far, MEBIBYTE * 256)  # never takes it all
    sender.join()
    assert isinstance(sender.fault, ConnectionError)


def test_p02_the_end_of_the_target_reaches_a_unix_client(shared: Shared) -> None:
    """AF_UNIX has no reset that is always seen: the client's own way is closed, too, unlike after a half-close."""
    client, far = shared.pair("unix")
    reset(far)
    is_cut(client)
    with pytest.raises(ConnectionError):
        client.sendall(b"x")


@TRANSPORTS
def test_p03_a_peer_that_stops_reading_blocks_its_own_direction_only(shared: Shared, transport: str) -> None:
    client, far = shared.pair(transport)
    before = peak_memory(shared.proxy)
    sender = Background(client, MEBIBYTE * 48)  # more than all kernel buffers on the way
    Background(far, MEBIBYTE * 16)
    assert receive(client, len(MEBIBYTE) * 16) == MEBIBYTE * 16
    assert sender.is_alive()  # nobody has read a byte of it
    assert peak_memory(shared.proxy) - before < 4 << 20
    assert receive(far, len(MEBIBYTE) * 48) == MEBIBYTE * 48
    sender.join()
    assert sender.fault is None


def test_p03_full_windows_both_ways_do_not_deadlock(shared: Shared) -> None:
    client, far = shared.pair("tcp")
    senders = [Background(one, MEBIBYTE * 24, then_end=True) for one in (client, far)]
    wait_for(lambda: not is_quiet(client, 0) and not is_quiet(far, 0), "data on both sides")
    assert len(receive_all(client)) == len(MEBIBYTE) * 24
    assert len(receive_all(far)) == len(MEBIBYTE) * 24
    for sender in senders:
        sender.join()
        assert sender.fault is None


def test_p04_p17_limits_of_time(starter: Starter, remote: Remote) -> None:
    listeners: list[dict[str, object]] = [
        {"half_closed_timeout": 0.3},
        {"idle_timeout": 0.3},
        {"max_lifetime": 1.5, "idle_timeout": 0},
        {"half_closed_timeout": 0, "idle_timeout": 0},
    ]
    remote_address = f"127.0.0.1:{remote.port}"
    tree = {
        "allowlist": str(starter.allow_list(("127.0.0.1", remote.port))),
        "listeners": [{"listen": "tcp:127.0.0.1:0", "remote": remote_address, **one} for one in listeners],
    }
    settings = starter.root / "settings.yaml"
    settings.write_text(yaml.safe_dump(tree))
    proxy = starter.start("--settings", str(settings))
    ends = [(proxy.connect(number), remote.accept()) for number in range(4)]
    names = [peer_text(client) for client, _ in ends]
    for number in (0, 3):
        ends[number][0].shutdown(socket.SHUT_WR)
        assert ends[number][1].recv(1) == b""
    for number, reason in enumerate(["half-closed", "idle", "lifetime"]):
        client, far = ends[number]
        assert is_cut(client), reason
        assert is_cut(far) or reason == "half-closed"  # whose end of file the server had read before
        assert f"reason: {reason})" in last_line(proxy, names[number])
    ends[3][1].sendall(b"without limits it waits on")
    assert receive(ends[3][0], 26) == b"without limits it waits on"


def test_p05_two_thousand_connections(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote, "-w", "2500", soft_limit=256)
    assert re.search(r"descriptor limit: raised from 256 to \d{4,}", proxy.log)
    ends = []
    for _ in range(2000):
        client = proxy.connect()
        ends.append((client, remote.accept()))
    for client, far in ends:
        client.sendall(b"a")
        far.sendall(b"b")
    for client, far in ends:
        assert (far.recv(9), client.recv(9)) == (b"a", b"b")
    assert not proxy.lines("WARN")


def test_p06_keep_alive_runs_on_both_sides(shared: Shared) -> None:
    client, far = shared.pair("tcp")
    client.sendall(b"x")
    assert receive(far, 1) == b"x"  # now the proxy has prepared both of its sockets
    ours = ({client.getsockname()[1], shared.proxy.ports[0]}, {far.getpeername()[1], shared.remote.port})
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    timers = [row[5].partition(":")[0] for row in rows if row[3] == "01" and {port_of(row[1]), port_of(row[2])} in ours]
    assert sorted(timers) == ["00", "00", "02", "02"]  # the test's sockets have none; 2 is the keep-alive timer


def port_of(address: str) -> int:
    """Of an address in /proc/net/tcp."""
    return int(address.rpartition(":")[2], 16)


def test_p30_one_line_per_connection_and_never_payload(shared: Shared) -> None:
    secret = b"PAYLOAD-THAT-NO-LOG-SHOWS"
    client, far = shared.pair("tcp")
    name = peer_text(client)
    client.sendall(secret)
    assert receive(far, len(secret)) == secret
    far.sendall(secret * 2)
    far.shutdown(socket.SHUT_WR)
    assert receive_all(client) == secret * 2
    client.close()
    assert re.fullmatch(
        rf"\(listener: tcp:127\.0\.0\.1:0, target: 127\.0\.0\.1:{shared.remote.port}, bytes up: 25, down: 50, "
        r"seconds: \d+\.\d{3}, ended first: target, reason: closed\)",
        last_line(shared.proxy, name),
    )
    assert secret.decode() not in shared.proxy.log  # which is at its most verbose level
    assert shared.proxy.output == ""


def test_hostile_clients_cost_the_others_nothing(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote)
    never_reading, far = proxy.connect(), remote.accept()
    Background(far, MEBIBYTE * 64)
    half_open = [proxy.connect() for _ in range(20)]
    held = [remote.accept() for _ in half_open]
    slow, slow_far = proxy.connect(), remote.accept()
    slow.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for number in range(500):
        slow.sendall(bytes([number % 256]))
        if number % 25 == 0:
            client, other = proxy.connect(), remote.accept()
            client.sendall(b"ping")
            assert receive(other, 4) == b"ping"
            other.sendall(b"pong")
            assert receive(client, 4) == b"pong"
            client.close()
            other.close()
    assert receive(slow_far, 500) == bytes(number % 256 for number in range(500))
    assert len(held) == 20
    never_reading.close()


def serve_until_marker(remote: Remote) -> None:
    """A server that closes when its client has, and answers the one that sends something."""
    while True:
        far = remote.accept()
        with suppress(ConnectionResetError):
            if far.recv(6) == b"served":
                far.sendall(b"indeed")
                return
        far.close()


def test_hostile_thousands_that_vanish_cost_the_others_nothing(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote)
    server = Thread(target=serve_until_marker, args=(remote,), daemon=True)
    server.start()
    for number in range(3000):
        end = socket.create_connection(("127.0.0.1", proxy.ports[0]), DEADLINE)
        if number % 2:
            reset(end)
        else:
            end.close()
    client = proxy.connect()
    client.sendall(b"served")
    assert receive(client, 6) == b"indeed"
    server.join()
    assert not proxy.lines("Traceback")
    assert not proxy.lines("internal error")
