"""The policy filter: its order and its texts, which operators search for."""

import pytest

from signer.errors import MalformedRequestError, RefusedError
from signer.policy import KeyPolicy, check_possession, check_request
from signer.tezos.keys import PublicKeyHash
from signer.tezos.kinds import RequestKind
from signer.tezos.requests import Request

TZ1 = PublicKeyHash.from_base58("tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q")
TZ4 = PublicKeyHash.from_base58("tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME")
CHAIN = "NetXdQprcVkpaWU"


def consensus(kind: RequestKind = RequestKind.ATTESTATION, tag: int = 21) -> Request:
    return Request(kind=kind, chain_id=CHAIN, level=1, round=0, tag=tag)


def generic(*operations: str, ballots: tuple[str, ...] = ()) -> Request:
    return Request(kind=RequestKind.GENERIC, operations=operations, ballots=ballots)


def policy(*requests: str, operations: tuple[str, ...] = (), chains: frozenset[str] | None = None) -> KeyPolicy:
    return KeyPolicy(requests=requests, operations=operations, chains=chains)


@pytest.mark.parametrize(
    ("allowed", "request_", "text", "rule"),
    [
        (policy("attestation", chains=frozenset()), consensus(), f"chain `{CHAIN}' is not allowed", "allowed_chains"),
        (
            policy(chains=frozenset(["NetXnHfVqm9iesp"])),
            consensus(),
            f"chain `{CHAIN}' is not allowed",
            "allowed_chains",
        ),
        (policy(), consensus(), "request kind `attestation' is not allowed", "allow"),
        (
            policy("attestation"),
            consensus(RequestKind.ATTESTATION_WITH_DAL, 23),
            "request kind `attestation_with_dal' is not allowed",
            "allow",
        ),
        (policy(), Request(kind=RequestKind.PACK), "request kind `pack' is not allowed", "allow"),
        (policy("generic"), generic("reveal"), "operation `reveal' is not allowed", "allow.generic"),
        (
            policy("generic", operations=("reveal",)),
            generic("reveal", "transaction", "delegation"),
            "operation `transaction' is not allowed",
            "allow.generic",
        ),
        (
            policy("generic", operations=("ballot:yay",)),
            generic("ballot", ballots=("nay",)),
            "operation `ballot:nay' is not allowed",
            "allow.generic",
        ),
        (
            policy("generic", operations=("transaction",)),
            generic("stake"),
            "operation `stake' is not allowed",
            "allow.generic",
        ),
    ],
)
def test_refusals(allowed: KeyPolicy, request_: Request, text: str, rule: str) -> None:
    with pytest.raises(RefusedError) as caught:
        check_request(allowed, TZ1, request_)
    assert (str(caught.value), caught.value.rule) == (text, rule)


@pytest.mark.parametrize(
    ("allowed", "request_"),
    [
        (policy("attestation"), consensus()),
        (policy("attestation", chains=frozenset([CHAIN])), consensus()),
        (policy("generic", operations=("reveal", "transaction")), generic("reveal", "transaction")),
        (policy("generic", operations=("ballot",)), generic("ballot", ballots=("nay",))),
        (policy("generic", operations=("ballot:nay",)), generic("ballot", ballots=("nay",))),
        (policy("pack", chains=frozenset()), Request(kind=RequestKind.PACK)),
        (policy("generic", operations=("reveal",), chains=frozenset()), generic("reveal")),
    ],
)
def test_what_passes(allowed: KeyPolicy, request_: Request) -> None:
    check_request(allowed, TZ1, request_)


@pytest.mark.parametrize(("pkh", "tag", "good"), [(TZ1, 21, True), (TZ1, 41, False), (TZ4, 41, True), (TZ4, 20, False)])
def test_forms_are_bound_to_curves_only_if_asked(pkh: PublicKeyHash, tag: int, good: bool) -> None:
    kinds = ("attestation",)
    check_request(KeyPolicy(requests=kinds, operations=()), pkh, consensus(tag=tag))
    strict = KeyPolicy(requests=kinds, operations=(), strict_forms=True)
    if good:
        check_request(strict, pkh, consensus(tag=tag))
    else:
        with pytest.raises(RefusedError, match=f"tag {tag} is not signed by a"):
            check_request(strict, pkh, consensus(tag=tag))


def test_possession() -> None:
    with pytest.raises(MalformedRequestError, match="proof of possession is not allowed"):
        check_possession(policy("attestation"))
    check_possession(KeyPolicy(requests=(), operations=(), allow_proof_of_possession=True))
