"""The IAM policies in `contrib/iam`: they are enough, and nothing in them is too much.

Servers refuse what a policy doesn't allow, and note what it is asked for. moto's own enforcement is of no use here: it
looks at no resource, and takes a transaction for an action of its own.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from signer.tezos.keys import Curve
from tests import kms_server, moto_server
from tests.integration.conftest import Setup, attestation, wait_for
from tests.kms_server import Kms
from tests.moto_server import Front

_POLICIES = Path(__file__).parents[2] / "contrib/iam"
_CHAIN = "NetXdQprcVkpaWU"
ALLOW = {"allow": {"block": None, "attestation": None}}


def _listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def granted(name: str) -> set[tuple[str, str]]:
    """Action and last part of the resource of what a policy allows; "*" for every key of KMS."""
    policy: dict[str, Any] = json.loads((_POLICIES / name).read_text())
    return {
        (action, "*" if action.startswith("kms:") else resource.rpartition("/")[2])
        for statement in policy["Statement"]
        for action in _listed(statement["Action"])
        for resource in _listed(statement["Resource"])
    }


@dataclass
class Role:
    """Who asks: what it may, and what it asked for."""

    front: Front
    kms: Kms
    may: set[tuple[str, str]] = field(default_factory=set)
    asked: set[tuple[str, str]] = field(default_factory=set)

    def take(self, policy: str) -> None:
        """Be allowed what *policy* says, from now on."""
        self.may, self.asked = granted(policy), set()
        self.front.allows = self._allows
        self.kms.calls.clear()
        self.kms.choose = lambda action, _key: "" if (f"kms:{action}", "*") in self.may else "denied"

    def _allows(self, action: str, table: str) -> bool:
        self.asked.add((f"dynamodb:{action}", table))
        return (f"dynamodb:{action}", table) in self.may

    @property
    def used(self) -> set[tuple[str, str]]:
        return (self.asked | {(f"kms:{action}", "*") for action, _ in self.kms.calls}) & self.may

    @property
    def missed(self) -> set[tuple[str, str]]:
        return (self.asked | {(f"kms:{action}", "*") for action, _ in self.kms.calls}) - self.may


@pytest.fixture
def role(setup: Setup) -> Iterator[Role]:
    with kms_server.serving() as kms, moto_server.serving() as (url, front):
        setup.environment = kms_server.environment(kms.url, setup.directory) | {"AWS_ENDPOINT_URL_DYNAMODB": url}
        setup.nitro["storage"] = {"driver": "dynamodb", "config": kms_server.CREDENTIALS}
        setup.top["watermark"] = {"driver": "dynamodb", "config": kms_server.CREDENTIALS}
        setup.vaults["kms"] = {"driver": "awskms", "config": kms_server.CREDENTIALS}
        yield Role(front, kms)
        front.allows = lambda _action, _table: True


def test_an_operator_prepares_and_a_signer_serves(setup: Setup, role: Role) -> None:
    role.kms.add("ECC_SECG_P256K1", alias="alias/delegate", tags={"Name": "delegate"})
    role.take("operator.json")
    (companion,) = setup.generate("bls")
    delegate, other = json.loads(setup.run("list", "--json").stdout)
    if delegate["vault"] != "AWSKMS":
        delegate, other = other, delegate
    assert (delegate["aliases"], other["public_key_hash"]) == (["alias/delegate"], companion)
    pkh = delegate["public_key_hash"]
    for level in ("7", "8"):
        done = setup.run("watermark", "set", companion, _CHAIN, "attestation", level)
        assert done.returncode == 0, done.stderr
    assert "level 8 round 0" in setup.run("watermark", "list").stdout.decode()
    sure = ("--confirm-key", companion, "--confirm-chain", _CHAIN)
    assert "level 8" in setup.run("watermark", "reset", companion, _CHAIN, *sure).stdout.decode()
    assert role.missed == set()
    assert role.used == role.may, "what isn't needed is not to be granted"

    role.take("signer.json")
    setup.policies |= {pkh: ALLOW, companion: ALLOW}
    setup.write_config()
    setup.start_signer()
    assert setup.utility.get("/healthz")[0] == 200
    for address, curve in ((pkh, Curve.SECP256K1), (companion, Curve.BLS12_381)):
        assert setup.api.sign(address, attestation(curve, 10))[0] == 200
        assert setup.api.sign(address, attestation(curve, 10, payload=1))[0] == 409
    assert role.used == role.may, "what isn't needed is not to be granted"
    assert role.missed == {("dynamodb:DescribeTable", "watermark"), ("dynamodb:DescribeTable", "encrypted_keys")}


LACKING = {
    ("dynamodb:PutItem", "watermark"): "the role needs dynamodb:PutItem on table/watermark",
    ("dynamodb:Scan", "encrypted_keys"): "the role needs dynamodb:Scan on table/encrypted_keys",
    ("kms:ListKeys", "*"): "the role needs kms:ListKeys on *",
    ("kms:GetPublicKey", "*"): "the role needs kms:GetPublicKey on arn:aws:kms:eu-west-1:",
    ("kms:Sign", "*"): "the role needs kms:Sign on arn:aws:kms:eu-west-1:",
}


def test_a_permission_that_is_missing_is_named(setup: Setup, role: Role) -> None:
    role.kms.add("ECC_SECG_P256K1")
    role.take("operator.json")
    (companion,) = setup.generate("bls")
    assert setup.run("watermark", "set", companion, _CHAIN, "block", "1").returncode == 0  # makes the table
    (delegate,) = json.loads(setup.run("list", "-v", "kms", "--json").stdout)
    pkh = str(delegate["public_key_hash"])
    setup.policies |= {pkh: ALLOW, companion: ALLOW}
    setup.write_config()
    for number, (lacking, text) in enumerate(LACKING.items(), 10):
        role.take("signer.json")
        role.may.discard(lacking)
        setup.log.write_text("")
        process = setup.start_signer(wait=False)
        wait_for(lambda number=number, text=text: text in _said(setup, pkh, number), text)  # type: ignore[misc]
        setup.stop(process)


def _said(setup: Setup, pkh: str, level: int) -> str:
    """Everything that an operator and a baker are told."""
    said = setup.log.read_text()
    if setup.answers():
        said += str(setup.utility.get("/healthz?verbose")[1])
        said += str(setup.api.sign(pkh, attestation(Curve.SECP256K1, level)))
    return said
