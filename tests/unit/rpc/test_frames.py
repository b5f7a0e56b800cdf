"""Framing: any chunking gives the same payloads, and a limit acts before anything is buffered for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.rpc.frames import MAX_FRAME, FrameDecoder, FrameError, encode_frame


@given(st.lists(st.binary(max_size=40)), st.data())
def test_any_chunking_gives_the_same_payloads(payloads: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(encode_frame, payloads))
    decoder, found = FrameDecoder(), []
    while stream:
        size = data.draw(st.integers(1, len(stream)))
        decoder.receive_data(stream[:size])
        stream = stream[size:]
        while (payload := decoder.next_payload()) is not None:
            found.append(payload)
    decoder.receive_eof()
    assert found == payloads


@given(st.binary(min_size=1, max_size=20), st.data())
def test_an_end_inside_a_frame_is_an_error(payload: bytes, data: st.DataObject) -> None:
    frame = encode_frame(payload)
    decoder = FrameDecoder()
    decoder.receive_data(frame[: data.draw(st.integers(1, len(frame) - 1))])
    assert decoder.next_payload() is None
    with pytest.raises(FrameError, match="inside a frame"):
        decoder.receive_eof()


def test_the_limit_acts_on_the_length() -> None:
    decoder = FrameDecoder()
    decoder.receive_data((MAX_FRAME + 1).to_bytes(4, "big"))
    with pytest.raises(FrameError, match="limit is 1048576"):
        decoder.next_payload()
    with pytest.raises(FrameError, match="limit of 1048576"):
        encode_frame(bytes(MAX_FRAME + 1))
    decoder = FrameDecoder()
    decoder.receive_data(encode_frame(bytes(MAX_FRAME)))
    assert decoder.next_payload() == bytes(MAX_FRAME)
