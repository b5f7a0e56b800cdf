"""Parts 1.1 and 1.2: what the command line takes, the order of the checks, texts, exit status and streams."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import cli
from proxy.address import VSOCK_ANY, TcpAddress, UnixAddress, VsockAddress
from proxy.daemon import StartError
from proxy.settings import Settings
from tests.unit.proxy.log_state import log_as_before

PLAIN = ["8000", "localhost", "443"]


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command line sets up the process's log: undo it."""
    with log_as_before():
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """With what settings the proxy would have run."""
    found: list[Settings] = []

    def run(settings: Settings) -> int:
        found.append(settings)
        return 0

    monkeypatch.setattr(cli, "run", run)
    return found


def status(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    code = caught.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize(
    "arguments",
    [
        ["-w8", *PLAIN],
        ["-w", "8", *PLAIN],
        ["-w=8", *PLAIN],
        ["--num_workers", "8", *PLAIN],
        ["--num_workers=8", *PLAIN],
        ["--num-workers", "8", *PLAIN],
        ["8000", "-w8", "localhost", "443"],
        ["8000", "localhost", "-w", "8", "443"],
        [*PLAIN, "-w=8"],
        ["-w8", "--", *PLAIN],
        ["8000", "-w", "8", "--", "localhost", "443"],
        ["-w+8", *PLAIN],
        ["-w", "0008", *PLAIN],
        ["-w=" + "0" * 5000 + "8", *PLAIN],
        ["-w8", "+8000", "localhost", "+443"],
        ["-w8", "0008000", "localhost", "000443"],
        ["-w8", "+" + "0" * 5000 + "8000", "localhost", "443"],
    ],
)
def test_spellings_of_one_command_line(taken: list[Settings], arguments: list[str]) -> None:
    assert status(*arguments) == 0
    (settings,) = taken
    (forward,) = settings.forwards
    assert forward.listen == VsockAddress(3, 8000)
    assert (forward.remote_host, forward.remote_port, forward.num_workers) == ("localhost", 443, 8)
    assert settings.allowlist == Path("/etc/nitro_enclaves/vsock-proxy.yaml")


@pytest.mark.parametrize(
    ("arguments", "family", "workers"),
    [
        (["-4"], 4, 64),
        (["--ipv4"], 4, 64),
        (["-6"], 6, 64),
        (["--ipv6"], 6, 64),
        (["-4w8"], 4, 8),
        (["-6w=8"], 6, 8),
        (["-4w", "8"], 4, 8),
        ([], None, 64),
    ],
)
def test_flags(taken: list[Settings], arguments: list[str], family: int | None, workers: int) -> None:
    assert status(*PLAIN, *arguments) == 0
    (forward,) = taken[0].forwards
    assert (forward.family, forward.num_workers) == (family, workers)


@pytest.mark.parametrize("arguments", [["--config=a.yaml"], ["--config", "a.yaml"]])
def test_config(taken: list[Settings], arguments: list[str]) -> None:
    assert status(*arguments, *PLAIN) == 0
    assert taken[0].allowlist == Path("a.yaml")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "<local_port> <remote_addr> <remote_port>"),
        (["8000"], "<remote_addr> <remote_port>"),
        (["8000", "localhost"], "<remote_port>"),
        ([*PLAIN, "more"], "more"),
        ([*PLAIN, "-4", "-6"], "-4"),
        ([*PLAIN, "-46"], "-4"),
        ([*PLAIN, "-4", "-4"], "--ipv4"),
        ([*PLAIN, "-44"], "--ipv4"),
        ([*PLAIN, "-w8", "-w8"], "--num-workers"),
        ([*PLAIN, "-w8", "--num_workers=8"], "--num-workers"),
        ([*PLAIN, "--config=a", "--config=b"], "--config"),
        ([*PLAIN, "--num_work=8"], "--num_work"),
        ([*PLAIN, "--conf=a"], "--conf"),
        ([*PLAIN, "--ipv"], "--ipv"),
        ([*PLAIN, "--ver"], "--ver"),
        (["-8000", "localhost", "443"], "-8"),
        (["8000", "localhost", "-443"], "-3"),
        ([*PLAIN, "-x"], "-x"),
        ([*PLAIN, "--nonsense"], "--nonsense"),
        ([*PLAIN, "-w"], "-w"),
        ([*PLAIN, "--config"], "--config"),
        ([*PLAIN, "-w", "-1"], "-1"),
        (["-w", "-4", *PLAIN], "-4"),
        (["--config", "-4", *PLAIN], "-4"),
        (["--num_workers", "--", *PLAIN], "--num_workers"),
        ([*PLAIN, "--ipv4=yes"], "--ipv4"),
        ([*PLAIN, "-c", "a"], "-c"),
        (["--listen", "tcp:127.0.0.1:1", *PLAIN], "443"),
        (["--listen", "nonsense", "localhost", "443"], "nonsense"),
        (["--listen", "vsock:4294967296:1", "localhost", "443"], "2^32"),
        (["--listen", "vsock:3:4294967295", "localhost", "443"], "any port"),
        (["--listen", "vsock:3:" + "9" * 5000, "localhost", "443"], "at most"),
        (["--listen", "unix:" + "a" * 200 + ":1", "localhost", "443"], "107"),
        (["--listen", "tcp:127.0.0.1:65536", "localhost", "443"], "65535"),
        (["--listen", "tcp:127.0.0.1:1", "--bind-cid", "any", "localhost", "443"], "--bind-cid"),
        (["--bind-cid", "many", *PLAIN], "many"),
        (["--bind-cid", "4294967296", *PLAIN], "4294967296"),
        (["--idle-timeout", "soon", *PLAIN], "--idle-timeout"),
        (["--idle-timeout=-1", *PLAIN], "--idle-timeout"),
        (["--idle-timeout", "nan", *PLAIN], "--idle-timeout"),
        (["--idle-timeout", "inf", *PLAIN], "--idle-timeout"),
        (["--max-waiting", "1.5", *PLAIN], "--max-waiting"),
        (["--max-waiting", "9" * 5000, *PLAIN], "--max-waiting"),
        (["--drain-timeout", "x", *PLAIN], "--drain-timeout"),
        (["--allowed-cid", "x", *PLAIN], "--allowed-cid"),
        (["--metrics", "9090", *PLAIN], "--metrics"),
        (["--metrics", "127.0.0.1:65536", *PLAIN], "--metrics"),
        (["--metrics", "127.0.0.1:" + "9" * 5000, *PLAIN], "--metrics"),
        (["--settings", "file", *PLAIN], "8000"),
        (["--settings", "file", "--listen", "tcp:127.0.0.1:1"], "--settings"),
    ],
)
def test_wrong_usage(
    taken: list[Settings], capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert status(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert text in output.err.splitlines()[0]
    assert "Usage: vsock-proxy [OPTIONS] <local_port> <remote_addr> <remote_port>" in output.err
    assert not taken


BAD_NUMBERS = ["", "x", " 8", "8 ", "1_000", "0x10", "１２", "٣", "²", "1e3", "8.0", "++8", "8+", "+", "９", "9" * 5000]


@pytest.mark.parametrize("text", [*BAD_NUMBERS, "4294967295", "4294967296"])
def test_bad_local_port(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert status(text, "localhost", "x", "-w0") == 1  # the first check that fails is the one that is told
    assert capsys.readouterr() == ("", 'Error: "Local port is not valid"\n')


@pytest.mark.parametrize("text", [*BAD_NUMBERS, "65536", "70000"])
def test_bad_remote_port(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert status("8000", "localhost", text, "-w0") == 1
    assert capsys.readouterr() == ("", 'Error: "Remote port is not valid"\n')


@pytest.mark.parametrize("text", [*BAD_NUMBERS, "18446744073709551616"])
def test_bad_number_of_workers(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert status(*PLAIN, f"--num_workers={text}", "--config=/nonexistent") == 1
    assert capsys.readouterr() == ("", 'Error: "Number of workers is not valid"\n')


def test_a_double_equals_sign_is_no_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*PLAIN, "-w==8") == 1
    assert status(*PLAIN, "-w=") == 1
    assert capsys.readouterr().err == 'Error: "Number of workers is not valid"\n' * 2


@pytest.mark.parametrize("text", ["0", "+0", "000"])
def test_no_workers(capsys: pytest.CaptureFixture[str], text: str) -> None:
    assert status(*PLAIN, "-w", text, "--config=/nonexistent") == 1
    assert capsys.readouterr() == ("", 'Error: "Number of workers must not be 0"\n')


@pytest.mark.parametrize("port", ["0", "4294967294"])
def test_limits_of_the_local_port(taken: list[Settings], port: str) -> None:
    assert status(port, "localhost", "65535", "-w18446744073709551615") == 0
    (forward,) = taken[0].forwards
    assert forward.listen == VsockAddress(3, int(port))
    assert (forward.remote_port, forward.num_workers) == (65535, 2**64 - 1)


def test_remote_port_zero_passes_the_check_and_no_list_allows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "allow.yaml"
    config.write_text("allowlist: [{address: localhost, port: 443}]")
    assert status("8000", "localhost", "0", "--config", str(config)) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('Error: "Error at checking the allowlist: localhost port 0 was compared with 1 entry')
    assert last.endswith('The given address and port are not allowed"')


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["-h", *PLAIN], [*PLAIN, "-w0", "--help"]])
def test_help(taken: list[Settings], capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert status(*arguments) == 0
    output = capsys.readouterr()
    assert output.out.startswith("Usage: vsock-proxy [OPTIONS] <local_port> <remote_addr> <remote_port>\n")
    assert "[default: 64]" in output.out
    assert output.err == ""
    assert not taken


@pytest.mark.parametrize("arguments", [["-V"], ["--version"], ["-V", *PLAIN]])
def test_version(taken: list[Settings], capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert status(*arguments) == 0
    output = capsys.readouterr()
    assert output.out.startswith("nitro-vsock-proxy ")
    assert output.out.count("\n") == 1
    assert output.err == ""
    assert not taken


def test_p27_listen_takes_the_place_of_the_local_port(taken: list[Settings]) -> None:
    listen = ["--listen", "tcp:127.0.0.1:9000", "--listen=unix:/run/v.sock:8000", "--listen", "vsock:any:8000"]
    assert status("localhost", *listen, "443") == 0
    assert [one.listen for one in taken[0].forwards] == [
        TcpAddress("127.0.0.1", 9000),
        UnixAddress("/run/v.sock", 8000),
        VsockAddress(VSOCK_ANY, 8000),
    ]
    assert {one.remote_host for one in taken[0].forwards} == {"localhost"}


@pytest.mark.parametrize(("text", "cid"), [("any", VSOCK_ANY), ("local", 1), ("5", 5)])
def test_p28_bind_cid(taken: list[Settings], text: str, cid: int) -> None:
    assert status(*PLAIN, "--bind-cid", text) == 0
    assert taken[0].forwards[0].listen == VsockAddress(cid, 8000)


def test_every_option_arrives(taken: list[Settings]) -> None:
    options = {
        "max-waiting": "1",
        "queue-timeout": "2.5",
        "connect-timeout": "3",
        "idle-timeout": "0",
        "half-closed-timeout": "5",
        "max-lifetime": "6",
        "max-connections-per-cid": "7",
        "max-rate-per-cid": "8.5",
    }
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += ["--allowed-cid=16", "--allowed-cid", "17", "--check-tls-name", "--drain-timeout=9"]
    assert status(*arguments, "--metrics", "[::1]:9090", *PLAIN) == 0
    (settings,) = taken
    (forward,) = settings.forwards
    for name, value in options.items():
        assert getattr(forward, name.replace("-", "_")) == float(value)
    assert forward.allowed_cids == (16, 17)
    assert forward.check_tls_name
    assert (settings.drain_timeout, settings.metrics) == (9, ("::1", 9090))


def test_p18_allowed_cids_need_vsock(taken: list[Settings], capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--listen", "tcp:127.0.0.1:0", "localhost", "443", "--allowed-cid", "16") == 2
    assert "only a vsock listener knows the CID of its peers" in capsys.readouterr().err
    assert not taken


def test_settings_file(taken: list[Settings], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text('listeners: [{listen: "vsock:3:8000", remote: "localhost:443", num_workers: 5}]')
    assert status("--settings", str(file), "-4", "--config", "mine.yaml", "--idle-timeout", "7") == 0
    (settings,) = taken
    (forward,) = settings.forwards
    assert (forward.num_workers, forward.family, forward.idle_timeout) == (5, 4, 7)
    assert settings.allowlist == Path("mine.yaml")


def test_a_bad_settings_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("listeners: [{listen: nonsense, remote: localhost}]\nidle: 5")
    assert status("--settings", str(file)) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(f'Error: "{file}: idle: unknown key')
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.err


def test_a_fault_while_running_is_told_as_the_original_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(_: Settings) -> int:
        raise StartError('Could not "listen" \\ for\nconnections')

    monkeypatch.setattr(cli, "run", run)
    assert status(*PLAIN) == 1
    assert capsys.readouterr() == ("", 'Error: "Could not \\"listen\\" \\\\ for\\nconnections"\n')
