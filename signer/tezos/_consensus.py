"""Layouts of blocks and consensus operations, sections 5 and 6 of the request specification.

They stand alone (first bytes 11, 12, 13) and, followed by a signature, as evidence inside of generic requests.
"""

from signer.tezos._layouts import (
    SIGNATURE_LENGTHS,
    Layout,
    fixed,
    integer,
    many,
    natural_i32,
    option,
    rest,
    sequence,
    u16,
)
from signer.tezos._reader import Reader

_FITNESS_VERSION = b"\x02"
_PAYLOAD_HASH = fixed(32, "payload hash")

_slot_form = sequence(u16("slot"), natural_i32("level"), natural_i32("round"), _PAYLOAD_HASH)
_aggregate = sequence(natural_i32("level"), natural_i32("round"), _PAYLOAD_HASH)

PREATTESTATION: Layout = _slot_form
ATTESTATION: Layout = _slot_form
ATTESTATION_WITH_DAL: Layout = sequence(_slot_form, integer("DAL bitset"))
PREATTESTATIONS_AGGREGATE: Layout = sequence(_aggregate, many(u16("slot"), "slots"))
ATTESTATIONS_AGGREGATE: Layout = sequence(
    _aggregate,
    many(sequence(u16("slot"), option(integer("DAL content"), "DAL content")), "committee"),
)
ATTESTATIONS_AGGREGATE_V1: Layout = sequence(_aggregate, many(u16("slot"), "slots"))


def inlined(contents: dict[int, Layout]) -> Layout:
    """A consensus operation as evidence: branch, tag, content, and the signature as the rest of the region."""
    known = ", ".join(map(str, contents))
    signature = rest("signature", (0, *SIGNATURE_LENGTHS))

    def read(reader: Reader) -> None:
        reader.skip(32, "branch")
        tag = reader.u8("consensus operation tag")
        if tag not in contents:
            raise reader.unknown_tag(tag, f"consensus operation tag {known}")
        contents[tag](reader)
        signature(reader)

    return read


def read_fitness(reader: Reader, level: int) -> int:
    """The five elements of a Tenderbake fitness; returns the round, which is the last one."""
    with reader.region("fitness"):
        start = reader.position
        if reader.blob("consensus version") != _FITNESS_VERSION:
            raise reader.fail("consensus version 02 as first fitness element", offset=start)
        if _element(reader, "level") != level:
            raise reader.fail(f"level {level}, as in the header, in the fitness", offset=reader.position - 4)
        _element(reader, "locked round", optional=True)
        _element(reader, "predecessor round")
        round_ = _element(reader, "round")
        if round_ < 0:
            raise reader.fail(f"round, not negative; got {round_}", offset=reader.position - 4)
    return round_


def _element(reader: Reader, what: str, *, optional: bool = False) -> int:
    start = reader.position
    value = reader.blob(what)
    if len(value) != 4 and not (optional and not value):
        raise reader.fail(f"{what} of 4 bytes as fitness element, got {len(value)}", offset=start)
    return int.from_bytes(value, "big", signed=True)


def read_header(reader: Reader) -> tuple[int, int]:
    """An unsigned block header from its level to its votes; returns level and round."""
    level = reader.natural_i32("level")
    reader.skip(1 + 32 + 8 + 1 + 32, "protocol, predecessor, timestamp, validation passes, operations hash")
    round_ = read_fitness(reader, level)
    reader.skip(32 + 32, "context and payload hash")
    reader.natural_i32("payload round")
    reader.skip(8, "proof-of-work nonce")
    if reader.boolean("presence of a seed nonce hash"):
        reader.skip(32, "seed nonce hash")
    reader.skip(1, "votes")
    return level, round_


def signed_header(reader: Reader) -> None:
    """A block header as evidence: the signature is all the rest of the region."""
    read_header(reader)
    rest("signature", SIGNATURE_LENGTHS)(reader)
