"""A KMS in memory at the seam of the client, with real keys and every odd answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from signer.aws.client import AwsError, AwsUnavailableError
from signer.vaults.awskms.keys import read_key

CURVES = {"ECC_SECG_P256K1": ec.SECP256K1(), "ECC_NIST_P256": ec.SECP256R1(), "ECC_NIST_P384": ec.SECP384R1()}
Private = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


def arn(number: int) -> str:
    return f"arn:aws:kms:eu-west-1:111122223333:key/00000000-0000-0000-0000-{number:012d}"


def private(spec: str) -> Private:
    if spec == "ECC_NIST_EDWARDS25519":
        return ed25519.Ed25519PrivateKey.generate()
    return ec.generate_private_key(CURVES.get(spec, ec.SECP256R1()))


def told(spec: str, key: Private, arn: str, usage: str = "SIGN_VERIFY") -> dict[str, Any]:
    """The answer to `GetPublicKey`."""
    der = key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return {"KeyId": arn, "KeySpec": spec, "CustomerMasterKeySpec": spec, "KeyUsage": usage, "PublicKey": der}


def refused(code: str, action: str = "GetPublicKey", resource: str = "") -> AwsError:
    where = f" on {resource}" if resource else ""
    response = {"Error": {"Code": code}}
    return AwsError(
        f"vault k: kms:{action}{where}: {code}: no", code=code, action=action, resource=resource, response=response
    )


def throttled() -> AwsUnavailableError:
    return AwsUnavailableError("throttled", code="ThrottlingException", response={"Error": {}})


def silent() -> AwsUnavailableError:
    return AwsUnavailableError("nobody answers")


class FakeKms:
    """Implements `signer.vaults.awskms.account.Client`.

    *trouble* may raise for an action and a key, before it is carried out; *answer* may replace what is answered. Calls
    wait for *gate* while there is one.
    """

    def __init__(self) -> None:
        self.keys: dict[str, dict[str, Any]] = {}  # by ARN: the answer to GetPublicKey
        self.names: dict[str, str] = {}  # aliases to ARNs
        self.private: dict[str, Private] = {}
        self.tags: dict[str, list[tuple[str, str]]] = {}
        self.page = 100
        self.calls: list[tuple[str, str]] = []
        self.parameters: list[dict[str, Any]] = []
        self.trouble: Callable[[str, str], Exception | None] = lambda _action, _key: None
        self.answer: Callable[[str, str, dict[str, Any]], dict[str, Any]] = lambda _action, _key, given: given
        self.gate: trio.Event | None = None
        self.busy = self.peak = 0  # calls at once

    def add(self, spec: str = "ECC_SECG_P256K1", *, usage: str = "SIGN_VERIFY", alias: str = "") -> str:
        name = arn(len(self.keys))
        self.private[name] = private(spec)
        self.keys[name] = told(spec, self.private[name], name, usage)
        if alias:
            self.names[alias] = name
        return name

    def address(self, name: str) -> Any:
        return read_key(self.keys[name]).public_key.hash

    def count(self, action: str) -> int:
        return sum(one == action for one, _ in self.calls)

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        key = str(parameters.get("KeyId", ""))
        self.calls.append((action, key))
        self.parameters.append(parameters)
        self.busy += 1
        self.peak = max(self.peak, self.busy)
        try:
            with trio.move_on_at(float("inf") if deadline is None else deadline):
                await (trio.lowlevel.checkpoint() if self.gate is None else self.gate.wait())
                problem = self.trouble(action, key)
                if problem is not None:
                    raise problem
                return self.answer(action, key, self._carry_out(action, self.names.get(key, key), parameters))
            raise silent()
        finally:
            self.busy -= 1

    def _carry_out(self, action: str, name: str, parameters: dict[str, Any]) -> dict[str, Any]:
        if action == "ListKeys":
            return self._paged(
                "Keys", [{"KeyArn": one, "KeyId": one.rpartition("/")[2]} for one in self.keys], parameters
            )
        if action == "ListAliases":
            aliases = [{"AliasName": alias, "TargetKeyId": arn.rpartition("/")[2]} for alias, arn in self.names.items()]
            return self._paged("Aliases", aliases, parameters)
        if name not in self.keys:
            raise refused("NotFoundException", action, name)
        if action == "ListResourceTags":
            return {"Tags": [{"TagKey": tag, "TagValue": value} for tag, value in self.tags.get(name, [])]}
        if action == "GetPublicKey":
            return self.keys[name]
        return {"KeyId": name, "Signature": self._sign(self.private[name], parameters)}

    def _paged(self, member: str, items: list[dict[str, Any]], parameters: dict[str, Any]) -> dict[str, Any]:
        first = int(parameters.get("Marker", 0))
        last = first + self.page
        more = {"Truncated": True, "NextMarker": str(last)} if last < len(items) else {"Truncated": False}
        return {member: items[first:last], **more}

    def _sign(self, key: Private, parameters: dict[str, Any]) -> bytes:
        assert len(parameters["Message"]) == 32
        if isinstance(key, ed25519.Ed25519PrivateKey):
            assert (parameters["MessageType"], parameters["SigningAlgorithm"]) == ("RAW", "ED25519_SHA_512")
            return key.sign(parameters["Message"])
        assert (parameters["MessageType"], parameters["SigningAlgorithm"]) == ("DIGEST", "ECDSA_SHA_256")
        return key.sign(parameters["Message"], ec.ECDSA(Prehashed(SHA256())))
