"""The combined configuration of Signatory's documentation: a tz2 delegate in KMS, its tz4 companion in the enclave.

The text is theirs. What is replaced: the base directory, ports, addresses of keys and the key's id; where the enclave
is (`enclave_address` for `enclave_cid` and `enclave_port`: a socket instead of vsock); the host behind the proxy. Its
credentials are the role of the instance; its regions stand where they have them, and nowhere else. KMS, DynamoDB and
the instance's metadata are servers on this machine.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from signer import crypto
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature
from tests import kms_server, metadata_server, moto_server
from tests.integration.conftest import Setup, attestation, free_port, running, wait_for
from tests.kms_server import REGION, Kms
from tests.metadata_server import Metadata
from tests.moto_server import Front

PAGE = """
base_dir: {base}
server:
  address: :{port}
  utility_address: :{utility_port}
vaults:
  aws-kms:
    driver: awskms
    config:
      region: {region}
  nitro-companion:
    driver: nitro
    config:
      enclave_address: {enclave}
      encryption_key_id: arn:aws:kms:{region}:123456789012:key/771dfdac-e8e9-4f40-9747-f56d0911fce4
      proxy_remote_address: 127.0.0.1:{outside}
      storage:
{storage}
tezos: {keys}
"""
FILE = "        driver: file\n        config: {base}/enclave_keys.json"
TABLE = "        driver: aws\n        config: {{region: {region}}}"
MARKS = "watermark: {{driver: aws, config: {{region: {region}}}}}\n"
DELEGATE = """
  {pkh}:
    log_payloads: true
    vault: aws-kms
    allow:
      block: []
      preattestation: []
      attestation: []
      attestation_with_dal: []
      generic:
        - reveal
        - delegation
        - origination
        - transaction
        - stake
        - unstake
        - update_companion_key"""
COMPANION = """
  {pkh}:
    log_payloads: true
    vault: nitro-companion
    allow:
      block: []
      preattestation: []
      attestation: []
      attestation_with_dal: []"""
PROOF = "\n    allow_proof_of_possession: true"


@dataclass
class Operator(Setup):
    """A machine with the page's configuration; its vaults are called as there."""

    tables: bool = False
    keys: str = ""
    outside: int = 0

    def write_config(self) -> None:
        text = (MARKS if self.tables else "") + PAGE.replace("{storage}", TABLE if self.tables else FILE)
        self.config.write_text(
            text.format(
                base=self.base_dir,
                port=self.port,
                utility_port=self.utility_port,
                region=REGION,
                enclave=f"unix:{self.socket}:2000",
                outside=self.outside,
                keys=self.keys,
            )
        )

    def another_machine(self) -> Operator:
        """It shares enclave and tables, and no file."""
        other = replace(self, port=free_port(), utility_port=free_port(), name="other-")
        other.write_config()
        return other

    def json(self, *arguments: str) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def take_up_keys(self) -> tuple[str, str]:
        """What an operator does once: see the key in KMS, generate the companion, write both down."""
        self.write_config()
        (delegate,) = self.json("list", "-v", "aws-kms")
        (companion,) = self.json("generate", "-v", "nitro-companion", "-t", "tz4")
        pkhs = str(delegate["public_key_hash"]), str(companion["public_key_hash"])
        self.keys = DELEGATE.format(pkh=pkhs[0]) + COMPANION.format(pkh=pkhs[1])
        self.write_config()
        return pkhs

    def signed(self, pkh: str, message: bytes) -> str:
        """The signature, verified."""
        status, answer = self.api.sign(pkh, message)
        assert status == 200, answer
        key = PublicKey.from_base58(self.api.get(f"/keys/{pkh}")[1]["public_key"])
        assert crypto.verify(key, message, Signature.from_base58(answer["signature"]))
        return str(answer["signature"])


@pytest.fixture
def kms() -> Iterator[Kms]:
    with kms_server.serving() as server:
        yield server


@pytest.fixture
def dynamodb() -> Iterator[tuple[str, Front]]:
    with moto_server.serving() as server:
        yield server


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with metadata_server.serving() as server:
        yield server


@pytest.fixture
def operator(
    tmp_path_factory: pytest.TempPathFactory, kms: Kms, dynamodb: tuple[str, Front], metadata: Metadata
) -> Iterator[Operator]:
    directory: Path = tmp_path_factory.mktemp("c")
    with running(directory) as bare:
        ready = Operator(directory, processes=bare.processes, outside=free_port())
        ready.environment = kms_server.environment(kms.url, directory) | {
            "AWS_ENDPOINT_URL_DYNAMODB": dynamodb[0],
            "AWS_EC2_METADATA_DISABLED": "false",
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": metadata.url,
        }
        ready.start_enclave()
        yield ready


def block(level: int, *, payload: int = 0) -> bytes:
    """A block of round 0."""
    number = level.to_bytes(4, "big")
    elements = (b"\2", number, b"", b"\xff" * 4, bytes(4))
    fitness = b"".join(len(one).to_bytes(4, "big") + one for one in elements)
    head = b"\x11\x7a\x06\xa7\x70" + number + b"\x18" + bytes(32) + bytes(8) + b"\4" + bytes(32)
    return head + len(fitness).to_bytes(4, "big") + fitness + bytes(32) + payload.to_bytes(32, "big") + bytes(14)


def with_dal(level: int) -> bytes:
    plain = attestation(Curve.SECP256K1, level)
    return plain[:37] + b"\x17" + plain[38:] + b"\x01"


@pytest.mark.parametrize("tables", [False, True], ids=["as on the page", "with tables"])
def test_from_nothing_to_a_baker_and_back_after_a_restart(operator: Operator, kms: Kms, *, tables: bool) -> None:
    operator.tables = tables
    arn = kms.add("ECC_SECG_P256K1")
    kms.add("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")  # the one that seals
    delegate, companion = operator.take_up_keys()
    process = operator.start_signer()
    status, health = operator.utility.get("/healthz")
    assert (status, health["ready"]) == (200, True)
    proposal = operator.signed(delegate, block(10))
    operator.signed(delegate, attestation(Curve.SECP256K1, 10))
    dal = operator.signed(delegate, with_dal(11))
    companions = operator.signed(companion, attestation(Curve.BLS12_381, 10))
    conflicts = {
        delegate: (block(10, payload=1), attestation(Curve.SECP256K1, 11, payload=1)),
        companion: (attestation(Curve.BLS12_381, 10, payload=1),),
    }
    assert _statuses(operator, conflicts) == {409}

    # the page's policy has no proof of possession: it is added without a restart
    assert operator.api.get(f"/bls_prove_possession/{companion}")[0] == 400
    operator.keys += PROOF
    operator.write_config()
    process.send_signal(signal.SIGHUP)
    wait_for(lambda: operator.api.get(f"/bls_prove_possession/{companion}")[0] == 200, "the new policy")
    proof = operator.api.get(f"/bls_prove_possession/{companion}")[1]["bls_prove_possession"]
    key = PublicKey.from_base58(operator.api.get(f"/keys/{companion}")[1]["public_key"])
    assert crypto.verify_possession(key, Signature.from_base58(proof))

    listed = operator.json("list")  # beside the server, whose proxy is in place
    assert [(one["public_key_hash"], one["vault"], one["reference"], one["active"]) for one in listed] == [
        (delegate, "AWSKMS", arn, True),
        (companion, "NitroEnclave", "", True),
    ]

    assert operator.stop(process) == 0
    operator.start_signer()
    assert _statuses(operator, conflicts) == {409}
    assert operator.signed(delegate, block(10)) == proposal
    assert operator.signed(delegate, with_dal(11)) == dal
    assert operator.signed(companion, attestation(Curve.BLS12_381, 10)) == companions
    operator.signed(delegate, attestation(Curve.SECP256K1, 12))
    operator.signed(companion, attestation(Curve.BLS12_381, 12))
    assert (operator.base_dir / "enclave_keys.json").exists() is not tables
    assert (operator.base_dir / "watermarks.db").exists() is not tables
    assert "SECRET" not in operator.log.read_text()


def _statuses(operator: Setup, messages: dict[str, tuple[bytes, ...]]) -> set[int]:
    return {operator.api.sign(pkh, message)[0] for pkh, many in messages.items() for message in many}


def test_a_second_machine_on_the_same_tables(operator: Operator, kms: Kms) -> None:
    """It finds the companion, signs the same bytes with the same signature, and refuses others of a slot."""
    operator.tables = True
    kms.add("ECC_SECG_P256K1")
    pkhs = operator.take_up_keys()
    operator.start_signer()
    other = operator.another_machine()
    other.start_signer()
    for pkh in pkhs:
        curve = PublicKeyHash.from_base58(pkh).curve
        first = operator.signed(pkh, attestation(curve, 10))
        wait_for(lambda pkh=pkh: _stored(operator, pkh), "the signature beside its mark")  # type: ignore[misc]
        assert other.signed(pkh, attestation(curve, 10)) == first
        assert other.api.sign(pkh, attestation(curve, 10, payload=1))[0] == 409
        other.signed(pkh, attestation(curve, 11))
        assert operator.api.sign(pkh, attestation(curve, 11, payload=1))[0] == 409


def _stored(operator: Operator, pkh: str) -> bool:
    client = moto_server.plain(operator.environment["AWS_ENDPOINT_URL_DYNAMODB"])
    items = client.scan(TableName="watermark")["Items"]
    client.close()
    return any(item["idx"]["S"].endswith(pkh) and "nitro_signature" in item for item in items)
