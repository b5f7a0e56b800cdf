"""Parts 1.3 and points 19 to 23: every allow list that can't be used, or refuses, as the command line tells it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import cli
from tests.unit.proxy.log_state import log_as_before

NOT_ALLOWED = "The given address and port are not allowed"


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """The command line sets up the process's log: undo it."""
    with log_as_before():
        yield


def refusal(capsys: pytest.CaptureFixture[str], config: Path, *target: str) -> str:
    """The reason that the command line prints: one line, exit status 1, nothing on standard output."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["8000", *(target or ("localhost", "443")), "--config", str(config)])
    output = capsys.readouterr()
    assert caught.value.code == 1
    assert output.out == ""
    assert "Traceback" not in output.err
    last = output.err.splitlines()[-1]
    found = re.fullmatch('Error: "Error at checking the allowlist: (.*)"', last)
    assert found is not None, last
    return found[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "No allowlist field: the file is empty"),
        ("# only a comment\n", "No allowlist field"),
        ("---\n", "No allowlist field"),
        ("null", "No allowlist field"),
        ("5", "No allowlist field"),
        ("[]", "No allowlist field"),
        ("{}", "No allowlist field"),
        ("allow: []", "No allowlist field"),
        ("allowlist:", "No allowlist field"),
        ("allowlist: 5", "No allowlist field"),
        ("allowlist: {address: a, port: 1}", "No allowlist field"),
        ("allowlist: []", "No allowlist field"),
        ("allowlist: [5]", "No address field"),
        ("allowlist: [{port: 443}]", "No address field"),
        ("allowlist: [{address: 5, port: 443}]", "No address field"),
        ("allowlist: [{address: [a], port: 443}]", "No address field"),
        ("allowlist: [{address: '', port: 443}]", "No address field"),
        ("allowlist: [{address: a}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: '443'}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: 4.5}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: true}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: [443]}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: 0}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: 65536}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: 65979}]", "No port field or invalid type"),
        ("allowlist: [{address: a, port: -1}]", "No port field or invalid type"),
        ("allowlist: [{address: localhost, port: 443}, {address: a}]", r"entry 2, line 1"),
        ("allowlist:\n- {address: localhost, port: 443}\n\n- {port: 1}", r"entry 2, line 4"),
        ("allowlist: [{address: 'a b', port: 443}]", "Could not parse domain name"),
        ("allowlist: [", "Bad yaml format"),
        ("a: b: c", "Bad yaml format"),
        ("\tallowlist: []", "Bad yaml format"),
        ("allowlist: [{address: !!python/object:os.system a, port: 443}]", "No address field"),
        ("allowlist: [*a]", "Bad yaml format"),
        ("allowlist: [{address: a, port: " + "9" * 5000 + "}]", ""),
        ("[" * 5000, "Bad yaml format"),
        (b"\xff\xfe\xfd", "Bad yaml format"),
        (b"allowlist: \x00", "Bad yaml format"),
    ],
)
def test_p19_p20_lists_that_cannot_be_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str | bytes, reason: str
) -> None:
    config = tmp_path / "allow.yaml"
    config.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert re.search(reason, refusal(capsys, config))


def test_p20_files_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, tmp_path / "none").startswith("Could not open the file")
    assert refusal(capsys, tmp_path).startswith("Could not open the file")
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(5 << 20)
    assert refusal(capsys, large).startswith("Could not read the file")


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (("kms.example", "444"), rf"kms\.example port 444 .*listed with port 443 \(line 2\): {NOT_ALLOWED}"),
        (("sts.example", "443"), rf"sts\.example port 443 .*port 443 .*kms\.example \(line 2\): {NOT_ALLOWED}"),
        (("10.0.0.2", "444"), rf"10\.0\.0\.2 port 444 .*{NOT_ALLOWED}"),
        (("16", "443"), ".*this is the TCP host to connect to, not the CID of the enclave"),
        (("", "443"), "Could not parse domain name.*"),
        (("a..b", "443"), "Could not parse domain name.*"),
        (("kms.example:443", "443"), "Could not parse domain name.*"),
        ((os.fsdecode(b"k\xff.example"), "443"), "Could not parse domain name.*"),
        (("10.0.0.1", "443", "-6"), ".*No accepted IP was found.*"),
        (("::1", "443", "-4"), ".*No accepted IP was found.*"),
        (("10.0.0.1", "8443", "--check-tls-name"), "the TLS name check needs a name, and 10.0.0.1 is listed .*"),
    ],
)
def test_p22_p23_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: tuple[str, ...], reason: str
) -> None:
    config = tmp_path / "allow.yaml"
    config.write_text("allowlist:\n- {address: kms.example, port: 443}\n- {address: 10.0.0.1, port: 8443}\n")
    found = refusal(capsys, config, *target)
    assert re.fullmatch(reason, found), found


def test_other_keys_and_documents_are_ignored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both styles occur in the field; what else is there does not matter."""
    config = tmp_path / "allow.yaml"
    config.write_text("version: 5\nallowlist:\n- address: kms.example\n  port: 443\n  note: x\n--- second document")
    assert NOT_ALLOWED in refusal(capsys, config)  # it was read, and localhost isn't in it


def test_nothing_is_logged_below_the_level_but_the_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUST_LOG", "off")
    with pytest.raises(SystemExit):
        cli.main(["8000", "localhost", "443", "--config", str(tmp_path / "none")])
    assert capsys.readouterr().err.startswith('Error: "Error at checking the allowlist: Could not open the file')


def start_error(capsys: pytest.CaptureFixture[str], config: Path, *options: str) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--listen", "tcp:127.0.0.1:0", "localhost", "443", "--config", str(config), *options])
    output = capsys.readouterr()
    assert caught.value.code == 1
    assert output.out == ""
    assert "Traceback" not in output.err
    return output.err.splitlines()[-1]


def test_p29_a_metrics_address_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "allow.yaml"
    config.write_text("allowlist: [{address: localhost, port: 443}]")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert start_error(capsys, config, "--metrics", address) == (
            f'Error: "Could not listen for metrics on {address}: Address already in use"'
        )
    text = start_error(capsys, config, "--metrics", "a..b:1")
    assert text.startswith('Error: "Could not listen for metrics on a..b:1: ')
