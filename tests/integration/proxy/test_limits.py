"""Points 7, 12, 15, 16, 18 and 27 with a real process: what one connection or listener can't take from the others."""

from __future__ import annotations

import resource
import socket
from collections.abc import Sequence
from pathlib import Path

from tests.integration.conftest import wait_for
from tests.integration.proxy.conftest import ProxyProcess, Remote, Starter, is_cut, is_quiet, receive, receive_all


def check_exchange(client: socket.socket, far: socket.socket) -> None:
    """Bytes go both ways."""
    client.sendall(b"ask")
    assert receive(far, 3) == b"ask"
    far.sendall(b"answer")
    assert receive(client, 6) == b"answer"


def test_p07_a_failed_connect_touches_no_other(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote, "--metrics", "127.0.0.1:0")
    client, far = proxy.connect(), remote.accept()
    remote.listener.close()
    assert proxy.refuses()
    check_exchange(client, far)
    again = starter.remote(remote.port)
    check_exchange(proxy.connect(), again.accept())
    assert proxy.lines(f"no connection to 127.0.0.1:{remote.port}: Connection refused")
    assert proxy.metric("vsock_proxy_refused_total", 'reason="connect-refused"') == 1


def test_p12_connect_timeout_and_its_counter(starter: Starter) -> None:
    full = starter.remote(backlog=0)
    with socket.create_connection(("127.0.0.1", full.port)):  # no room for another: the kernel drops what comes
        proxy = starter.forward(full, "--connect-timeout", "0.3", "--metrics", "127.0.0.1:0")
        assert proxy.refuses()
    assert proxy.lines(f"no connection to 127.0.0.1:{full.port} in 0.3 s")
    assert proxy.metric("vsock_proxy_refused_total", 'reason="connect-timeout"', 'cid="unknown"') == 1


def test_p15_waiting_connections_are_served_in_turn(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote, "-w1", "--max-waiting", "2")
    first, first_far = proxy.connect(), remote.accept()
    waiting = []
    for number in range(3):
        waiting.append(proxy.connect())
        waiting[-1].sendall(b"%d" % number)
        proxy.wait_for_log("Accepted connection", min(number + 2, 3))
    assert is_quiet(remote.listener)
    assert len(proxy.lines("Accepted connection")) == 3  # the queue is full: the fourth is not accepted
    ends = [(first, first_far)]
    for number, client in enumerate(waiting):
        ends[-1][0].close()
        ends[-1][1].close()
        far = remote.accept()
        assert receive(far, 1) == b"%d" % number
        ends.append((client, far))
    assert len(proxy.lines("Accepted connection")) == 4


def test_p15_waiting_ends_with_a_reset_a_count_and_few_lines(starter: Starter, remote: Remote) -> None:
    options = ("-w", "1", "--max-waiting", "30", "--queue-timeout", "0.4", "--metrics", "127.0.0.1:0")
    proxy = starter.forward(remote, *options)
    client, far = proxy.connect(), remote.accept()
    waiting = [proxy.connect() for _ in range(30)]
    assert [is_cut(one) for one in waiting] == [True] * 30
    lines = proxy.lines("waited 0.4 s for one of 1 workers, and was reset")
    assert 1 <= len(lines) <= 3
    assert proxy.metric("vsock_proxy_refused_total", 'reason="queue"') == 30
    check_exchange(client, far)


def test_p16_without_descriptors_it_waits(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote)
    client, far = proxy.connect(), remote.accept()
    check_exchange(client, far)
    pid = proxy.process.pid
    used = len(list(Path(f"/proc/{pid}/fd").iterdir()))
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, hard))
    late = [proxy.connect() for _ in range(5)]
    proxy.wait_for_log("Could not accept connection: Too many open files; trying again")
    check_exchange(client, far)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (hard, hard))
    fars = [remote.accept() for _ in late]
    for one in late:
        one.sendall(b"x")
    assert [receive(one, 1) for one in fars] == [b"x"] * 5
    assert len(proxy.lines("Could not accept")) <= 3  # not once for each try


def test_p18_limits_per_peer(starter: Starter, remote: Remote) -> None:
    """Peers without a CID count as one."""
    proxy = starter.forward(remote, "--max-connections-per-cid", "2", "--metrics", "127.0.0.1:0")
    ends = [(proxy.connect(), remote.accept()) for _ in range(2)]
    assert proxy.refuses()
    assert proxy.metric("vsock_proxy_refused_total", 'reason="peer-connections"') == 1
    for end in ends[0]:
        end.close()
    proxy.wait_for_log("disconnected")
    check_exchange(proxy.connect(), remote.accept())
    check_exchange(*ends[1])


def test_p18_rate_per_peer(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote, "--max-rate-per-cid", "0.001")
    check_exchange(proxy.connect(), remote.accept())
    assert proxy.refuses()
    assert proxy.lines("its CID opens connections too fast")


def test_p27_listeners_have_their_own_limits_and_counters(starter: Starter, remote: Remote) -> None:
    base = starter.root / "v.sock"
    listen = [f"unix:{base}:1", f"unix:{base}:2"]
    options = ("--max-connections-per-cid", "1", "--metrics", "127.0.0.1:0")
    proxy = starter.forward(remote, *options, listen=listen)
    paths = [Path(f"{base}_1"), Path(f"{base}_2")]
    ends = [(proxy.connect_unix(path), remote.accept()) for path in paths]  # one for each
    is_cut(proxy.connect_unix(paths[0]))
    for client, far in ends:
        check_exchange(client, far)

    def accepted(path: Path) -> float:
        return proxy.metric("vsock_proxy_accepted_total", f'listener="{path}"')

    assert (accepted(paths[0]), accepted(paths[1])) == (2, 1)
    assert proxy.metric("vsock_proxy_refused_total", f'listener="{paths[1]}"') == 0


def test_p29_metrics(starter: Starter, remote: Remote) -> None:
    proxy = starter.forward(remote, "--metrics", "127.0.0.1:0", "-w", "2")
    clients, fars = zip(*[(proxy.connect(), remote.accept()) for _ in range(2)], strict=True)
    proxy.connect()  # waits
    clients[0].sendall(b"12345")
    assert receive(fars[0], 5) == b"12345"
    wait_for(lambda: proxy.metric("vsock_proxy_waiting") == 1, "the waiting connection in the metrics")
    assert proxy.metric("vsock_proxy_active") == 2
    wait_for(lambda: proxy.metric("vsock_proxy_bytes_total", 'direction="up"') == 5, "bytes of a live connection")
    fars[0].sendall(b"1234567")
    fars[0].close()
    assert receive_all(clients[0]) == b"1234567"
    clients[0].close()
    proxy.wait_for_log("disconnected")
    found = proxy.metrics()
    labels = 'listener="tcp:127.0.0.1:0"'
    assert found[f'vsock_proxy_accepted_total{{cid="unknown",{labels}}}'] == 3
    assert found[f'vsock_proxy_bytes_total{{cid="unknown",direction="down",{labels}}}'] == 7
    assert found[f'vsock_proxy_ended_total{{cid="unknown",{labels},reason="closed"}}'] == 1
    for name in ("connect", "first_byte", "duration"):
        assert found[f"vsock_proxy_{name}_seconds_count{{{labels}}}"] >= 1
    assert found[f"vsock_proxy_lookup_failures_total{{{labels}}}"] == 0
    assert found[f"vsock_proxy_lookup_age_seconds{{{labels}}}"] < 60
    assert found[f"vsock_proxy_candidates{{{labels}}}"] == 1
    assert_no_peer_port(proxy, clients)


def assert_no_peer_port(proxy: ProxyProcess, clients: Sequence[socket.socket]) -> None:
    """No label names the port of a peer: there would be as many series as connections."""
    ports = proxy.lines("Accepted connection on tcp: 127.0.0.1:")
    names = "\n".join(proxy.metrics())
    assert len(ports) >= len(clients)
    assert not any(f":{line.rpartition(':')[2]}" in names for line in ports)
