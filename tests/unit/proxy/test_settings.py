"""The settings: defaults, the file with several listeners, and what every fault in it says."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.address import TcpAddress, UnixAddress, VsockAddress
from proxy.settings import Forward, Settings, SettingsError, host_port, load

GOOD = "listeners: [{listen: 'vsock:3:8000', remote: 'localhost:443'}]\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "settings.yaml"


def faults(file: Path, text: str | bytes) -> list[str]:
    """What is said about *text*, without the path of the file."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingsError) as caught:
        load(file, {})
    lines = str(caught.value).splitlines()
    assert all(line.startswith(str(file)) for line in lines)
    return [line.removeprefix(str(file)).removeprefix(": ") for line in lines]


def test_defaults(file: Path) -> None:
    file.write_text(GOOD)
    settings = load(file, {})
    (forward,) = settings.forwards
    assert forward.listen == VsockAddress(3, 8000)
    assert (forward.remote_host, forward.remote_port, forward.family) == ("localhost", 443, None)
    assert (forward.num_workers, forward.max_waiting, forward.queue_timeout) == (64, 128, 10)  # P2.15
    assert (forward.connect_timeout, forward.idle_timeout, forward.half_closed_timeout) == (10, 600, 60)  # 12, 17, 4
    assert (forward.max_lifetime, forward.max_connections_per_cid, forward.max_rate_per_cid) == (0, 0, 0)
    assert forward.allowed_cids is None
    assert not forward.check_tls_name  # P2.33
    assert settings.allowlist == Path("/etc/nitro_enclaves/vsock-proxy.yaml")
    assert settings.drain_timeout == 10  # P2.24
    assert settings.metrics is None


def test_p27_what_stands_at_the_top_holds_for_listeners_that_do_not_say_otherwise(file: Path) -> None:
    file.write_text(
        """
allowlist: /allow.yaml
drain_timeout: 3
metrics: "[::1]:9090"
idle_timeout: 5
num_workers: 6
listeners:
  - {listen: "vsock:any:8000", remote: "kms.example:443"}
  - {listen: "unix:/run/v.sock:1", remote: "[::1]:8443", num_workers: 7, family: 6}
  - {listen: "tcp:[::1]:9", remote: "h:1", idle_timeout: 0, check_tls_name: true}
"""
    )
    settings = load(file, {"num_workers": 9, "drain_timeout": 4.0})
    first, second, third = settings.forwards
    assert second.listen == UnixAddress("/run/v.sock", 1)
    assert third.listen == TcpAddress("::1", 9)
    assert (second.remote_host, second.remote_port, second.family) == ("::1", 8443, 6)
    assert [one.idle_timeout for one in settings.forwards] == [5, 5, 0]
    assert [one.num_workers for one in settings.forwards] == [9, 9, 9]  # the command line goes first
    assert third.check_tls_name
    assert not first.check_tls_name
    assert (settings.drain_timeout, settings.metrics, settings.allowlist) == (4, ("::1", 9090), Path("/allow.yaml"))
    assert [str(one) for one in settings.forwards] == ["vsock:any:8000", "/run/v.sock_1", "tcp:[::1]:9"]


ENTRY = "listeners: [{listen: 'vsock:3:8000', remote: 'localhost:443', %s}]"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", ["expected a map with the key listeners"]),
        ("5", ["expected a map with the key listeners"]),
        ("[]", ["expected a map with the key listeners"]),
        ("{5: 6}", ["expected a map with the key listeners"]),
        ("a: 1", ["a: unknown key", "listeners: expected a list of maps with listen and remote"]),
        ("listeners:", ["listeners: expected a list of maps with listen and remote"]),
        ("listeners: []", ["listeners: expected a list of maps with listen and remote"]),
        ("listeners: {}", ["listeners: expected a list of maps with listen and remote"]),
        ("listeners: [5]", ["listeners: expected a list of maps with listen and remote"]),
        ("listeners: [{}]", ["listener 1: listen: Field required", "remote_host: Field required"]),
        (GOOD + "idle_timeot: 5", ["idle_timeot: unknown key; did you mean idle_timeout?"]),
        (ENTRY % "num_worker: 5", ["listener 1: num_worker: unknown key; did you mean num_workers?"]),
        (ENTRY % "num_workers: 0", ["listener 1: num_workers: "]),
        (ENTRY % "num_workers: true", ["listener 1: num_workers: expected a number"]),
        (ENTRY % "idle_timeout: -1", ["listener 1: idle_timeout: "]),
        (ENTRY % "idle_timeout: .inf", ["listener 1: idle_timeout: "]),
        (ENTRY % "idle_timeout: .nan", ["listener 1: idle_timeout: "]),
        (ENTRY % "idle_timeout: {}", ["listener 1: idle_timeout: "]),
        (ENTRY % "family: 5", ["listener 1: family: "]),
        (ENTRY % "allowed_cids: [-1]", ["listener 1: allowed_cids.0: "]),
        (ENTRY % "allowed_cids: [4294967296]", ["listener 1: allowed_cids.0: "]),
        (ENTRY % "allowed_cids: 5", ["listener 1: allowed_cids: "]),
        (ENTRY % "5: 6", ["listener 1: "]),
        ("listeners: [{listen: 'vsock:3:8000', remote: localhost}]", ["listener 1: remote: expected host:port"]),
        ("listeners: [{listen: 'vsock:3:8000', remote: ':443'}]", ["listener 1: remote: expected host:port"]),
        ("listeners: [{listen: 'vsock:3:8000', remote: 'h:65536'}]", ["listener 1: remote: expected host:port"]),
        ("listeners: [{listen: 'vsock:3:8000', remote: ['h:1']}]", ["listener 1: remote: expected host:port"]),
        ("listeners: [{listen: 5, remote: 'h:1'}]", ["listener 1: listen: expected vsock:<cid>:<port>, "]),
        ("listeners: [{listen: {cid: 3, port: 5}, remote: 'h:1'}]", ["listener 1: listen: expected vsock:<cid>"]),
        ("listeners: [{listen: 'vsock:x:1', remote: 'h:1'}]", ["listener 1: listen: 'vsock:x:1': the CID is"]),
        ("listeners: [{listen: 'vsock:3:4294967295', remote: 'h:1'}]", ["listener 1: listen: Linux takes the port"]),
        (GOOD + "metrics: 9090", ["metrics: expected host:port"]),
        (GOOD + "metrics: 'h:x'", ["metrics: expected host:port"]),
        (GOOD + "metrics: [[['h:1']]]", ["metrics: expected host:port"]),
        (GOOD + "drain_timeout: x", ["drain_timeout: "]),
        (GOOD + "allowlist: 5", ["allowlist: "]),
        (GOOD + "num_workers: 5\nnum_workers: 6", [":3: the key num_workers is there twice"]),
        ("listeners: [{listen: 'vsock:3:1', listen: 'vsock:3:2'}]", [":1: the key listen is there twice"]),
        ("a: [", [":1: "]),
        ("\n\na: b: c", [":3: "]),
        ("a: !!python/object:os.system {}", [":1: "]),
        ("? [a]\n: b", [":1: "]),
        ("? [a]\n: b\n? [a]\n: b", [":1: "]),
        ("a: *b", [":1: "]),
        ("--- {}\n--- {}", [":2: "]),
        ("a: 2001-99-99", ["not YAML: "]),
        ("a: " + "9" * 5000, ["not YAML: "]),
        ("[" * 5000, ["not YAML: "]),
        (b"\xff\xfe\xff", ["not YAML: "]),
        (b"a: \x00", ["not YAML: "]),
    ],
)
def test_every_fault_is_told_with_its_place(file: Path, text: str | bytes, told: list[str]) -> None:
    found = faults(file, text)
    for one in told:
        assert any(one in line for line in found), found


def test_all_faults_at_once(file: Path) -> None:
    text = "x: 1\nlisteners: [{listen: a, remote: 'h:1', family: 5}, {listen: 'tcp:h:1', remote: 'h:1', idle: 5}]"
    assert len(faults(file, text)) == 4


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot read .*/none: No such file or directory"):
        load(tmp_path / "none", {})
    with pytest.raises(SettingsError, match="cannot read .*: Is a directory"):
        load(tmp_path, {})


def test_a_file_that_is_too_large(file: Path) -> None:
    assert faults(file, "#" * (1024 * 1024 + 1)) == ["larger than 1048576 bytes"]


def test_p18_allowed_cids_need_vsock(file: Path) -> None:
    text = "listeners: [{listen: 'unix:/v:1', remote: 'h:1', allowed_cids: [3]}]"
    assert faults(file, text) == ["listener 1: allowed_cids: only a vsock listener knows the CID of its peers"]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("h:0", ("h", 0)),
        ("[::1]:65535", ("::1", 65535)),
        ("::1:80", ("::1", 80)),
        ("h", None),
        (":80", None),
        ("[]:80", None),
        ("h:", None),
        ("h:+1", None),
        ("h:１", None),
        ("h:65536", None),
        ("h:" + "9" * 5000, None),
        (5, None),
        (None, None),
    ],
)
def test_host_and_port(text: object, found: tuple[str, int] | None) -> None:
    assert host_port(text) == found


def test_settings_from_python_need_a_forward() -> None:
    forward = Forward(listen=VsockAddress(3, 8000), remote_host="h", remote_port=1)
    assert Settings(forwards=(forward,)).forwards[0].listen == VsockAddress(3, 8000)
    with pytest.raises(ValueError, match="forwards"):
        Settings(forwards=())
