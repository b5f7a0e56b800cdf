"""The judge: each thing that must not happen is found."""

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils

from signer import crypto
from signer.tezos.keys import Curve, Signature, digest_of
from signer.tezos.requests import decode
from tests.drill.ledger import Ledger
from tests.drill.messages import Kind, Slot, message

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
SECRETS = {curve: crypto.load_secret_key(curve, bytes(range(1, 33))) for curve in Curve}


def slot(curve: Curve = Curve.ED25519, level: int = 7) -> Slot:
    return Slot(1, str(SECRETS[curve].public_key.hash), Kind.ATTESTATION, level, 0)


def enter(ledger: Ledger, curve: Curve, text: bytes, signature: str, *, level: int = 7) -> None:
    ledger.signature(slot(curve, level), SECRETS[curve].public_key, text, signature)


def sign(curve: Curve, text: bytes) -> str:
    return str(SECRETS[curve].sign(text, version=2))


@pytest.mark.parametrize("curve", list(Curve))
def test_good_signatures_and_their_repeats_are_right(curve: Curve) -> None:
    ledger, text = Ledger(), message(slot(curve), curve, 1)
    for _ in range(2):
        enter(ledger, curve, text, sign(curve, text))
    assert ledger.signed == 2
    assert not ledger.violations


@pytest.mark.parametrize("curve", list(Curve))
def test_a_signature_over_other_bytes_is_wrong(curve: Curve) -> None:
    ledger, text = Ledger(), message(slot(curve), curve, 1)
    enter(ledger, curve, text, sign(curve, message(slot(curve), curve, 2)))
    assert len(ledger.wrong) == len(ledger.violations) == 1


def test_a_signature_of_another_key_is_wrong() -> None:
    ledger, text = Ledger(), b"m"
    enter(ledger, Curve.ED25519, text, sign(Curve.P256, text))
    other = crypto.load_secret_key(Curve.ED25519, bytes(range(2, 34)))
    enter(ledger, Curve.ED25519, text, str(other.sign(text, version=2)))
    assert len(ledger.wrong) == 2


@pytest.mark.parametrize("text", ["", "nonsense", str(Signature(None, bytes(64)))])
def test_what_is_no_signature_is_wrong(text: str) -> None:
    ledger = Ledger()
    enter(ledger, Curve.ED25519, b"m", text)
    assert len(ledger.wrong) == 1


def test_two_messages_of_one_slot_are_a_double_signature() -> None:
    ledger, curve = Ledger(), Curve.BLS12_381
    for payload in (1, 2):
        text = message(slot(curve), curve, payload)
        enter(ledger, curve, text, sign(curve, text))
    assert len(ledger.doubles) == len(ledger.violations) == 1


def test_other_slots_are_no_double_signature() -> None:
    ledger, curve = Ledger(), Curve.P256
    for level in (7, 8):
        text = message(slot(curve, level), curve, level)
        enter(ledger, curve, text, sign(curve, text), level=level)
    assert not ledger.violations


def test_another_signature_for_the_same_bytes_is_found() -> None:
    ledger, curve, text = Ledger(), Curve.P256, b"m"
    enter(ledger, curve, text, sign(curve, text))
    secret = ec.derive_private_key(int.from_bytes(SECRETS[curve].secret_bytes(), "big"), ec.SECP256R1())
    again = secret.sign(digest_of(text), ec.ECDSA(utils.Prehashed(hashes.SHA256())))  # a nonce of its own
    r, s = utils.decode_dss_signature(again)
    low = min(s, ORDER - s)
    enter(ledger, curve, text, str(Signature(curve, r.to_bytes(32, "big") + low.to_bytes(32, "big"))))
    assert not ledger.wrong
    assert len(ledger.violations) == 1


@pytest.mark.parametrize(
    ("status", "allowed"), [(200, True), (409, True), (500, True), (502, True), (404, False), (503, False)]
)
def test_statuses(status: int, *, allowed: bool) -> None:
    ledger = Ledger()
    ledger.status(status, slot(), "text")
    assert ledger.statuses == {status: 1}
    assert (not ledger.violations) is allowed


def test_reasons_of_errors_are_counted_without_the_key() -> None:
    ledger = Ledger()
    for curve in Curve:
        address = SECRETS[curve].public_key.hash
        ledger.status(500, slot(), f'[{{"kind":"temporary","id":"failure","msg":"no {address} now"}}]')
    ledger.status(500, slot(), "no JSON")
    ledger.status(409, slot(), "[]")
    assert ledger.reasons == {"no tz… now": 4, "no JSON": 1}


@pytest.mark.parametrize("curve", list(Curve))
@pytest.mark.parametrize("kind", list(Kind))
def test_messages_say_what_their_slot_says(kind: Kind, curve: Curve) -> None:
    place = Slot(0x7A06A770, "", kind, 12, 3)
    request = decode(message(place, curve, 5))
    assert (request.kind.value, request.level, request.round) == (kind.name.lower(), 12, 3)
    assert request.chain_id == "NetXdQprcVkpaWU"
    assert message(place, curve, 5) != message(place, curve, 6)
