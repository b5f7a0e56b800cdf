"""The program of an image against Linux's own /dev/nsm: duties at the start, documents, and KMS out of reach.

The emulator's documents are unsigned, so what they say is read here without judging them; that a host refuses them is
part of the test.
"""

import re
import socket
import struct
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from signer.attestation import claims
from signer.attestation.cbor import decode
from signer.attestation.document import DocumentError, Expected, verify
from signer.attestation.sealed import raw_public_key
from signer.enclave.clock import timestamp_of
from signer.rpc.frames import LENGTH, encode_frame
from signer.rpc.messages import (
    Attest,
    Attested,
    AttestKey,
    Call,
    GenerateAndImport,
    ImportSealed,
    Initialize,
    RemoteError,
    Result,
    decode_reply,
    encode_call,
)
from signer.tezos.keys import Curve
from tests.nitro.guest import DEADLINE, LISTENING, PORT, Guest, Image

NONCE = bytes(range(32))
INITIALIZE = Initialize(
    access_key_id="AKIDEXAMPLE", secret_access_key="secret", encryption_key_id="alias/baker", region="us-west-2"
)
_STARTED = re.compile(r"security module 1\.0\.0 of (\S+), 1024 random bytes from it, boot id ([0-9a-f]{32})\n")


class Host:
    """One connection to the program."""

    def __init__(self, base: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE)
        self._socket.connect(str(base))
        self._socket.sendall(b"CONNECT %d\n" % PORT)
        self._stream = self._socket.makefile("rb")
        assert self._stream.readline().startswith(b"OK ")

    def ask(self, call: Call) -> Result:
        self._socket.sendall(encode_frame(encode_call(call)))
        (length,) = struct.unpack(LENGTH.format, self._stream.read(LENGTH.size))
        return decode_reply(call, self._stream.read(length))

    def close(self) -> None:
        self._stream.close()
        self._socket.close()


@pytest.fixture(scope="module")
def guest(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    directory = tmp_path_factory.mktemp("attested")
    guest = Guest(Image(directory), cid=21, base=directory / "v.sock", log=directory / "log")
    try:
        guest.wait_until_it_listens()
        yield guest
    finally:
        guest.kill()


@pytest.fixture
def host(guest: Guest) -> Iterator[Host]:
    host = Host(guest.base)
    yield host
    host.close()


def said_in(reply: Result) -> dict[int | str, object]:
    """The payload of a document that nobody signed."""
    assert isinstance(reply, Attested)
    item = decode(reply.document)
    assert isinstance(item, list)
    payload = decode(item[2])
    assert isinstance(payload, dict)
    return payload


def claims_in(payload: dict[int | str, object]) -> claims.Claims:
    said = payload["user_data"]
    assert isinstance(said, bytes)
    return claims.decode(said)


def test_the_duties_come_before_listening(guest: Guest) -> None:
    started = _STARTED.search(guest.log)
    assert started is not None, guest.log
    assert started.end() <= guest.log.index(LISTENING)


def test_documents_of_a_session(guest: Guest, host: Host) -> None:
    started = _STARTED.search(guest.log)
    assert started is not None
    for caller_data in (b"", b"host"):
        reply = host.ask(Attest("session", NONCE, caller_data))
        payload = said_in(reply)
        assert payload["nonce"] == NONCE
        assert payload["module_id"] == started[1]
        assert not payload["public_key"]
        assert claims_in(payload) == claims.Claims(
            purpose="session", boot_id=bytes.fromhex(started[2]), caller_data=caller_data
        )
        assert isinstance(reply, Attested)
        assert abs(timestamp_of(reply.document) / 1000 - datetime.now(UTC).timestamp()) < 30
        with pytest.raises(DocumentError) as caught:
            verify(reply.document, Expected(nonce=NONCE), now=datetime.now(UTC))
        assert caught.value.reason == "algorithm"


def test_import_keys_are_fresh_and_used_once(host: Host) -> None:
    keys = []
    for _ in range(2):
        public_key = said_in(host.ask(Attest("import", NONCE)))["public_key"]
        assert isinstance(public_key, bytes)
        keys.append(raw_public_key(public_key))
    assert keys[0] != keys[1]
    host.ask(INITIALIZE)
    for text in ("import error: decryption failed", "import error: unknown import key"):
        with pytest.raises(RemoteError, match=f"^{text}$"):
            host.ask(ImportSealed(keys[0], bytes(32), bytes(60), "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"))


def test_kms_out_of_reach_is_an_error_of_the_call(host: Host) -> None:
    host.ask(INITIALIZE)
    with pytest.raises(RemoteError, match="encryption error.*vsock:3:8000"):
        host.ask(GenerateAndImport(Curve.ED25519))
    with pytest.raises(RemoteError, match="^signer error: invalid handle$"):
        host.ask(AttestKey(0, NONCE))
