"""The operations of a generic request: section 8 of the request specification as tables, and its list rules.

`LATEST` holds the layouts of protocol 025, `LATEST_024` differs in tag 24 only, `VERSION_1` is protocol 022.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from signer.tezos import _consensus as consensus
from signer.tezos._layouts import (
    Layout,
    blob,
    bls_proof,
    boolean,
    choice,
    contract,
    dyn,
    expression,
    fixed,
    i32,
    int31,
    integer,
    manager,
    many,
    mutez,
    natural,
    natural_i32,
    nothing,
    option,
    originated,
    pkh,
    public_key,
    read_contract,
    read_entrypoint,
    read_pkh,
    rest,
    script,
    sequence,
    u8,
    u16,
)
from signer.tezos._reader import Reader

VOTES = ("yay", "nay", "pass")
FIRST_MANAGER_TAG = 107
SIGNATURE_PREFIX_TAG = 255
_BALLOT_TAG = 6
_TRANSACTION_TAG = 108
_MAX_PROPOSALS = 20
_MAX_RAW_DATA = 4096  # bytes in a reveal of a refutation

_PSEUDO_OPERATIONS = {
    b"stake": "stake",
    b"unstake": "unstake",
    b"finalize_unstake": "finalize_unstake",
    b"set_delegate_parameters": "set_delegate_parameters",
}


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the tables; *content* is None where a function of this module reads it."""

    kind: str
    content: Layout | None


# -- evidence

_inlined = consensus.inlined(
    {
        20: consensus.PREATTESTATION,
        21: consensus.ATTESTATION,
        23: consensus.ATTESTATION_WITH_DAL,
        30: consensus.PREATTESTATIONS_AGGREGATE,
        31: consensus.ATTESTATIONS_AGGREGATE,
    }
)
_inlined_attestation_v1 = consensus.inlined({21: consensus.ATTESTATION, 23: consensus.ATTESTATION_WITH_DAL})
_inlined_preattestation_v1 = consensus.inlined({20: consensus.PREATTESTATION})
_shard = sequence(int31("shard index"), many(fixed(32, "share"), "shares"), fixed(48, "shard proof"))
_evidence = dyn(_inlined, "evidence")

# -- smart rollups

_rollup = fixed(20, "rollup")
_inbox_proof = sequence(natural_i32("inbox level"), natural("message counter"), blob("inbox proof"))


def _raw_data(reader: Reader) -> None:
    start = reader.position
    length = reader.u16("length of raw data")
    if length > _MAX_RAW_DATA:
        raise reader.fail(f"raw data of at most {_MAX_RAW_DATA} bytes, got {length}", offset=start)
    reader.skip(length, "raw data")


_dal_page = sequence(natural_i32("published level"), u8("slot index"), fixed(2, "page index"), blob("DAL page proof"))
_reveal_proof = choice("reveal proof", {0: _raw_data, 1: nothing, 2: _dal_page, 3: nothing})
_input_proof = choice("input proof", {0: _inbox_proof, 1: _reveal_proof, 2: nothing})
_dissection = many(sequence(option(fixed(32, "state"), "state"), natural("tick")), "dissection")
_step = choice(
    "refutation step",
    {0: _dissection, 1: sequence(blob("machine step"), option(_input_proof, "input proof"))},
)
_refutation = choice(
    "refutation",
    {
        0: fixed(32 + 32, "player's and opponent's commitment"),
        1: sequence(natural("choice"), _step),
    },
)

# -- zk rollups

_states = many(fixed(32, "scalar"), "scalars")
_zk_ticket = choice("zk operation's ticket", {0: nothing, 1: sequence(expression, expression, contract("ticketer"))})
_zk_operation = sequence(
    int31("operation code"),
    fixed(32, "price id"),
    integer("price amount"),
    pkh("layer-1 destination"),
    fixed(20, "zk rollup"),
    _states,
    _zk_ticket,
)
_zk_pending = sequence(blob("circuit name"), _states, fixed(32, "fee"), boolean("exit validity"))
_zk_private = sequence(blob("circuit name"), _states, fixed(32, "fee"))
_zk_update = sequence(
    many(_zk_pending, "pending updates"), many(_zk_private, "private updates"), _states, blob("proof")
)

# -- the tables

_proof_option = option(bls_proof, "BLS proof of possession")
_key_with_proof = sequence(public_key, _proof_option)

_SIGNATURE_PREFIX = Operation(
    "signature_prefix",
    choice("signature prefix", {3: fixed(32, "signature prefix"), 4: fixed(2356, "signature prefix")}),
)

_COMMON: dict[int, Operation] = {
    1: Operation("seed_nonce_revelation", sequence(natural_i32("level"), fixed(32, "nonce"))),
    3: Operation(
        "double_baking_evidence",
        sequence(dyn(consensus.signed_header, "first header"), dyn(consensus.signed_header, "second header")),
    ),
    4: Operation("activate_account", fixed(20 + 20, "ed25519 hash and activation secret")),
    5: Operation(
        "proposals",
        sequence(pkh("source"), i32("period"), many(fixed(32, "proposal"), "proposals", limit=_MAX_PROPOSALS)),
    ),
    6: Operation("ballot", None),
    8: Operation("vdf_revelation", fixed(100 + 100, "VDF solution")),
    9: Operation("drain_delegate", sequence(pkh("consensus key"), pkh("delegate"), pkh("destination"))),
    17: Operation("failing_noop", blob("arbitrary bytes")),
    108: Operation("transaction", None),
    109: Operation("origination", sequence(mutez("balance"), option(pkh("delegate"), "delegate"), script, script)),
    110: Operation("delegation", option(pkh("delegate"), "delegate")),
    111: Operation("register_global_constant", script),
    112: Operation("set_deposits_limit", option(mutez("deposits limit"), "deposits limit")),
    113: Operation("increase_paid_storage", sequence(integer("amount"), originated("destination"))),
    158: Operation(
        "transfer_ticket",
        sequence(
            script,
            script,
            contract("ticketer"),
            natural("amount"),
            contract("destination"),
            blob("entrypoint", limit=31),
        ),
    ),
    200: Operation(
        "smart_rollup_originate",
        sequence(
            u8("rollup machine", maximum=2),
            blob("kernel"),
            script,
            option(many(pkh("staker"), "whitelist"), "whitelist"),
        ),
    ),
    201: Operation("smart_rollup_add_messages", many(blob("message"), "messages")),
    202: Operation("smart_rollup_cement", _rollup),
    203: Operation(
        "smart_rollup_publish",
        sequence(
            _rollup,
            fixed(32, "state hash"),
            natural_i32("inbox level"),
            fixed(32, "predecessor"),
            fixed(8, "ticks"),
        ),
    ),
    204: Operation("smart_rollup_refute", sequence(_rollup, pkh("opponent"), _refutation)),
    205: Operation("smart_rollup_timeout", sequence(_rollup, pkh("staker"), pkh("staker"))),
    206: Operation(
        "smart_rollup_execute_outbox_message",
        sequence(_rollup, fixed(32, "commitment"), blob("output proof")),
    ),
    207: Operation("smart_rollup_recover_bond", sequence(_rollup, pkh("staker"))),
    230: Operation("dal_publish_commitment", fixed(1 + 48 + 96, "slot index, commitment and proof")),
    250: Operation(
        "zk_rollup_origination",
        sequence(
            blob("public parameters"),
            many(sequence(blob("circuit name"), u8("circuit kind", maximum=2)), "circuits"),
            _states,
            int31("number of operations"),
        ),
    ),
    251: Operation("zk_rollup_publish", sequence(_rollup, many(_zk_operation, "zk operations"))),
    252: Operation("zk_rollup_update", sequence(_rollup, _zk_update)),
    255: _SIGNATURE_PREFIX,
}


def _dal_entrapment(inlined: Layout, *middle: Layout) -> Operation:
    return Operation("dal_entrapment_evidence", sequence(dyn(inlined, "attestation"), *middle, _shard))


LATEST: dict[int, Operation] = _COMMON | {
    2: Operation("double_consensus_operation_evidence", sequence(u16("slot"), _evidence, _evidence)),
    24: _dal_entrapment(_inlined, u16("consensus slot"), u8("slot index"), option(u8("lag index"), "lag index")),
    30: Operation("preattestations_aggregate", consensus.PREATTESTATIONS_AGGREGATE),
    31: Operation("attestations_aggregate", consensus.ATTESTATIONS_AGGREGATE),
    107: Operation("reveal", _key_with_proof),
    114: Operation("update_consensus_key", _key_with_proof),
    115: Operation("update_companion_key", _key_with_proof),
}
LATEST_024: dict[int, Operation] = LATEST | {24: _dal_entrapment(_inlined, u16("consensus slot"), u8("slot index"))}
VERSION_1: dict[int, Operation] = _COMMON | {
    2: Operation("double_attestation_evidence", sequence(*[dyn(_inlined_attestation_v1, "attestation")] * 2)),
    7: Operation("double_preattestation_evidence", sequence(*[dyn(_inlined_preattestation_v1, "preattestation")] * 2)),
    24: _dal_entrapment(_inlined_attestation_v1, u8("slot index")),
    31: Operation("attestations_aggregate", consensus.ATTESTATIONS_AGGREGATE_V1),
    107: Operation("reveal", public_key),
    114: Operation(
        "update_consensus_key",
        sequence(public_key, option(dyn(rest("signature", (64, 96)), "proof of possession"), "proof")),
    ),
}


def read_operations(reader: Reader, table: Mapping[int, Operation]) -> tuple[list[str], list[str]]:
    """Everything behind the branch of a generic request; returns kinds in wire order, and the ballots' votes."""
    kinds: list[str] = []
    ballots: list[str] = []
    first_tag: int | None = None
    ended = False  # by a signature prefix
    while reader.position < reader.end:
        tag = reader.u8("operation tag")
        operation = table.get(tag)
        if operation is None:
            raise reader.unknown_tag(tag, "tag of an operation")
        _check_place(reader, tag, first_tag, ended=ended)
        first_tag = tag if first_tag is None else first_tag
        ended = tag == SIGNATURE_PREFIX_TAG
        kinds.append(_read_operation(reader, tag, operation, ballots))
    if not kinds:
        raise reader.fail("at least one operation")
    return kinds, ballots


def _check_place(reader: Reader, tag: int, first_tag: int | None, *, ended: bool) -> None:
    """The rules of section 7 for what may stand beside what."""
    here = reader.position - 1
    if ended:
        raise reader.fail("the end of the request after a signature prefix", offset=here)
    if tag == SIGNATURE_PREFIX_TAG:
        if first_tag is None:
            raise reader.fail("an operation before the signature prefix", offset=here)
    elif first_tag is not None and min(tag, first_tag) < FIRST_MANAGER_TAG:
        raise reader.fail("a single operation, or manager operations (tags 107 to 252) only", offset=here)


def _read_operation(reader: Reader, tag: int, operation: Operation, ballots: list[str]) -> str:
    if tag == _BALLOT_TAG:
        ballots.append(_ballot(reader))
        return operation.kind
    source = b""
    if FIRST_MANAGER_TAG <= tag < SIGNATURE_PREFIX_TAG:
        source = read_pkh(reader, "source")
        reader.mutez("fee")
        manager(reader)
    if tag == _TRANSACTION_TAG:
        return _transaction(reader, source)
    assert operation.content is not None
    operation.content(reader)
    return operation.kind


def _ballot(reader: Reader) -> str:
    read_pkh(reader, "source")
    reader.skip(4 + 32, "period and proposal")
    vote = reader.u8("vote")
    if vote >= len(VOTES):
        raise reader.fail(f"vote 0 (yay), 1 (nay) or 2 (pass), got {vote}", offset=reader.position - 1)
    return VOTES[vote]


def _transaction(reader: Reader, source: bytes) -> str:
    """A transaction, or the pseudo-operation that it stands for (section 9).

    An entrypoint is taken by its name, whether that was sent as a tag or as text: the protocol reads both alike, so
    a policy without `stake` must not be passed by spelling it out.
    """
    reader.mutez("amount")
    destination = read_contract(reader, "destination")
    if not reader.present("parameters"):
        return "transaction"
    entrypoint = read_entrypoint(reader)
    script(reader)
    if destination == source:
        return _PSEUDO_OPERATIONS.get(entrypoint, "transaction")
    return "transaction"
