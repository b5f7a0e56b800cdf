"""The marks in DynamoDB: the reference's items, faults of table and network, several signers on one table."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from signer.aws import table as aws_table
from signer.aws.client import AwsError
from signer.errors import UnavailableError
from signer.tezos.keys import Curve, PublicKeyHash, digest_text
from signer.watermark import dynamodb, items
from signer.watermark import table as mark_table
from signer.watermark.dynamodb import DynamoWatermarks
from signer.watermark.interface import Mark, MarkKey, Slot, WatermarkRefusedError, WatermarkStoreError
from signer.watermark.rules import Replay
from tests.dynamo import Dynamo, dynamo

PKH = PublicKeyHash(Curve.ED25519, bytes(20))
CHAIN = "NetXdQprcVkpaWU"
KEY = MarkKey(CHAIN, PKH, Slot.ATTESTATION)
BLOCK = MarkKey(CHAIN, PKH, Slot.BLOCK)
A, B = b"a" * 32, b"b" * 32
TABLE = "watermark"


@pytest.fixture
def server() -> Iterator[Dynamo]:
    with dynamo() as tables:
        yield tables


def make_table(server: Dynamo) -> None:
    """The table as the reference makes it."""
    server.boto.create_table(
        TableName=TABLE,
        AttributeDefinitions=[{"AttributeName": name, "AttributeType": "S"} for name in ("idx", "request")],
        KeySchema=[{"AttributeName": "idx", "KeyType": "HASH"}, {"AttributeName": "request", "KeyType": "RANGE"}],
        ProvisionedThroughput={"ReadCapacityUnits": 5, "WriteCapacityUnits": 5},
    )


def put(server: Dynamo, name: str, **attributes: Any) -> None:
    key = {"idx": {"S": f"{CHAIN}/{PKH}"}, "request": {"S": name}}
    server.boto.put_item(TableName=TABLE, Item=key | attributes)


def found(server: Dynamo) -> dict[str, dict[str, Any]]:
    """The items by the name of the request, less their keys."""
    return {
        item["request"]["S"]: {name: value for name, value in item.items() if name not in ("idx", "request")}
        for item in server.boto.scan(TableName=TABLE)["Items"]
    }


def reference_accepts(server: Dynamo, name: str, level: int, round_: int) -> bool:
    """The conditional put of the reference; it changes the table where it is accepted."""
    try:
        server.boto.put_item(
            TableName=TABLE,
            Item={
                "idx": {"S": f"{CHAIN}/{PKH}"},
                "request": {"S": name},
                "lvl": {"N": str(level)},
                "round": {"N": str(round_)},
                "digest": {"B": b"r" * 32},
            },
            ConditionExpression="attribute_not_exists(idx) OR lvl < :l OR (lvl = :l AND #r < :r)",
            ExpressionAttributeNames={"#r": "round"},
            ExpressionAttributeValues={":l": {"N": str(level)}, ":r": {"N": str(round_)}},
        )
    except server.boto.exceptions.ConditionalCheckFailedException:
        return False
    return True


@asynccontextmanager
async def opened(server: Dynamo, **options: Any) -> AsyncIterator[DynamoWatermarks]:
    store = DynamoWatermarks(server, TABLE, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        yield store
        nursery.cancel_scope.cancel()


async def advance(
    store: DynamoWatermarks, level: int, digest: bytes = A, *, round_: int = 0, key: MarkKey = KEY
) -> str | None:
    return await store.advance(key, level, round_, digest, on_settled=lambda _: None).wait()


# -- the layout of the reference


async def test_a_mark_is_written_under_every_name_of_its_slot(
    server: Dynamo, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(server) as store:
        await advance(store, 7, round_=2)
        await advance(store, 5, key=BLOCK)
        await advance(store, 6, key=MarkKey(CHAIN, PKH, Slot.PREATTESTATION))
    seven, six = ({"lvl": {"N": str(n)}, "round": {"N": str(r)}, "digest": {"B": A}} for n, r in ((7, 2), (6, 0)))
    assert found(server) == {
        "attestation": seven,
        "attestation_with_dal": seven,
        "endorsement": seven,
        "preattestation": six,
        "preendorsement": six,
        "block": {"lvl": {"N": "5"}, "round": {"N": "0"}, "digest": {"B": A}},
    }
    for name, level in (("attestation", 7), ("attestation_with_dal", 7), ("endorsement", 7), ("preendorsement", 6)):
        for below in ((level, 0), (level, 2 if level == 7 else 0), (level - 1, 9)):
            assert not reference_accepts(server, name, *below)
        assert reference_accepts(server, name, level, 3)


@pytest.mark.parametrize("name", ["attestation", "attestation_with_dal", "endorsement"])
@pytest.mark.parametrize(
    "digest", [{"digest": {"B": A}}, {"digest": {"S": digest_text(A)}}, {}, {"digest": {"S": "?"}}]
)
@pytest.mark.parametrize("round_", [{"round": {"N": "0"}}, {}])
async def test_what_the_reference_signed(server: Dynamo, name: str, digest: Any, round_: Any) -> None:
    make_table(server)
    put(server, name, lvl={"N": "10"}, **round_, **digest)
    known = digest not in ({}, {"digest": {"S": "?"}})
    async with opened(server) as store:
        for level, other in ((9, A), (10, B)):
            with pytest.raises(WatermarkRefusedError) as caught:
                await advance(store, level, other)
            assert (caught.value.standing.level, caught.value.standing.round) == (10, 0)
        if known:
            assert await store.recall(KEY, 10, 0, A) is None
            assert await advance(store, 10, A) is None, "the same bytes are signed again"
            assert {item["lvl"]["N"] for item in found(server).values()} == {"10"}
            assert not reference_accepts(server, "endorsement", 10, 0)
        else:
            with pytest.raises(WatermarkRefusedError):
                await advance(store, 10, A)
        with pytest.raises(WatermarkRefusedError):
            await advance(store, 10, B)
        assert await advance(store, 10, B, round_=1) is None


async def test_two_conflicting_attestations_of_the_reference(server: Dynamo) -> None:
    """It signs both kinds at one level; neither digest is the slot's."""
    make_table(server)
    put(server, "attestation", lvl={"N": "10"}, round={"N": "0"}, digest={"B": A})
    put(server, "attestation_with_dal", lvl={"N": "10"}, round={"N": "0"}, digest={"B": B})
    async with opened(server) as store:
        for digest in (A, B):
            with pytest.raises(WatermarkRefusedError):
                await advance(store, 10, digest)
        assert await advance(store, 11) is None


class _Outrun(Dynamo):
    """The reference signs other bytes under another name after our first look."""

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        try:
            return await super().call(action, resource=resource, deadline=deadline, **parameters)
        finally:
            if self.actions.count("TransactWriteItems") == 1 and action == "TransactWriteItems":
                assert reference_accepts(self, "attestation_with_dal", 10, 0)


async def test_the_reference_signs_between_our_look_and_our_claim(server: Dynamo) -> None:
    make_table(server)
    put(server, "attestation", lvl={"N": "10"}, round={"N": "0"}, digest={"B": A})
    async with opened(_Outrun()) as store:
        with pytest.raises(WatermarkRefusedError, match="already signed with different data"):
            await advance(store, 10, A)
    assert found(server)["attestation_with_dal"]["digest"] == {"B": b"r" * 32}


async def test_one_name_that_stands_higher_refuses_the_slot(server: Dynamo) -> None:
    make_table(server)
    put(server, "endorsement", lvl={"N": "20"}, round={"N": "1"})
    put(server, "attestation", lvl={"N": "10"}, round={"N": "0"}, digest={"B": A})
    async with opened(server) as store:
        with pytest.raises(WatermarkRefusedError, match="below high watermark 20"):
            await advance(store, 15)
        with pytest.raises(WatermarkRefusedError, match="below high watermark 20"):
            await store.recall(KEY, 15, 0, A)
    assert found(server)["attestation"]["lvl"] == {"N": "10"}, "nothing was written by halves"


@pytest.mark.parametrize("level", [{"N": "1.5"}, None])
async def test_an_item_that_is_no_mark(server: Dynamo, level: dict[str, str] | None) -> None:
    make_table(server)
    put(server, "block", **({} if level is None else {"lvl": level}))
    async with opened(server) as store:
        with pytest.raises(WatermarkStoreError, match=f"item {CHAIN}/{PKH}/block has lvl .* integer is expected"):
            await store.recall(BLOCK, 1, 0, A)
        with pytest.raises(WatermarkStoreError, match="integer is expected"):
            await advance(store, 1, key=BLOCK)


def test_what_is_no_mark_is_no_ones() -> None:
    for idx, request in (("x", "block"), (f"{CHAIN}/{PKH}", "generic"), (f"{CHAIN}/tz1x", "block")):
        assert items.key_of({"idx": {"S": idx}, "request": {"S": request}}) is None
    assert items.key_of({"idx": {"S": f"{CHAIN}/{PKH}"}, "request": {"S": "preendorsement"}}) == MarkKey(
        CHAIN, PKH, Slot.PREATTESTATION
    )


# -- replies that are lost, and tables that are busy


@pytest.mark.parametrize("key", [KEY, BLOCK])
async def test_a_lost_reply_is_no_loss(server: Dynamo, key: MarkKey) -> None:
    async with opened(server) as store:
        server.faults.append("lost")
        with pytest.raises(
            UnavailableError, match="may have been set, and a repeat of the same bytes is safe"
        ) as caught:
            await advance(store, 5, key=key)
        assert isinstance(caught.value, WatermarkStoreError)
        assert caught.value.status == 502
        assert "may have been set" in store.failure
        with pytest.raises(WatermarkRefusedError):
            await advance(store, 5, B, key=key)
        assert store.failure == "", "a refusal is an answer"
        assert await advance(store, 5, key=key) is None


async def test_throttling_is_no_refusal(server: Dynamo) -> None:
    async with opened(server) as store:
        server.faults.append("throttled")
        with pytest.raises(UnavailableError):
            await advance(store, 5)
        assert await advance(store, 5, B) is None, "nothing was set"


async def test_what_is_denied_later_is_no_refusal(server: Dynamo) -> None:
    async with opened(server) as store:
        server.denied = {"PutItem", "TransactWriteItems"}
        with pytest.raises(WatermarkStoreError, match="AccessDenied.*nothing is signed") as caught:
            await advance(store, 5)
        assert caught.value.status == 500
        server.denied.clear()
        server.boto.delete_table(TableName=TABLE)
        with pytest.raises(WatermarkStoreError, match="the table is gone. Restore it") as caught:
            await advance(store, 5)
        assert caught.value.status == 500


async def test_a_transaction_in_the_way_is_waited_for(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    async with opened(server) as store:
        server.faults.extend(["TransactionConflictException", "TransactionInProgressException"])
        assert await advance(store, 5) is None
        assert server.actions.count("TransactWriteItems") == 3
        began = trio.current_time()
        server.faults.extend(["TransactionConflictException"] * 1000)
        with pytest.raises(
            UnavailableError, match="busy for too long: TransactionConflict.*may have been set"
        ) as caught:
            await advance(store, 6)
        assert caught.value.status == 502
        assert 2.5 < trio.current_time() - began <= 3
        server.faults.clear()
        assert await advance(store, 6, B) is None


@pytest.mark.parametrize("reason", ["TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"])
async def test_a_transaction_that_was_cancelled_is_tried_again(
    server: Dynamo, autojump_clock: trio.testing.MockClock, reason: str
) -> None:
    async with opened(server) as store:
        server.faults.extend([f"reason {reason}"] * 3)
        assert await advance(store, 5) is None
        server.calls.clear()
        server.faults.append("reason ValidationError")
        with pytest.raises(WatermarkStoreError, match="TransactionCanceledException.*nothing is signed") as caught:
            await advance(store, 6)
        assert (caught.value.status, len(server.calls)) == (500, 1)


async def test_a_mark_that_takes_too_long(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    async with opened(server, write_timeout=2.0) as store:
        server.gate = trio.Event()
        began = trio.current_time()
        for work in (partial(advance, store, 5), partial(store.recall, KEY, 5, 0, A)):
            with pytest.raises(UnavailableError, match="no answer within 2 s"):
                await work()
        assert 4 < trio.current_time() - began < 4.5
        assert "no answer" in store.failure
        server.gate = None
        assert await advance(store, 6) is None


# -- order, and several at once


async def test_requests_of_one_slot_keep_their_order(server: Dynamo) -> None:
    """The first that came is never refused for the second, however the tasks are scheduled."""
    async with opened(server) as store:
        for level in range(1, 60, 3):
            marks = [store.advance(KEY, level + n, 0, A, on_settled=lambda _: None) for n in range(3)]
            for mark in reversed(marks):
                assert await mark.wait() is None


async def test_slots_do_not_wait_for_each_other(server: Dynamo) -> None:
    async with opened(server) as store:
        server.calls.clear()
        server.gate = trio.Event()
        keys = [MarkKey(CHAIN, PublicKeyHash(Curve.P256, bytes([n]) * 20), Slot.BLOCK) for n in range(20)]
        marks = [store.advance(key, 1, 0, A, on_settled=lambda _: None) for key in keys]
        await trio.testing.wait_all_tasks_blocked()
        assert len(server.calls) == 20
        server.gate.set()
        for mark in marks:
            assert await mark.wait() is None


async def test_what_was_handed_in_is_written_at_the_end(server: Dynamo) -> None:
    async with opened(server) as store:
        mark = store.advance(KEY, 5, 0, A, on_settled=lambda _: None)
    with trio.fail_after(5):
        assert await mark.wait() is None
    assert found(server)["attestation"]["lvl"] == {"N": "5"}
    assert store.failure == "closed"
    for late in (partial(advance, store, 6), partial(store.recall, KEY, 6, 0, A)):
        with pytest.raises(WatermarkStoreError, match="closed"):
            await late()


async def test_a_bug_leaves_nobody_waiting(server: Dynamo, monkeypatch: pytest.MonkeyPatch) -> None:
    async with opened(server) as store:
        with monkeypatch.context() as broken:
            broken.setattr(items, "advance", lambda *_: 1 / 0)
            with pytest.raises(WatermarkStoreError, match="internal error"):
                await advance(store, 5)
        assert await advance(store, 5) is None


# -- signatures


async def test_a_signature_is_stored_and_given_again(server: Dynamo) -> None:
    async with opened(server) as store:
        await advance(store, 5)
        store.remember(KEY, A, "sig")
        assert await advance(store, 5) == "sig", "known before it is stored"
        await trio.testing.wait_all_tasks_blocked()
        assert found(server)["attestation"]["nitro_signature"] == {"S": "sig"}
        store.remember(KEY, B, "of other bytes")
    async with opened(server) as store:
        assert await store.recall(KEY, 5, 0, A) == "sig"
        assert await advance(store, 5) == "sig"
        assert await advance(store, 6) is None
        assert await advance(store, 6) is None, "the earlier signature isn't that of the same digest at another level"


async def test_a_request_does_not_wait_for_a_signature_to_be_stored(
    server: Dynamo, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(server) as store:
        await advance(store, 5)
        server.gate = trio.Event()
        store.remember(KEY, A, "sig")
        await trio.testing.wait_all_tasks_blocked()
        server.gate = None
        with pytest.raises(WatermarkRefusedError):
            await advance(store, 5, B)
        await trio.testing.wait_all_tasks_blocked()
        assert found(server)["attestation"]["nitro_signature"] == {"S": "sig"}, "what came was refused: stored after it"
        server.gate = trio.Event()
        store.remember(KEY, A, "another")
        await trio.testing.wait_all_tasks_blocked()
        server.gate = None
        assert await advance(store, 6) is None
        await trio.testing.wait_all_tasks_blocked()
        assert "nitro_signature" not in found(server)["attestation"]


async def test_a_signature_that_is_not_stored_costs_nothing(
    server: Dynamo, autojump_clock: trio.testing.MockClock
) -> None:
    async with opened(server) as store:
        await advance(store, 5)
        server.faults.append("throttled")
        store.remember(KEY, A, "sig")
        await trio.testing.wait_all_tasks_blocked()
        assert await advance(store, 5) == "sig"
    assert "nitro_signature" not in found(server)["attestation"]
    async with opened(server) as store:
        assert await advance(store, 5) is None
        server.gate = trio.Event()
        store.remember(KEY, A, "sig")
        await trio.sleep(10)
        server.gate = None
        assert await advance(store, 6) is None


async def test_a_signature_of_another_signers_bytes_is_never_written(server: Dynamo) -> None:
    """Between our mark and our signature another machine has moved on."""
    async with opened(server) as first, opened(server) as second:
        await advance(first, 5)
        await advance(second, 6, B)
        first.remember(KEY, A, "sig")
        await trio.testing.wait_all_tasks_blocked()
    assert "nitro_signature" not in found(server)["attestation"]


# -- opening


async def test_a_role_that_may_only_put(server: Dynamo) -> None:
    make_table(server)
    server.denied = {"DescribeTable", "CreateTable", "GetItem", "Scan", "UpdateItem", "Query"}
    async with opened(server) as store:
        assert await advance(store, 5) is None
        store.remember(KEY, A, "sig")
        assert await store.recall(KEY, 5, 0, A) in (None, "sig")
    assert set(server.actions) == {"DescribeTable", "PutItem", "TransactWriteItems"}


@pytest.mark.parametrize("denied", [{"CreateTable"}, {"CreateTable", "DescribeTable"}])
async def test_no_table_and_a_role_that_may_not_make_it(server: Dynamo, denied: set[str]) -> None:
    server.denied = denied
    with pytest.raises(WatermarkStoreError, match="doesn't exist, and the role may not.*aws dynamodb create-table"):
        await DynamoWatermarks(server, TABLE).run()


async def test_a_role_that_may_not_put_is_found_at_the_start(server: Dynamo) -> None:
    server.denied = {"PutItem"}
    with pytest.raises(WatermarkStoreError, match="AccessDenied.*PutItem"):
        await DynamoWatermarks(server, TABLE).run()


async def test_a_table_of_another_program(server: Dynamo) -> None:
    server.boto.create_table(
        TableName=TABLE,
        AttributeDefinitions=[{"AttributeName": "pkh", "AttributeType": "S"}],
        KeySchema=[{"AttributeName": "pkh", "KeyType": "HASH"}],
        BillingMode="PAY_PER_REQUEST",
    )
    with pytest.raises(WatermarkStoreError, match="has the key pkh .S., and idx, request"):
        await DynamoWatermarks(server, TABLE).run()


class _Slow(Dynamo):
    """A table that takes its time to appear."""

    looks = 0

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        answer = await super().call(action, resource=resource, deadline=deadline, **parameters)
        if action == "DescribeTable":
            self.looks -= 1
            if self.looks >= 0:
                answer["Table"]["TableStatus"] = "CREATING"
        return answer


async def test_a_table_that_appears_slowly(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    slow = _Slow()
    slow.looks = 100
    async with opened(slow) as store:
        assert trio.current_time() > 90
        assert slow.actions.count("CreateTable") == 1
        assert await advance(store, 5) is None
    slow.looks = 1000
    with pytest.raises(WatermarkStoreError, match="not usable after 300 s: CREATING"):
        await DynamoWatermarks(slow, TABLE).run()


async def test_a_table_that_another_process_makes(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    server.faults.extend(["ResourceNotFoundException", "ResourceInUseException"])
    make_table(server)
    async with opened(server) as store:
        assert await advance(store, 5) is None


async def test_a_server_that_is_away_at_the_start(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    server.faults.extend(["throttled"] * 5)
    async with opened(server) as store:
        assert await advance(store, 5) is None
    server.faults.extend(["throttled"] * 1000)
    with pytest.raises(WatermarkStoreError, match="not usable after 300 s: no answer from DescribeTable"):
        await DynamoWatermarks(server, TABLE).run()
    assert aws_table.OPEN_LIMIT == 300


# -- what is heard of it


async def test_the_observer_hears_of_everything(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    heard: list[tuple[str, str, str | None, bool]] = []

    class Observer:
        def watermark_table_io(
            self, table: str, operation: str, seconds: float, error: str | None, *, refused: bool
        ) -> None:
            assert seconds >= 0
            heard.append((table, operation, error, refused))

    async with opened(server, observer=Observer()) as store:
        await advance(store, 5)
        assert reference_accepts(server, "attestation", 6, 0)
        with suppress(WatermarkRefusedError):
            await advance(store, 6)
        server.faults.append("throttled")
        with suppress(UnavailableError):
            await advance(store, 7)
    assert heard == [
        (TABLE, "create", None, False),
        (TABLE, "write", None, False),
        (TABLE, "write", None, True),
        (TABLE, "write", "ThrottlingException", False),
    ]


# -- several signers, and whatever the network does

STEP = st.tuples(
    st.integers(0, 1),  # which signer
    st.integers(1, 4),  # level
    st.integers(0, 2),  # round
    st.sampled_from([A, B]),
    st.sampled_from([KEY, BLOCK]),
    st.sampled_from(["", "", "lost", "throttled", "TransactionConflictException"]),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEP, max_size=25))
def test_for_each_slot_one_digest_at_most_is_signed(steps: list[Any]) -> None:
    """The reference takes part: it is given every level and round that ours signed, and must refuse."""
    signed: dict[tuple[MarkKey, int, int], bytes] = {}

    async def one(store: DynamoWatermarks, key: MarkKey, place: tuple[int, int], digest: bytes) -> None:
        with suppress(WatermarkRefusedError, UnavailableError):
            await advance(store, place[0], digest, round_=place[1], key=key)
            assert signed.setdefault((key, *place), digest) == digest

    async def main() -> None:
        with dynamo() as server:
            async with opened(server) as first, opened(server) as second:
                for batch in (steps[n : n + 5] for n in range(0, len(steps), 5)):
                    async with trio.open_nursery() as nursery:
                        for signer, level, round_, digest, key, fault in batch:
                            server.faults.append(fault)
                            nursery.start_soon(one, (first, second)[signer], key, (level, round_), digest)
                    server.faults.clear()
            for key, level, round_ in signed:
                for name in items.NAMES[key.slot]:
                    assert not reference_accepts(server, name, level, round_)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_the_mark_that_wins_carries_a_digest() -> None:
    assert items.standing([]) is None
    assert items.standing([Mark(3, 0), Mark(3, 0, A), Mark(2, 9, B)]) == Mark(3, 0, A)


async def test_a_store_that_is_not_open_yet(server: Dynamo, autojump_clock: trio.testing.MockClock) -> None:
    server.faults.extend(["throttled"] * 5)
    store = DynamoWatermarks(server, TABLE)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await trio.sleep(0.01)
        assert store.failure == "watermark table watermark: not open yet: no answer from DescribeTable"
        for work in (partial(advance, store, 5), partial(store.recall, KEY, 5, 0, A)):
            with pytest.raises(UnavailableError, match="not open yet: no answer.*nothing is signed"):
                await work()
        await trio.sleep(10)
        assert store.failure == ""
        assert await advance(store, 5) is None
        nursery.cancel_scope.cancel()


# -- what becomes of the table, and of the memory


@pytest.mark.parametrize("key", [KEY, BLOCK])
async def test_a_table_that_forgets_does_not_make_us_sign_again(server: Dynamo, key: MarkKey) -> None:
    """Emptied, or restored from a backup: what this process has signed, it knows."""
    async with opened(server) as store:
        await advance(store, 4, key=key)
        backup = server.boto.scan(TableName=TABLE)["Items"]
        await advance(store, 5, round_=1, key=key)
        for restored in (backup[:0], backup):
            for item in server.boto.scan(TableName=TABLE)["Items"]:
                where = {name: item[name] for name in ("idx", "request")}
                server.boto.delete_item(TableName=TABLE, Key=where)
            for item in restored:
                server.boto.put_item(TableName=TABLE, Item=item)
            for level, round_, digest in ((5, 1, B), (5, 0, A), (4, 9, A)):
                with pytest.raises(WatermarkRefusedError):
                    await advance(store, level, digest, round_=round_, key=key)
                with pytest.raises(WatermarkRefusedError):
                    await store.recall(key, level, round_, digest)
        assert await advance(store, 5, round_=1, key=key) is None, "the same bytes"
        assert {item["lvl"]["N"] for item in found(server).values()} == {"5"}, "and the table knows them again"


async def test_a_refusal_from_memory_says_nothing_of_the_table(server: Dynamo) -> None:
    async with opened(server) as store:
        await advance(store, 5)
        server.faults.append("throttled")
        with pytest.raises(UnavailableError):
            await advance(store, 6)
        server.calls.clear()
        with pytest.raises(WatermarkRefusedError):
            await advance(store, 5, B)
        assert server.calls == []
        assert "may have been set" in store.failure


async def test_slots_in_memory_are_bounded(server: Dynamo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those used last stay; one that is at work is never dropped; a dropped one costs its signature nothing."""
    monkeypatch.setattr(dynamodb, "_MAX_LANES", 3)
    keys = [MarkKey(f"Net{number}", PKH, Slot.BLOCK) for number in range(5)]
    async with opened(server) as store:
        for key in keys:
            assert await advance(store, 1, key=key) is None
            store.remember(key, A, f"of {key.chain_id}")
            await trio.testing.wait_all_tasks_blocked()
            await advance(store, 1, key=keys[0])
        assert set(store._lanes) == {keys[0], *keys[3:]}
        assert [await advance(store, 1, key=key) for key in keys] == [f"of {key.chain_id}" for key in keys]
        with pytest.raises(WatermarkRefusedError):
            await advance(store, 1, B, key=keys[1])
        server.gate = trio.Event()
        marks = [store.advance(key, 2, 0, A, on_settled=lambda _: None) for key in keys]
        await trio.testing.wait_all_tasks_blocked()
        assert len(store._lanes) == 5
        server.gate.set()
        for mark in marks:
            assert await mark.wait() is None


@pytest.mark.parametrize(
    "other", [Mark(5, 0, B, "sig"), Mark(5, 1, A, "sig"), Mark(6, 0, A, "sig"), Mark(4, 0, A, "sig")]
)
async def test_a_signature_is_stored_beside_its_own_mark_only(server: Dynamo, other: Mark) -> None:
    """Also after a reset, when another signer may have signed other bytes at that place: its mark must stay."""
    async with opened(server) as store:
        await advance(store, 5)
    (put_,) = items.remember(TABLE, KEY, other)
    with pytest.raises(server.boto.exceptions.ConditionalCheckFailedException):
        server.boto.put_item(**put_)
    assert found(server)["attestation"] == {"lvl": {"N": "5"}, "round": {"N": "0"}, "digest": {"B": A}}


def test_every_mark_of_a_slot_has_its_say() -> None:
    """Not the highest alone: two of one place may be of different bytes, and one of them have the signature."""
    signed = Mark(5, 0, A, "sig")
    for marks in ([Mark(5, 0, A), signed], [signed, Mark(5, 0, A)], [Mark(4, 9, B), Mark(5, 0, A), signed]):
        assert items.judge(KEY, marks, 5, 0, A) == Replay("sig")
    for marks in ([Mark(5, 0, A), Mark(5, 0, B)], [Mark(5, 0, A), Mark(5, 0)], [signed, Mark(5, 0, B, "other")]):
        for digest in (A, B):
            with pytest.raises(WatermarkRefusedError):
                items.judge(KEY, marks, 5, 0, digest)


async def test_a_signature_that_is_not_stored_yet_is_recalled_for_its_own_mark(server: Dynamo) -> None:
    async with opened(server) as store:
        await advance(store, 5)
        server.faults.append("throttled")
        store.remember(KEY, A, "sig")
        await trio.testing.wait_all_tasks_blocked()
        assert await store.recall(KEY, 5, 0, A) == "sig"
        assert await store.recall(KEY, 6, 0, B) is None


def test_busy_beside_a_fault_is_a_fault() -> None:
    for other, busy in (("None", True), ("ValidationError", False)):
        reasons = [{"Code": other}, {"Code": "TransactionConflict"}]
        error = AwsError("x", code="TransactionCanceledException", response={"CancellationReasons": reasons})
        assert mark_table._is_busy(error) is busy


async def test_keys_of_another_type_and_replicas(server: Dynamo, capsys: pytest.CaptureFixture[str]) -> None:
    described = {
        "KeySchema": [{"AttributeName": "idx", "KeyType": "HASH"}, {"AttributeName": "request", "KeyType": "RANGE"}],
        "AttributeDefinitions": [{"AttributeName": name, "AttributeType": "S"} for name in ("idx", "request")],
        "Replicas": [{"RegionName": "eu-central-1"}],
    }
    table = aws_table.Table(server, TABLE, "idx", "request")
    table._check(described)
    assert "this is a global table" in capsys.readouterr().out
    described["AttributeDefinitions"][1]["AttributeType"] = "N"
    with pytest.raises(aws_table.TableError, match="request .N."):
        table._check(described)
