"""The user data of our documents: one way to write it, and no other is read."""

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.attestation.claims import KEY, MAX_CALLER_DATA, MAX_CLAIMS, Claims, ClaimsError, decode, encode
from signer.errors import SignerError
from tests.unit.attestation.vectors import DOCUMENTS

BOOT = bytes(range(16))
ADDRESS = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
TABLE = "arn:aws:dynamodb:us-west-2:123456789012:table/" + "m" * 255
_FIELDS: dict[object, object] = {1: "tezos-signer", 2: 1, 3: "session", 4: b"hello", 5: BOOT}

_PLAIN = st.text(st.characters(min_codepoint=32, max_codepoint=126), min_size=1, max_size=64)
_CLAIMS = st.builds(
    Claims, purpose=st.sampled_from(["session", "import"]), boot_id=st.binary(min_size=16, max_size=16),
    caller_data=st.binary(max_size=256),
) | st.builds(
    Claims, purpose=st.just("key"), boot_id=st.just(BOOT), address=_PLAIN, marks=st.none() | _PLAIN,
)  # fmt: skip


def test_the_vector_is_read_and_written() -> None:
    data = bytes.fromhex(DOCUMENTS["valid_user_data_checked"]["facts"]["user_data"])
    claims = Claims(purpose="session", caller_data=b"hello", boot_id=bytes.fromhex("61d274ba4e024a6d1315bf943d704c97"))
    assert decode(data) == claims
    assert encode(claims) == data


@given(_CLAIMS)
def test_decode_inverts_encode(claims: Claims) -> None:
    assert decode(encode(claims)) == claims


def test_of_a_key_the_longest_table_fits() -> None:
    claims = Claims(purpose=KEY, boot_id=BOOT, address=ADDRESS, marks=TABLE)
    assert decode(encode(claims)) == claims


def test_all_at_their_longest_are_too_much_for_a_document() -> None:
    claims = Claims(purpose=KEY, boot_id=BOOT, address=ADDRESS, marks=TABLE, caller_data=bytes(MAX_CALLER_DATA))
    with pytest.raises(ClaimsError, match=f"at most {MAX_CLAIMS}"):
        encode(claims)


@given(_CLAIMS, st.data())
def test_no_truncation_and_no_other_byte_gives_the_same_claims(claims: Claims, data: st.DataObject) -> None:
    encoded = bytearray(encode(claims))
    place = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(ClaimsError):
        decode(bytes(encoded[:place]))
    encoded[place] ^= data.draw(st.integers(1, 255))
    try:
        assert decode(bytes(encoded)) != claims
    except ClaimsError:
        pass


@given(st.binary(max_size=200))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(ClaimsError):
        decode(data)


@pytest.mark.parametrize("data", [None, b""])
def test_no_user_data_is_refused(data: bytes | None) -> None:
    with pytest.raises(ClaimsError, match="there is none"):
        decode(data)


@pytest.mark.parametrize(
    "change",
    [
        {1: "nitro-signer"}, {1: b"tezos-signer"}, {2: 2}, {2: True}, {2: "1"}, {3: "sessions"}, {3: "key"}, {3: 1},
        {4: bytes(257)}, {4: "hello"}, {4: None}, {5: bytes(15)}, {5: bytes(17)}, {5: None},
        {6: ADDRESS}, {6: None}, {7: TABLE}, {8: 1}, {0: 1}, {"1": 1},
        {3: "key", 6: ADDRESS, 7: 1}, {3: "key", 6: ADDRESS, 7: None}, {3: "key", 6: ADDRESS, 7: ""},
        {3: "key", 6: ""}, {3: "key", 6: "tz1\n"}, {3: "key", 6: "tzé"}, {3: "key", 6: "t" * 65}, {3: "key", 7: TABLE},
        {3: "import", 6: ADDRESS},
    ],
)  # fmt: skip
def test_a_field_that_is_wrong(change: dict[object, object]) -> None:
    assert decode(cbor2.dumps(_FIELDS)).caller_data == b"hello"
    with pytest.raises(ClaimsError) as caught:
        decode(cbor2.dumps(_FIELDS | change))
    assert isinstance(caught.value, SignerError)
    assert "user data of an attestation document" in str(caught.value)


def test_another_version_is_named_as_such() -> None:
    with pytest.raises(ClaimsError, match="its version is not 1; the enclave's image and this program do not fit"):
        decode(cbor2.dumps(_FIELDS | {2: 2, 8: "new in version 2"}))


@pytest.mark.parametrize("missing", [1, 2, 3, 4, 5])
def test_a_field_that_is_missing(missing: int) -> None:
    fields = {key: value for key, value in _FIELDS.items() if key != missing}
    with pytest.raises(ClaimsError):
        decode(cbor2.dumps(fields))


def test_another_order_or_form_is_refused() -> None:
    good = cbor2.dumps(_FIELDS)
    assert decode(good).purpose == "session"
    with pytest.raises(ClaimsError, match="written"):
        decode(cbor2.dumps(dict(reversed(_FIELDS.items()))))
    with pytest.raises(ClaimsError, match="written"):
        decode(b"\xbf" + good[1:] + b"\xff")
    with pytest.raises(ClaimsError, match="written"):
        decode(good.replace(b"\x02\x01", b"\x02\x18\x01"))
    with pytest.raises(ClaimsError):
        decode(good + b"\0")
    with pytest.raises(ClaimsError):
        decode(cbor2.dumps(list(_FIELDS.items())))
