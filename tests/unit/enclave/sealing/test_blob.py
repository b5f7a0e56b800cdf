"""Sealed keys of version 1: the vectors with their reasons, damage of every kind, and what is bound to what."""

import json
from pathlib import Path
from typing import Any

import cbor2
import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.crypto import load_secret_key
from signer.crypto.interface import SecretKey
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.blob import (
    MAGIC,
    MAX_BLOB,
    BlobError,
    encryption_context,
    is_version_1,
    open_key,
    parse,
    seal,
)
from signer.enclave.sealing.interface import SealingError
from signer.tezos.keys import Curve

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[3] / "vectors" / "attestation.json").read_text())
CASES = {case["name"]: case for case in VECTORS["sealed_blobs"]["cases"]}
PLAIN = bytes.fromhex(CASES["plain"]["blob"])
DATA_KEY = bytearray.fromhex(CASES["plain"]["data_key"])
MARKS = "arn:aws:dynamodb:us-west-2:123456789012:table/marks"
WRAPPED = b"\1\2\2\0x" + bytes(180)


def reason_of(blob: bytes, data_key: bytearray = DATA_KEY) -> str:
    """The word of a refusal, `ok` for a key."""
    try:
        open_key(parse(blob), data_key).wipe()
    except BlobError as exc:
        return exc.reason
    return "ok"


@pytest.mark.parametrize("name", CASES)
def test_vectors(name: str) -> None:
    case = CASES[name]
    blob, data_key = bytes.fromhex(case["blob"]), bytearray.fromhex(case["data_key"])
    assert reason_of(blob, data_key) == case["expect"]
    if case["expect"] == "ok":
        read = parse(blob)
        key = open_key(read, data_key)
        assert _plaintext.encode(key).hex() == case["plaintext"]
        assert encryption_context(read.address) == case["encryption_context"]
        assert read.marks == (MARKS if name == "with_marks" else None)


@pytest.mark.parametrize(("address", "plaintext"), VECTORS["sealed_blobs"]["legacy_plaintext"].items())
def test_legacy_plaintexts(address: str, plaintext: str) -> None:
    key = _plaintext.decode(bytes.fromhex(plaintext))
    assert str(key.public_key.hash) == address
    assert _plaintext.encode(key).hex() == plaintext


@pytest.mark.parametrize("curve", list(Curve))
@pytest.mark.parametrize("marks", [None, MARKS])
def test_what_is_sealed_opens(curve: Curve, marks: str | None) -> None:
    key = load_secret_key(curve, bytes(range(1, 33)))
    blob = seal(key, DATA_KEY, WRAPPED, marks=marks)
    assert is_version_1(blob)
    assert bytes(range(1, 33)) not in blob
    assert 300 < len(blob) < 600
    read = parse(blob)
    assert (read.address, read.wrapped_data_key, read.marks) == (str(key.public_key.hash), WRAPPED, marks)
    assert open_key(read, DATA_KEY).public_key == key.public_key
    assert seal(key, DATA_KEY, WRAPPED, marks=marks) != blob


def test_every_truncation() -> None:
    header_end = len(parse(PLAIN).prefix)
    assert {reason_of(PLAIN[:end]) for end in range(header_end)} == {"format"}
    assert {reason_of(PLAIN[:end]) for end in range(header_end, len(PLAIN))} == {"decrypt"}


def test_every_single_byte_change() -> None:
    for position in range(len(PLAIN)):
        for value in {0, 0xFF, 0xA5, PLAIN[position] ^ 1, PLAIN[position] ^ 0x80} - {PLAIN[position]}:
            changed = PLAIN[:position] + bytes([value]) + PLAIN[position + 1 :]
            assert reason_of(changed) in ("format", "decrypt")


def with_header(header: bytes) -> bytes:
    return MAGIC + len(header).to_bytes(2, "big") + header + bytes(60)


GOOD: dict[int, object] = {1: 2, 2: "Ed25519", 3: "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q", 4: WRAPPED, 5: bytes(12)}


@pytest.mark.parametrize(
    "change",
    [
        {1: 1},
        {1: "2"},
        {2: "Rsa"},
        {2: b"Ed25519"},
        {3: b"tz1"},
        {4: b""},
        {4: bytes(6145)},
        {4: "text"},
        {5: bytes(11)},
        {5: bytes(13)},
        {6: b"arn"},
        {6: None},
        {7: "more"},
        {0: "less"},
        {"x": 1},
    ],
    ids=str,
)
def test_other_headers(change: dict[int, object]) -> None:
    assert reason_of(with_header(cbor2.dumps(GOOD))) == "decrypt"
    assert reason_of(with_header(cbor2.dumps(GOOD | change))) == "format"


def test_the_header_has_one_encoding() -> None:
    good = cbor2.dumps(GOOD)
    assert reason_of(with_header(b"\xbf" + good[1:] + b"\xff")) == "format"  # indefinite
    assert reason_of(with_header(cbor2.dumps(dict(reversed(GOOD.items()))))) == "format"
    assert reason_of(with_header(good + b"\0")) == "format"
    assert reason_of(with_header(b"\xd9\xd9\xf7" + good)) == "format"  # tagged
    assert reason_of(with_header(good.replace(b"\xa5\x01\x02", b"\xa5\x01\x18\x02"))) == "format"  # not the shortest
    for missing in GOOD:
        assert reason_of(with_header(cbor2.dumps({name: GOOD[name] for name in GOOD if name != missing}))) == "format"


def test_a_blob_is_bounded() -> None:
    assert reason_of(PLAIN + bytes(MAX_BLOB)) == "format"
    key = load_secret_key(Curve.ED25519, bytes(32))
    assert len(seal(key, DATA_KEY, bytes(6144))) < MAX_BLOB
    with pytest.raises(BlobError, match="at most 8192 bytes"):
        seal(key, DATA_KEY, bytes(6144), marks="m" * 2000)


@pytest.mark.parametrize("length", [0, 6145, 7900])
def test_nothing_is_sealed_that_would_not_open(length: int) -> None:
    key = load_secret_key(Curve.ED25519, bytes(31) + b"\1")
    with pytest.raises(BlobError, match="a wrapped data key has 1 to 6144 bytes"):
        seal(key, DATA_KEY, bytes(length))
    assert reason_of(seal(key, DATA_KEY, bytes(6144), marks=MARKS)) == "ok"


def test_the_key_is_compared_with_the_address() -> None:
    """Whoever could have a data key made may seal anything, but not under another key's address or type."""
    first, second = (load_secret_key(Curve.ED25519, bytes(31) + bytes([number])) for number in (1, 2))

    class Liar:
        public_key = second.public_key
        curve = first.curve

        def secret_bytes(self) -> bytearray:
            return first.secret_bytes()

    blob = seal(Liar(), DATA_KEY, WRAPPED)  # type: ignore[arg-type]
    with pytest.raises(BlobError) as caught:
        open_key(parse(blob), DATA_KEY)
    assert caught.value.chain[:2] == ("encryption error", "address mismatch")


def test_the_key_is_compared_with_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """And wiped, where it is another."""
    opened: list[SecretKey] = []

    def decode(plaintext: bytes) -> SecretKey:
        opened.append(original(plaintext))
        return opened[-1]

    original = _plaintext.decode
    monkeypatch.setattr(_plaintext, "decode", decode)
    key = load_secret_key(Curve.ED25519, bytes(31) + b"\1")
    header = cbor2.dumps(GOOD | {2: "NistP256", 3: str(key.public_key.hash)})
    prefix = MAGIC + len(header).to_bytes(2, "big") + header
    sealed = AESGCM(DATA_KEY).encrypt(bytes(12), _plaintext.encode(key), prefix)
    assert reason_of(prefix + sealed) == "address mismatch"
    assert [bytes(one.secret_bytes()) for one in opened] == [bytes(32)]


def test_a_data_key_of_another_length_is_none() -> None:
    key = load_secret_key(Curve.ED25519, bytes(32))
    for length in (0, 16, 24, 31, 33):
        with pytest.raises(BlobError, match="a data key has 32 bytes"):
            seal(key, bytearray(length), WRAPPED)
        assert reason_of(PLAIN, bytearray(length)) == "decrypt"


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes(data: bytes) -> None:
    for blob in (data, MAGIC + data, with_header(data)):
        assert reason_of(blob) == "format"


@pytest.mark.parametrize("plaintext", ["", "a0", "ff", "a163526f7440", "a2"])
def test_a_plaintext_that_is_no_key(plaintext: str) -> None:
    with pytest.raises(SealingError, match="deserialization error"):
        _plaintext.decode(bytes.fromhex(plaintext))
