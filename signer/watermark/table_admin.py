"""What operators do to marks in a DynamoDB table: list, set, reset, import, export. Works beside running signers.

As `signer.watermark.admin` does it for the database; the role needs `dynamodb:Scan` to list, `dynamodb:PutItem` to set,
`dynamodb:DeleteItem` to reset. Nothing lowers a mark but `reset_mark`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import structlog
import trio

from signer.aws.client import AwsClient
from signer.config.models import WatermarkTable
from signer.tezos.keys import PublicKeyHash
from signer.watermark import admin, items
from signer.watermark.interface import Mark, MarkKey, Slot, WatermarkStoreError
from signer.watermark.rules import higher
from signer.watermark.sources import Entry, merge, read
from signer.watermark.table import DEFAULT_TABLE, MarkTable, WatermarkUnavailableError

_TIMEOUT = 15.0  # seconds for one change; an operator waits for it
_OPEN_TIMEOUT = 60.0  # seconds until the table is there; one that has to be made takes some ten
_CONNECT_TIMEOUT, _READ_TIMEOUT = 1.0, 1.0  # seconds; DynamoDB takes some ms, and a lost reply leaves time to ask again
_AT_ONCE = 4  # marks raised at once: a table with few units is throttled by more, and then each has to wait
_PAUSE = 1.0  # seconds before a mark is tried again; each try took up to `_TIMEOUT` before
_WORKERS = 32  # calls at once: as many keys may have their slot in one moment

logger = structlog.get_logger(__name__)


def name_of(table: WatermarkTable) -> str:
    return table.table or DEFAULT_TABLE


def client_for(table: WatermarkTable) -> AwsClient:
    """A client with the credentials of *table*, and with limits that fit into the time that a mark may take."""
    return AwsClient(
        "dynamodb",
        table,
        component="watermark",
        workers=_WORKERS,
        connect_timeout=_CONNECT_TIMEOUT,
        read_timeout=_READ_TIMEOUT,
    )


async def list_marks(table: MarkTable) -> list[Entry]:
    """Every mark that counts, ordered by chain, key and slot."""
    highest: dict[MarkKey, Mark] = {}
    for key, mark in await table.scan():
        highest[key] = higher(highest.get(key), mark)
    return admin.ordered(highest)


async def set_mark(table: MarkTable, key: MarkKey, level: int, round: int) -> None:
    """Raise a mark; raises `MarkRefusedError` for one that is not higher."""
    admin.check_settable(level, round)
    await _open(table)
    standing = await _raise(table, key, Mark(level, round))
    if standing is not None:
        raise admin.not_raised(key, standing)


async def _open(table: MarkTable) -> None:
    """Make the table where it is missing: marks are to stand in it before a signer signs its first level."""
    with _limited(table, _OPEN_TIMEOUT):
        await table.open()


async def _raise(table: MarkTable, key: MarkKey, mark: Mark) -> Mark | None:
    """Set *mark* unless as much stands: then that is returned."""
    puts = items.advance(table.name, key, mark)
    with _limited(table):
        failed = await table.put(puts, deadline=trio.current_time() + _TIMEOUT)
    return items.standing(table.in_the_way(failed))


@contextmanager
def _limited(table: MarkTable, seconds: float = _TIMEOUT) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError as exc:
        text = f"watermark table {table.name}: no answer within {seconds:g} s; the change may have been made"
        raise WatermarkUnavailableError(text) from exc


async def reset_mark(
    table: MarkTable, pkh: PublicKeyHash, chain_id: str, slot: Slot | None, *, confirm_key: str, confirm_chain: str
) -> list[Entry]:
    """Forget the marks of a key on a chain (of one *slot*, or of all); returns what was forgotten."""
    admin.check_confirmed(pkh, chain_id, confirm_key, confirm_chain)
    forgotten: list[Entry] = []
    with _limited(table):
        for one in Slot if slot is None else (slot,):
            key = MarkKey(chain_id, pkh, one)
            deadline = trio.current_time() + _TIMEOUT
            seen = await table.look(key, deadline=deadline)
            standing = items.standing(table.marks(seen))
            if standing is None:
                continue
            if not await table.forget(seen, deadline=deadline):
                raise admin.MarkRefusedError(
                    f"the {one} mark of {pkh} on {chain_id} has changed just now, and stays: a signer uses it. Stop "
                    "the signers, then reset"
                )
            forgotten.append((key, standing))
    if forgotten:
        logger.warning("a running signer goes on refusing what it has signed itself: restart it", table=table.name)
    return forgotten


async def import_marks(table: MarkTable, source: Path) -> tuple[int, int]:
    """Take over the marks of another signer at *source*; returns how many were read and how many raised the table's."""
    sources = await trio.to_thread.run_sync(read, source)
    await _open(table)
    moved = await _raise_all(table, merge(sources).items())
    return sum(len(one.entries) for one in sources), moved


async def _raise_all(table: MarkTable, entries: Iterable[Entry], *, patient: bool = False) -> int:
    """Raise as many marks as are higher, returns their number; *patient*: a table that is away is asked again."""
    moved: list[MarkKey] = []
    failures: list[WatermarkStoreError] = []
    limiter = trio.CapacityLimiter(_AT_ONCE)

    async def one(key: MarkKey, mark: Mark) -> None:
        try:
            if await raised(key, mark):
                moved.append(key)
        except WatermarkStoreError as exc:
            failures.append(exc)

    async def raised(key: MarkKey, mark: Mark) -> bool:
        while True:
            try:
                async with limiter:
                    return await _raise(table, key, mark) is None
            except WatermarkUnavailableError as exc:
                if not patient:
                    raise
                stage = f"taking marks over: {exc}"
                if stage != table.stage:  # once for many marks, in a long outage
                    logger.warning("marks can't be taken over, trying again", error=str(exc))
                table.stage = stage
            await trio.sleep(_PAUSE)

    async with trio.open_nursery() as nursery:
        for key, mark in entries:
            nursery.start_soon(one, key, mark)
    if failures:
        raise failures[0]
    return len(moved)


async def export_signatory(table: MarkTable, target: Path) -> list[Path]:
    """Write all marks to *target* as Signatory's `watermark_v2` directory; returns the files written."""
    marks = await list_marks(table)
    return await trio.to_thread.run_sync(partial(admin.write_signatory, marks, target, f"the table {table.name}"))


async def take_over_files(base_dir: Path, table: MarkTable, made: bool) -> None:
    """Raise the table's marks to those in *base_dir*: of our database, or of another signer.

    So a signer that kept its marks in a file goes on with them in a table. It is done at each start: whoever goes
    back to the file for a while, and returns, loses nothing. A table that is busy (each mark is up to 6 write units,
    also where it is not raised) is waited for: ending the process would begin it all again.
    """
    marks = await trio.to_thread.run_sync(admin.list_marks, base_dir)
    if marks:
        table.stage = "taking marks over"
        moved = await _raise_all(table, marks, patient=True)
        logger.info(
            "watermarks were taken over", source=str(base_dir), table=table.name, marks=len(marks), raised=moved
        )
    elif made:
        logger.warning(
            "a new watermark table was made, without a mark: any level is signed. If a key has signed before, stop, "
            "and import its marks, or raise them with: signer watermark set",
            table=table.name,
        )
