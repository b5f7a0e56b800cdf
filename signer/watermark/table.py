"""The marks in a DynamoDB table: the calls on it, each of which is complete or changes nothing.

Nothing here waits in a queue or knows what a request is; `signer.watermark.dynamodb` is the store of a running signer,
`signer.watermark.table_admin` what an operator does.
"""

import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import trio

from signer.aws.client import AwsError, AwsUnavailableError
from signer.aws.table import Client, Table
from signer.errors import SignerError, UnavailableError
from signer.watermark import items
from signer.watermark.interface import Mark, MarkKey, WatermarkStoreError
from signer.watermark.items import Item

DEFAULT_TABLE = "watermark"
_CONFLICT_PAUSE = 0.02  # seconds; about how long a transaction takes, doubled up to the next
_MAX_CONFLICT_PAUSE = 0.3
_FAILED = "ConditionalCheckFailed"
_BUSY = ("TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded")
"""Reasons, beside a failed condition, that end a transaction without having changed anything, and pass."""
_NEVER_MADE = "If it was never made: signer watermark set or import, and signer serve, make it"


class TableObserver(Protocol):
    """Hears of each access to the table; called in the Trio thread."""

    def watermark_table_io(
        self, table: str, operation: str, seconds: float, error: str | None, *, refused: bool
    ) -> None:
        """*operation*: `write`, `create`; *error*: what failed, or None; *refused*: a condition wasn't met."""


class WatermarkUnavailableError(WatermarkStoreError, UnavailableError):
    """The table didn't answer in time, or is throttled: the mark may have been set.

    No signature was let out. A repeat of the same bytes finds its own mark, and is safe.
    """

    status = 502


class MarkTable:
    """The marks in the table *name*."""

    def __init__(self, client: Client, name: str, *, observer: TableObserver | None = None) -> None:
        self._opened = False
        self.name = name
        self._table = Table(client, name, items.PARTITION, items.SORT)
        self._observer = observer
        self.stage = ""

    async def open(self) -> bool:
        """Return once marks can be set; tells whether the table was made. Raises `WatermarkStoreError`."""
        began = trio.current_time()
        try:
            made = await self._table.open(self._probe)
        except SignerError as exc:
            raise self.error(exc) from exc
        self._opened = True
        if made:
            self._observe("create", began, None)
        return made

    @property
    def status(self) -> str:
        """Before the store is ready: what is being done, or what DynamoDB says of the table, or why it says nothing."""
        return self.stage or self._table.status

    async def _probe(self) -> None:
        """A put that is always refused: it shows that the role may put."""
        nobody = {items.PARTITION: {"S": "probe"}, items.SORT: {"S": "probe"}}
        never = f"attribute_exists({items.PARTITION})"
        try:
            await self._table.call("PutItem", TableName=self.name, Item=nobody, ConditionExpression=never)
        except AwsError as exc:
            if exc.code != "ConditionalCheckFailedException":
                raise

    async def put(self, puts: Sequence[dict[str, Any]], *, deadline: float) -> list[Item | None]:
        """Carry out all of *puts*, or none.

        Returns the items as they stand where a condition failed, None for one that isn't there; empty for success.
        A busy table is tried again until *deadline*. Raises `WatermarkStoreError`.
        """
        began, refused = trio.current_time(), False
        outcome: Exception | None = TimeoutError()
        try:
            failed = await self._try(partial(self._put, puts, deadline), deadline)
            outcome, refused = None, bool(failed)
            return failed
        except AwsError as exc:
            outcome = exc
            raise self.error(exc) from exc
        finally:
            self._observe("write", began, outcome, refused=refused)

    async def _try(self, send: Callable[[], Awaitable[None]], deadline: float) -> list[Item | None]:
        pause = _CONFLICT_PAUSE
        while True:
            wait = pause * random.uniform(0.5, 1)  # noqa: S311  # spreads retries, keeps no secret
            try:
                await send()
            except AwsError as exc:
                failed = _failed(exc)
                if failed:
                    return failed
                if not _is_busy(exc):
                    raise
                if trio.current_time() + wait >= deadline:  # else the caller would hear of no answer
                    raise AwsUnavailableError(f"busy for too long: {exc}", code=exc.code) from exc
            else:
                return []
            await trio.sleep(wait)
            pause = min(2 * pause, _MAX_CONFLICT_PAUSE)

    async def _put(self, puts: Sequence[dict[str, Any]], deadline: float) -> None:
        if len(puts) == 1:  # half the price of a transaction, and faster
            await self._table.call("PutItem", deadline=deadline, **puts[0])
        else:
            await self._transact([{"Put": put} for put in puts], deadline)

    async def look(self, key: MarkKey, *, deadline: float) -> list[Item]:
        """What stands in the slot, under all its names; raises `WatermarkStoreError`."""
        return [item for item in await self.put(items.look(self.name, key), deadline=deadline) if item]

    def marks(self, found: Sequence[Item | None]) -> list[Mark]:
        try:
            return [items.mark_of(item) for item in found if item]
        except items.ItemError as exc:
            raise self.error(exc) from exc

    def in_the_way(self, failed: Sequence[Item | None]) -> list[Mark]:
        """The marks that made a condition fail; raises `WatermarkStoreError`, also where one isn't told."""
        marks = self.marks(failed)
        if len(marks) < len(failed):
            raise WatermarkStoreError(
                f"watermark table {self.name}: DynamoDB doesn't say what stands; nothing is signed"
            )
        return marks

    async def scan(self) -> list[tuple[MarkKey, Mark]]:
        """Every item that is a mark, one by one; raises `WatermarkStoreError`."""
        found: list[tuple[MarkKey, Mark]] = []
        page: dict[str, Any] = {}
        try:
            while True:
                answer = await self._table.call("Scan", TableName=self.name, ConsistentRead=True, **page)
                for item in answer.get("Items", ()):
                    key = items.key_of(item)
                    if key is not None:
                        found.append((key, items.mark_of(item)))
                if not answer.get("LastEvaluatedKey"):
                    return found
                page = {"ExclusiveStartKey": answer["LastEvaluatedKey"]}
        except SignerError as exc:
            raise self.error(exc) from exc

    async def forget(self, seen: Sequence[Item], *, deadline: float) -> bool:
        """Delete the items *seen* as they were; False, and nothing is deleted, where one has changed since.

        Raises `WatermarkStoreError`.
        """
        deletes = [{"Delete": items.forget(self.name, item)} for item in seen]
        try:
            return not await self._try(partial(self._transact, deletes, deadline), deadline)
        except AwsError as exc:
            raise self.error(exc) from exc

    async def _transact(self, actions: Sequence[dict[str, Any]], deadline: float) -> None:
        await self._table.call("TransactWriteItems", deadline=deadline, TransactItems=actions)

    def error(self, exc: SignerError) -> WatermarkStoreError:
        """What went wrong, with what it means."""
        if isinstance(exc, WatermarkStoreError):
            return exc
        text = f"watermark table {self.name}: {exc}"
        if isinstance(exc, AwsUnavailableError):
            meaning = "it was only read" if exc.action == "dynamodb:Scan" else self.unknown
            return WatermarkUnavailableError(f"{text}; {meaning}")
        if isinstance(exc, AwsError) and exc.code == "ResourceNotFoundException":
            if not self._opened:
                return WatermarkStoreError(f"{text}. {_NEVER_MADE}")
            text = (
                f"{text}: the table is gone. Restore it from a backup that holds the last signed levels: a restart "
                "makes an empty one, which forgets every mark"
            )
        return WatermarkStoreError(f"{text}; nothing is signed")

    unknown = "the mark may have been set, and a repeat of the same bytes is safe"

    def _observe(self, operation: str, began: float, error: Exception | None, *, refused: bool = False) -> None:
        if self._observer is None:
            return
        name = None if error is None else getattr(error, "code", "") or type(error).__name__
        seconds = trio.current_time() - began
        self._observer.watermark_table_io(self.name, operation, seconds, name, refused=refused)


def _reasons(exc: AwsError) -> Sequence[Mapping[str, Any]]:
    reasons: Sequence[Mapping[str, Any]] = exc.response.get("CancellationReasons") or ()
    return reasons


def _failed(exc: AwsError) -> list[Item | None]:
    """The items that made a condition fail."""
    if exc.code == "ConditionalCheckFailedException":
        return [exc.response.get("Item")]
    return [one.get("Item") for one in _reasons(exc) if one.get("Code") == _FAILED]


def _is_busy(exc: AwsError) -> bool:
    """Whether another write is in the way of this one, which has changed nothing."""
    if exc.code in ("TransactionConflictException", "TransactionInProgressException"):
        return True
    codes = {str(one.get("Code")) for one in _reasons(exc)} - {"None"}
    return bool(codes) and codes <= set(_BUSY)
