"""Two signers of ours and the reference on one table, while the network does its worst: no slot is signed twice.

A model of DynamoDB in memory (conditional puts, transactions, reasons) behind a network that loses requests and
replies, delivers late, twice, and after the caller has gone. It is quick enough for many more orders than moto.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from decimal import Decimal
from functools import partial
from typing import Any

import pytest
import trio

from signer.aws.client import AwsError, AwsUnavailableError
from signer.errors import SignerError
from signer.tezos.keys import Curve, PublicKeyHash, digest_text
from signer.watermark import items
from signer.watermark.dynamodb import DynamoWatermarks
from signer.watermark.interface import MarkKey, Slot
from signer.watermark.items import NAMES, partition_of

PKH = PublicKeyHash(Curve.ED25519, bytes(20))
KEYS = [MarkKey("NetXdQprcVkpaWU", PKH, slot) for slot in (Slot.BLOCK, Slot.ATTESTATION)]
RUNS, STEPS = 150, 40

Attribute = dict[str, Any]


class Tables:
    """One table; each request is decided in one moment."""

    def __init__(self) -> None:
        self.items: dict[tuple[str, str], dict[str, Attribute]] = {}

    def write(self, puts: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Carry out all of *puts* or none; returns the reasons where one failed."""
        reasons: list[dict[str, Any]] = []
        for put in puts:
            standing = self.items.get(_place(put))
            met = _holds(put, standing or {})
            old = {"Item": standing} if standing and "ReturnValuesOnConditionCheckFailure" in put else {}
            reasons.append({"Code": "None"} if met else {"Code": "ConditionalCheckFailed", **old})
        if any(reason["Code"] != "None" for reason in reasons):
            return reasons
        for put in puts:
            self.items[_place(put)] = dict(put["Item"])
        return []


def _place(put: dict[str, Any]) -> tuple[str, str]:
    return put["Item"]["idx"]["S"], put["Item"]["request"]["S"]


def _holds(put: dict[str, Any], item: dict[str, Attribute]) -> bool:
    """Whether the condition holds; a comparison with what is absent, or of another type, doesn't."""
    names, values = put.get("ExpressionAttributeNames") or {}, put.get("ExpressionAttributeValues") or {}

    def compare(name: str, operator: str, value: str) -> bool:
        found, wanted = item.get(names.get(name, name)), values[value]
        if found is None or found.keys() != wanted.keys():
            return False
        ((kind, left),), (right,) = found.items(), wanted.values()
        if kind == "N":
            left, right = Decimal(left), Decimal(right)
        return bool(left < right if operator == "<" else left == right)

    text = put["ConditionExpression"]
    text = re.sub(r"attribute_(not_)?exists\((#?\w+)\)", lambda m: f"exists({m[2]!r}, {not m[1]})", text)
    text = re.sub(r"(#?\w+) (<|=) (:\w+)", lambda m: f"compare({m[1]!r}, {m[2]!r}, {m[3]!r})", text)
    text = text.replace(" OR ", " or ").replace(" AND ", " and ")
    known = {"compare": compare, "exists": lambda name, wanted: (names.get(name, name) in item) is wanted}
    return bool(eval(text, {"__builtins__": {}}, known))  # our own conditions


@dataclass
class Network:
    """Implements `signer.aws.table.Client`: what is sent arrives, or not, now or later, once or twice."""

    tables: Tables
    chance: random.Random
    nursery: trio.Nursery
    calm: bool = False
    met: set[str] = field(default_factory=set)

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        if action == "DescribeTable":
            raise AwsError("denied", code="AccessDeniedException")
        puts = [one["Put"] for one in parameters["TransactItems"]] if "TransactItems" in parameters else [parameters]
        while True:  # as the client does
            try:
                return await self._once(puts)
            except AwsUnavailableError:
                if deadline is None or trio.current_time() + 0.05 >= deadline or self.chance.random() < 0.3:
                    raise
            await trio.sleep(0.05)

    async def _once(self, puts: list[dict[str, Any]]) -> dict[str, Any]:
        fates = ["", "", "", "lost", "dropped", "late", "twice", "slow", "conflict"]
        fate = "" if self.calm else self.chance.choice(fates)
        self.met.add(fate)
        if fate == "conflict":
            raise AwsError(
                "busy", code="TransactionCanceledException", response={"CancellationReasons": self._busy(len(puts))}
            )
        outcome: list[list[dict[str, Any]]] = []
        arrived = trio.Event()

        async def arrive() -> None:
            await trio.sleep(self._delay(fate))
            outcome.append(self.tables.write(puts))
            arrived.set()
            if fate == "twice":
                await trio.sleep(self.chance.choice([0, 0.01, 6]))
                self.tables.write(puts)

        if fate != "dropped":
            self.nursery.start_soon(arrive)
        if fate not in ("dropped", "late"):
            await arrived.wait()
        await trio.sleep(self.chance.choice([0, 0, 0.001, 0.02]))
        if fate in ("lost", "dropped", "late"):
            raise AwsUnavailableError("no answer")
        if not outcome[0]:
            return {}
        if len(puts) == 1:
            item = outcome[0][0].get("Item")
            response = {"Item": item} if item else {}
            raise AwsError("failed", code="ConditionalCheckFailedException", response=response)
        reasons = [self._also_busy(reason) for reason in outcome[0]]
        raise AwsError("failed", code="TransactionCanceledException", response={"CancellationReasons": reasons})

    def _delay(self, fate: str) -> float:
        return {"late": self.chance.choice([0.0, 0.03, 1.0, 8.0]), "slow": self.chance.choice([0.02, 0.5, 5.0])}.get(
            fate, 0.0
        )

    def _busy(self, number: int) -> list[dict[str, Any]]:
        code = self.chance.choice(["TransactionConflict", "ThrottlingError"])
        return [{"Code": "None"}] * (number - 1) + [{"Code": code}]

    def _also_busy(self, reason: dict[str, Any]) -> dict[str, Any]:
        busy = reason["Code"] == "None" and not self.calm and self.chance.random() < 0.5
        return {"Code": "TransactionConflict"} if busy else reason


@dataclass
class Reference:
    """Signs under the name of the kind alone, of a version that calls kinds as it likes."""

    tables: Tables

    def signs(self, key: MarkKey, name: str, place: tuple[int, int], digest: Attribute, *, bare: bool) -> bool:
        level, round_ = ({"N": str(number)} for number in place)
        item = {"idx": {"S": partition_of(key)}, "request": {"S": name}, "lvl": level, "digest": digest}
        put = {
            "Item": item if bare and place[1] == 0 else item | {"round": round_},
            "ConditionExpression": "attribute_not_exists(idx) OR lvl < :l OR (lvl = :l AND #r < :r)",
            "ExpressionAttributeNames": {"#r": "round"},
            "ExpressionAttributeValues": {":l": level, ":r": round_},
        }
        return not self.tables.write([put])


class World:
    """Everybody's requests, and what was let out."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.tables = Tables()
        self.reference = Reference(self.tables)
        self.ours: dict[tuple[MarkKey, int, int], set[bytes]] = {}
        self.theirs: dict[tuple[MarkKey, int, int], set[bytes]] = {}
        self.highest: dict[MarkKey, tuple[int, int]] = {}  # that ours let out
        self.seen: set[str] = set()

    async def run(self) -> None:
        async with trio.open_nursery() as world:
            network = Network(self.tables, self.chance, world, calm=True)
            stores = [await self._start(world, network) for _ in range(2)]
            network.calm = False
            for _ in range(STEPS):
                step = self.chance.random()
                if step < 0.2:
                    self._reference_signs()
                elif step < 0.25:  # one is killed, and starts anew: what it had sent may still arrive
                    network.calm = True
                    stores[self.chance.randrange(2)] = await self._start(world, network)
                    network.calm = False
                else:
                    world.start_soon(partial(self._ask, self.chance.choice(stores)))
                if self.chance.random() < 0.6:
                    await trio.sleep(self.chance.choice([0, 0.001, 0.03, 0.3, 3.0]))
            await trio.sleep(30)
            self.seen |= network.met
            world.cancel_scope.cancel()
        for place, digests in self.ours.items():
            assert len(digests | self.theirs.get(place, set())) == 1, (place, digests, self.theirs.get(place))
        self._check_that_the_reference_refuses()

    async def _start(self, world: trio.Nursery, network: Network) -> DynamoWatermarks:
        store = DynamoWatermarks(network, "watermark")
        await world.start(store.run)
        return store

    def _place(self) -> tuple[MarkKey, tuple[int, int], bytes]:
        chance = self.chance
        place = chance.randint(1, 4), chance.randint(0, 2)
        return chance.choice(KEYS), place, bytes([chance.randrange(3), *place]) + bytes(29)  # level and round are in it

    def _reference_signs(self) -> None:
        key, place, digest = self._place()
        written: Attribute = self.chance.choice([{"B": digest}, {"S": digest_text(digest)}, {"S": "?"}])
        name = self.chance.choice(NAMES[key.slot])
        if self.reference.signs(key, name, place, written, bare=self.chance.random() < 0.3):
            self.seen.add("reference")
            self.theirs.setdefault((key, *place), set()).add(digest)

    async def _ask(self, store: DynamoWatermarks) -> None:
        key, place, digest = self._place()
        before = self.highest.get(key, (-1, -1))
        try:
            if self.chance.random() < 0.2:
                stored = await store.recall(key, *place, digest)
                if stored is None:
                    return
            else:
                stored = await store.advance(key, *place, digest, on_settled=lambda _: None).wait()
        except SignerError as exc:
            self.seen.add(type(exc).__name__)
            return
        assert stored in (None, _signature(place, digest)), "a signature of other bytes"
        assert place >= before, "below what had been let out when it was asked for"
        self.seen.add("repeated" if stored else "signed")
        self.highest[key] = max(self.highest.get(key, (-1, -1)), place)
        self.ours.setdefault((key, *place), set()).add(digest)
        await trio.sleep(self.chance.choice([0, 0.001, 0.1]))
        store.remember(key, digest, _signature(place, digest))

    def _check_that_the_reference_refuses(self) -> None:
        for key, level, round_ in self.ours:
            for name in NAMES[key.slot]:
                assert not self.reference.signs(key, name, (level, round_), {"B": b"r" * 32}, bare=False)


def _signature(place: tuple[int, int], digest: bytes) -> str:
    return f"{place} {digest[0]}"


def many_runs(seed: int) -> set[str]:
    """What was met in all of them."""
    seen: set[str] = set()
    for run in range(seed, seed + RUNS):
        world = World(run)
        try:
            trio.run(world.run, clock=trio.testing.MockClock(autojump_threshold=0))
        except BaseException:
            print(f"--seed {run}")
            raise
        seen |= world.seen
    return seen


def test_no_slot_is_signed_twice(seed: int) -> None:
    wanted = {"signed", "repeated", "reference", "WatermarkRefusedError", "WatermarkUnavailableError"}
    assert many_runs(seed) >= wanted | {"lost", "dropped", "late", "twice", "slow", "conflict"}


@pytest.mark.parametrize(
    ("weak", "condition"),
    [("_above", lambda mark: "attribute_not_exists(idx) OR lvl < :lvl OR lvl = :lvl"), ("NAMES", None)],
)
def test_the_model_finds_a_weak_rule(monkeypatch: pytest.MonkeyPatch, weak: str, condition: Any) -> None:
    """It would be no proof otherwise."""
    monkeypatch.setattr(items, weak, condition or {slot: names[:1] for slot, names in NAMES.items()})
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        many_runs(0)
