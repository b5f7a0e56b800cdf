"""The durable store, `watermark.driver: file`: one writer thread, and one commit for all who wait.

`advance` hands its request to the thread and waits. The thread takes everything that has arrived meanwhile into one
transaction, so that concurrent requests share one sync of the disk; two requests for one slot in a batch are decided
one after the other. Nobody hears of success before the commit has returned. Signatures that came back are stored in
the next transaction, or in one of their own, unsynced, when nothing else is to do.
"""

import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Protocol

import structlog
import trio

from signer.watermark.database import Database
from signer.watermark.interface import Advance, Mark, MarkKey, WatermarkRefusedError, WatermarkStoreError
from signer.watermark.rules import Accept, Replay, check_range, decide

_SIGNATURE_DELAY = 0.02
"""Seconds that a finished signature waits for a transaction to ride in, before it gets one of its own. One that is
lost with the process within this time is made again from the same bytes: signing is deterministic."""

_FAILURE_MEMORY = 60.0
"""Seconds that a failed commit counts as the state of the store. Then nobody knows: a load balancer that keeps requests
away from a signer which isn't ready would never see it recover."""

logger = structlog.get_logger(__name__)


class IoObserver(Protocol):
    """Hears of each access to the disk; called in the writer thread."""

    def watermark_io(self, operation: str, seconds: float, error: str | None) -> None:
        """*operation* is `write`; *error* names what failed, None for success."""


class _Signature:
    """One finished signature to be stored beside its mark."""

    __slots__ = ("digest", "key", "text")

    def __init__(self, key: MarkKey, digest: bytes, text: str) -> None:
        self.key = key
        self.digest = digest
        self.text = text


class SqliteWatermarks:
    """Implements `signer.watermark.interface.WatermarkStore` on the database at *path*.

    *prepare* is called with the opened database before the store is ready: marks of other signers are taken over there.
    """

    backend = "file"

    def __init__(
        self,
        path: Path,
        *,
        prepare: Callable[[Database], None] | None = None,
        observer: IoObserver | None = None,
    ) -> None:
        self._path = path
        self._prepare = prepare
        self._observer = observer
        self._queue: queue.SimpleQueue[Advance | _Signature | None] = queue.SimpleQueue()
        self._token: trio.lowlevel.TrioToken | None = None
        self._open = False
        self._failed = (float("-inf"), "")  # when (time.monotonic) the last commit failed, and how

    @property
    def failure(self) -> str:
        if not self._open:
            return "closed"
        at, text = self._failed
        return text if time.monotonic() - at < _FAILURE_MEMORY else ""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        database = await trio.to_thread.run_sync(self._open_database)
        self._token = trio.lowlevel.current_trio_token()
        writer = threading.Thread(target=self._write, args=(database,), name="watermarks", daemon=True)
        writer.start()
        self._open = True
        try:
            task_status.started()
            await trio.sleep_forever()
        finally:
            self._open = False
            self._queue.put(None)
            with trio.CancelScope(shield=True):  # what was handed in is still written
                await trio.to_thread.run_sync(writer.join)

    def advance(
        self, key: MarkKey, level: int, round: int, digest: bytes, *, on_settled: Callable[[Advance], None]
    ) -> Advance:
        advance = Advance(key, level, round, digest, on_settled)
        self._hand_in(advance)
        return advance

    async def recall(self, key: MarkKey, level: int, round: int, digest: bytes) -> str | None:
        question = Advance(key, level, round, digest, lambda _: None, moves=False)
        self._hand_in(question)
        return await question.wait()

    def _hand_in(self, advance: Advance) -> None:
        check_range(advance.level, advance.round)
        if not self._open:
            raise WatermarkStoreError("the watermark store is closed; nothing is signed")
        self._queue.put(advance)

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        self._queue.put(_Signature(key, digest, signature))

    def _open_database(self) -> Database:
        database = Database(self._path)
        try:
            if self._prepare is not None:
                self._prepare(database)
        except BaseException:
            database.close()
            raise
        return database

    # -- in the writer thread

    def _write(self, database: Database) -> None:
        signatures: list[_Signature] = []  # not stored yet
        open_ = True
        with closing(database):
            while open_:
                pending, arrived, open_ = self._take(_SIGNATURE_DELAY if signatures else None)
                signatures += arrived
                if pending:
                    self._commit(database, pending, signatures)
                    self._settle(pending)
                    signatures = []
                elif signatures and (not arrived or not open_):
                    self._store(database, signatures)
                    signatures = []

    def _take(self, timeout: float | None) -> tuple[list[Advance], list[_Signature], bool]:
        """Wait at most *timeout* seconds for something to do, then take all there is; False when the store closes."""
        pending: list[Advance] = []
        signatures: list[_Signature] = []
        try:
            item = self._queue.get(timeout=timeout)
            while item is not None:
                if isinstance(item, Advance):
                    pending.append(item)
                else:
                    signatures.append(item)
                item = self._queue.get_nowait()
        except queue.Empty:
            return pending, signatures, True
        return pending, signatures, False

    def _commit(self, database: Database, pending: list[Advance], signatures: list[_Signature]) -> None:
        began, failure = time.perf_counter(), None
        try:
            with database.transaction():
                for signature in signatures:
                    database.remember(signature.key, signature.digest, signature.text)
                for one in pending:
                    _check_and_set(database, one)
        except WatermarkStoreError as exc:
            failure = exc
        except Exception as exc:  # a bug must not end the thread and leave callers waiting, nor let a signature out
            logger.exception("internal error in the watermark store")
            failure = WatermarkStoreError(f"internal error in the watermark store: {exc!r}; nothing is signed")
        if failure is not None:
            for one in pending:
                one.error = failure
        self._failed = (float("-inf"), "") if failure is None else (time.monotonic(), str(failure))
        self._observe(time.perf_counter() - began, failure)

    def _observe(self, seconds: float, failure: WatermarkStoreError | None) -> None:
        if self._observer is None:
            return
        error = None if failure is None else type(failure.__cause__ or failure).__name__
        try:
            self._observer.watermark_io("write", seconds, error)
        except Exception:  # the marks stand, and whoever waits for them must hear of it
            logger.exception("internal error in the metrics of the watermark store")

    def _store(self, database: Database, signatures: list[_Signature]) -> None:
        try:
            with database.transaction(synced=False):
                for signature in signatures:
                    database.remember(signature.key, signature.digest, signature.text)
        except WatermarkStoreError as exc:  # no harm: the same bytes are signed again
            logger.warning("signatures were not stored beside their marks", error=str(exc))
        except Exception:  # as in _commit
            logger.exception("internal error in the watermark store")

    def _settle(self, pending: list[Advance]) -> None:
        def wake() -> None:
            for one in pending:
                one.settle()

        assert self._token is not None
        try:
            self._token.run_sync_soon(wake)
        except trio.RunFinishedError:
            return


def _check_and_set(database: Database, pending: Advance) -> None:
    """Decide one request inside the transaction; a refusal is the request's, not the batch's."""
    try:
        standing = database.get(pending.key)
        decision = decide(pending.key, standing, pending.level, pending.round, pending.digest)
    except WatermarkRefusedError as exc:
        pending.error = exc
        return
    match decision:
        case Replay(signature):
            pending.stored = signature
        case Accept():  # also where the mark stands there already: written, it is this commit that makes it durable
            if pending.moves:
                database.put(pending.key, Mark(pending.level, pending.round, pending.digest))
