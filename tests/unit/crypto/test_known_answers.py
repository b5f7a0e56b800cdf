"""Known answers: section 6.8 of the signer specification, section 12 of the remote-signer specification."""

import pytest

from signer.crypto import load_secret_key, verify, verify_possession
from signer.crypto.formats import parse_secret_key, to_base58
from signer.tezos.keys import Curve, PublicKey, Signature, digest_of, digest_text

SLOT_FORM = bytes.fromhex(
    "13ed9d217cfc81eee810737b04018acef4db74d056b79edc43e6be46cae7e4c217c22a82f01500120000518d0000000003e7ea1f67dbb0bb6c"
    "fa372cb092cd9cf786b4f1b5e5139da95b915fb95e698d"
)
BLS_FORM = bytes.fromhex(
    "13ed9d217cfc81eee810737b04018acef4db74d056b79edc43e6be46cae7e4c217c22a82f0290000518d0000000003e7ea1f67dbb0bb6cfa37"
    "2cb092cd9cf786b4f1b5e5139da95b915fb95e698d"
)
BLS_SECRET = "BLsk1XMDG3iepYGj15mBWc7dYjrkpVVM4VH3y5DyBCN9iAGrELwRbY"

ANSWERS = [
    (
        "edsk4FTF78Qf1m2rykGpHqostAiq5gYW4YZEoGUSWBTJr2njsDHSnd",
        "edpkv45regue1bWtuHnCgLU8xWKLwa9qRqv4gimgJKro4LSc3C5VjV",
        "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q",
        SLOT_FORM,
        2,
        "edsigtuRwihvmjUkXsNXix1isC4aEaHjwSqL4csc2cQrcqufFmDkVsWdqWT1t15NVjVSfcJMzqvcXnyA1EGy1BgQCt6ZQxSDk9Y",
    ),
    (
        "spsk1XYsTqUsd7LaLs9a8qpmCvLVJeLEZEXkeAZS5dwcKgUZhv3cYw",
        "sppk7cvVVMRRtYTdriTB6KQqpXZt9TUwSTcpMWq4FwpvG2eVZ56UuHP",
        "tz2QPsZoZse4eeahhg5DdfnBDB4VbU1PwgxN",
        SLOT_FORM,
        2,
        "spsig16GqQCHHPnbbvkzZ4SzV7EMS5Wkz2pKZZdhtKt2smjBvRA5Ps7f4vgcfwEQDMd5DrFnerDWPC122VpW2USR3msExK9PoCN",
    ),
    (
        "p2sk2rUMnnnFPQCB7DBozkCZrFhiZ87ddrpAHbRcww7dwU2WHYUbci",
        "p2pk65pxFqFj1N66zRRQtdbEJWHMH5hRv4WsRkaGWQJtZ5bv8nVx6Dg",
        "tz3ZbCsUveF3Q6WUNkThT1wyJyhPunanaAXK",
        SLOT_FORM,
        2,
        "p2sigsXSAgguAU6kuNbZwFy8TkHDKhezpAh1PvEALMYPNX5kZTQEjHh9gyaEDeP6yYbKkE4FvMssZjJshAQ1sNPtz3EXCD5xwg",
    ),
    (
        BLS_SECRET,
        "BLpk1nRV5SBB2QCxsiem5Neoywcizr3mkdp167HL1iKFgFvzPhKo4RSy7J8JBh2BgGgVYjNsRGwU",
        "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME",
        BLS_FORM,
        2,
        (
            "BLsigAtNfu2y6iey2j3YyGj2AQ8FkHCNEk9aECLyLV3uecaNYWBg1TnXFkt7pCz7Nv2DoxZgxQbobf2odwJZnftEUevfqfzyDFZfdU9ocNBhxK"
            "BTpTevzN7SBZGZNo5Ma6A3SZonro8Xgx"
        ),
    ),
    (
        BLS_SECRET,
        "BLpk1nRV5SBB2QCxsiem5Neoywcizr3mkdp167HL1iKFgFvzPhKo4RSy7J8JBh2BgGgVYjNsRGwU",
        "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME",
        BLS_FORM,
        1,
        (
            "BLsigAoQWGudQcUXQ2REcQrUTrXfgCvJpNgTqy4jprPLjLBvB1arH88SSvUfHiNicmaqnjpD11Tx7BtaSG3aBVguKdcbAdpoU89TWVoRezw7TY"
            "8Q2hBWg3z1BAavkrMGMTdqhaYXoDXyyD"
        ),
    ),
]


@pytest.mark.parametrize(("secret", "public", "address", "message", "version", "expected"), ANSWERS)
def test_signature(secret: str, public: str, address: str, message: bytes, version: int, expected: str) -> None:
    key = parse_secret_key(secret.encode(), lambda: None)
    assert str(key.public_key) == public
    assert str(key.public_key.hash) == address
    assert to_base58(key) == secret
    signature = key.sign(message, version=version)
    assert str(signature) == expected
    assert verify(key.public_key, message, Signature.from_base58(expected), version=version)
    assert not verify(key.public_key, message + b"\0", signature, version=version)


def test_proof_of_possession() -> None:
    key = parse_secret_key(BLS_SECRET.encode(), lambda: None)
    proof = key.prove_possession()
    assert str(proof) == (
        "BLsigAy8AtcyrqtA8AsyYZq4GUj3b2hbbJswfTphEj1haJJVmwoueZhwGcV5Ewjm5YAvrQVeuikt5tK9BXjhhbPWaroBmpfCWpmCGYwJ5FvUn7"
        "dkW7ekQHAeHy3yiWzik2NaT1q6KTKfqv"
    )
    assert verify_possession(key.public_key, proof)
    other = parse_secret_key(b"BLsk1d6zjtYgWxyZwdnCsQpwYcs3cJRFTMwJ1CWCgjFu4zpaZp9nL6", lambda: None).public_key
    assert str(other.hash) == "tz4Eb1d5L4njHViVgDDkas7qNgoZgDw6VYPz"
    over = key.prove_possession(other)
    assert verify_possession(key.public_key, over, over=other)
    assert not verify_possession(key.public_key, over)
    assert not verify_possession(key.public_key, proof, over=other)


def test_digest_of_the_attestation() -> None:
    assert digest_text(digest_of(SLOT_FORM)) == "vh2gXnNzbwzsj4Z7sJ8xWChrZGr19321fTdvrKokqrwVNs3XBeVx"


def test_remote_signer_vectors() -> None:
    key = load_secret_key(Curve.ED25519, bytes(range(32)))
    assert str(key.public_key) == "edpktfpdouHjAze9TeFcihdpeMng7FSCWbY4BozpSffZ9z85nyyBBB"
    assert str(key.public_key.hash) == "tz1haTDx9MiA53qTAkchH9sUWoKfFABN6ggh"
    message = bytes.fromhex("137a06a770" + "11" * 32 + "150003000003e800000002" + "22" * 32)
    signature = key.sign(message)
    assert str(signature) == (
        "edsigtyQGRyK1uHvRaHUmbozf45qwXRZQsu3fUtE8SHs59GmBzBHVneiihR28tBpF95FBh41SMK1oVN59hwm2cCMTCL1syWQonL"
    )
    generic = Signature.from_base58(
        "sigoaoJv67dMjPX6VUTn9U6nZRkbUUuGB57CUPhws68vkEgMLuHkodcMnDqbCT3c4qFWXpRoESek7Ny9ipx41V1Gwmy4ECXT"
    )
    assert generic.data == signature.data
    assert verify(key.public_key, message, generic)
    client = load_secret_key(Curve.ED25519, bytes(range(32, 64)))
    assert str(client.public_key) == "edpktxaTju8gvuYj9in4BM2uAco1HkVpxn4jQnKgZ1f8ByVn5SFtTQ"
    wrapped = b"\x04\x01" + key.public_key.hash.tagged() + message
    assert str(client.sign(wrapped)) == (
        "edsigu36VZNgiseSRq1QX5QmXqNgN6c1JnVFNuQmMzWKUrJhgpmdsXrLC2i7QjAWwMv1QyaiFzadaF1qLb7i1tUWw6DnzhH3XLX"
    )
    assert PublicKey.from_base58(str(client.public_key)) == client.public_key
