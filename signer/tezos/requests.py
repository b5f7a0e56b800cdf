"""What a signing request asks for: kind, chain, level, round, operations, ballots.

Implements the request specification (versions 022 to 025 of the protocol): a full parse of all bytes, and a refusal of
what doesn't parse (section 12). Whether a key may sign the request is `signer.policy`'s business. Does no I/O; the
work is linear in the length of the request, and nothing in it recurses on its content.
"""

import struct
from dataclasses import dataclass

from signer.tezos import _operations as operations
from signer.tezos._consensus import read_header
from signer.tezos._micheline import skip_expression
from signer.tezos._reader import Reader
from signer.tezos.errors import DecodeError, TezosError
from signer.tezos.keys import chain_id_text
from signer.tezos.kinds import RequestKind

LATEST_VERSION = 2
NONCE_LEVEL_LENGTH = 4  # bytes of a request for a deterministic nonce

_GENERIC, _AUTHENTICATION, _PACK, _BLOCK, _PREATTESTATION, _ATTESTATION = 0x03, 0x04, 0x05, 0x11, 0x12, 0x13
_CONTENT_OFFSET = 37  # of a consensus operation's tag: first byte, chain id, branch
_LEVEL_AND_ROUND = struct.Struct(">ii")

# (first byte, tag): kind, offset of level and round, bytes up to the end of the payload hash (section 6)
_SLOT_FORM = (40, 80)
_BLS_FORM = (38, 78)
_CONSENSUS: dict[tuple[int, int], tuple[RequestKind, tuple[int, int]]] = {
    (_PREATTESTATION, 20): (RequestKind.PREATTESTATION, _SLOT_FORM),
    (_PREATTESTATION, 40): (RequestKind.PREATTESTATION, _BLS_FORM),
    (_ATTESTATION, 21): (RequestKind.ATTESTATION, _SLOT_FORM),
    (_ATTESTATION, 23): (RequestKind.ATTESTATION_WITH_DAL, _SLOT_FORM),
    (_ATTESTATION, 41): (RequestKind.ATTESTATION, _BLS_FORM),
}
_CONSENSUS_VERSION_1 = {
    (_PREATTESTATION, 20): (RequestKind.PREATTESTATION, _SLOT_FORM),
    (_ATTESTATION, 21): (RequestKind.ATTESTATION, _SLOT_FORM),
    (_ATTESTATION, 23): (RequestKind.ATTESTATION, _SLOT_FORM),
}
_DAL_TAG = 23

_REFUSED_FIRST_BYTES = {
    0x01: "a block of the consensus before Tenderbake is not signed",
    0x02: "an endorsement of the consensus before Tenderbake is not signed",
    _AUTHENTICATION: "an authentication request is not signed: the signature would let its owner pose as a client",
}


FIRST_BYTES = {bytes((_GENERIC,)): RequestKind.GENERIC, bytes((_PACK,)): RequestKind.PACK}
"""The kinds without a bound on their length, which the first byte tells; the others say more in their tag."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A decoded request. Chain, level and round are there for the kinds that have a watermark."""

    kind: RequestKind
    operations: tuple[str, ...] = ()  # of a generic request, in wire order
    ballots: tuple[str, ...] = ()  # "yay", "nay", "pass", in wire order
    chain_id: str | None = None  # "Net…"
    level: int | None = None
    round: int | None = None
    tag: int | None = None  # of a consensus operation: 20, 21, 23, 40 or 41

    @property
    def policy_operations(self) -> tuple[str, ...]:
        """The operations as a policy names them: a ballot with its vote, `ballot:yay`."""
        votes = iter(self.ballots)
        return tuple(f"ballot:{next(votes)}" if kind == "ballot" else kind for kind in self.operations)


def decode(data: bytes, *, version: int = LATEST_VERSION) -> Request:
    """Decode the bytes of a request.

    *version* is the signing version: exactly 1 selects the layouts of protocol 022, any other the latest ones.
    Raises `DecodeError`, which names the offset and what was expected there.
    """
    if not data:
        raise DecodeError(
            "gotez: buffer is too short, at least 1 byte(s) were expected, had 0: can't sign empty data: "
            "at offset 0: expected the first byte of a request",
            offset=0,
        )
    first = data[0]
    if first in (_PREATTESTATION, _ATTESTATION):
        return _consensus_operation(data, _CONSENSUS_VERSION_1 if version == 1 else _CONSENSUS)
    if first == _BLOCK:
        return _block(data)
    if len(data) == NONCE_LEVEL_LENGTH:
        raise DecodeError(
            "at offset 0: expected a request; deterministic nonces are not served (4 bytes are a level)", offset=0
        )
    if first == _GENERIC:
        return _generic(data, version)
    if first == _PACK and version != 1:
        return _pack(data)
    why = _REFUSED_FIRST_BYTES.get(first)
    expected = (
        "a first byte 0x03, 0x11, 0x12 or 0x13" if version == 1 else "a first byte 0x03, 0x05, 0x11, 0x12 or 0x13"
    )
    raise DecodeError(
        f"gotez: unknown tag {first}: at offset 0: expected {expected}" + (f"; {why}" if why else ""), offset=0
    )


def describe(data: bytes, *, version: int = LATEST_VERSION) -> dict[str, object]:
    """What `signer decode` prints of a request: its facts, or `{"error": text}`; never raises."""
    try:
        request = decode(data, version=version)
    except TezosError as exc:
        return {"error": str(exc)}
    return {
        "request_kind": str(request.kind),
        "chain_id": request.chain_id,
        "level": request.level,
        "round": request.round,
        "operations": list(request.operations),
        "ballots": list(request.ballots),
    }


def _consensus_operation(data: bytes, table: dict[tuple[int, int], tuple[RequestKind, tuple[int, int]]]) -> Request:
    reader = Reader(data)
    reader.need(_CONTENT_OFFSET + 1, "chain id, branch and tag of a consensus operation")
    tag = data[_CONTENT_OFFSET]
    found = table.get((data[0], tag))
    reader.position = _CONTENT_OFFSET + 1
    if found is None:
        known = " or ".join(str(tag) for first, tag in table if first == data[0])
        raise reader.unknown_tag(tag, f"consensus operation tag {known} behind first byte 0x{data[0]:02x}")
    kind, (offset, end) = found
    reader.need(end - reader.position, "slot, level, round and payload hash")
    level, round_ = _LEVEL_AND_ROUND.unpack_from(data, offset)
    if level < 0:
        raise reader.fail(f"level, not negative; got {level}", offset=offset)
    if round_ < 0:
        raise reader.fail(f"round, not negative; got {round_}", offset=offset + 4)
    reader.position = end
    if tag == _DAL_TAG:
        reader.integer("DAL bitset")
    _at_end(reader)
    return Request(kind=kind, chain_id=chain_id_text(data[1:5]), level=level, round=round_, tag=tag)


def _block(data: bytes) -> Request:
    reader = Reader(data, 1)
    chain_id = reader.take(4, "chain id")
    level, round_ = read_header(reader)
    _at_end(reader)
    return Request(kind=RequestKind.BLOCK, chain_id=chain_id_text(chain_id), level=level, round=round_)


def _generic(data: bytes, version: int) -> Request:
    table = operations.VERSION_1 if version == 1 else operations.LATEST
    try:
        kinds, ballots = _operations(data, table)
    except DecodeError:
        if version == 1:
            raise
        try:  # evidence of DAL entrapment as protocol 024 writes it, without a lag index
            kinds, ballots = _operations(data, operations.LATEST_024)
        except DecodeError:
            kinds = []
        if "dal_entrapment_evidence" not in kinds:
            raise
    return Request(kind=RequestKind.GENERIC, operations=tuple(kinds), ballots=tuple(ballots))


def _operations(data: bytes, table: dict[int, operations.Operation]) -> tuple[list[str], list[str]]:
    reader = Reader(data, 1)
    reader.skip(32, "branch")
    return operations.read_operations(reader, table)


def _pack(data: bytes) -> Request:
    skip_expression(Reader(data, 1))  # anything may follow
    return Request(kind=RequestKind.PACK)


def _at_end(reader: Reader) -> None:
    if reader.remaining:
        raise reader.fail(f"the end of the request, {reader.remaining} byte(s) are left")
