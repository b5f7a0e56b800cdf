"""A mark as items of a DynamoDB table, in the layout of the reference (section 3.7 of the signer specification). Pure.

The reference keeps one item for each name of a request, and once called some of them otherwise. A mark of ours stands
under every name that its slot ever had: whatever version of the reference shares the table refuses what we signed, and
what it signed is seen by us. All items of a mark are written together or not at all.

Everything is a conditional put: the reference's role may put, and nothing else.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from signer.errors import SignerError
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKeyHash, digest_text, parse_digest
from signer.watermark.interface import Mark, MarkKey, Slot
from signer.watermark.rules import Accept, Replay, decide, higher

PARTITION, SORT = "idx", "request"
_CONTENT = ("lvl", "round", "digest")
SIGNATURE = "nitro_signature"  # ours alone: the reference reads no item

NAMES: Mapping[Slot, tuple[str, ...]] = {
    Slot.BLOCK: ("block",),
    Slot.PREATTESTATION: ("preattestation", "preendorsement"),
    Slot.ATTESTATION: ("attestation", "attestation_with_dal", "endorsement"),
}
"""Sort keys of a slot's items. The first one holds the signature."""

SLOT_OF_NAME = {name: slot for slot, names in NAMES.items() for name in names}

Item = Mapping[str, Mapping[str, Any]]


class ItemError(SignerError):
    """An item that is no mark; the text names it."""


def partition_of(key: MarkKey) -> str:
    return f"{key.chain_id}/{key.public_key_hash}"


def key_of(item: Item) -> MarkKey | None:
    """Whose mark the item is; None for what is no mark of a slot."""
    chain_id, _, address = str(item.get(PARTITION, {}).get("S", "")).partition("/")
    slot = SLOT_OF_NAME.get(str(item.get(SORT, {}).get("S", "")))
    try:
        return None if slot is None else MarkKey(chain_id, PublicKeyHash.from_base58(address), slot)
    except TezosError:
        return None


def mark_of(item: Item) -> Mark:
    """The mark in an item, of ours or of the reference; raises `ItemError`."""
    level, round_ = _integer(item, "lvl", None), _integer(item, "round", 0)
    signature = item.get(SIGNATURE, {}).get("S")
    return Mark(level, round_, _digest(item), None if signature is None else str(signature))


def _integer(item: Item, name: str, default: int | None) -> int:
    value = item.get(name)
    if value is None and default is not None:
        return default
    try:
        return int((value or {})["N"])
    except (KeyError, ValueError):
        where = "/".join(str(item.get(part, {}).get("S", "?")) for part in (PARTITION, SORT))
        raise ItemError(f"the item {where} has {name} {value!r} where an integer is expected") from None


def _digest(item: Item) -> bytes | None:
    """Binary, as it is written, or `vh…`, as the documentation of the reference shows it; else unknown."""
    value = item.get("digest", {})
    if isinstance(value.get("B"), bytes):
        return bytes(value["B"])
    try:
        return parse_digest(value["S"])
    except (KeyError, TezosError):
        return None


# -- the puts of a mark; each takes and returns the parameters of a call


def advance(table: str, key: MarkKey, mark: Mark) -> list[dict[str, Any]]:
    """Set *mark* where everything stands below it."""
    return [_put(table, key, name, mark, _above(mark)) for name in NAMES[key.slot]]


def claim(table: str, key: MarkKey, mark: Mark) -> list[dict[str, Any]]:
    """Set *mark* where everything stands below it, or is the mark of the same bytes already."""
    digest = "(#digest = :digest OR #digest = :text)"
    here = "#round = :round" if mark.round else "(#round = :round OR attribute_not_exists(#round))"
    condition = f"{_above(mark)} OR (lvl = :lvl AND {here} AND {digest})"
    return [_put(table, key, name, mark, condition) for name in NAMES[key.slot]]


def remember(table: str, key: MarkKey, mark: Mark) -> list[dict[str, Any]]:
    """Add the signature in *mark* to the item that is the same but for it."""
    return [_put(table, key, NAMES[key.slot][0], mark, "lvl = :lvl AND #round = :round AND #digest = :digest")]


def look(table: str, key: MarkKey) -> list[dict[str, Any]]:
    """Change nothing, and have everything that stands returned by the refusal.

    So a role that may put needs no permission to get, and several items are read as of one moment.
    """
    return [
        {
            "TableName": table,
            "Item": {PARTITION: {"S": partition_of(key)}, SORT: {"S": name}},
            "ConditionExpression": "lvl < :never",
            "ExpressionAttributeValues": {":never": {"N": "-1e30"}},  # false for what is absent, too
            "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
        }
        for name in NAMES[key.slot]
    ]


def forget(table: str, item: Item) -> dict[str, Any]:
    """Delete *item* as it was seen, or find it gone; never what was set since, however late this is executed."""
    condition = [f"#{name} = :{name}" if name in item else f"attribute_not_exists(#{name})" for name in _CONTENT]
    seen = {f":{name}": item[name] for name in _CONTENT if name in item}
    return {
        "TableName": table,
        "Key": {name: item[name] for name in (PARTITION, SORT)},
        "ConditionExpression": f"attribute_not_exists({PARTITION}) OR ({' AND '.join(condition)})",
        "ExpressionAttributeNames": {f"#{name}": name for name in _CONTENT},
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    } | ({"ExpressionAttributeValues": seen} if seen else {})


def _above(mark: Mark) -> str:
    """The condition of the reference; an item without a round has round 0."""
    lower = "#round < :round" + (" OR attribute_not_exists(#round)" if mark.round else "")
    return f"attribute_not_exists({PARTITION}) OR lvl < :lvl OR (lvl = :lvl AND ({lower}))"


def _put(table: str, key: MarkKey, name: str, mark: Mark, condition: str) -> dict[str, Any]:
    item: dict[str, dict[str, Any]] = {
        PARTITION: {"S": partition_of(key)},
        SORT: {"S": name},
        "lvl": {"N": str(mark.level)},
        "round": {"N": str(mark.round)},
    }
    if mark.digest is not None:
        item["digest"] = {"B": mark.digest}
    if mark.signature is not None and name == NAMES[key.slot][0]:
        item[SIGNATURE] = {"S": mark.signature}
    known = {":lvl": item["lvl"], ":round": item["round"]}
    if mark.digest is not None:
        known |= {":digest": item["digest"], ":text": {"S": digest_text(mark.digest)}}
    return {
        "TableName": table,
        "Item": item,
        "ConditionExpression": condition,
        "ExpressionAttributeNames": {name: name[1:] for name in ("#round", "#digest") if name in condition},
        "ExpressionAttributeValues": {name: value for name, value in known.items() if name in condition},
        "ReturnValuesOnConditionCheckFailure": "ALL_OLD",
    }


def standing(marks: Sequence[Mark]) -> Mark | None:
    """The highest of them."""
    top: Mark | None = None
    for mark in marks:
        top = higher(top, mark)
    return top


def judge(key: MarkKey, marks: Sequence[Mark], level: int, round: int, digest: bytes) -> Accept | Replay:
    """What to do with a request while all of *marks* stand; raises `WatermarkRefusedError`.

    The reference may have signed two attestations of one level and round, under its two names: then neither is ours.
    """
    decision = decide(key, standing(marks), level, round, digest)
    for mark in marks:
        one = decide(key, mark, level, round, digest)
        decision = one if isinstance(one, Replay) else decision
    return decision
