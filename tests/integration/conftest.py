"""Real processes for the integration tests: the enclave program, the signer, and a client without a framework."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from signer.tezos.keys import Curve

ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "ENCLAVE_"))}
DEADLINE = 30.0  # seconds for anything to happen at all; on a healthy machine it takes a fraction


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Return once *condition* holds."""
    deadline = time.monotonic() + DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(0.01)


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on, and that was not given out before: the kernel may well offer one twice."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        if port not in _given:
            _given.add(port)
            return port


def attestation(
    curve: Curve, level: int, *, round_: int = 0, payload: int = 0, chain: bytes = b"\x7a\x06\xa7\x70"
) -> bytes:
    """An attestation in the form that *curve* signs; *payload* makes two of one level conflict."""
    place = level.to_bytes(4, "big") + round_.to_bytes(4, "big") + payload.to_bytes(32, "big")
    if curve is Curve.BLS12_381:
        return b"\x13" + chain + bytes(32) + b"\x29" + place
    return b"\x13" + chain + bytes(32) + b"\x15\x00\x00" + place


@dataclass
class Api:
    """A client; each call on a connection of its own, as Octez does it."""

    port: int
    timeout: float = DEADLINE

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, bytes, dict[str, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=self.timeout)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            answer = response.read()
            return response.status, answer, {name.lower(): value for name, value in response.getheaders()}
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, Any]:
        status, body, _ = self.request("GET", path)
        return status, json.loads(body)

    def sign(self, pkh: str, message: bytes, query: str = "?version=2") -> tuple[int, Any]:
        status, body, _ = self.request("POST", f"/keys/{pkh}{query}", json.dumps(message.hex()).encode() + b"\n")
        return status, json.loads(body)


@dataclass
class Setup:
    """A directory with an enclave, a configuration and a base directory; starts and ends the processes."""

    directory: Path
    port: int = field(default_factory=free_port)
    utility_port: int = field(default_factory=free_port)
    policies: dict[str, Any] = field(default_factory=dict)
    server: dict[str, Any] = field(default_factory=dict)
    top: dict[str, Any] = field(default_factory=dict)
    nitro: dict[str, Any] = field(default_factory=dict)
    vaults: dict[str, Any] = field(default_factory=dict)  # beside nitro
    environment: dict[str, str] = field(default_factory=dict)  # of the signer, beside what all processes have
    name: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def twin(self) -> Setup:
        """Another signer on the same enclave, with ports and a base directory of its own."""
        other = replace(self, port=free_port(), utility_port=free_port(), name="twin-")
        other.write_config()
        return other

    @property
    def socket(self) -> Path:
        return self.directory / "v.sock"

    @property
    def config(self) -> Path:
        return self.directory / f"{self.name}signatory.yaml"

    @property
    def base_dir(self) -> Path:
        return self.directory / f"{self.name}base"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}signer.log"

    @property
    def api(self) -> Api:
        return Api(self.port)

    @property
    def utility(self) -> Api:
        return Api(self.utility_port)

    def start_enclave(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "signer.enclave", "--listen", f"unix:{self.socket}:2000", "--sealing", "local"]
        command += ["--development", "--key-file", str(self.directory / "development.key")]
        with (self.directory / "enclave.log").open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        self.processes.append(process)
        wait_for(self.socket.exists, "the enclave's socket")
        return process

    def write_config(self) -> None:
        nitro = {
            "enclave_address": f"unix:{self.socket}:2000",
            "encryption_key_id": "development",
            "credentials": {"access_key_id": "AKID", "secret_access_key": "SECRETKEY", "region": "none"},
        }
        tree = {
            "base_dir": str(self.base_dir),
            "server": {
                "address": f"127.0.0.1:{self.port}",
                "utility_address": f"127.0.0.1:{self.utility_port}",
                **self.server,
            },
            "vaults": {"nitro": {"driver": "nitro", "config": nitro | self.nitro}, **self.vaults},
            "tezos": self.policies,
            **self.top,
        }
        self.config.write_text(yaml.safe_dump(tree))

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "signer", *arguments, "-c", str(self.config)]

    def run(self, *arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        """Run one command to its end."""
        return subprocess.run(
            self.command(*arguments),
            input=stdin,
            capture_output=True,
            env=ENVIRONMENT | self.environment,
            timeout=60,
            check=False,
        )

    def generate(self, kind: str, number: int = 1) -> list[str]:
        """Make keys, allow them everything, and return their addresses."""
        self.write_config()
        done = self.run("generate", "-v", "nitro", "-t", kind, "-n", str(number), "--json")
        assert done.returncode == 0, done.stderr
        addresses = [key["public_key_hash"] for key in json.loads(done.stdout)]
        for address in addresses:
            self.policies[address] = {
                "allow": {"block": None, "attestation": None, "attestation_with_dal": None, "preattestation": None},
                "allow_proof_of_possession": address.startswith("tz4"),
            }
        self.write_config()
        return addresses

    def start_signer(self, *extra: str, wait: bool = True) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                self.command("serve", *extra),
                stdout=log,
                stderr=log,
                env=ENVIRONMENT | self.environment,
                start_new_session=True,
            )
        self.processes.append(process)
        if wait:
            wait_for(lambda: process.poll() is not None or self.answers(), "the signer")
            assert process.poll() is None, self.log.read_text()
        return process

    def answers(self) -> bool:
        try:
            return self.api.request("GET", "/authorized_keys")[0] == 200
        except OSError:
            return False

    def stop(self, process: subprocess.Popen[bytes], number: int = signal.SIGTERM) -> int:
        process.send_signal(number)
        return process.wait(DEADLINE)

    def stop_all(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(15)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


@contextmanager
def running(directory: Path) -> Iterator[Setup]:
    setup = Setup(directory)
    try:
        yield setup
    finally:
        setup.stop_all()


@pytest.fixture
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """An empty setup with its enclave running; nothing else yet."""
    with running(tmp_path_factory.mktemp("s")) as ready:
        ready.start_enclave()
        yield ready
