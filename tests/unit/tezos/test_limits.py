"""Each limit of the request specification from both sides: the last value that is read, and the first refused."""

import pytest

from signer.tezos.errors import DecodeError
from signer.tezos.requests import decode

PKH = bytes(21)
CONTRACT = b"\0" + PKH
MANAGER = PKH + b"\0\0\0\0"
UNIT = bytes.fromhex("00000002030b")
MAX_I32, MIN_I32 = 2**31 - 1, -(2**31)


def i32(value: int) -> bytes:
    return value.to_bytes(4, "big", signed=True)


def dyn(content: bytes) -> bytes:
    return len(content).to_bytes(4, "big") + content


def generic(tag: int, content: bytes) -> bytes:
    """A request with one operation, after its manager part where it has one."""
    return b"\x03" + bytes(32) + bytes((tag,)) + (MANAGER if 107 <= tag < 255 else b"") + content


def slot_form(level: int = 1, round_: int = 1) -> bytes:
    return bytes(2) + i32(level) + i32(round_) + bytes(32)


def aggregate(level: int, round_: int) -> bytes:
    return i32(level) + i32(round_) + bytes(32) + dyn(bytes(2))


def inlined(tag: int, content: bytes, signature: int = 0) -> bytes:
    return dyn(bytes(32) + bytes((tag,)) + content + bytes(signature))


def consensus_evidence(second: bytes) -> bytes:
    return generic(2, bytes(2) + inlined(21, slot_form()) + second)


def entrapment(index: int) -> bytes:
    return generic(24, inlined(21, slot_form()) + bytes(2 + 1 + 1) + i32(index) + dyn(bytes(32)) + bytes(48))


def input_proof(content: bytes) -> bytes:
    """A refutation that moves with a proof; *content* begins with the tag of the input proof."""
    return generic(204, bytes(20) + PKH + b"\x01\x00\x01" + dyn(b"step") + b"\xff" + content)


def raw_data(length: int) -> bytes:
    return input_proof(b"\x01\x00" + length.to_bytes(2, "big") + bytes(length))


def publish(level: int) -> bytes:
    return generic(203, bytes(20 + 32) + i32(level) + bytes(32 + 8))


def transfer_ticket(*, amount: bytes = b"\x01", name: int = 4) -> bytes:
    return generic(158, UNIT + UNIT + CONTRACT + amount + CONTRACT + dyn(bytes(name)))


def zk_origination(*, kind: int = 0, operations: int = 0) -> bytes:
    return generic(250, dyn(b"") + dyn(dyn(b"name") + bytes((kind,))) + dyn(bytes(32)) + i32(operations))


def zk_publish(*, code: int = 0, price: bytes = b"\0") -> bytes:
    return generic(251, bytes(20) + dyn(i32(code) + bytes(32) + price + PKH + bytes(20) + dyn(b"") + b"\0"))


def rollup(machine: int) -> bytes:
    return generic(200, bytes((machine,)) + dyn(b"kernel") + UNIT + b"\0")


def proposals(count: int, period: int = 0) -> bytes:
    return generic(5, PKH + i32(period) + dyn(bytes(32 * count)))


def limits(counter: int = 1, gas: int = 1, storage: int = 1) -> bytes:
    """A delegation whose counter, gas and storage limit take so many bytes."""
    naturals = b"".join(
        b"\x80" * (length - 1) + (b"\x01" if length > 1 else b"\0") for length in (counter, gas, storage)
    )
    return b"\x03" + bytes(32) + b"\x6e" + PKH + b"\0" + naturals + b"\0"


def update_consensus_key(proof: int) -> bytes:
    """In the form of version 1."""
    return generic(114, b"\0" + bytes(32) + b"\xff" + dyn(bytes(proof)))


def header(elements: list[bytes], *, level: int = 7, payload_round: int = 0) -> bytes:
    fitness = dyn(b"".join(map(dyn, elements)))
    start = i32(level) + bytes(1 + 32 + 8 + 1 + 32) + fitness + bytes(32)
    return start + bytes(32) + i32(payload_round) + bytes(8) + b"\0\0"


def fitness(
    *, version: bytes = b"\x02", level: int = 7, locked: bytes = b"", before: bytes = i32(-1), last: bytes = i32(3)
) -> list[bytes]:
    return [version, i32(level), locked, before, last]


def block(elements: list[bytes], **fields: int) -> bytes:
    return b"\x11" + bytes(4) + header(elements, **fields)


def baking_evidence(elements: list[bytes], signature: int = 64) -> bytes:
    return generic(3, (dyn(header(elements) + bytes(signature))) * 2)


BOTH_SIDES = {
    "raw data": (raw_data(4096), raw_data(4097)),
    "inbox proof level": (
        input_proof(b"\0" + i32(MAX_I32) + b"\0" + dyn(b"")),
        input_proof(b"\0" + i32(-1) + b"\0" + dyn(b"")),
    ),
    "DAL page level": (
        input_proof(b"\x01\x02" + i32(MAX_I32) + b"\xff" + b"\xff\xff" + dyn(b"")),
        input_proof(b"\x01\x02" + i32(-1) + b"\xff" + b"\xff\xff" + dyn(b"")),
    ),
    "nonce level": (generic(1, i32(MAX_I32) + bytes(32)), generic(1, i32(MIN_I32) + bytes(32))),
    "published inbox level": (publish(0), publish(-1)),
    "rollup machine": (rollup(2), rollup(3)),
    "circuit kind": (zk_origination(kind=2), zk_origination(kind=3)),
    "zk operations, highest": (zk_origination(operations=2**30 - 1), zk_origination(operations=2**30)),
    "zk operations, lowest": (zk_origination(operations=-(2**30)), zk_origination(operations=-(2**30) - 1)),
    "zk operation code": (zk_publish(code=-(2**30)), zk_publish(code=MAX_I32)),
    "zk price is a Z": (zk_publish(price=b"\xc0\x01"), zk_publish(price=b"\xc0\x00")),
    "shard index": (entrapment(2**30 - 1), entrapment(2**30)),
    "entrypoint of a ticket": (transfer_ticket(name=31), transfer_ticket(name=32)),
    "ticket amount has no limit": (
        transfer_ticket(amount=b"\x80" * 40 + b"\x01"),
        transfer_ticket(amount=b"\x80" * 40 + b"\x00"),
    ),
    "proposals": (proposals(20), proposals(21)),
    "period may be anything": (proposals(1, period=-1), proposals(21, period=-1)),
    "counter": (limits(counter=10), limits(counter=11)),
    "gas limit": (limits(gas=10), limits(gas=11)),
    "storage limit": (limits(storage=10), limits(storage=11)),
    "storage to pay for is a Z": (
        generic(113, b"\xc0\x01" + b"\x01" + bytes(21)),
        generic(113, b"\xc0\x00" + b"\x01" + bytes(21)),
    ),
    "evidence level": (
        consensus_evidence(inlined(20, slot_form(MAX_I32))),
        consensus_evidence(inlined(20, slot_form(-1))),
    ),
    "evidence round": (
        consensus_evidence(inlined(20, slot_form(1, MAX_I32))),
        consensus_evidence(inlined(20, slot_form(1, -1))),
    ),
    "evidence signature": (
        consensus_evidence(inlined(20, slot_form(), 2420)),
        consensus_evidence(inlined(20, slot_form(), 2419)),
    ),
    "aggregate round": (generic(30, aggregate(0, MAX_I32)), generic(30, aggregate(0, -1))),
    "aggregate level": (generic(31, aggregate(MAX_I32, 0)), generic(31, aggregate(-1, 0))),
    "signature of a header": (baking_evidence(fitness(), 2420), baking_evidence(fitness(), 0)),
    "fitness of a header": (baking_evidence(fitness()), baking_evidence(fitness(last=i32(-1)))),
    "round": (block(fitness(last=i32(MAX_I32))), block(fitness(last=i32(-1)))),
    "payload round": (block(fitness(), payload_round=MAX_I32), block(fitness(), payload_round=-1)),
    "level in the fitness": (block(fitness(level=8), level=8), block(fitness(level=8), level=7)),
    "locked round": (block(fitness(locked=i32(1))), block(fitness(locked=b"\0\0\0"))),
    "predecessor round": (block(fitness(before=i32(-9))), block(fitness(before=b""))),
    "last round": (block(fitness(last=i32(0))), block(fitness(last=b""))),
    "consensus version": (block(fitness()), block(fitness(version=b"\0\x02"))),
    "five elements": (block(fitness()), block([*fitness(), b""])),
    "older fitness of 17 bytes": (block(fitness()), block([b"\x01", bytes(8)])),
}


@pytest.mark.parametrize(("accepted", "refused"), BOTH_SIDES.values(), ids=BOTH_SIDES)
def test_both_sides_of_a_limit(accepted: bytes, refused: bytes) -> None:
    decode(accepted)
    with pytest.raises(DecodeError, match=r"at offset \d+: expected"):
        decode(refused)


@pytest.mark.parametrize("proof", [64, 96])
def test_proofs_of_version_1(proof: int) -> None:
    assert decode(update_consensus_key(proof), version=1).operations == ("update_consensus_key",)
    for length in (proof - 1, proof + 1, 0, 2420):
        with pytest.raises(DecodeError, match=r"expected signature of 64, 96 bytes"):
            decode(update_consensus_key(length), version=1)


def test_any_byte_but_zero_is_true() -> None:
    for flag in b"\x01\x80\xff":
        assert decode(generic(110, bytes((flag,)) + PKH)).operations == ("delegation",)
        with pytest.raises(DecodeError, match="too short"):
            decode(generic(110, bytes((flag,))))


def test_a_count_is_at_most_an_int31() -> None:
    """Said before what is left is looked at: such a count is wrong whatever follows."""
    for count, text in ((2**30 - 1, "too short"), (2**30, "at most 1073741823, got 1073741824")):
        with pytest.raises(DecodeError, match=text):
            decode(b"\x05\x01" + count.to_bytes(4, "big"))
