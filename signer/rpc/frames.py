"""Length-prefixed frames, section 4.1 of the signer specification: a 4-byte big-endian length, then the payload."""

import struct

LENGTH = struct.Struct(">I")

MAX_FRAME = 1024 * 1024
"""Bytes of payload that either side accepts. The largest honest frame is a request of 256 KiB written as an array of
integers, two bytes each at most; a length beyond this is a peer out of step, and must not be allocated."""


class FrameError(Exception):
    """The peer broke the framing: the connection cannot be used any more."""


class FrameDecoder:
    """Cuts a byte stream into payloads; does no I/O. Any chunking of the stream gives the same payloads."""

    def __init__(self, max_payload: int = MAX_FRAME) -> None:
        self._max_payload = max_payload  # bytes
        self._buffer = bytearray()

    def receive_data(self, data: bytes | bytearray) -> None:
        """Take in what the peer sent."""
        self._buffer += data

    def receive_eof(self) -> None:
        """The peer closed its side; raises `FrameError` inside a frame."""
        if self._buffer:
            raise FrameError("the peer closed the connection inside a frame")

    def next_payload(self) -> bytes | None:
        """The next payload, or None while more data is needed; raises `FrameError` for a length over the limit."""
        if len(self._buffer) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._buffer)
        if length > self._max_payload:
            raise FrameError(f"a frame of {length} bytes is announced, the limit is {self._max_payload}")
        end = LENGTH.size + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[LENGTH.size : end])
        del self._buffer[:end]
        return payload


def encode_frame(payload: bytes) -> bytes:
    """The frame that carries *payload*; raises `FrameError` for one that no peer would accept."""
    if len(payload) > MAX_FRAME:
        raise FrameError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME}")
    return LENGTH.pack(len(payload)) + payload
