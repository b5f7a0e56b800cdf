"""The calls around attestation byte by byte, as a stranger writes them from sections 7.2 and 7.4 of the specification.

Nothing here goes through the signer's own codec: what both of its sides get wrong alike is seen here only.
"""

import hashlib

import cbor2
import pytest
import trio.testing

from signer.enclave.attestor import Attestor
from signer.enclave.entropy import kernel_entropy
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session
from tests.attested.nsm import FakeNsm
from tests.unit.attestation import hpke

BOOT_ID = b"0123456789abcdef"
ADDRESS = b"tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
PRIVATE_KEY = bytes.fromhex("a167456432353531395820cfe0c48fe7530d3aba4f5b3a9b33073251691a83fbc1ab248db31c42ec2b9703")
PUBLIC_KEY = bytes.fromhex("a167456432353531395820b9dfece6122726b04976b23a69d54729816cebde72eebd521b2b8d5a6ad891b6")
TABLE = b"arn:aws:dynamodb:us-west-2:123456789012:table/marks"
CREDENTIALS = b"\xa1\x66region\x69us-west-2"
OK = bytes.fromhex("a1624f6b")


def error(*chain: bytes) -> bytes:
    """Texts of fewer than 24 bytes."""
    found = b"\xf6"
    for text in reversed(chain):
        found = b"\xa2\x67message" + bytes([0x60 + len(text)]) + text + b"\x66source" + found
    return b"\xa1\x63Err" + found


@pytest.fixture
def session(autojump_clock: trio.testing.MockClock) -> Session:
    """Attest is limited to five a second, on Trio's clock."""
    attestor = Attestor(FakeNsm(), boot_id=BOOT_ID, entropy=kernel_entropy)
    return Session(LocalSealing(bytes(32)), attestor=attestor)


def said(purpose: bytes, behind: bytes = b"", *, entries: int = 5) -> bytes:
    """User data with nothing of the caller's."""
    head = bytes([0xA0 + entries]) + b"\x01\x6ctezos-signer\x02\x01\x03"
    return head + bytes([0x60 + len(purpose)]) + purpose + b"\x04\x40\x05\x50" + BOOT_ID + behind


def document_of(reply: bytes) -> bytes:
    assert reply.startswith(OK + b"\xa1\x68document\x59")
    assert int.from_bytes(reply[15:17], "big") == len(reply[17:])
    return reply[17:]


def fields_of(document: bytes) -> tuple[bytes | None, bytes | None, bytes | None]:
    """Nonce, user data and public key."""
    payload = cbor2.loads(cbor2.loads(document)[2])
    return payload["nonce"], payload["user_data"], payload["public_key"]


async def import_key(session: Session) -> tuple[bytes, bytes]:
    """A document for an import, and the raw key in it."""
    nonce = b"n" * 16
    document = document_of(await session.answer(b"\xa1\x66Attest\xa2\x67purpose\x66import\x65nonce\x50" + nonce))
    found_nonce, user_data, public_key = fields_of(document)
    assert (found_nonce, user_data) == (nonce, said(b"import"))
    assert public_key is not None
    assert public_key[:12] == bytes.fromhex("302a300506032b656e032100")
    return document, public_key[12:]


def sealed(document: bytes, key: bytes, plaintext: bytes, bound_to: bytes) -> bytes:
    """The entries key, enc and ciphertext of a call's map."""
    info = b"tezos-signer/import/1\0" + hashlib.sha256(document).digest() + bound_to
    enc, ciphertext = hpke.seal(key, info, plaintext, ephemeral=b"e" * 32)
    assert 24 <= len(ciphertext) < 256
    return (
        b"\x63key\x58\x20"
        + key
        + b"\x63enc\x58\x20"
        + enc
        + b"\x6aciphertext\x58"
        + bytes([len(ciphertext)])
        + ciphertext
    )


async def initialize(session: Session) -> None:
    assert await session.answer(b"\xa1\x6aInitialize\xa0") == OK + b"\xf6"


async def test_a_session_is_attested(session: Session) -> None:
    """Before Initialize; binary may come as arrays of integers."""
    array = b"\x98\x40" + b"\x07" * 64
    call = b"\xa1\x66Attest\xa3\x65nonce" + array + b"\x67purpose\x67session\x69user_data\x41x"
    nonce, user_data, public_key = fields_of(document_of(await session.answer(call)))
    assert (nonce, public_key) == (b"\x07" * 64, None)
    assert user_data == said(b"session").replace(b"\x04\x40", b"\x04\x41x")


async def test_a_key_is_imported_and_attested(session: Session) -> None:
    await initialize(session)
    document, key = await import_key(session)
    entries = sealed(document, key, PRIVATE_KEY, ADDRESS + b"\0" + TABLE)
    call = b"\xa1\x6cImportSealed\xa5" + entries + b"\x67address\x78\x24" + ADDRESS + b"\x65marks\x78\x33" + TABLE
    reply = await session.answer(call)
    assert reply.startswith(OK + b"\xa3\x75encrypted_private_key\x58")
    assert reply.endswith(b"\x6apublic_key" + PUBLIC_KEY + b"\x66handle\x00")
    assert await session.answer(call) == error(b"import error", b"unknown import key")

    reply = await session.answer(b"\xa1\x69AttestKey\xa2\x66handle\x00\x65nonce\x50" + bytes(16))
    behind = b"\x06\x78\x24" + ADDRESS + b"\x07\x78\x33" + TABLE
    assert fields_of(document_of(reply)) == (bytes(16), said(b"key", behind, entries=7), None)


@pytest.mark.parametrize(
    ("address", "bound_to", "plaintext", "reason"),
    [
        (ADDRESS, ADDRESS + b"\0" + TABLE, PRIVATE_KEY, b"decryption failed"),
        (ADDRESS[:-1] + b"R", ADDRESS, PRIVATE_KEY, b"decryption failed"),
        (ADDRESS[:-1] + b"R", ADDRESS[:-1] + b"R", PRIVATE_KEY, b"address mismatch"),
    ],
)
async def test_what_was_sealed_for_another_address(
    session: Session, address: bytes, bound_to: bytes, plaintext: bytes, reason: bytes
) -> None:
    await initialize(session)
    entries = sealed(*await import_key(session), plaintext, bound_to)
    reply = await session.answer(b"\xa1\x6cImportSealed\xa4" + entries + b"\x67address\x78\x24" + address)
    assert reply == error(b"import error", reason)


async def test_a_session_is_opened_by_sealed_credentials(session: Session) -> None:
    assert await session.answer(b"\xa1\x69PublicKey\x00") == error(b"uninitialized")
    entries = sealed(*await import_key(session), CREDENTIALS, b"credentials")
    assert await session.answer(b"\xa1\x70InitializeSealed\xa3" + entries) == OK + b"\xf6"
    assert await session.answer(b"\xa1\x69PublicKey\x00") == error(b"signer error", b"invalid handle")
