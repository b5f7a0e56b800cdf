"""The writer of envelopes: against the bytes of the vectors, and against OpenSSL."""

import base64
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_der_private_key,
)

from tests.attested.envelope import seal, write
from tests.unit.attestation.vectors import VECTORS

_MESSAGES = {case["name"]: base64.b64decode(case["message"]) for case in VECTORS["cms"]}
_KEY = load_der_private_key(base64.b64decode(VECTORS["rsa_private_key_pkcs8"]), None)
assert isinstance(_KEY, RSAPrivateKey)
_PUBLIC_KEY = _KEY.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _chunks(content: bytes) -> list[bytes]:
    """The octet strings up to the end of contents."""
    found = []
    while content[:2] != b"\0\0":
        assert content[0] == 4
        start, length = 2, content[1]
        if length & 0x80:
            start += length & 0x7F
            length = int.from_bytes(content[2:start], "big")
        found.append(content[start : start + length])
        content = content[start + length :]
    return found


@pytest.mark.parametrize("name", ["kms_form", "kms_two_chunks", "kms_odd_chunks", "empty_plaintext", "data_key"])
def test_the_vectors_are_written_byte_for_byte(name: str) -> None:
    message = _MESSAGES[name]
    key_at, iv_at = message.index(b"\x04\x82\x01\x00") + 4, message.index(b"\x04\x10", 380) + 2
    content = message[iv_at + 16 :]
    assert content.startswith(b"\xa0\x80")
    parts = (message[33:65], message[key_at : key_at + 256], message[iv_at : iv_at + 16], _chunks(content[2:]))
    assert write(*parts) == message


def test_a_key_of_ours_has_the_size_that_was_seen() -> None:
    assert len(seal(_PUBLIC_KEY, bytes(32))) == 493
    assert seal(_PUBLIC_KEY, bytes(32))[:65] == _MESSAGES["data_key"][:65], "the recipient is named by the same hash"


@pytest.mark.parametrize(
    ("length", "chunk_size"), [(0, None), (43, None), (1500, None), (1500, 1000), (100, 7), (16, 1)]
)
def test_openssl_opens_it(tmp_path: Path, length: int, chunk_size: int | None) -> None:
    key_file = tmp_path / "key.pem"
    assert isinstance(_KEY, RSAPrivateKey)
    key_file.write_bytes(_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    plaintext = bytes(index % 251 for index in range(length))
    message = seal(_PUBLIC_KEY, plaintext, chunk_size=chunk_size)
    content = message[message.index(b"\x04\x10", 380) + 20 :]
    padded = length + 16 - length % 16
    assert [len(chunk) for chunk in _chunks(content)][:-1] == [chunk_size] * ((padded - 1) // (chunk_size or padded))
    command = ["openssl", "cms", "-decrypt", "-inform", "DER", "-inkey", str(key_file), "-binary"]
    done = subprocess.run(command, input=message, capture_output=True, check=True, timeout=30)
    assert done.stdout == plaintext
