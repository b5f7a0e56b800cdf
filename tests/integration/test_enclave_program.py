"""How `python -m signer.enclave` starts, and how it says why it doesn't."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import DEADLINE, ENVIRONMENT


def start(directory: Path, listen: str, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "signer.enclave", "--listen", listen, "--sealing", "local"]
    command += ["--key-file", str(directory / "development.key"), *more]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, env=ENVIRONMENT, cwd=directory, check=False
    )


@pytest.mark.parametrize(
    ("listen", "text"),
    [
        ("tcp:127.0.0.1:{port}", "Address already in use; another program listens there"),
        ("tcp:192.0.2.1:7", "; this machine does not have that address"),
        ("unix:{directory}/file:3", "another kind of file, which is not replaced; move the file away"),
        ("unix:{directory}/none/v.sock:3", "No such file or directory; make the directory first"),
    ],
)
def test_an_address_that_cannot_be_listened_on(tmp_path: Path, listen: str, text: str) -> None:
    (tmp_path / "file").write_text("notes")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = listen.format(port=taken.getsockname()[1], directory=tmp_path)
        done = start(tmp_path, address, "--development")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"Error: cannot listen on {address}: ")
    assert text in line


def test_development_sealing_must_be_wanted(tmp_path: Path) -> None:
    done = start(tmp_path, "tcp:127.0.0.1:0")
    assert done.returncode == 2
    assert "add --development if that is what you want" in done.stderr
    assert not (tmp_path / "development.key").exists()


@pytest.mark.parametrize("port", ["0", "-1", "2000x", "4294967295", "２０００"])
def test_a_port_of_the_environment_that_is_none(tmp_path: Path, port: str) -> None:
    command = [sys.executable, "-m", "signer.enclave", "--sealing", "none", "--development"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=DEADLINE, env=ENVIRONMENT | {"LISTEN_PORT": port}, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert f"LISTEN_PORT: expected a port number, got {port!r}" in done.stderr


def enclave(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """The program as an image starts it."""
    return subprocess.run(
        [sys.executable, "-m", "signer.enclave", "--sealing", "kms", *arguments],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=ENVIRONMENT | variables,
        check=False,
    )


def test_sealing_by_kms_is_for_an_enclave() -> None:
    """Said before anything else is done: no trace, no listener, no connection."""
    done = enclave()
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: not inside an enclave: there is no security module here (/dev/nsm: ")


@pytest.mark.parametrize(
    ("arguments", "variables", "text"),
    [
        (["--development"], {}, "Error: --sealing kms is not for development: leave out --development"),
        ([], {"PROXY_PORT": "abc"}, "Error: PROXY_PORT: expected a port number, got 'abc'"),
        ([], {"ENDPOINT": "http://kms.example.com"}, "Error: ENDPOINT: expected https://<host name>"),
        ([], {"SEAL_STRICT": "yes"}, "Error: SEAL_STRICT: expected 0 or 1, got 'yes'"),
    ],
)
def test_what_an_image_is_told_must_make_sense(arguments: list[str], variables: dict[str, str], text: str) -> None:
    done = enclave(*arguments, **variables)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(text)


SERVE = [sys.executable, "-m", "signer.enclave", "--listen", "tcp:127.0.0.1:0", "--sealing", "none", "--development"]
PUBLIC_KEY_0 = bytes.fromhex("0000000ca1695075626c69634b657900")
UNINITIALIZED = bytes.fromhex("00000024a163457272a2676d6573736167656d756e696e697469616c697a656466736f75726365f6")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_orderly(number: signal.Signals) -> None:
    with subprocess.Popen(SERVE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("WARNING sealing is off")
        port = int(process.stderr.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)):  # a session between two calls
            assert process.stderr.readline().endswith("opened\n")
            process.send_signal(number)
            assert process.stderr.readline().endswith("closed, 0 key(s) forgotten\n")
        assert process.wait(DEADLINE) == 0


def test_a_log_that_nobody_reads_ends_no_session() -> None:
    with subprocess.Popen(SERVE, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr is not None
        process.stderr.readline()
        port = int(process.stderr.readline().rpartition(":")[2])
        process.stderr.close()
        for _ in range(3):
            with socket.create_connection(("127.0.0.1", port), DEADLINE) as host:
                host.sendall(PUBLIC_KEY_0)
                assert host.recv(len(UNINITIALIZED), socket.MSG_WAITALL) == UNINITIALIZED
        process.terminate()
        assert process.wait(DEADLINE) == 0
