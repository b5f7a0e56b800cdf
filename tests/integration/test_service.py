"""The signer as a service: what its manager hears, SIGHUP under load, and the order in which it starts and ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from signer.tezos.keys import Curve
from tests.integration import conftest
from tests.integration.conftest import DEADLINE, Setup, attestation, running, wait_for
from tests.nitro_cli import NitroCli, enclave


class Manager:
    """A service manager: hears what is sent to its socket."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(directory / "notify"))
        self._socket.setblocking(False)
        self.path = str(directory / "notify")
        self.heard: list[str] = []

    def listen(self) -> list[str]:
        """Everything so far, one entry a datagram."""
        with suppress(BlockingIOError):
            while True:
                self.heard.append(self._socket.recv(5000).decode())
        return self.heard

    def wait_for(self, pattern: str, what: str = "") -> None:
        wait_for(
            lambda: any(re.search(pattern, text) for text in self.listen()), what or f"the manager hears {pattern}"
        )

    def forget(self) -> None:
        self.listen()
        self.heard = []

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    one = Manager(tmp_path)
    monkeypatch.setitem(conftest.ENVIRONMENT, "NOTIFY_SOCKET", one.path)
    yield one
    one.close()


@contextmanager
def load(setup: Setup, pkh: str) -> Iterator[list[Any]]:
    """Attestations by *pkh*, one after the other; yields the answers, each as status and body."""
    answers: list[Any] = []
    end = threading.Event()

    def ask() -> None:
        level = 1000
        while not end.is_set():
            try:
                answers.append(setup.api.sign(pkh, attestation(Curve.ED25519, level)))
            except OSError as exc:
                answers.append((0, exc))
            level += 1

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        end.set()
        thread.join()


def more(answers: list[Any], number: int = 20) -> None:
    """Return after so many further answers."""
    wanted = len(answers) + number
    wait_for(lambda: len(answers) >= wanted, "answers")


def log_has(setup: Setup, text: str, times: int = 1) -> None:
    wait_for(lambda: setup.log.read_text().count(text) >= times, f"{times} x {text!r} in the log")


def tasks(setup: Setup) -> Any:
    return setup.utility.get("/healthz?verbose")[1]["tasks"]


# -- the service manager


def test_ready_only_once_a_key_can_sign(setup: Setup, manager: Manager) -> None:
    setup.generate("tz1", 2)
    setup.stop(setup.processes[0], signal.SIGKILL)
    process = setup.start_signer()
    manager.wait_for("STATUS=waiting: none of 2 configured")
    assert setup.utility.get("/healthz")[0] == 503, "it answers already"
    assert not any("READY" in text for text in manager.listen())
    enclave = setup.start_enclave()
    manager.wait_for(r"READY=1\nSTATUS=signing with [12] of 2 key")
    manager.wait_for("STATUS=signing with 2 of 2 key.*vault nitro: connected to")
    setup.stop(enclave, signal.SIGKILL)
    manager.wait_for("STATUS=waiting")
    assert setup.stop(process) == 0
    assert manager.listen()[-1] == "STOPPING=1"
    assert sum("READY" in text for text in manager.heard) == 1


def test_a_signer_without_a_usable_key_never_says_ready(setup: Setup, manager: Manager) -> None:
    setup.write_config()
    process = setup.start_signer()
    manager.wait_for("STATUS=waiting: none of 0 configured")
    assert setup.stop(process) == 0
    assert not any("READY" in text for text in manager.listen())


def test_a_silent_enclave_starves_the_watchdog(setup: Setup, manager: Manager, monkeypatch: pytest.MonkeyPatch) -> None:
    """While its link counts as up: WatchdogSec is shorter than the time that the enclave has for an answer here."""
    monkeypatch.setitem(conftest.ENVIRONMENT, "WATCHDOG_USEC", "2000000")
    setup.nitro["exchange_timeout"] = 60
    setup.generate("tz1")
    setup.start_signer()
    manager.wait_for("READY=1")
    manager.forget()
    manager.wait_for("WATCHDOG=1")
    enclave = setup.processes[0]
    enclave.send_signal(signal.SIGSTOP)
    try:
        log_has(setup, "watchdog is not fed: vault nitro shows no sign of life")
        manager.forget()
    finally:
        enclave.send_signal(signal.SIGCONT)
    manager.wait_for("WATCHDOG=1")


# -- reload


def test_sighup_under_load(setup: Setup, manager: Manager) -> None:
    first, second = setup.generate("tz1", 2)
    policy = setup.policies.pop(second)
    setup.write_config()
    process = setup.start_signer()
    manager.wait_for("READY=1")
    message = attestation(Curve.ED25519, 1)
    with load(setup, first) as answers:
        assert setup.api.sign(second, message)[0] == 403
        setup.policies[second] = policy
        setup.write_config()
        manager.forget()
        process.send_signal(signal.SIGHUP)
        manager.wait_for("READY=1", "the reload")
        assert manager.heard[0].startswith("RELOADING=1\nMONOTONIC_USEC=")
        assert setup.api.sign(second, message)[0] == 200
        more(answers)

        good = setup.config.read_text()
        setup.config.write_text(good.replace("attestation:", "atestation:") + "\nsurver: {}\n")
        process.send_signal(signal.SIGHUP)
        log_has(setup, "the old settings stay in force")
        assert setup.api.sign(second, attestation(Curve.ED25519, 2))[0] == 200
        status, health = setup.utility.get("/healthz")
        assert (status, health["tasks"]["configuration"]["state"]) == (200, "failing")
        assert "surver" in health["tasks"]["configuration"]["last_fault"]
        log = setup.log.read_text()
        assert "SIGHUP: " in log
        assert re.search(r"signatory.yaml:\d+: surver", log)
        assert re.search(r"signatory.yaml:\d+: tezos\.\S+: .*atestation", log), "every fault, with its place"
        more(answers)

        setup.policies[second] = {"allow": {"block": None}}
        setup.server["max_body_bytes"] = 2048
        setup.write_config()
        process.send_signal(signal.SIGHUP)
        log_has(setup, "the configuration was read again", 2)
        assert setup.api.sign(second, attestation(Curve.ED25519, 3))[0] == 403
        log_has(setup, "keys=server.max_body_bytes")
        assert setup.utility.get("/healthz") == (200, {"ready": True})
        for _ in range(30):
            process.send_signal(signal.SIGHUP)
        more(answers, 50)
    assert {status for status, _ in answers} == {200}, answers
    assert setup.stop(process) == 0


def test_sighup_finds_keys_and_forgets_them(setup: Setup) -> None:
    first, second = setup.generate("tz1", 2)
    process = setup.start_signer()
    path = setup.base_dir / "enclave_keys.json"
    entries = json.loads(path.read_text())
    replacement = path.with_suffix(".new")
    with load(setup, first) as answers:
        replacement.write_text(json.dumps([one for one in entries if one["public_key_hash"] == first]))
        replacement.replace(path)
        process.send_signal(signal.SIGHUP)
        wait_for(lambda: setup.api.request("GET", f"/keys/{second}")[0] != 200, "the key is forgotten")
        path.write_text("[")
        process.send_signal(signal.SIGHUP)
        log_has(setup, "the keys of the vault stay as they were")
        replacement.write_text(json.dumps(entries))
        replacement.replace(path)
        wait_for(lambda: setup.api.request("GET", f"/keys/{second}")[0] == 200, "the key is back, without a signal")
        more(answers)
    assert {status for status, _ in answers} == {200}, answers


def test_sighup_while_it_starts_is_heeded_later_and_kills_nothing(setup: Setup) -> None:
    setup.generate("tz1")
    with setup.log.open("ab") as log:
        process = subprocess.Popen(
            setup.command("serve"), stdout=log, stderr=log, env=conftest.ENVIRONMENT, start_new_session=True
        )
    setup.processes.append(process)
    wait_for(lambda: blocks_sighup(process.pid), "the command has begun")
    process.send_signal(signal.SIGHUP)
    log_has(setup, "the configuration was read again")
    assert setup.stop(process) == 0


def blocks_sighup(pid: int) -> bool:
    masks = re.findall(r"Sig(?:Blk|Cgt):\s+(\w+)", Path(f"/proc/{pid}/status").read_text())
    return any(int(mask, 16) & 1 << (signal.SIGHUP - 1) for mask in masks)


def test_the_demo_ends_in_good_order_when_its_terminal_does(tmp_path: Path) -> None:
    with running(tmp_path) as setup:
        addresses = [f"--address=127.0.0.1:{setup.port}", f"--utility-address=127.0.0.1:{setup.utility_port}"]
        command = [*setup.command()[:3], "demo", "--dir", str(tmp_path / "demo"), "--json", *addresses]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, env=conftest.ENVIRONMENT, start_new_session=True)
        setup.processes.append(process)
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline().startswith(b'{"url"')
        assert setup.stop(process, signal.SIGHUP) == 0


# -- order, tasks


def test_the_order_of_start_and_end(setup: Setup, manager: Manager) -> None:
    (pkh,) = setup.generate("tz1")
    process = setup.start_signer()
    manager.wait_for("READY=1")
    wait_for(lambda: {task["state"] for task in tasks(setup).values()} == {"running"}, "everything runs")
    assert tasks(setup).keys() >= {"watermarks", "utility server", "vault nitro", "signing API", "configuration"}
    metrics = setup.utility.request("GET", "/metrics")[1].decode()
    assert 'task_up{task="signing API"} 1.0' in metrics
    assert 'task_restarts_total{task="vault nitro"} 0.0' in metrics

    enclave = setup.processes[0]
    enclave.send_signal(signal.SIGSTOP)  # so that a request is on its way when the signal comes
    answers: list[Any] = []
    asking = threading.Thread(target=lambda: answers.append(setup.api.sign(pkh, attestation(Curve.ED25519, 9))))
    asking.start()
    under_way(setup)
    process.send_signal(signal.SIGTERM)
    manager.wait_for("STOPPING=1")
    wait_for(lambda: not setup.answers(), "it stops accepting")
    status, health = setup.utility.get("/healthz")
    assert (status, health["serving"], health["vaults"]["nitro"]["keys"]) == (503, False, 1), "the vault is there still"
    process.send_signal(signal.SIGHUP)  # ignored now
    enclave.send_signal(signal.SIGCONT)
    asking.join()
    assert answers[0][0] == 200, "what had begun was finished"
    assert process.wait(DEADLINE) == 0
    assert "read again" not in setup.log.read_text()
    started = [setup.log.read_text().index(text) for text in ORDER]
    assert started == sorted(started)


def under_way(setup: Setup) -> None:
    """Return when a request has its mark."""
    done = 'watermark_io_operations_total{backend="file",operation="write",result="success"'
    wait_for(lambda: done in setup.utility.request("GET", "/metrics")[1].decode(), "a mark")


ORDER = (
    "Initializing watermark backend",
    "Utility HTTP server is listening",
    "Initializing vault",
    '"HTTP server is listening',
    "Captured SIGTERM",
    "Shutting down...",
)


def test_an_enclave_that_goes_and_comes_is_told_at_changes(setup: Setup) -> None:
    setup.generate("tz1")
    setup.start_signer()
    setup.stop(setup.processes[0], signal.SIGKILL)
    wait_for(lambda: tasks(setup)["vault nitro"]["state"] == "failing", "the fault")
    assert tasks(setup)["vault nitro"]["last_fault"]
    setup.start_enclave()
    wait_for(lambda: tasks(setup)["vault nitro"]["state"] == "running", "the end of it")
    assert tasks(setup)["vault nitro"]["restarts"] >= 1
    log_has(setup, "vault nitro: works again")
    assert 'task_restarts_total{task="vault nitro"} 0.0' not in setup.utility.request("GET", "/metrics")[1].decode()


def discovery(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> NitroCli:
    """Let the signer find the enclave of *setup* by a stand-in of nitro-cli."""
    command = NitroCli(setup.directory / "bin")
    monkeypatch.setitem(conftest.ENVIRONMENT, "PATH", command.path_environment()["PATH"])
    (setup.directory / "20.sock").symlink_to(setup.socket)
    setup.nitro["enclave_address"] = f"unix:{setup.directory}/{{cid}}.sock:2000"
    command.show(enclave(20))
    return command


def test_a_vault_that_is_slow_to_start_keeps_no_caller_from_an_answer(
    setup: Setup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The signing API opens without it, and what it has is listed once it is in."""
    setup.nitro["wait_timeout"] = 0.1
    command = discovery(setup, monkeypatch)
    (pkh,) = setup.generate("tz1")
    message = attestation(Curve.ED25519, 1)
    command.hang()
    process = setup.start_signer()
    assert "vault nitro is slow to start" in setup.log.read_text()
    status, answer = setup.api.sign(pkh, message)
    assert (status, "not connected yet: looking for the enclave" in answer[0]["msg"]) == (502, True)
    assert 'msg="Key"' not in setup.log.read_text()
    child = command.process_id("child")
    assert child is not None
    os.kill(child, signal.SIGKILL)  # then the command goes on, and lists the enclave
    wait_for(lambda: setup.api.sign(pkh, message)[0] == 200, "a signature")
    log_has(setup, f'msg="Key" pkh={pkh}')
    assert setup.stop(process) == 0


def test_sigterm_while_it_starts_waits_for_nothing(
    setup: Setup, manager: Manager, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = discovery(setup, monkeypatch)
    setup.write_config()
    command.hang()
    process = setup.start_signer(wait=False)
    wait_for(lambda: command.process_id("child") is not None, "nitro-cli is asked")
    assert setup.stop(process) == 0
    assert manager.listen()[-1] == "STOPPING=1"
    log = setup.log.read_text()
    assert "Shutting down..." in log
    assert '"HTTP server is listening' not in log
    assert "Traceback" not in log


def test_a_port_in_use_ends_the_start(setup: Setup) -> None:
    setup.write_config()
    with socket.create_server(("127.0.0.1", setup.port)):
        done = setup.run("serve")
    assert done.returncode == 1
    assert f"Error: listen tcp 127.0.0.1:{setup.port}" in done.stderr.decode()


def test_a_second_signal_does_not_wait(setup: Setup) -> None:
    (pkh,) = setup.generate("tz1")
    process = setup.start_signer()
    setup.processes[0].send_signal(signal.SIGSTOP)
    try:
        asking = threading.Thread(target=lambda: suppressed(setup, pkh))
        asking.start()
        under_way(setup)
        process.send_signal(signal.SIGTERM)
        log_has(setup, "Shutting down...")
        assert setup.stop(process, signal.SIGINT) == 0
        asking.join()
    finally:
        setup.processes[0].send_signal(signal.SIGCONT)
    assert "stopped without waiting for the drain" in setup.log.read_text()


def suppressed(setup: Setup, pkh: str) -> None:
    with suppress(OSError):
        setup.api.sign(pkh, attestation(Curve.ED25519, 9))
