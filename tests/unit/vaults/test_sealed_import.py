"""The lines of a sealed import: what each side makes of whatever the other one says."""

import json
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer import crypto
from signer.attestation import claims, sealed
from signer.attestation.claims import Claims
from signer.attestation.document import Expected
from signer.crypto.interface import SecretKey
from signer.rpc.messages import ImportSealed
from signer.tezos.keys import Curve
from signer.vaults.nitro import sealed_import
from signer.vaults.nitro.sealed_import import (
    MAX_LINE,
    Answer,
    Imported,
    Question,
    SealedImportError,
    order_line,
    read_answer,
    read_imported,
    read_order,
    read_question,
    refusal,
)
from tests.attested.documents import make_chain, make_document, root

KEY = crypto.load_secret_key(Curve.ED25519, bytes(31) + b"\1").public_key
READERS = (read_question, read_answer, read_order, read_imported)


@given(
    nonce=st.binary(min_size=16, max_size=64),
    document=st.binary(max_size=16_384),
    ciphertext=st.binary(max_size=4096),
    marks=st.none() | st.text(max_size=50),
)
def test_what_is_written_is_read(nonce: bytes, document: bytes, ciphertext: bytes, marks: str | None) -> None:
    order = ImportSealed(bytes(32), bytes(range(32)), ciphertext, str(KEY.hash), marks)
    lines = [Question(nonce).line(), Answer(document).line(), order_line(order), Imported(KEY).line()]
    assert all(line.endswith(b"\n") and line.count(b"\n") == 1 and len(line) < MAX_LINE for line in lines)
    assert read_question(lines[0]) == Question(nonce)
    assert read_answer(lines[1]) == Answer(document)
    assert read_order(lines[2]) == order
    assert read_imported(lines[3]) == Imported(KEY)


@given(
    st.binary(max_size=300)
    | st.recursive(st.none() | st.integers() | st.text(), st.lists).map(json.dumps).map(str.encode)
)
def test_anything_else_is_refused(line: bytes) -> None:
    for read in READERS:
        with pytest.raises(SealedImportError):
            read(line)


@given(st.data())
def test_fields_of_other_kinds_are_refused(data: st.DataObject) -> None:
    names = st.sampled_from(["nonce", "document", "key", "enc", "ciphertext", "address", "marks", "public_key"])
    values = st.none() | st.integers() | st.text(max_size=5) | st.lists(st.integers(), max_size=2)
    fields = {"tezos-signer": sealed_import.VERSION, **data.draw(st.dictionaries(names, values))}
    for read in (read_question, read_order, read_imported):
        with pytest.raises(SealedImportError):
            read(json.dumps(fields).encode())


@pytest.mark.parametrize("size", [15, 65])
def test_a_nonce_has_its_length(size: int) -> None:
    with pytest.raises(SealedImportError, match="a nonce has 16 to 64 bytes"):
        read_question(Question(bytes(size)).line())


@pytest.mark.parametrize(
    "order",
    [
        ImportSealed(bytes(31), bytes(32), b"", "tz1", None),
        ImportSealed(bytes(32), bytes(33), b"", "tz1", None),
        ImportSealed(bytes(32), bytes(32), bytes(4097), "tz1", None),
    ],
)
def test_an_order_has_its_lengths(order: ImportSealed) -> None:
    with pytest.raises(SealedImportError, match="another length"):
        read_order(order_line(order))


@pytest.mark.parametrize("marks", [1, ["arn"], {}, True])
def test_marks_are_a_text(marks: object) -> None:
    fields = json.loads(order_line(ImportSealed(bytes(32), bytes(32), b"", "tz1", None)))
    assert read_order(json.dumps(fields).encode()).marks is None
    with pytest.raises(SealedImportError, match="marks is a text"):
        read_order(json.dumps(fields | {"marks": marks}).encode())


def test_a_refusal_is_told_without_what_a_terminal_obeys() -> None:
    for read in READERS:
        with pytest.raises(SealedImportError) as error:
            read(refusal("no\x1b[2J\r\nroom"))
        assert str(error.value) == "the host says: no?[2J??room"


def test_a_line_without_end_is_refused() -> None:
    with pytest.raises(SealedImportError, match="is no sealed import"):
        read_answer(b" " * (MAX_LINE + 1))


def test_another_program_is_named_as_such() -> None:
    with pytest.raises(SealedImportError, match="does not speak sealed-import/1; it said 'Welcome to Debian'"):
        read_answer(b"Welcome to Debian\n")


@pytest.mark.parametrize("version", ["sealed-import/2", "", None, 1])
def test_another_version_is_named_as_such(version: object) -> None:
    lines = [Question(bytes(16)).line(), Answer(b"d").line(), Imported(KEY).line()]
    for read, line in zip((read_question, read_answer, read_imported), lines, strict=True):
        other = json.dumps(json.loads(line) | {"tezos-signer": version}).encode()
        with pytest.raises(SealedImportError, match="does not speak sealed-import/1"):
            read(other)


@pytest.mark.parametrize(
    "text", ["A" * 24 + "!", "A" * 12 + "\n" + "A" * 12, "AAAA-AAA_AAAAAAAAAAAAAAAAAAA", "A" * 23, "é" * 24]
)
def test_base64_is_plain(text: str) -> None:
    with pytest.raises(SealedImportError, match="nonce is not Base64"):
        read_question(json.dumps({"tezos-signer": sealed_import.VERSION, "nonce": text}).encode())


# -- the operator's machine

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
CHAIN = make_chain(at=NOW)
NONCE = bytes(range(32))


def document(purpose: str, address: str | None = None, public_key: bytes | None = None) -> bytes:
    """Genuine, and with a key to seal to."""
    public_key = public_key or sealed.generate()[1]
    told = claims.encode(Claims(purpose=purpose, boot_id=bytes(16), address=address))
    return make_document(CHAIN, made_at=NOW, nonce=NONCE, public_key=public_key, user_data=told)


def test_nothing_is_sealed_to_a_document_of_another_purpose() -> None:
    secret = crypto.load_secret_key(Curve.ED25519, bytes(31) + b"\1")
    expected = Expected(nonce=NONCE, needs_public_key=True, root_sha256=root().sha256)
    order, _ = sealed_import.seal_for(document(claims.IMPORT), secret, expected, now=NOW)
    assert order.address == str(secret.public_key.hash)
    for other in (document(claims.SESSION), document(claims.KEY, order.address)):
        with pytest.raises(SealedImportError, match="for another purpose than an import"):
            sealed_import.seal_for(other, secret, expected, now=NOW)


def test_the_key_is_bound_to_document_address_and_marks() -> None:
    secret = crypto.load_secret_key(Curve.ED25519, bytes(31) + b"\1")
    opener, public_key = sealed.generate()
    genuine, table = document(claims.IMPORT, public_key=public_key), "arn:aws:dynamodb:us-west-2:1:table/marks"
    expected = Expected(nonce=NONCE, needs_public_key=True, root_sha256=root().sha256)
    for marks in (None, table):
        order, _ = sealed_import.seal_for(genuine, secret, expected, now=NOW, marks=marks)
        assert order.marks == marks
        bound_to = sealed.info(genuine, str(secret.public_key.hash), marks)
        assert bytes(secret.secret_bytes()) in sealed.open_(opener, order.enc, order.ciphertext, bound_to)


def test_the_copy_of_the_secret_is_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where it cannot be encoded."""
    secret = crypto.load_secret_key(Curve.ED25519, bytes(31) + b"\1")
    copies: list[bytearray] = []
    secret_bytes = type(secret).secret_bytes

    def watched(self: SecretKey) -> bytearray:
        copies.append(secret_bytes(self))
        return copies[-1]

    monkeypatch.setattr(type(secret), "secret_bytes", watched)
    expected = Expected(nonce=NONCE, root_sha256=root().sha256)
    sealed_import.seal_for(document(claims.IMPORT), secret, expected, now=NOW)
    monkeypatch.setattr(sealed_import, "encode_private_key", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sealed_import.seal_for(document(claims.IMPORT), secret, expected, now=NOW)
    assert copies == [bytes(32), bytes(32)]
