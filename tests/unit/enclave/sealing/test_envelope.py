"""The reader of KMS's envelopes: the vectors with their reasons, and bytes that nobody meant to send."""

import base64
import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.enclave.sealing import envelope as envelope_module
from signer.enclave.sealing.envelope import MAX_ENVELOPE, EnvelopeError, open_envelope, recipient_id

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[3] / "vectors" / "attestation.json").read_text())
CASES = {case["name"]: case for case in VECTORS["cms"]}


def load_key() -> RSAPrivateKey:
    key = load_der_private_key(base64.b64decode(VECTORS["rsa_private_key_pkcs8"]), None)
    assert isinstance(key, RSAPrivateKey)
    return key


KEY = load_key()
KEY_ID = recipient_id(KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
KMS_FORM = base64.b64decode(CASES["kms_form"]["message"])


def reason_of(message: bytes) -> str:
    """The word of a refusal, `ok` for a plaintext."""
    try:
        open_envelope(message, KEY, KEY_ID)
    except EnvelopeError as exc:
        return exc.reason
    return "ok"


@pytest.mark.parametrize("name", CASES)
def test_vectors(name: str) -> None:
    case = CASES[name]
    message = base64.b64decode(case["message"])
    if case["expect"] == "ok":
        plaintext = open_envelope(message, KEY, KEY_ID)
        assert isinstance(plaintext, bytearray)
        assert plaintext.hex() == case["plaintext"]
    else:
        assert reason_of(message) == case["expect"]


def test_faults_behind_rsa_have_one_text() -> None:
    texts = set()
    for case in CASES.values():
        if case["expect"] == "decrypt":
            with pytest.raises(EnvelopeError) as caught:
                open_envelope(base64.b64decode(case["message"]), KEY, KEY_ID)
            assert caught.value.__cause__ is caught.value.__context__ is None
            texts.add(str(caught.value))
    assert texts == {"the envelope of AWS KMS is refused (decrypt): it does not decrypt"}


def test_the_content_is_decrypted_whatever_rsa_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A message whose key does not open costs the work of one whose key does."""
    seen = []
    original = envelope_module._is_padded

    def counted(data: bytearray) -> bool:
        seen.append(len(data))
        return original(data)

    monkeypatch.setattr(envelope_module, "_is_padded", counted)
    for name in ("kms_form", "other_key_same_id", "short_content_key", "bad_padding"):
        reason_of(base64.b64decode(CASES[name]["message"]))
    assert seen == [48, 48, 48, 48]


def test_what_is_refused_behind_rsa_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plaintext whose padding is wrong may still be most of a key."""
    seen: list[bytearray] = []

    def refuse(data: bytearray) -> bool:
        assert any(data)
        seen.append(data)
        return False

    monkeypatch.setattr(envelope_module, "_is_padded", refuse)
    assert reason_of(KMS_FORM) == "decrypt"
    assert [bytes(data) for data in seen] == [bytes(48)]


@pytest.mark.parametrize(
    ("tail", "good"),
    [
        ("01", True),
        ("0202", True),
        ("030303", True),
        ("10" * 16, True),
        ("00", False),
        ("0302", False),
        ("020303", False),
        ("ff", False),
        ("11" * 17, False),
        ("10" + "0f" + "10" * 14, False),
        ("0f" + "10" * 15, False),
    ],
)
def test_padding(tail: str, good: bool) -> None:
    data = bytearray(b"\x55" * 32)
    data[-len(tail) // 2 :] = bytes.fromhex(tail)
    assert envelope_module._is_padded(data) is good


@pytest.mark.parametrize("name", ["kms_form", "kms_odd_chunks", "der_form"])
def test_every_truncation(name: str) -> None:
    message = base64.b64decode(CASES[name]["message"])
    assert {reason_of(message[:end]) for end in range(len(message))} == {"ber"}


def test_every_single_byte_change() -> None:
    """Nothing but a plaintext or an `EnvelopeError`; a changed vector or padding may still decrypt: it is CBC alone."""
    reasons: dict[str, int] = {}
    for position in range(len(KMS_FORM)):
        for value in {0, 1, 0x80, 0x84, 0xFF, KMS_FORM[position] ^ 1, KMS_FORM[position] ^ 0x20} - {KMS_FORM[position]}:
            reason = reason_of(KMS_FORM[:position] + bytes([value]) + KMS_FORM[position + 1 :])
            reasons[reason] = reasons.get(reason, 0) + 1
    assert set(reasons) >= {"ber", "structure", "version", "recipient_key", "algorithm", "content_type", "decrypt"}


def test_size_and_depth_are_bounded() -> None:
    assert reason_of(b"") == "ber"
    assert reason_of(b"\x30\x80" * 4000) == "ber"
    assert reason_of(b"\x30\x80" * (MAX_ENVELOPE // 2) + b"\0\0") == "ber"
    wide = b"\x30\x82\x3f\xfc" + b"\x05\x00" * ((MAX_ENVELOPE - 4) // 2)
    assert len(wide) == MAX_ENVELOPE
    assert reason_of(wide) == "structure"
    assert reason_of(wide.replace(b"\x3f\xfc", b"\x3f\xfe") + b"\x05\x00") == "ber"


@pytest.mark.parametrize(("depth", "reason"), [(12, "structure"), (13, "ber")])
def test_twelve_elements_may_be_inside_one_another(depth: int, reason: str) -> None:
    message = b"\5\0"
    for _ in range(depth - 1):
        message = b"\x30" + bytes([len(message)]) + message
    assert reason_of(message) == reason
    assert reason_of(b"\x30\x80" * (depth - 1) + b"\5\0" + bytes(2 * (depth - 1))) == reason


def test_an_end_of_contents_lies_inside_the_element_around_it() -> None:
    assert reason_of(b"\x30\6\x30\x80\5\0\0\0") == "structure"
    for length in (4, 5):
        assert reason_of(b"\x30" + bytes([length]) + b"\x30\x80\5\0\0\0") == "ber"


def test_a_length_has_at_most_four_octets_behind_the_first() -> None:
    message = base64.b64decode(CASES["long_lengths"]["message"])
    assert message[1] == 0x84
    assert reason_of(message[:1] + b"\x85\0" + message[2:]) == "ber"


@pytest.mark.parametrize(
    "message",
    [
        "0480",
        "3085000000000200",
        "0000",
        "3000ff",
        "1f0100",
        "30020000",
        "30",
        "3081",
        "30830000",
        "30800000ff",
        "3080",
    ],
)
def test_malformed_ber(message: str) -> None:
    assert reason_of(bytes.fromhex(message)) == "ber"


def rebuilt(*changes: tuple[str, str]) -> bytes:
    """The message in KMS's form with pieces of it exchanged; they must keep their length or have indefinite parents."""
    text = KMS_FORM.hex()
    for old, new in changes:
        assert text.count(old) >= 1
        text = text.replace(old, new, 1)
    return bytes.fromhex(text)


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("3080060", "3180060", "structure"),
        ("06092a864886f70d010701", "06092a864886f70d010702", "content_type"),
        ("0410", "0510", "algorithm"),
        ("a0800430", "a1800430", "structure"),
        ("a0800430", "a0800c30", "content"),
        ("a0800430", "a4800430", "structure"),
        ("020102", "020103", "version"),
        ("04820100", "05820100", "structure"),
        ("8020f995", "0420f995", "structure"),
    ],
)
def test_other_forms(old: str, new: str, reason: str) -> None:
    assert reason_of(rebuilt((old, new))) == reason


def test_originator_and_attributes_are_refused() -> None:
    assert reason_of(rebuilt(("02010231", "020102a00031"))) == "structure"
    assert KMS_FORM.endswith(bytes(10))
    assert reason_of(KMS_FORM[:-6] + b"\xa1\x00" + KMS_FORM[-6:]) == "structure"


def test_nested_chunks_are_refused() -> None:
    """A constructed octet string inside: BER would allow it."""
    nested = rebuilt(("a0800430", "a08024800430"))
    assert reason_of(nested[:-10] + bytes(12)) == "content"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=600))
def test_any_bytes(message: bytes) -> None:
    assert reason_of(message) != "ok"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_any_damage(seed: int) -> None:
    """Cut, exchanged and repeated stretches of good messages."""
    chance = random.Random(seed)
    message = bytearray(base64.b64decode(chance.choice([c["message"] for c in CASES.values() if c["expect"] == "ok"])))
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(message))
        message[at : at + chance.randrange(4)] = chance.randbytes(chance.randrange(4))
    with contextlib.suppress(EnvelopeError):
        open_envelope(bytes(message), KEY, KEY_ID)
