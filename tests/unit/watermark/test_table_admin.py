"""What operators do to marks in a DynamoDB table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from signer.config.models import WatermarkTable
from signer.tezos.keys import Curve, PublicKeyHash
from signer.watermark import items, table_admin
from signer.watermark.admin import MarkRefusedError
from signer.watermark.database import FILE_NAME, Database
from signer.watermark.dynamodb import DynamoWatermarks
from signer.watermark.interface import Mark, MarkKey, Slot, WatermarkStoreError
from signer.watermark.table import MarkTable, WatermarkUnavailableError
from tests.dynamo import Dynamo, dynamo

PKH = PublicKeyHash(Curve.ED25519, bytes(20))
CHAIN = "NetXdQprcVkpaWU"
KEY, BLOCK = MarkKey(CHAIN, PKH, Slot.ATTESTATION), MarkKey(CHAIN, PKH, Slot.BLOCK)
SURE = {"confirm_key": str(PKH), "confirm_chain": CHAIN}
A = b"a" * 32


@pytest.fixture
def server() -> Iterator[Dynamo]:
    with dynamo() as tables:
        yield tables


@pytest.fixture
async def table(server: Dynamo) -> MarkTable:
    made = MarkTable(server, "watermark")
    await made.open()
    return made


async def test_list_set_reset(table: MarkTable) -> None:
    assert await table_admin.list_marks(table) == []
    await table_admin.set_mark(table, KEY, 10, 1)
    for place in ((10, 1), (9, 5)):
        with pytest.raises(
            MarkRefusedError, match="set only raises: the attestation mark .* stands at level 10, round 1"
        ):
            await table_admin.set_mark(table, KEY, *place)
    with pytest.raises(MarkRefusedError, match="outside 0"):
        await table_admin.set_mark(table, KEY, -1, 0)
    await table_admin.set_mark(table, BLOCK, 7, 0)
    assert await table_admin.list_marks(table) == [(KEY, Mark(10, 1)), (BLOCK, Mark(7, 0))]
    with pytest.raises(MarkRefusedError, match="nothing was reset"):
        await table_admin.reset_mark(table, PKH, CHAIN, None, confirm_key="", confirm_chain=CHAIN)
    assert await table_admin.reset_mark(table, PKH, CHAIN, Slot.BLOCK, **SURE) == [(BLOCK, Mark(7, 0))]
    assert await table_admin.reset_mark(table, PKH, CHAIN, None, **SURE) == [(KEY, Mark(10, 1))]
    assert await table_admin.list_marks(table) == []


async def test_what_the_reference_holds_is_listed_by_slot(server: Dynamo, table: MarkTable) -> None:
    for name, level in (("attestation", 4), ("endorsement", 9), ("generic", 99)):
        item = {"idx": {"S": f"{CHAIN}/{PKH}"}, "request": {"S": name}, "lvl": {"N": str(level)}}
        server.boto.put_item(TableName="watermark", Item=item)
    assert await table_admin.list_marks(table) == [(KEY, Mark(9, 0))]


async def test_every_page_is_listed(table: MarkTable, server: Dynamo) -> None:
    """moto ends a page at 1 MB, as DynamoDB does; a long attribute makes few items enough."""
    for number in range(20):
        item = {
            "idx": {"S": f"{CHAIN}/{PublicKeyHash(Curve.P256, bytes([number]) * 20)}"},
            "request": {"S": "block"},
            "lvl": {"N": "1"},
            "other": {"S": "x" * 100_000},
        }
        server.boto.put_item(TableName="watermark", Item=item)
    server.calls.clear()
    assert len(await table_admin.list_marks(table)) == 20
    assert len(server.calls) > 1
    assert all(parameters["ConsistentRead"] for _, parameters in server.calls)


async def test_import_and_export(table: MarkTable, tmp_path: Path) -> None:
    theirs = tmp_path / "watermark_v2"
    theirs.mkdir()
    kinds = {"block": {"level": 30}, "endorsement": {"level": 29, "round": 1}}
    (theirs / f"{CHAIN}.json").write_text(json.dumps({str(PKH): kinds}))
    await table_admin.set_mark(table, BLOCK, 31, 0)
    assert await table_admin.import_marks(table, theirs) == (2, 1)
    assert await table_admin.list_marks(table) == [(KEY, Mark(29, 1)), (BLOCK, Mark(31, 0))]
    (written,) = await table_admin.export_signatory(table, tmp_path / "out")
    (found,) = json.loads(written.read_text()).values()
    assert {name: mark["level"] for name, mark in found.items()} == {
        "attestation": 29,
        "attestation_with_dal": 29,
        "block": 31,
    }
    await table_admin.reset_mark(table, PKH, CHAIN, None, **SURE)
    with pytest.raises(MarkRefusedError, match="there are no marks in the table watermark"):
        await table_admin.export_signatory(table, tmp_path / "none")


@pytest.mark.parametrize("way", ["set", "import"])
async def test_marks_come_before_the_first_signer(server: Dynamo, tmp_path: Path, way: str) -> None:
    """Whoever comes from another signer must be able to raise marks while nothing signs yet."""
    table = MarkTable(server, "watermark")
    for look in (table_admin.list_marks(table), table_admin.reset_mark(table, PKH, CHAIN, None, **SURE)):
        with pytest.raises(WatermarkStoreError, match="If it was never made: signer watermark set or import"):
            await look
    if way == "set":
        await table_admin.set_mark(table, BLOCK, 30, 0)
    else:
        (tmp_path / f"{CHAIN}.json").write_text(json.dumps({str(PKH): {"block": {"level": 30}}}))
        assert await table_admin.import_marks(table, tmp_path / f"{CHAIN}.json") == (1, 1)
    assert await table_admin.list_marks(table) == [(BLOCK, Mark(30, 0))]


async def test_marks_of_the_file_are_taken_over_at_the_start(
    server: Dynamo, table: MarkTable, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    database = Database(tmp_path / FILE_NAME)
    with database.transaction():
        database.put(KEY, Mark(50, 0, A, "sig"))
        database.put(BLOCK, Mark(49, 0, A))
    database.close()
    await table_admin.set_mark(table, BLOCK, 60, 0)
    for _ in range(2):
        await table_admin.take_over_files(tmp_path, table, False)
        assert await table_admin.list_marks(table) == [(KEY, Mark(50, 0, A, "sig")), (BLOCK, Mark(60, 0))]
    assert "raised=1" in capsys.readouterr().out
    await table_admin.take_over_files(tmp_path / "none", table, True)
    assert "a new watermark table was made, without a mark" in capsys.readouterr().out


async def test_a_store_that_can_not_take_over_does_not_start(server: Dynamo, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"junk" * 2000)

    async def prepare(table: MarkTable, made: bool) -> None:
        await table_admin.take_over_files(tmp_path, table, made)

    with pytest.raises(WatermarkStoreError, match="is damaged"):
        await DynamoWatermarks(server, "watermark", prepare=prepare).run()


async def test_what_keeps_an_operator(
    server: Dynamo, table: MarkTable, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    server.gate = trio.Event()
    with pytest.raises(WatermarkUnavailableError, match="no answer within 60 s"):
        await table_admin.set_mark(table, KEY, 1, 0)
    with pytest.raises(WatermarkUnavailableError, match="no answer within 15 s"):
        await table_admin.reset_mark(table, PKH, CHAIN, None, **SURE)
    server.gate = None
    server.faults.extend(("throttled",))
    with pytest.raises(WatermarkUnavailableError, match="no answer from Scan; it was only read"):
        await table_admin.list_marks(table)
    server.denied = {"Scan", "TransactWriteItems"}
    with pytest.raises(WatermarkStoreError, match="AccessDenied.*Scan"):
        await table_admin.list_marks(table)
    theirs = tmp_path / "watermark_v2"
    theirs.mkdir()
    kinds = {"attestation": {"level": 30}, "preattestation": {"level": 29}}
    (theirs / f"{CHAIN}.json").write_text(json.dumps({str(PKH): kinds}))
    with pytest.raises(WatermarkStoreError, match="AccessDenied.*TransactWriteItems"):
        await table_admin.import_marks(table, theirs)
    put = {"idx": {"S": f"{CHAIN}/{PKH}"}, "request": {"S": "attestation"}, "lvl": {"N": "1"}}
    server.boto.put_item(TableName="watermark", Item=put)
    server.denied = set()
    server.faults.extend(["", "AccessDeniedException"])
    with pytest.raises(WatermarkStoreError, match="AccessDenied"):
        await table_admin.reset_mark(table, PKH, CHAIN, Slot.ATTESTATION, **SURE)


def test_the_table_has_the_name_of_the_reference() -> None:
    assert table_admin.name_of(WatermarkTable()) == "watermark"
    assert table_admin.name_of(WatermarkTable(table="t")) == "t"


@pytest.mark.parametrize("key", [KEY, BLOCK])
async def test_a_reset_that_is_executed_late_forgets_nothing_new(
    server: Dynamo, table: MarkTable, autojump_clock: trio.testing.MockClock, key: MarkKey
) -> None:
    """A reply is lost, or the request is held up: what a signer has set meanwhile is no mark that was reset."""
    await table_admin.set_mark(table, key, 7, 0)
    seen = await table.look(key, deadline=trio.current_time() + 5)
    for digest in (A, b"b" * 32):
        assert await table.forget(seen, deadline=trio.current_time() + 5)
        assert await table.forget(seen, deadline=trio.current_time() + 5), "it was done: a repeat finds so"
        async with trio.open_nursery() as nursery:
            signer = DynamoWatermarks(server, "watermark")
            await nursery.start(signer.run)
            await signer.advance(key, 7, 0, digest, on_settled=lambda _: None).wait()
            nursery.cancel_scope.cancel()
        assert not await table.forget(seen, deadline=trio.current_time() + 5)
        assert await table_admin.list_marks(table) == [(key, Mark(7, 0, digest))]
        seen = await table.look(key, deadline=trio.current_time() + 5)


async def test_a_mark_that_moves_is_not_reset(
    server: Dynamo, table: MarkTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    await table_admin.set_mark(table, KEY, 7, 0)
    look = table.look

    async def outrun(key: MarkKey, *, deadline: float) -> list[items.Item]:
        seen = await look(key, deadline=deadline)
        await table_admin.set_mark(table, key, 8, 0)
        return seen

    monkeypatch.setattr(table, "look", outrun)
    with pytest.raises(MarkRefusedError, match="attestation mark .* has changed just now, and stays"):
        await table_admin.reset_mark(table, PKH, CHAIN, Slot.ATTESTATION, **SURE)
    assert await table_admin.list_marks(table) == [(KEY, Mark(8, 0))]


async def test_the_items_of_the_reference_are_reset(server: Dynamo, table: MarkTable) -> None:
    for name, content in (("attestation", {}), ("endorsement", {"round": {"N": "2"}, "digest": {"S": "vh"}})):
        item = {"idx": {"S": f"{CHAIN}/{PKH}"}, "request": {"S": name}, "lvl": {"N": "4"}} | content
        server.boto.put_item(TableName="watermark", Item=item)
    assert await table_admin.reset_mark(table, PKH, CHAIN, Slot.ATTESTATION, **SURE) == [(KEY, Mark(4, 2))]
    assert server.boto.scan(TableName="watermark")["Items"] == []


async def test_what_stands_untold_was_not_raised(server: Dynamo, table: MarkTable) -> None:
    """A refusal without the item, as an older server or a proxy in between gives it, is no success."""
    server.faults.extend(["", "", "ConditionalCheckFailedException"])
    with pytest.raises(WatermarkStoreError, match="doesn't say what stands"):
        await table_admin.set_mark(table, BLOCK, 10, 0)


async def test_a_busy_table_is_waited_for_when_marks_are_taken_over(
    server: Dynamo, tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    """A table with few write units, and a process that ends for it and starts again, would never get through."""
    database = Database(tmp_path / FILE_NAME)
    with database.transaction():
        for number in range(6):
            database.put(MarkKey(CHAIN, PublicKeyHash(Curve.P256, bytes([number]) * 20), Slot.BLOCK), Mark(50, 0))
    database.close()

    async def prepare(table: MarkTable, made: bool) -> None:
        await table_admin.take_over_files(tmp_path, table, made)

    store = DynamoWatermarks(server, "watermark", prepare=prepare)
    async with trio.open_nursery() as nursery:
        server.faults.extend(["", "", "", "", *["throttled"] * 50])  # it is made and probed, then busy
        nursery.start_soon(store.run)
        while "not open yet: taking marks over: watermark table watermark: no answer" not in store.failure:
            await trio.sleep(0.01)
        while store.failure:
            await trio.sleep(1)
        assert len(await table_admin.list_marks(MarkTable(server, "watermark"))) == 6
        nursery.cancel_scope.cancel()
