"""CBOR as both sides write it: one item, nothing behind it, no tags, no deep nesting, no duplicate keys."""

import io
from typing import NoReturn

import cbor2

MAX_DEPTH = 32  # containers inside one another; the deepest honest message (an error chain) has as many as causes
_MAX_SHOWN = 200  # characters of the decoder's text, which may quote a map key as long as the frame


class CborError(ValueError):
    """The bytes are not one well-formed item of the kind that this protocol uses."""


def _refuse_tag(_value: object, _immutable: bool) -> NoReturn:
    raise cbor2.CBORDecodeError("a tag")


_DECODED_BY_CBOR2 = (*range(6), 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799)
_TAG_DECODERS = dict.fromkeys(_DECODED_BY_CBOR2, _refuse_tag)
"""No message here has a tag, and cbor2 makes numbers, dates, patterns and mails of them: a decimal fraction in a frame
of 1 MiB took it 100 s, in which nothing else ran."""


def loads(data: bytes, *, text_keys: bool = True) -> object:
    """Decode exactly one item; raises `CborError` for anything else. Map keys are texts unless *text_keys* is off."""
    stream = io.BytesIO(data)
    decoder = cbor2.CBORDecoder(
        stream,
        read_size=1,
        max_depth=MAX_DEPTH,
        allow_duplicate_keys=False,
        strict_hashable_types=text_keys,
        semantic_decoders=_TAG_DECODERS,
        tag_hook=_refuse_tag,
    )
    try:
        item: object = decoder.decode()
    except (cbor2.CBORError, ValueError, OverflowError, TypeError, RecursionError, MemoryError) as exc:
        raise CborError(f"malformed CBOR: {str(exc)[:_MAX_SHOWN]}") from exc
    if stream.tell() != len(data):
        raise CborError(f"malformed CBOR: {len(data) - stream.tell()} byte(s) after the item")
    return item


def dumps(item: object) -> bytes:
    """Encode one item; maps keep the order of their keys."""
    return bytes(cbor2.dumps(item))
