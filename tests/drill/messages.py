"""Requests of the load, built from the layouts of sections 5 and 6 of the request specification."""

from dataclasses import dataclass
from enum import Enum

from signer.tezos.keys import Curve


class Kind(Enum):
    """The three that have a watermark; the value is the first byte."""

    BLOCK = 0x11
    PREATTESTATION = 0x12
    ATTESTATION = 0x13


@dataclass(frozen=True, slots=True)
class Slot:
    """What may be signed once: two signatures here over different bytes are a double signature."""

    chain: int
    key: str  # address
    kind: Kind
    level: int
    round: int


def message(slot: Slot, curve: Curve, payload: int) -> bytes:
    """The bytes to sign for *slot*; two of the same slot with another *payload* conflict."""
    head = bytes([slot.kind.value]) + slot.chain.to_bytes(4, "big")
    if slot.kind is Kind.BLOCK:
        return head + _header(slot, payload)
    place = _i32(slot.level) + _i32(slot.round) + payload.to_bytes(32, "big")
    if slot.kind is Kind.PREATTESTATION:
        return head + bytes(32) + b"\x14\x00\x00" + place
    if curve is Curve.BLS12_381:
        return head + bytes(32) + b"\x29" + place
    return head + bytes(32) + b"\x15\x00\x00" + place


def _header(slot: Slot, payload: int) -> bytes:
    elements = (b"\x02", _i32(slot.level), b"", _i32(-1), _i32(slot.round))
    fitness = b"".join(len(one).to_bytes(4, "big") + one for one in elements)
    shell = _i32(slot.level) + b"\x18" + bytes(32) + bytes(8) + b"\x04" + bytes(32)
    protocol_data = payload.to_bytes(32, "big") + bytes(4 + 8 + 1 + 1)
    return shell + len(fitness).to_bytes(4, "big") + fitness + bytes(32) + protocol_data


def _i32(value: int) -> bytes:
    return value.to_bytes(4, "big", signed=True)
