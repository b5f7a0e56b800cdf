"""What the codec of the wire refuses, and that refusing is cheap."""

import cbor2
import pytest

from signer.enclave.sealing.none import NoSealing
from signer.enclave.session import Session
from signer.rpc._cbor import CborError, dumps, loads
from signer.rpc.frames import MAX_FRAME, encode_frame


def tagged(number: int, item: bytes) -> bytes:
    """*item* under a tag, which cbor2 would not write for numbers that it decodes."""
    return cbor2.dumps(cbor2.CBORTag(number, 0))[:-1] + item


@pytest.mark.parametrize("item", [b"\x61a", b"\x41\x01", b"\x01", b"\x82\x01\x02", b"\xa0"], ids=bytes.hex)
def test_no_tag_is_decoded(item: bytes) -> None:
    for number in [*range(1024), 1004, 43000, 55799, 2**32, 2**64 - 1]:
        with pytest.raises(CborError, match="a tag"):
            loads(tagged(number, item))


def test_a_tag_inside_is_refused_before_the_one_around_it_is_looked_at() -> None:
    number = b"\x5a" + (MAX_FRAME - 64).to_bytes(4, "big") + b"\xff" * (MAX_FRAME - 64)
    fraction = b"\xc4\x82\x1a\x3b\x9a\xca\x00\xc2" + number  # to make a decimal of it takes minutes
    with pytest.raises(CborError, match="a tag"):
        loads(b"\xa1\x66Import" + fraction)


def test_a_text_never_quotes_more_than_a_piece() -> None:
    key = b"\x7a" + (400_000).to_bytes(4, "big") + b"\1" * 400_000
    with pytest.raises(CborError) as caught:
        loads(b"\xa2" + key + b"\0" + key + b"\0")
    assert len(str(caught.value)) < 300


async def test_a_long_key_twice_is_answered_and_the_session_goes_on() -> None:
    key = b"\x7a" + (400_000).to_bytes(4, "big") + b"\1" * 400_000  # four characters each where it is quoted
    session = Session(NoSealing())
    reply = await session.answer(b"\xa2" + key + b"\0" + key + b"\0")
    assert b"Duplicate map key" in encode_frame(reply)
    assert b"uninitialized" in await session.answer(dumps({"PublicKey": 0}))
