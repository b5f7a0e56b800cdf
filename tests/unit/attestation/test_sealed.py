"""Sealed imports: the vectors, and that nothing else opens what was sealed."""

import base64
import hashlib

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from hypothesis import given
from hypothesis import strategies as st

from signer.attestation.sealed import (
    CREDENTIALS,
    MAX_CIPHERTEXT,
    SealedError,
    generate,
    info,
    info_of_digest,
    open_,
    raw_public_key,
    seal,
)
from signer.errors import SignerError
from tests.unit.attestation import hpke
from tests.unit.attestation.vectors import VECTORS, document

ADDRESS = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
TABLE = "arn:aws:dynamodb:us-west-2:123456789012:table/marks"
_CASES = {case["name"]: case for case in VECTORS["sealed_imports"]}


@pytest.mark.parametrize("name", _CASES)
def test_vector(name: str) -> None:
    case = _CASES[name]
    secret, enc, ciphertext = (bytes.fromhex(case[field]) for field in ("enclave_secret", "enc", "ciphertext"))
    bound_to = info(base64.b64decode(case["document"]), case["address"])
    assert bound_to.hex() == case["info"]
    if case["expect"] == "ok":
        assert open_(secret, enc, ciphertext, bound_to).hex() == case["plaintext"]
    else:
        with pytest.raises(SealedError, match=r"^decryption failed$"):
            open_(secret, enc, ciphertext, bound_to)


def test_both_outcomes_are_among_the_vectors() -> None:
    assert {case["expect"] for case in _CASES.values()} == {"ok", "decrypt"}


@given(st.binary(max_size=3000), st.binary(max_size=400))
def test_what_was_sealed_opens(plaintext: bytes, bound_to: bytes) -> None:
    secret, public_key = generate()
    enc, ciphertext = seal(raw_public_key(public_key), bound_to, plaintext)
    assert (len(enc), len(ciphertext)) == (32, len(plaintext) + 16)
    assert open_(secret, enc, ciphertext, bound_to) == plaintext


@pytest.mark.parametrize("marks", [None, TABLE])
def test_a_reader_of_the_specification_agrees(marks: str | None) -> None:
    """Both sides here take HPKE and `info` from one place; the vectors have no marks, and open only."""
    secret, public_key = generate()
    bound_to = b"tezos-signer/import/1\0" + hashlib.sha256(b"document").digest() + ADDRESS.encode()
    if marks is not None:
        bound_to += b"\0" + marks.encode()
    assert info(b"document", ADDRESS, marks) == bound_to
    assert public_key == bytes.fromhex("302a300506032b656e032100") + raw_public_key(public_key)
    enc, ciphertext = seal(raw_public_key(public_key), bound_to, b"secret")
    assert hpke.open_(bytes(secret), enc, ciphertext, bound_to) == b"secret"
    theirs = hpke.seal(raw_public_key(public_key), bound_to, b"secret", ephemeral=bytes(range(32)))
    assert open_(secret, *theirs, bound_to) == b"secret"


def test_a_fresh_key_each_time_and_another_ciphertext() -> None:
    secret, public_key = generate()
    assert secret != generate()[0]
    raw = raw_public_key(public_key)
    assert seal(raw, b"i", b"p") != seal(raw, b"i", b"p")
    assert len(public_key) == 44


def test_the_secret_comes_from_the_entropy_that_is_given() -> None:
    fixed = bytes(range(32))
    secret, public_key = generate(lambda count: fixed[:count])
    assert secret == fixed
    assert raw_public_key(public_key).hex() == "8f40c5adb68f25624ae5b214ea767a6ec94d829d3d7b5e1ad1ba6f3e2138285f"


def test_every_changed_byte_and_every_truncation_is_refused() -> None:
    secret, public_key = generate()
    enc, ciphertext = seal(raw_public_key(public_key), b"info", b"plaintext")
    whole = enc + ciphertext
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 0x11
        with pytest.raises(SealedError, match=r"^decryption failed$"):
            open_(secret, bytes(damaged[:32]), bytes(damaged[32:]), b"info")
        with pytest.raises(SealedError):
            open_(secret, whole[:place][:32], whole[:place][32:], b"info")
    with pytest.raises(SealedError):
        open_(secret, enc, ciphertext + b"\0", b"info")
    with pytest.raises(SealedError):  # cut at another place
        open_(secret, whole[:31], whole[31:], b"info")
    with pytest.raises(SealedError):
        open_(secret, bytes(32), ciphertext, b"info")  # a point of low order
    with pytest.raises(SealedError):
        open_(generate()[0], enc, ciphertext, b"info")


def test_document_address_and_marks_are_bound() -> None:
    first, second = document("valid"), document("valid_nulls")
    kinds = [
        info(first, ADDRESS),
        info(second, ADDRESS),
        info(first, CREDENTIALS),
        info(first, ADDRESS, TABLE),
        info(first, ADDRESS, TABLE + "2"),
        info(first, ADDRESS + TABLE),
    ]
    assert len(set(kinds)) == len(kinds)
    secret, public_key = generate()
    for one in kinds:
        enc, ciphertext = seal(raw_public_key(public_key), one, b"secret")
        for other in kinds:
            if other == one:
                assert open_(secret, enc, ciphertext, other) == b"secret"
            else:
                with pytest.raises(SealedError):
                    open_(secret, enc, ciphertext, other)


def test_the_form_of_the_info() -> None:
    digest = hashlib.sha256(b"document").digest()
    assert info(b"document", ADDRESS) == b"tezos-signer/import/1\0" + digest + ADDRESS.encode()
    assert info(b"document", ADDRESS, TABLE) == info(b"document", ADDRESS) + b"\0" + TABLE.encode()
    assert info_of_digest(digest, ADDRESS, TABLE) == info(b"document", ADDRESS, TABLE)


@pytest.mark.parametrize("text", ["", "tz1\0arn", "tz1é", "tz1\n"])
def test_texts_that_could_be_read_in_two_ways_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="ASCII"):
        info(b"document", text)
    with pytest.raises(ValueError, match="ASCII"):
        info(b"document", ADDRESS, text)


@pytest.mark.parametrize("digest", [b"", bytes(31), bytes(48)])
def test_a_hash_of_another_length_is_refused(digest: bytes) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        info_of_digest(digest, ADDRESS)


@pytest.mark.parametrize("key", [b"", bytes(31), bytes(33), bytes(32), b"\x01" + bytes(31)])
def test_a_public_key_that_is_none_is_refused(key: bytes) -> None:
    with pytest.raises(SealedError, match="usable"):
        seal(key, b"info", b"plaintext")


def test_only_an_x25519_key_is_sealed_to() -> None:
    rsa = bytes.fromhex(VECTORS["documents"][0]["facts"]["public_key"])
    good = generate()[1]
    ed25519 = good.replace(bytes.fromhex("2b656e"), bytes.fromhex("2b6570"))
    for key in (None, b"", rsa, good[:-1], good + b"\0", ed25519, bytes(44)):
        with pytest.raises(SealedError, match="not made for an import") as caught:
            raw_public_key(key)
        assert isinstance(caught.value, SignerError)


def test_length() -> None:
    secret, public_key = generate()
    raw = raw_public_key(public_key)
    enc, ciphertext = seal(raw, b"info", bytes(MAX_CIPHERTEXT - 16))
    assert len(open_(secret, enc, ciphertext, b"info")) == MAX_CIPHERTEXT - 16
    with pytest.raises(SealedError, match="too many"):
        seal(raw, b"info", bytes(MAX_CIPHERTEXT - 15))


def test_a_ciphertext_that_is_too_long_is_not_even_tried() -> None:
    secret, public_key = generate()
    suite = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
    key = X25519PublicKey.from_public_bytes(raw_public_key(public_key))
    sealed = suite.encrypt(bytes(MAX_CIPHERTEXT - 15), key, b"info")
    with pytest.raises(SealedError, match=r"^decryption failed$"):
        open_(secret, sealed[:32], sealed[32:], b"info")
