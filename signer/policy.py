"""Which request a key may sign; sections 3.1, 3.2 and 3.8 of the signer specification. Pure.

The texts are the reference's, quotes included: operators search their logs for them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from signer.config import Settings, compile_policy
from signer.errors import MalformedRequestError, RefusedError
from signer.tezos.keys import Curve, PublicKeyHash
from signer.tezos.kinds import RequestKind
from signer.tezos.requests import FIRST_BYTES, Request

_BLS_FORMS = (40, 41)  # tags of consensus operations without a slot


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks: the peer's address, and the id under which the log has the request."""

    address: str = ""
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """What one key may be asked to sign."""

    requests: tuple[str, ...]  # as listings show them
    operations: tuple[str, ...]
    chains: frozenset[str] | None = None  # None: any
    allow_proof_of_possession: bool = False
    log_payloads: bool = False
    vault: str | None = None  # the only vault that may be used for the key
    strict_forms: bool = False


def compile_policies(settings: Settings) -> Mapping[PublicKeyHash, KeyPolicy]:
    """The policy of every configured key."""
    policies: dict[PublicKeyHash, KeyPolicy] = {}
    for pkh, written in settings.tezos.items():
        compiled = compile_policy(pkh, written)
        if written is None:
            policies[pkh] = KeyPolicy(requests=compiled.requests, operations=compiled.operations)
            continue
        policies[pkh] = KeyPolicy(
            requests=compiled.requests,
            operations=compiled.operations,
            chains=None if written.allowed_chains is None else frozenset(written.allowed_chains),
            allow_proof_of_possession=written.allow_proof_of_possession and pkh.curve is Curve.BLS12_381,
            log_payloads=written.log_payloads,
            vault=written.vault,
            strict_forms=written.strict_forms,
        )
    return policies


def check_first_byte(policy: KeyPolicy, message: bytes) -> None:
    """Raise `RefusedError` where the first byte tells that the kind is not allowed; spares decoding a large body."""
    kind = FIRST_BYTES.get(message[:1])
    if kind is not None and kind not in policy.requests:
        raise RefusedError(f"request kind `{kind}' is not allowed", rule="allow", violation=kind)


def check_request(policy: KeyPolicy, pkh: PublicKeyHash, request: Request) -> None:
    """Raise `RefusedError` unless *policy* lets *pkh* sign *request*."""
    if policy.chains is not None and request.chain_id is not None and request.chain_id not in policy.chains:
        raise RefusedError(f"chain `{request.chain_id}' is not allowed", rule="allowed_chains")
    if request.kind not in policy.requests:
        raise RefusedError(f"request kind `{request.kind}' is not allowed", rule="allow", violation=request.kind)
    if request.kind is RequestKind.GENERIC:
        _check_operations(policy, request)
    if policy.strict_forms and request.tag is not None:
        _check_form(pkh, request.tag)


def check_possession(policy: KeyPolicy) -> None:
    """Raise `MalformedRequestError` unless *policy* allows a proof of possession."""
    if not policy.allow_proof_of_possession:
        raise MalformedRequestError(
            "proof of possession is not allowed: Request to prove possession is not allowed; "
            "allow_proof_of_possession under the key (tz4 only) permits it"
        )


def _check_operations(policy: KeyPolicy, request: Request) -> None:
    for kind in request.policy_operations:
        plain = kind.partition(":")[0]
        if kind not in policy.operations and plain not in policy.operations:
            raise RefusedError(f"operation `{kind}' is not allowed", rule="allow.generic", violation=plain)


def _check_form(pkh: PublicKeyHash, tag: int) -> None:
    if (tag in _BLS_FORMS) is not (pkh.curve is Curve.BLS12_381):
        raise RefusedError(
            f"a consensus operation with tag {tag} is not signed by a {pkh.curve.address_prefix} key",
            rule="strict_forms",
            violation="form",
        )
