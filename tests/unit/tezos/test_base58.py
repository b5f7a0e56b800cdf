"""Base58check: every kind of text, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.tezos import base58
from signer.tezos.base58 import ALL_PREFIXES, Prefix, decode, encode
from signer.tezos.errors import Base58Error
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature, parse_chain_id, parse_digest

LENGTHS = {"tz1": 36, "tz4": 36, "edpk": 54, "sppk": 55, "BLpk": 76, "edsig": 99, "spsig1": 99, "p2sig": 98, "sig": 96}
LENGTHS |= {"BLsig": 142, "Net": 15, "vh": 52, "KT1": 36, "epx1": 37, "edesk": 88, "BLsk": 54}


@pytest.mark.parametrize("prefix", ALL_PREFIXES, ids=lambda prefix: prefix.name)
@pytest.mark.parametrize("fill", [0, 255])
def test_every_kind_starts_as_it_is_called(prefix: Prefix, fill: int) -> None:
    text = encode(prefix, bytes([fill]) * prefix.length)
    assert text.startswith(prefix.name)
    assert len(text) == LENGTHS.get(prefix.name, len(text)) or prefix.length == 64
    assert decode(text) == (prefix, bytes([fill]) * prefix.length)


@given(st.sampled_from(ALL_PREFIXES), st.data())
def test_decode_inverts_encode_and_notices_any_change(prefix: Prefix, data: st.DataObject) -> None:
    text = encode(prefix, data.draw(st.binary(min_size=prefix.length, max_size=prefix.length)))
    assert decode(text)[0] == prefix
    position = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.sampled_from("123456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"))
    if other != text[position]:
        with pytest.raises(Base58Error):
            decode(text[:position] + other + text[position + 1 :])


@given(st.text(max_size=80))
def test_any_text_is_refused_or_decoded(text: str) -> None:
    try:
        decode(text)
    except Base58Error:
        pass


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tz1l0", "unexpected character at position 3: l"),
        ("1", "data is too short: 1"),
        ("", "data is too short: 0"),
        ("tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2R", "invalid checksum"),
        ("1" * 5000, "limit 4096"),
    ],
)
def test_texts(text: str, expected: str) -> None:
    with pytest.raises(Base58Error, match=expected):
        decode(text)


def test_a_known_prefix_with_another_length() -> None:
    odd = Prefix("tz1", base58.ED25519_HASH.leading, 21)
    with pytest.raises(Base58Error, match="invalid base58 message length: expected 20, got 21"):
        decode(encode(odd, bytes(21)))
    with pytest.raises(Base58Error, match="unknown Tezos base58 prefix"):
        decode(encode(Prefix("?", b"\xff\xff", 3), bytes(3)))


def test_values_refuse_texts_of_another_kind() -> None:
    chain = "NetXdQprcVkpaWU"
    assert parse_chain_id(chain) == bytes.fromhex("7a06a770")
    for parse, text in (
        (PublicKeyHash.from_base58, chain),
        (PublicKey.from_base58, chain),
        (Signature.from_base58, chain),
        (parse_chain_id, "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"),
        (parse_digest, chain),
    ):
        with pytest.raises(Base58Error, match="unknown .* prefix"):
            parse(text)
    with pytest.raises(ValueError, match="20 bytes"):
        PublicKeyHash(Curve.P256, b"")
    with pytest.raises(ValueError, match="length"):
        PublicKey(Curve.P256, b"")
    with pytest.raises(ValueError, match="length"):
        Signature(None, b"")
