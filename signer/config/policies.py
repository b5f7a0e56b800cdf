"""The policy section, from what is written to what counts; section 1.7 of the signer specification.

Old names are translated, deprecated keys still work, and each translation is worth a warning. Pure.
"""

from dataclasses import dataclass, field

from signer.config.models import Policy
from signer.tezos.keys import Curve, PublicKeyHash
from signer.tezos.kinds import BALLOT_KINDS, OPERATION_KINDS, REQUEST_KINDS

DEFAULT_REQUESTS = ("block", "preattestation", "attestation")  # for a key without a policy, in the listing's order

_REQUEST_RENAMES = {"endorsement": "attestation", "preendorsement": "preattestation"}
_OPERATION_RENAMES = {
    "endorsement": "attestation",
    "preendorsement": "preattestation",
    "double_endorsement_evidence": "double_attestation_evidence",
    "double_preendorsement_evidence": "double_preattestation_evidence",
    "set_companion_key": "update_companion_key",  # as the product's documentation has it
}
_OPERATIONS = frozenset((*OPERATION_KINDS, *BALLOT_KINDS))


@dataclass(slots=True)
class Compiled:
    """What a key may be asked to sign; *faults* name the key below the policy that is wrong."""

    requests: tuple[str, ...] = ()
    operations: tuple[str, ...] = ()
    warnings: list[str] = field(default_factory=list)
    faults: list[tuple[str, str]] = field(default_factory=list)


def compile_policy(pkh: PublicKeyHash, policy: Policy | None) -> Compiled:
    """The request kinds and operation kinds that *policy* allows."""
    if policy is None:
        return Compiled(requests=DEFAULT_REQUESTS)
    compiled = Compiled()
    if policy.allow is not None:
        requests, operations = list(policy.allow), list(policy.allow.get("generic") or ())
        where = ("allow", "allow")
        if "failing_noop" in policy.allow:  # documented as a request kind
            requests.remove("failing_noop")
            requests.append("generic")
            operations.append("failing_noop")
            compiled.warnings.append(f"tezos.{pkh}.allow: failing_noop is an operation; write generic: [failing_noop]")
    else:
        requests, operations = list(policy.allowed_operations or ()), list(policy.allowed_kinds or ())
        where = ("allowed_operations", "allowed_kinds")
        if policy.allowed_operations is not None or policy.allowed_kinds is not None:
            compiled.warnings.append(_deprecated(pkh, requests, operations))
    compiled.requests = tuple(sorted({_request(pkh, kind, compiled) for kind in requests}))
    compiled.operations = tuple(sorted({_operation(kind) for kind in operations}))
    _check(compiled, where)
    if policy.allow_proof_of_possession and pkh.curve is not Curve.BLS12_381:
        compiled.warnings.append(f"proof of possession is not supported for {pkh}")
    return compiled


def _request(pkh: PublicKeyHash, kind: str, compiled: Compiled) -> str:
    if kind in _REQUEST_RENAMES:
        compiled.warnings.append(f"tezos.{pkh}: {kind} is called {_REQUEST_RENAMES[kind]} now")
        return _REQUEST_RENAMES[kind]
    return kind


def _operation(kind: str) -> str:
    name, colon, rest = kind.partition(":")
    return _OPERATION_RENAMES.get(name, name) + colon + rest


def _check(compiled: Compiled, where: tuple[str, str]) -> None:
    """*where* names the keys that hold the request kinds and the operation kinds."""
    for kind in compiled.requests:
        if kind not in REQUEST_KINDS:
            text = f"invalid request kind `{kind}` in `allow` list; known: {', '.join(REQUEST_KINDS)}"
            compiled.faults.append((where[0], text))
    for kind in compiled.operations:
        if kind not in _OPERATIONS:
            text = f"invalid operation kind `{kind}` in `allow.generic` list; see: signer list-ops"
            compiled.faults.append((where[1], text))


def _deprecated(pkh: PublicKeyHash, requests: list[str], operations: list[str]) -> str:
    lines = [f"tezos.{pkh}: allowed_operations and allowed_kinds are deprecated, use allow:", "  allow:"]
    renamed = {_REQUEST_RENAMES.get(kind, kind) for kind in requests}
    for kind in sorted(renamed | ({"generic"} if operations else set())):
        lines.append(f"    {kind}:")
        if kind == "generic":
            lines += [f"      - {operation}" for operation in sorted({_operation(name) for name in operations})]
    return "\n".join(lines)
