"""The decoder against the vectors, every truncation of them, mutations, and hostile shapes."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.tezos.errors import DecodeError
from signer.tezos.keys import chain_id_text
from signer.tezos.requests import decode, describe

VECTORS: list[dict[str, Any]] = json.loads(
    (Path(__file__).parents[2] / "vectors" / "requests.json").read_text(encoding="utf-8")
)
VALID = [vector for vector in VECTORS if not vector.get("error")]
REFUSED = [vector for vector in VECTORS if vector.get("error")]


def version_of(vector: dict[str, Any]) -> int:
    return int(vector.get("signing_version", 2))


@pytest.mark.parametrize("vector", VALID, ids=lambda vector: vector["name"])
def test_valid_vector(vector: dict[str, Any]) -> None:
    assert describe(bytes.fromhex(vector["hex"]), version=version_of(vector)) == {
        "request_kind": vector["request_kind"],
        "chain_id": vector["chain_id"],
        "level": vector["level"],
        "round": vector["round"],
        "operations": vector["operations"],
        "ballots": vector.get("ballots", []),
    }


@pytest.mark.parametrize("vector", REFUSED, ids=lambda vector: vector["name"])
def test_refused_vector(vector: dict[str, Any]) -> None:
    with pytest.raises(DecodeError, match=r"at offset \d+: expected"):
        decode(bytes.fromhex(vector["hex"]), version=version_of(vector))


def test_every_truncation_is_refused_or_is_a_shorter_request() -> None:
    """Shorter bytes decode only where the batch ends behind an operation, or before a final presence byte."""
    for vector in VALID:
        data, whole = bytes.fromhex(vector["hex"]), None
        for end in range(len(data)):
            try:
                request = decode(data[:end], version=version_of(vector))
            except DecodeError as exc:
                assert 0 <= exc.offset <= end
                continue
            whole = whole or decode(data, version=version_of(vector))
            assert request.kind == whole.kind
            assert request.kind in ("generic", "pack")
            shorter = request.operations
            assert len(shorter) <= len(whole.operations)
            assert [kind for kind in shorter[:-1]] == list(whole.operations[: max(len(shorter) - 1, 0)])


def test_mutations_never_raise_anything_else() -> None:
    source = random.Random(7)
    for vector in VALID:
        data = bytearray.fromhex(vector["hex"])
        for _ in range(20):
            changed = bytearray(data)
            changed[source.randrange(len(changed))] = source.randrange(256)
            describe(bytes(changed), version=version_of(vector))


@given(st.binary(max_size=200), st.sampled_from([0, 1, 2, 3]))
def test_random_bytes_are_refused_or_decoded(data: bytes, version: int) -> None:
    for first in b"\x03\x05\x11\x12\x13":
        describe(bytes((first,)) + data, version=version)
    describe(data, version=version)


@given(
    st.binary(min_size=4, max_size=4),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**31 - 1),
    st.sampled_from([(0x12, 20), (0x12, 40), (0x13, 21), (0x13, 41)]),
)
def test_consensus_operations_of_an_independent_encoder(
    chain: bytes, level: int, round_: int, form: tuple[int, int]
) -> None:
    first, tag = form
    slot = b"" if tag in (40, 41) else b"\x00\x07"
    data = bytes((first,)) + chain + bytes(32) + bytes((tag,)) + slot
    data += level.to_bytes(4, "big") + round_.to_bytes(4, "big") + bytes(32)
    request = decode(data)
    assert (request.chain_id, request.level, request.round) == (chain_id_text(chain), level, round_)
    with pytest.raises(DecodeError, match="the end of the request"):
        decode(data + b"\0")
    with pytest.raises(DecodeError, match="not negative"):
        decode(data[:-40] + (level | 2**31).to_bytes(4, "big") + data[-36:])


def micheline(depth: int) -> bytes:
    """PACKed primitives of one argument, inside one another."""
    return b"\x05" + b"\x05\x00" * (depth - 1) + b"\x00\x00"


def test_deep_micheline_is_refused_not_fatal() -> None:
    assert decode(micheline(9_999)).kind == "pack"
    with pytest.raises(DecodeError, match="at most 10000 Micheline nodes"):
        decode(micheline(100_000))
    nested = b"\x03\x0b"
    for _ in range(100):
        nested = b"\x02" + len(nested).to_bytes(4, "big") + nested
    assert decode(b"\x05" + nested).kind == "pack"


@pytest.mark.parametrize("count", ["7fffffff", "80000000", "ffffffff", "40000000"])
def test_a_huge_count_is_refused(count: str) -> None:
    for data in (f"0501{count}", f"0502{count}", f"03{'00' * 32}11{count}"):
        with pytest.raises(DecodeError, match="at offset"):
            decode(bytes.fromhex(data))


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("", "had 0: can't sign empty data"),
        ("04" + "00" * 90, "gotez: unknown tag 4: .* pose as a client"),
        ("01" + "00" * 90, "before Tenderbake"),
        ("000003e8", "deterministic nonces are not served"),
        ("42" * 40, "gotez: unknown tag 66: at offset 0: expected a first byte"),
        ("13", "gotez: buffer is too short, at least 38 byte"),
        ("03" + "00" * 32, "expected at least one operation"),
    ],
)
def test_texts(data: str, text: str) -> None:
    with pytest.raises(DecodeError, match=text):
        decode(bytes.fromhex(data))


def test_pack_is_refused_in_version_1() -> None:
    data = bytes.fromhex("050a00000016000032041dca76bac940b478aae673e362bd15847ed8")
    assert decode(data).kind == "pack"
    with pytest.raises(DecodeError, match="unknown tag 5"):
        decode(data, version=1)


def transaction(entrypoint: bytes, destination: bytes) -> bytes:
    source = bytes(21)
    return (
        b"\x03"
        + bytes(32)
        + b"\x6c"
        + source
        + b"\0\0\0\0"
        + b"\0"
        + destination
        + b"\xff"
        + entrypoint
        + bytes.fromhex("00000002030b")
    )


def test_a_spelled_out_pseudo_operation_counts_as_one() -> None:
    to_itself, elsewhere = b"\0" + bytes(21), b"\0" + bytes(20) + b"\1"
    assert decode(transaction(b"\x06", to_itself)).operations == ("stake",)
    assert decode(transaction(b"\xff\x05stake", to_itself)).operations == ("stake",)
    assert decode(transaction(b"\xff\x05stake", elsewhere)).operations == ("transaction",)
    assert decode(transaction(b"\xff\x04ship", to_itself)).operations == ("transaction",)


def test_ballots_are_named_by_their_vote_for_policy() -> None:
    ballot = b"\x03" + bytes(32) + b"\x06" + bytes(21 + 4 + 32) + b"\x01"
    request = decode(ballot)
    assert (request.operations, request.policy_operations) == (("ballot",), ("ballot:nay",))
