"""The stores as callers see them: durability, replays, batches, cancellation, failures."""

import os
import sqlite3
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from signer.errors import MalformedRequestError
from signer.tezos.keys import Curve, PublicKeyHash
from signer.watermark import admin
from signer.watermark.database import FILE_NAME, Database, store_error
from signer.watermark.dynamodb import DynamoWatermarks
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
from signer.watermark.sqlite import SqliteWatermarks, _Signature
from tests.dynamo import dynamo

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


@pytest.fixture(params=["file", "mem", "aws"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], WatermarkStore]]:
    with dynamo() as tables:
        makers: dict[str, Callable[[], WatermarkStore]] = {
            "file": lambda: SqliteWatermarks(tmp_path / FILE_NAME),
            "mem": MemoryWatermarks,
            "aws": lambda: DynamoWatermarks(tables, "watermark"),
        }
        yield makers[request.param]


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


async def test_recalling_moves_nothing(make: Callable[[], WatermarkStore]) -> None:
    async with opened(make()) as store:
        assert await store.recall(KEY, 5, 0, A) is None
        assert await advance(store, 4, B) is None, "level 5 did not become the mark"
        assert await store.recall(KEY, 4, 0, B) is None, "set, not signed yet"
        store.remember(KEY, B, "sig")
        assert await store.recall(KEY, 4, 0, B) == "sig"
        for level, digest in ((4, A), (3, B)):
            with pytest.raises(WatermarkRefusedError):
                await store.recall(KEY, level, 0, digest)
        with pytest.raises(MalformedRequestError):
            await store.recall(KEY, -1, 0, A)


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
    [
        (b"", "is damaged: it is empty"),
        (b"junk" * 2000, "is damaged"),
        (b"SQLite format 3\0" + bytes(84), "damaged|malformed|not a database"),
    ],
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
    database.close()


def test_no_commit_costs_an_earlier_one_its_durability(tmp_path: Path) -> None:
    """Level 0 (OFF) would let a checkpoint start the WAL over before the database is on the disk."""
    database = Database(tmp_path / FILE_NAME)
    levels = []
    for synced in (True, False, False, True):
        with database.transaction(synced=synced):
            database.put(KEY, Mark(1, 1, A))
            database.remember(KEY, A, "sig")
            levels += database._connection.execute("PRAGMA synchronous").fetchone()
    assert levels == [2, 1, 1, 2]
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


async def test_a_store_that_fails_says_so_until_it_works(tmp_path: Path) -> None:
    store = SqliteWatermarks(tmp_path / FILE_NAME)
    assert store.failure == "closed"
    async with opened(store):
        assert store.failure == ""
        (tmp_path / FILE_NAME).rename(tmp_path / "aside")
        with pytest.raises(WatermarkStoreError, match="a restart without it forgets every mark"):
            await advance(store, 1)
        assert "is gone" in store.failure
        (tmp_path / "aside").rename(tmp_path / FILE_NAME)
        await advance(store, 1)
        assert store.failure == ""


async def test_an_observer_that_fails_holds_nobody_up(tmp_path: Path) -> None:
    class Observer:
        def watermark_io(self, operation: str, seconds: float, error: str | None) -> None:
            raise ZeroDivisionError

    async with opened(SqliteWatermarks(tmp_path / FILE_NAME, observer=Observer())) as store:
        with trio.fail_after(5):
            for level in range(3):
                assert await advance(store, level) is None


async def test_a_bug_ends_neither_the_thread_nor_lets_a_signature_out(tmp_path: Path) -> None:
    """Below the types: what no caller of today hands in."""
    bad: Any = None
    store = SqliteWatermarks(tmp_path / FILE_NAME)
    database = Database(tmp_path / FILE_NAME)
    store._store(database, [_Signature(bad, A, "sig")])
    with database.transaction():
        database.put(KEY, Mark(1, 0, A))
    database.close()
    async with opened(store):
        with trio.fail_after(5):
            with pytest.raises(WatermarkStoreError, match="internal error"):
                await advance(store, 2, key=bad)
            assert await advance(store, 2) is None


async def test_a_batch_that_fails_leaves_nobody_waiting(tmp_path: Path) -> None:
    """Of the refused, the replayed and the accepted in one batch, nobody gets anything while the disk is away."""
    path = tmp_path / FILE_NAME
    errors: list[WatermarkStoreError] = []
    async with opened(SqliteWatermarks(path)) as store:
        await advance(store, 5)
        store.remember(KEY, A, "sig")
        assert await advance(store, 5) == "sig"
        (tmp_path / f"{FILE_NAME}-wal").rename(tmp_path / "away")

        async def one(level: int, digest: bytes) -> None:
            with pytest.raises(WatermarkStoreError, match="-wal is gone") as caught:
                await advance(store, level, digest)
            errors.append(caught.value)

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                for level, digest in ((5, B), (5, A), (6, A), (7, A), (4, A)):
                    nursery.start_soon(one, level, digest)
        (tmp_path / "away").rename(tmp_path / f"{FILE_NAME}-wal")
        assert await advance(store, 6) is None
    assert len(errors) == 5


async def test_a_batch_of_accepted_and_refused(tmp_path: Path) -> None:
    """A refusal in a transaction takes nothing from the others in it."""
    others = [MarkKey(KEY.chain_id, PublicKeyHash(Curve.P256, bytes([n]) * 20), Slot.BLOCK) for n in range(20)]
    async with opened(SqliteWatermarks(tmp_path / FILE_NAME)) as store:
        await advance(store, 5)
        batch = [store.advance(key, 1, 0, A, on_settled=lambda _: None) for key in others[:10]]
        refused = store.advance(KEY, 5, 0, B, on_settled=lambda _: None)
        batch += [store.advance(key, 1, 0, A, on_settled=lambda _: None) for key in others[10:]]
        for mark in batch:
            assert await mark.wait() is None
        with pytest.raises(WatermarkRefusedError):
            await refused.wait()
    database = Database(tmp_path / FILE_NAME)
    assert dict(database.all()) == {key: Mark(1, 0, A) for key in others} | {KEY: Mark(5, 0, A)}
    database.close()


async def test_a_mark_that_stands_is_made_durable_again(tmp_path: Path) -> None:
    """Whoever set it may have been killed before the sync: the same bytes get no signature without one of their own."""
    wal = tmp_path / f"{FILE_NAME}-wal"
    async with opened(SqliteWatermarks(tmp_path / FILE_NAME)) as store:
        await advance(store, 5)
        before = wal.stat().st_size
        assert await advance(store, 5) is None
        assert wal.stat().st_size > before


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm"])
def test_each_file_of_the_database_is_watched(tmp_path: Path, suffix: str) -> None:
    """Marks in a WAL without a name die with the process; without the shared memory no lock keeps another one out."""
    database = Database(tmp_path / FILE_NAME)
    with database.transaction():
        database.put(KEY, Mark(1, 0, A))
    path = tmp_path / f"{FILE_NAME}{suffix}"
    path.rename(tmp_path / "away")
    with pytest.raises(WatermarkStoreError, match=f"{FILE_NAME}{suffix} is gone"), database.transaction():
        pytest.fail("begun")
    path.write_bytes(b"another")
    with pytest.raises(WatermarkStoreError, match=f"{FILE_NAME}{suffix} was replaced"), database.transaction():
        pytest.fail("begun")
    (tmp_path / "away").replace(path)
    with database.transaction():
        database.put(KEY, Mark(2, 0, A))
    database.close()


def test_a_deleted_wal_is_saved_by_an_orderly_stop(tmp_path: Path) -> None:
    database = Database(tmp_path / FILE_NAME)
    with database.transaction():
        database.put(KEY, Mark(1, 0, A))
    (tmp_path / f"{FILE_NAME}-wal").unlink()
    database.close()
    database = Database(tmp_path / FILE_NAME)
    assert database.get(KEY) == Mark(1, 0, A)
    database.close()


def test_a_database_behind_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    Database(tmp_path / "disk" / "marks").close()
    (tmp_path / FILE_NAME).symlink_to(tmp_path / "disk" / "marks")
    database = Database(tmp_path / FILE_NAME)
    with database.transaction():
        database.put(KEY, Mark(1, 0, A))
    database.close()
    (tmp_path / "disk" / "marks").unlink()
    with pytest.raises(WatermarkStoreError, match="nothing is signed"):
        Database(tmp_path / FILE_NAME)


def test_a_database_cut_short_while_in_use(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    Database(path).close()
    database = Database(path)
    with database.transaction():
        database.put(KEY, Mark(1, 0, A))  # and SQLite looks at its own copy of the pages from now on
    os.truncate(path, 4096)
    with pytest.raises(WatermarkStoreError, match="cut short while in use"), database.transaction():
        pytest.fail("begun")
    database.close()


def test_a_wal_without_its_database_is_not_thrown_away(tmp_path: Path) -> None:
    """SQLite deletes the WAL of a database that it creates: the marks in it would be gone."""
    path, wal = tmp_path / FILE_NAME, tmp_path / f"{FILE_NAME}-wal"
    database = Database(path)
    with database.transaction():
        database.put(KEY, Mark(1, 0, A))
    content = wal.read_bytes()
    database.close()
    path.unlink()
    wal.write_bytes(content)
    for look in (Database, lambda path: admin.list_marks(path.parent)):
        with pytest.raises(WatermarkStoreError, match="is gone, but .*-wal is there"):
            look(path)
    assert wal.read_bytes() == content
    assert not path.exists()


async def test_two_first_starts_at_once(tmp_path: Path) -> None:
    """One database comes of it, and no other file stays behind."""
    path = tmp_path / FILE_NAME
    async with opened_twice(path) as (first, second):
        assert await advance(first, 5) is None
        with pytest.raises(WatermarkRefusedError):
            await advance(second, 5, B)
    assert {file.name for file in tmp_path.iterdir()} <= {FILE_NAME, f"{FILE_NAME}-wal", f"{FILE_NAME}-shm"}


@asynccontextmanager
async def opened_twice(path: Path) -> AsyncIterator[tuple[WatermarkStore, WatermarkStore]]:
    stores = SqliteWatermarks(path), SqliteWatermarks(path)
    async with trio.open_nursery() as nursery:
        async with trio.open_nursery() as starting:
            for store in stores:
                starting.start_soon(nursery.start, store.run)
        yield stores
        nursery.cancel_scope.cancel()


def test_after_an_io_error_everything_is_brought_to_the_disk_first(tmp_path: Path) -> None:
    wal = tmp_path / f"{FILE_NAME}-wal"
    database = Database(tmp_path / FILE_NAME)
    for level in range(5):
        with database.transaction():
            database.put(KEY, Mark(level, 0, A))
    before = wal.stat().st_size
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = "SQLITE_IOERR_FSYNC"
    with pytest.raises(WatermarkStoreError, match="look at the disk"), database.transaction():
        raise error
    reader = sqlite3.connect(tmp_path / FILE_NAME, isolation_level=None)
    reader.execute("BEGIN")
    assert reader.execute("SELECT level FROM mark").fetchall() == [(4,)]
    database._connection.execute("PRAGMA busy_timeout=0")
    with pytest.raises(WatermarkStoreError, match="disk has failed"), database.transaction():
        pytest.fail("begun")
    reader.close()
    with database.transaction():
        database.put(KEY, Mark(7, 0, A))
    assert wal.stat().st_size < before
    assert database.get(KEY) == Mark(7, 0, A)
    database.close()


async def test_administration_beside_a_running_store(tmp_path: Path) -> None:
    """What an operator changes counts from the next request on, and coming and going takes no file away."""
    async with opened(SqliteWatermarks(tmp_path / FILE_NAME)) as store:
        await advance(store, 5)
        assert await trio.to_thread.run_sync(admin.set_mark, tmp_path, KEY, 10, 0) == Mark(5, 0, A)
        for level, digest in ((7, A), (10, A), (10, B)):
            with pytest.raises(WatermarkRefusedError, match="high watermark 10"):
                await advance(store, level, digest)
        assert await advance(store, 11) is None
        assert admin.list_marks(tmp_path) == [(KEY, Mark(11, 0, A))]
        sure = {"confirm_key": str(PKH), "confirm_chain": KEY.chain_id}
        assert admin.reset_mark(tmp_path, PKH, KEY.chain_id, None, **sure) == [(KEY, Mark(11, 0, A))]
        store.remember(KEY, A, "a signature whose mark was forgotten")
        assert await advance(store, 1) is None
    assert admin.list_marks(tmp_path) == [(KEY, Mark(1, 0, A))]


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("SQLITE_FULL", "make room"),
        ("SQLITE_IOERR_SHMSIZE", "make room"),
        ("SQLITE_IOERR_FSYNC", "look at the disk"),
        ("SQLITE_BUSY_RECOVERY", "fuser"),
        ("SQLITE_CORRUPT_INDEX", "restore a copy"),
        ("SQLITE_READONLY_DIRECTORY", "writable"),
    ],
)
def test_what_to_do(tmp_path: Path, name: str, advice: str) -> None:
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorname = name
    assert advice in str(store_error(tmp_path, error))
