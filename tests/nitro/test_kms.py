"""The whole way: our image in the emulator, our proxy, and a KMS that opens keys for this image alone.

The emulator's documents are unsigned, so the KMS of the tests takes them as they are, but for that compares everything;
what needs signatures (the host's judgement, debug mode) is in the ordinary tests, with the security module of these.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from signer.image import build as builder
from signer.image.build import Built, Inputs, build
from tests.integration.conftest import ENVIRONMENT, Setup, running
from tests.nitro.guest import PORT
from tests.nitro.machine import Machine
from tests.nitro.signing import assert_all_sign
from tests.nitro.test_drill import CURVES, TIMEOUTS

FIRST, SECOND, CHANGED = 31, 32, 33  # CIDs


class Kms:
    """The fake KMS as a process."""

    def __init__(self, directory: Path) -> None:
        self.ca = directory / "ca.pem"
        command = [sys.executable, "-m", "tests.attested.kms", "--emulated", "--ca-file", str(self.ca)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        where = self._line()
        self.port, self.key = int(where["port"]), str(where["key"])

    def accept(self, pcr0: bytes) -> None:
        """Let the policy of the key name this image alone."""
        self._tell(key=self.key, pcrs={"0": [pcr0.hex()]})

    def calls(self) -> list[dict[str, Any]]:
        """The calls since the last question."""
        return list(self._tell(calls=True)["calls"])

    def close(self) -> None:
        with self._process:  # it ends with its standard input
            pass

    def _tell(self, **order: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer


@pytest.fixture
def setup(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    with running(tmp_path_factory.mktemp("k")) as found:
        yield found


@pytest.fixture
def kms(setup: Setup) -> Iterator[Kms]:
    kms = Kms(setup.directory)
    yield kms
    kms.close()


def images(inputs: Inputs, kms: Kms, directory: Path) -> Iterator[tuple[Path, Built]]:
    """The image, which trusts the CA of the tests in place of Amazon's; then the same but for one byte."""
    sources = directory / "sources"
    shutil.copytree(inputs.sources, sources)
    roots = sources / "signer/enclave/kms/roots.pem"
    for number in range(2):
        roots.write_text(kms.ca.read_text() + number * "\n")
        path = directory / f"{number}.eif"
        inputs = replace(inputs, sources=sources, arguments=builder.ARGUMENTS)
        yield path, build(inputs, path)


def link(setup: Setup, kms: Kms, cid: int) -> None:
    """Have the signer talk to the enclave of this CID, and the enclave to KMS, through the signer's proxy."""
    setup.nitro = {
        "enclave_address": f"unix:{setup.directory}/{cid}.sock:{PORT}",
        "encryption_key_id": kms.key,
        "proxy_remote_address": f"127.0.0.1:{kms.port}",
        "credentials": {
            "access_key_id": "AKIDEXAMPLE",
            "secret_access_key": "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY",
            "region": "us-west-2",
        },
        "seal": "v1",
        **TIMEOUTS,
    }
    setup.write_config()


def test_kms_opens_keys_for_this_image_and_nothing_else(
    inputs: Inputs, setup: Setup, kms: Kms, capsys: pytest.CaptureFixture[str]
) -> None:
    (path, built), (changed_path, changed) = images(inputs, kms, setup.directory)
    assert built.measured.registers[0] != changed.measured.registers[0]
    kms.accept(built.measured.registers[0])

    machine = Machine(path, setup.directory, FIRST)
    try:
        machine.wait_for(f"enclave: listening on vsock:any:{PORT}")
        link(setup, kms, FIRST)
        addresses = [pkh for kind in CURVES for pkh in setup.generate(kind)]
        made = kms.calls()
        assert {call["operation"] for call in made} == {"GenerateDataKey", "Decrypt"}
        assert {call["pcr0"] for call in made} == {built.measured.registers[0].hex()}
        assert {call["context"]["tezos-signer:pkh"] for call in made} == set(addresses)
    finally:
        machine.kill()

    machine = Machine(path, setup.directory, SECOND)
    try:
        listening = machine.wait_for(f"enclave: listening on vsock:any:{PORT}")
        link(setup, kms, SECOND)
        signer = setup.start_signer()
        assert_all_sign(setup, addresses)
        status, proof = setup.api.get(f"/bls_prove_possession/{addresses[-1]}")
        assert status == 200, proof
        assert {call["operation"] for call in kms.calls()} == {"Decrypt"}
        assert setup.stop(signer) == 0
    finally:
        machine.kill()

    machine = Machine(changed_path, setup.directory, CHANGED)
    try:
        machine.wait_for(f"enclave: listening on vsock:any:{PORT}")
        link(setup, kms, CHANGED)
        done = setup.run("list")
        assert all(pkh.encode() in done.stderr for pkh in addresses), done.stderr
        assert b"AccessDeniedException" in done.stderr
        assert changed.measured.registers[0].hex().encode() in done.stderr, "which image asked"
        assert {call["error"] for call in kms.calls()} == {"AccessDeniedException"}
    finally:
        machine.kill()
    with capsys.disabled():
        print(f"\nsealed by KMS, opened again and signed; listening {listening:.1f} s after the start of the machine")
