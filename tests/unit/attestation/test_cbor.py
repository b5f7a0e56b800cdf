"""The strict reader: what it takes, what it refuses, and that nothing makes it slow."""

import time
import tracemalloc

import cbor2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.attestation.cbor import CborError, decode, split_tag
from tests.unit.attestation.vectors import document

_SCALARS = st.integers(-(2**64), 2**64 - 1) | st.binary(max_size=300) | st.text(max_size=80) | st.booleans() | st.none()
_KEYS = st.integers(-(2**64), 2**64 - 1) | st.text(max_size=20)
_ITEMS = st.recursive(
    _SCALARS, lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_KEYS, inner, max_size=5), max_leaves=20
)


def _depth(item: object) -> int:
    if isinstance(item, dict):
        return 1 + max(map(_depth, item.values()), default=0)
    if isinstance(item, list):
        return 1 + max(map(_depth, item), default=0)
    return 0


@given(_ITEMS, st.booleans())
def test_what_another_writer_wrote_is_read(item: object, indefinite: bool) -> None:
    data = cbor2.dumps(item, indefinite_containers=indefinite)
    if _depth(item) <= 6:
        found = decode(data)
        assert found == item
        assert repr(found) == repr(item), "True is not 1"
    else:
        with pytest.raises(CborError, match="deep"):
            decode(data)


@given(_ITEMS, st.data())
def test_every_truncation_is_refused(item: object, data: st.DataObject) -> None:
    encoded = cbor2.dumps(item)
    cut = data.draw(st.integers(0, len(encoded) - 1))
    with pytest.raises(CborError):
        decode(encoded[:cut])


@settings(max_examples=500)
@given(st.binary(max_size=200))
def test_any_bytes_give_an_item_or_the_error(data: bytes) -> None:
    try:
        item = decode(data)
    except CborError:
        return
    assert cbor2.loads(data) == item


def test_every_change_of_a_document_gives_an_item_or_the_error() -> None:
    original = document("valid_indefinite_map")[8:]  # the payload, whose maps and arrays are of both forms
    for place in range(len(original)):
        for change in (0x01, 0x1F, 0x80, 0xFF):
            damaged = bytearray(original)
            damaged[place] ^= change
            try:
                decode(bytes(damaged))
            except CborError:
                pass


@pytest.mark.parametrize(
    ("what", "data"),
    [
        ("nothing", ""),
        ("bytes behind the item", "0000"),
        ("reserved length form", "1c"),
        ("integer of indefinite length", "1f"),
        ("negative integer of indefinite length", "3f"),
        ("chunked byte string", "5f4101ff"),
        ("chunked text", "7f6161ff"),
        ("text that is no UTF-8", "61ff"),
        ("text with a surrogate", "63eda080"),
        ("tag 2", "c24101"),
        ("tag inside", "81c24101"),
        ("shared reference", "d81c80"),
        ("half float", "f93c00"),
        ("float", "fa3f800000"),
        ("double", "fb3ff0000000000000"),
        ("undefined", "f7"),
        ("simple value 0", "e0"),
        ("true in two bytes", "f815"),
        ("break alone", "ff"),
        ("break in an array of fixed length", "81ff"),
        ("break instead of a value", "bf00ff"),
        ("open array", "9f00"),
        ("open map", "bf0000"),
        ("map with a byte key", "a1410000"),
        ("map with a boolean key", "a1f500"),
        ("map with a null key", "a1f600"),
        ("map with an array as key", "a18000"),
        ("key twice", "a200010002"),
        ("key twice in two widths", "a20001180002"),
        ("text key twice in an open map", "bf616100616101ff"),
        ("seven arrays", "81818181818180"),
        ("seven maps", "a100a100a100a100a100a100a0"),
    ],
)
def test_refused(what: str, data: str) -> None:
    with pytest.raises(CborError):
        decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("data", "item"),
    [
        ("1818", 24),
        ("1800", 0),  # not in its shortest form
        ("1bffffffffffffffff", 2**64 - 1),
        ("3bffffffffffffffff", -(2**64)),
        ("818181818180", [[[[[[]]]]]]),
        ("9f9fff80ff", [[], []]),
        ("a2000120f5", {0: 1, -1: True}),
        ("bf6161f6ff", {"a": None}),
    ],
)
def test_taken(data: str, item: object) -> None:
    assert decode(bytes.fromhex(data)) == item


@pytest.mark.parametrize("head", ["5a", "7a", "9a", "ba", "5b", "7b", "9b", "bb"])
def test_a_huge_length_costs_nothing(head: str) -> None:
    width = 4 if head.endswith("a") else 8
    data = bytes.fromhex(head) + b"\xff" * width + b"\0" * 1000
    tracemalloc.start()
    try:
        with pytest.raises(CborError, match="announced"):
            decode(data)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("unit", ["80", "a0", "9fff", "bfff", "00", "81", "9f"])
def test_time_is_bounded(unit: str) -> None:
    data = b"\x9f" + bytes.fromhex(unit) * (16_384 // (len(unit) // 2))
    began = time.perf_counter()
    with pytest.raises(CborError):
        decode(data)
    assert time.perf_counter() - began < 1


def test_the_depth_is_a_parameter() -> None:
    assert decode(b"\x81\x80", max_depth=2) == [[]]
    with pytest.raises(CborError):
        decode(b"\x81\x80", max_depth=1)
    with pytest.raises(CborError):
        decode(b"\x80", max_depth=0)


@pytest.mark.parametrize(
    ("data", "tag", "rest"),
    [("d280", 18, "80"), ("d86280", 98, "80"), ("80", None, "80"), ("", None, ""), ("d2", 18, "")],
)
def test_a_tag_in_front_is_split_off(data: str, tag: int | None, rest: str) -> None:
    assert split_tag(bytes.fromhex(data)) == (tag, bytes.fromhex(rest))


@pytest.mark.parametrize("data", ["d8", "d9ff", "df80", "dc80"])
def test_half_a_tag_is_refused(data: str) -> None:
    with pytest.raises(CborError):
        split_tag(bytes.fromhex(data))
