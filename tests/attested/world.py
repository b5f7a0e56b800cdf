"""A host, the fake KMS and the attested enclave, as processes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from tests.attested.documents import PCRS, root
from tests.integration.conftest import DEADLINE, ENVIRONMENT, Setup, running, wait_for

ROOT = root().sha256.hex()
PCR0 = PCRS[0].hex()


class World:
    """The configuration and what runs."""

    def __init__(self, setup: Setup, kms: subprocess.Popen[str], where: dict[str, Any]) -> None:
        self.setup = setup
        self.kms = kms
        self.port = int(where["port"])
        self.key = str(where["key"])
        self.ca = setup.directory / "ca.pem"
        setup.nitro = {
            "encryption_key_id": self.key,
            "credentials": {
                "access_key_id": "AKIDEXAMPLE",
                "secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
                "region": "us-west-2",
            },
            "pcrs": {"PCR0": [PCR0]},
            "attestation_root": ROOT,
            "seal": "v1",
        }
        setup.write_config()

    @property
    def log(self) -> Path:
        return self.setup.directory / "enclave.log"

    def start_enclave(self, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "tests.attested.enclave", "--listen", f"unix:{self.setup.socket}:2000"]
        command += ["--kms", str(self.port), "--ca-file", str(self.ca), *arguments]
        with self.log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, env=ENVIRONMENT)
        self.setup.processes.append(process)
        wait_for(self.setup.socket.exists, "the enclave's socket")
        return process

    def tell_kms(self, **order: Any) -> Any:
        assert self.kms.stdin is not None
        assert self.kms.stdout is not None
        self.kms.stdin.write(json.dumps(order) + "\n")
        self.kms.stdin.flush()
        return json.loads(self.kms.stdout.readline())

    def log_stream(self) -> bytes:
        """What a reader of the log stream is told at once."""
        with closing(socket.socket(socket.AF_UNIX)) as reader:
            reader.settimeout(DEADLINE)
            reader.connect(str(self.setup.socket))
            reader.sendall(b"CONNECT 2001\n")
            with reader.makefile("rb") as stream:
                assert stream.readline().startswith(b"OK ")
                found = b""
                while b'"event": "counters"' not in found:
                    found += stream.readline()
                return found

    def key_file(self) -> bytes:
        return (self.setup.base_dir / "enclave_keys.json").read_bytes()


@contextmanager
def attested_world(directory: Path, *arguments: str) -> Iterator[World]:
    """*arguments* are of the fake KMS; the enclave is not started yet."""
    with running(directory) as setup:
        command = [sys.executable, "-m", "tests.attested.kms", "--ca-file", str(directory / "ca.pem"), "--pcr0", PCR0]
        kms = subprocess.Popen(
            [*command, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert kms.stdout is not None
        with kms:  # it ends with its standard input
            yield World(setup, kms, json.loads(kms.stdout.readline()))
            setup.stop_all()
