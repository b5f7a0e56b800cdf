"""The module's messages against the vectors, and answers that are none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.enclave.nsm.interface import Description, NsmError, Register
from signer.enclave.nsm.messages import (
    Attestation,
    DescribeNsm,
    DescribePcr,
    ExtendPcr,
    GetRandom,
    LockPcr,
    LockPcrs,
    Request,
    decode_description,
    decode_document,
    decode_extended,
    decode_locked,
    decode_random,
    decode_register,
    encode_request,
)
from signer.rpc._cbor import dumps

VECTORS = {
    one["name"]: one
    for one in json.loads((Path(__file__).parents[3] / "vectors" / "attestation.json").read_text())["nsm"]
}


def answer_of(name: str) -> bytes:
    return bytes.fromhex(VECTORS[name]["response"])


def decode_lock(answer: bytes) -> None:
    decode_locked(answer, LockPcr(16))


def decode_locks(answer: bytes) -> None:
    decode_locked(answer, LockPcrs(17))


Decoder = Callable[[bytes], object]
ANSWERS: list[tuple[str, Decoder]] = [
    ("DescribeNSM", decode_description),
    ("DescribePCR 0", decode_register),
    ("ExtendPCR 16", decode_extended),
    ("LockPCR 16", decode_lock),
    ("LockPCRs 17", decode_locks),
    ("GetRandom", decode_random),
    ("Attestation", decode_document),
]


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("DescribeNSM", DescribeNsm()),
        ("DescribePCR 0", DescribePcr(0)),
        ("DescribePCR 32", DescribePcr(32)),
        ("ExtendPCR 16", ExtendPcr(16, b"boot")),
        ("ExtendPCR 0", ExtendPcr(0, b"boot")),
        ("LockPCR 16", LockPcr(16)),
        ("LockPCRs 17", LockPcrs(17)),
        ("GetRandom", GetRandom()),
        ("Attestation", Attestation(nonce=b"\1\2")),
    ],
)
def test_requests_byte_for_byte(name: str, request_: Request) -> None:
    assert encode_request(request_).hex() == VECTORS[name]["request"]


def test_answers() -> None:
    description = decode_description(answer_of("DescribeNSM"))
    assert description == Description(
        version=(1, 0, 0),
        module_id=description.module_id,
        max_pcrs=32,
        locked_pcrs=frozenset(range(16)),
        digest="SHA384",
    )
    assert description.module_id.startswith("i-0123456789abcdef0-enc019a9bbbb")
    register = decode_register(answer_of("DescribePCR 0"))
    assert (register.locked, register.data.hex()[:8]) == (True, "e32af85b")
    assert decode_extended(answer_of("ExtendPCR 16")).hex().startswith("98ddef47d8c6fb9d")
    decode_lock(answer_of("LockPCR 16"))
    decode_locks(answer_of("LockPCRs 17"))
    assert len(decode_random(answer_of("GetRandom"))) == 256
    assert decode_document(answer_of("Attestation")).startswith(bytes.fromhex("8444a1013822a059"))


@pytest.mark.parametrize("decode", [decode for _, decode in ANSWERS])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DescribePCR 32", "InvalidIndex"),
        ("ExtendPCR 0", "ReadOnlyIndex"),
        ("unknown call", "InvalidOperation"),
        ("too large", "InputTooLarge"),
    ],
)
def test_errors_by_their_word(name: str, value: str, decode: Decoder) -> None:
    with pytest.raises(NsmError) as caught:
        decode(answer_of(name))
    assert caught.value.value == value
    assert str(caught.value).startswith(f"{value} (")


@pytest.mark.parametrize("value", ["Success", "Whatever", 5, None, ["InvalidIndex"]])
def test_words_that_are_no_errors_are_internal(value: object) -> None:
    with pytest.raises(NsmError) as caught:
        decode_random(dumps({"Error": value}))
    assert caught.value.value == "InternalError"


@pytest.mark.parametrize(
    ("request_", "value"),
    [
        (DescribePcr(-1), "InvalidArgument"),
        (LockPcr(65536), "InvalidArgument"),
        (LockPcrs(-1), "InvalidArgument"),
        (ExtendPcr(70000, b""), "InvalidArgument"),
        (ExtendPcr(16, bytes(4096)), "InputTooLarge"),
        (Attestation(user_data=bytes(1025)), "InputTooLarge"),
        (Attestation(nonce=bytes(1025)), "InputTooLarge"),
        (Attestation(public_key=bytes(1025)), "InputTooLarge"),
    ],
)
def test_requests_that_the_module_cannot_take(request_: Request, value: str) -> None:
    with pytest.raises(NsmError) as caught:
        encode_request(request_)
    assert caught.value.value == value


def test_the_largest_requests() -> None:
    full = Attestation(user_data=bytes(1024), nonce=bytes(1024), public_key=bytes(1024))
    assert len(encode_request(full)) < 4096
    overhead = len(encode_request(ExtendPcr(16, bytes(1000)))) - 1000
    assert len(encode_request(ExtendPcr(16, bytes(4096 - overhead)))) == 4096
    with pytest.raises(NsmError, match="InputTooLarge"):
        encode_request(ExtendPcr(16, bytes(4097 - overhead)))


def test_empty_fields_are_sent_as_absent() -> None:
    assert encode_request(Attestation(user_data=b"", nonce=b"", public_key=b"")) == encode_request(Attestation())


def test_indefinite_maps_and_any_order_are_read() -> None:
    answer = b"\xbf\x6bDescribePCR\xbf\x64data\x58\x30" + bytes(48) + b"\x64lock\xf4\xff\xff"
    assert decode_register(answer) == Register(False, bytes(48))


@pytest.mark.parametrize(
    ("decode", "answer"),
    [
        (decode_register, dumps({"DescribePCR": {"lock": 1, "data": bytes(48)}})),
        (decode_register, dumps({"DescribePCR": {"lock": True, "data": bytes(47)}})),
        (decode_register, dumps({"DescribePCR": {"lock": True}})),
        (decode_register, dumps({"DescribePCR": [True, bytes(48)]})),
        (decode_register, dumps({"DescribeNSM": {"lock": True, "data": bytes(48)}})),
        (decode_register, dumps({"DescribePCR": {"lock": True, "data": bytes(48)}, "Error": "InvalidIndex"})),
        (decode_extended, dumps({"ExtendPCR": {"data": "text"}})),
        (decode_random, dumps({"GetRandom": {"random": b""}})),
        (decode_random, dumps("GetRandom")),
        (decode_document, dumps({"Attestation": {"document": b""}})),
        (decode_document, dumps({"Attestation": {"document": None}})),
        (decode_lock, dumps("LockPCRs")),
        (decode_lock, dumps({"LockPCR": None})),
        (decode_locks, dumps("LockPCR")),
        (decode_description, dumps({"DescribeNSM": {}})),
    ],
)
def test_answers_that_do_not_fit(decode: Decoder, answer: bytes) -> None:
    with pytest.raises(NsmError) as caught:
        decode(answer)
    assert caught.value.value == "InvalidResponse"


@pytest.mark.parametrize("name", ["version_major", "module_id", "max_pcrs", "locked_pcrs", "digest"])
@pytest.mark.parametrize("value", [None, -1, True, [None], b"bytes"])
def test_a_description_with_one_wrong_field(name: str, value: object) -> None:
    fields: dict[str, object] = {
        "version_major": 1,
        "version_minor": 0,
        "version_patch": 0,
        "module_id": "i-1-enc1",
        "max_pcrs": 32,
        "locked_pcrs": [0, 1],
        "digest": "SHA384",
    }
    assert decode_description(dumps({"DescribeNSM": fields})).locked_pcrs == {0, 1}
    with pytest.raises(NsmError, match="InvalidResponse"):
        decode_description(dumps({"DescribeNSM": fields | {name: value}}))


@pytest.mark.parametrize(("name", "decode"), ANSWERS)
def test_every_cut_answer_is_an_error_of_the_module(name: str, decode: Decoder) -> None:
    answer = answer_of(name)
    for end in range(len(answer)):
        with pytest.raises(NsmError) as caught:
            decode(answer[:end])
        assert caught.value.value in ("InternalError", "InvalidResponse")


@pytest.mark.parametrize(("name", "decode"), ANSWERS)
def test_no_changed_byte_is_another_exception(name: str, decode: Decoder) -> None:
    answer = answer_of(name)
    for position in range(min(len(answer), 400)):
        for flip in (0x01, 0x20, 0x80, 0xFF):
            changed = bytearray(answer)
            changed[position] ^= flip
            try:
                decode(bytes(changed))
            except NsmError:
                pass


@given(st.binary(max_size=200) | st.recursive(st.none() | st.text(), st.lists).map(dumps), st.sampled_from(ANSWERS))
def test_hostile_answers(answer: bytes, case: tuple[str, Decoder]) -> None:
    with pytest.raises(NsmError):
        case[1](answer)


def test_deep_and_huge_answers_cost_nothing() -> None:
    for answer in (b"\x81" * 12_288, bytes.fromhex("5b7fffffffffffffff00"), b"\xbf" * 12_288):
        with pytest.raises(NsmError):
            decode_random(answer)
