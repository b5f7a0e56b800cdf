"""The stores as callers see them: durability, replays, batches, cancellation, failures."""

import sqlite3
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from signer.errors import MalformedRequestError
from signer.tezos.keys import Curve, PublicKeyHash
from signer.watermark.database import FILE_NAME, Database
from signer.watermark.interface import (
    Advance,
    Mark,
    MarkKey,
    Slot,
    WatermarkRefusedError,
    WatermarkStore,
    WatermarkStoreError,
)
from signer.watermark.memory import MemoryWatermarks
from signer.watermark.sqlite import SqliteWatermarks

PKH = PublicKeyHash(Curve.ED25519, bytes(20))
KEY = MarkKey("NetXdQprcVkpaWU", PKH, Slot.BLOCK)
A, B = b"a" * 32, b"b" * 32


@asynccontextmanager
async def opened(store: WatermarkStore) -> AsyncIterator[WatermarkStore]:
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        yield store
        nursery.cancel_scope.cancel()


async def advance(
    store: WatermarkStore, level: int, digest: bytes = A, *, round_: int = 0, key: MarkKey = KEY
) -> str | None:
    return await store.advance(key, level, round_, digest, on_settled=lambda _: None).wait()


@pytest.fixture(params=["file", "mem"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[], WatermarkStore]:
    return (lambda: SqliteWatermarks(tmp_path / FILE_NAME)) if request.param == "file" else MemoryWatermarks


async def test_the_rule_through_a_store(make: Callable[[], WatermarkStore]) -> None:
    async with opened(make()) as store:
        assert await advance(store, 5) is None
        assert await advance(store, 5) is None
        store.remember(KEY, B, "not for this digest")
        store.remember(KEY, A, "sig")
        assert await advance(store, 5) == "sig"
        for level, digest in ((5, B), (4, A)):
            with pytest.raises(WatermarkRefusedError):
                await advance(store, level, digest)
        assert await advance(store, 5, B, round_=1) is None
        with pytest.raises(MalformedRequestError):
            await advance(store, -1)
        other = MarkKey(KEY.chain_id, PKH, Slot.ATTESTATION)
        assert await advance(store, 1, key=other) is None


async def test_settled_is_called_before_the_waiter_wakes(make: Callable[[], WatermarkStore]) -> None:
    seen: list[Advance] = []
    async with opened(make()) as store:
        await advance(store, 5)
        mark = store.advance(KEY, 5, 0, B, on_settled=seen.append)
        with pytest.raises(WatermarkRefusedError):
            await mark.wait()
    assert seen == [mark]
    assert isinstance(mark.error, WatermarkRefusedError)


async def test_marks_and_signatures_outlive_the_store(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    async with opened(SqliteWatermarks(path)) as store:
        await advance(store, 7)
        store.remember(KEY, A, "sig")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with opened(SqliteWatermarks(path)) as store:
        assert await advance(store, 7) == "sig"
        with pytest.raises(WatermarkRefusedError):
            await advance(store, 7, B)
    with pytest.raises(WatermarkStoreError, match="closed"):
        await advance(store, 9)


async def test_of_conflicting_requests_in_one_batch_one_wins(tmp_path: Path) -> None:
    outcomes: list[bool] = []
    async with opened(SqliteWatermarks(tmp_path / FILE_NAME)) as store:

        async def one(number: int) -> None:
            try:
                await advance(store, 1, bytes([number]) * 32)
                outcomes.append(True)
            except WatermarkRefusedError:
                outcomes.append(False)

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(one, number)
    assert sorted(outcomes) == [False] * 49 + [True]


async def test_two_stores_on_one_file_never_both_accept(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    async with opened(SqliteWatermarks(path)) as first, opened(SqliteWatermarks(path)) as second:
        for level in range(40):
            accepted: list[bytes] = []

            async def one(store: WatermarkStore, digest: bytes, level: int, accepted: list[bytes]) -> None:
                try:
                    await advance(store, level, digest)
                    accepted.append(digest)
                except WatermarkRefusedError:
                    pass

            async with trio.open_nursery() as nursery:
                nursery.start_soon(one, first, A, level, accepted)
                nursery.start_soon(one, second, B, level, accepted)
            assert len(accepted) == 1


async def test_a_cancelled_waiter_leaves_a_store_that_works(tmp_path: Path) -> None:
    async with opened(SqliteWatermarks(tmp_path / FILE_NAME)) as store:
        for level in range(20):
            with trio.CancelScope() as scope:
                mark = store.advance(KEY, level, 0, A, on_settled=lambda _: None)
                scope.cancel()
                await mark.wait()
            assert scope.cancelled_caught
        assert await advance(store, 19) is None
        assert await advance(store, 20) is None


@pytest.mark.parametrize(
    ("content", "text"),
    [(b"junk" * 2000, "is damaged"), (b"SQLite format 3\0" + bytes(84), "damaged|malformed|not a database")],
)
async def test_a_damaged_file_is_kept(tmp_path: Path, content: bytes, text: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_bytes(content)
    with pytest.raises(WatermarkStoreError, match=text):
        Database(path)
    assert path.read_bytes() == content


def test_a_database_of_the_first_schema_is_brought_up(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Database(path).close()
    with sqlite3.connect(path) as older:
        older.execute("PRAGMA user_version=1")
        older.execute("DROP TABLE taken_over")
        older.execute("CREATE TABLE taken_over (source TEXT PRIMARY KEY, marks INTEGER NOT NULL) WITHOUT ROWID")
        older.execute("INSERT INTO taken_over VALUES ('old', 3)")
    older.close()
    for _ in range(2):
        database = Database(path)
        assert database.taken_over() == {"old": ""}
        database.close()


def test_databases_that_are_not_ours(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE t (x)")
    other.close()
    with pytest.raises(WatermarkStoreError, match="database of another program"):
        Database(path)
    path.unlink()
    Database(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version=3")
    newer.close()
    with pytest.raises(WatermarkStoreError, match="schema version 3, this program knows 2"):
        Database(path)
    with pytest.raises(WatermarkStoreError, match="writable"):
        Database(tmp_path / "no" / FILE_NAME)


def test_a_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    database = Database(tmp_path / FILE_NAME)
    with suppress(ZeroDivisionError), database.transaction():
        database.put(KEY, Mark(1, 1, A))
        raise ZeroDivisionError
    assert database.get(KEY) is None
    with database.transaction():
        database.put(KEY, Mark(1, 1, A))
    assert database.all() == [(KEY, Mark(1, 1, A))]
    with pytest.raises(WatermarkStoreError), database.transaction():
        database.put(KEY, Mark(-1, 1, A))  # the schema itself refuses what is no level
    (synchronous,) = database._connection.execute("PRAGMA synchronous").fetchone()
    with database.unsynced(), database.transaction():
        database.remember(KEY, A, "sig")
    assert database._connection.execute("PRAGMA synchronous").fetchone() == (synchronous,) == (2,)
    assert database.get(KEY) == Mark(1, 1, A, "sig")
    database.close()


async def test_the_observer_hears_of_writes(tmp_path: Path) -> None:
    heard: list[tuple[str, bool, str | None]] = []

    class Observer:
        def watermark_io(self, operation: str, seconds: float, error: str | None) -> None:
            heard.append((operation, seconds >= 0, error))

    async with opened(SqliteWatermarks(tmp_path / FILE_NAME, observer=Observer())) as store:
        await advance(store, 1)
        (tmp_path / FILE_NAME).unlink()
        with pytest.raises(WatermarkStoreError, match="is gone"):
            await advance(store, 2)
    assert heard == [("write", True, None), ("write", True, "FileNotFoundError")]
