"""The shared store, `watermark.driver: aws`: the marks of several machines in one DynamoDB table.

Section 3.7 of the signer specification, with weakness 24 mended. The server decides: each mark is set by one
conditional write, and of several signers on one table one wins. A write whose outcome is not known is repeated: it then
finds its own digest, and that is success. So the same bytes are always signed again, on every machine, and other bytes
of the slot never. What this process has signed itself it refuses to undercut also where the table forgot it.

Requests for one slot go to the server one after the other, in the order in which they came; those of different slots
side by side. A finished signature is stored beside its mark when its slot has nothing else to do.
"""

import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import structlog
import trio

from signer.aws.table import Client
from signer.errors import SignerError
from signer.watermark import items
from signer.watermark.interface import Advance, Mark, MarkKey, WatermarkRefusedError, WatermarkStoreError
from signer.watermark.rules import Replay, check_range, decide
from signer.watermark.table import MarkTable, TableObserver, WatermarkUnavailableError

_FAILURE_MEMORY = 60.0
"""Seconds that a failed write counts as the state of the store, as in `signer.watermark.sqlite`."""

_MAX_LANES = 4096
"""Slots whose last mark is kept in memory, about half a kilobyte each: three for each key and chain. A client chooses
the chain, so there is a limit; the slot that was used last is the last to go, and its mark stays in the table."""

_GRACE = 0.1  # seconds that the client gets, past the limit, to say itself what kept it
_SIGNATURE_LIMIT = 5.0  # seconds to store a signature, which nobody waits for

logger = structlog.get_logger(__name__)

Prepare = Callable[[MarkTable, bool], Awaitable[None]]


class _Lane:
    """One slot: what is waiting for its turn, and what is known of the last mark that was set."""

    __slots__ = ("accepted", "busy", "finished", "key", "signature", "storing", "waiting")

    def __init__(self, key: MarkKey) -> None:
        self.key = key
        self.waiting: deque[tuple[Advance, float]] = deque()  # with the time by which each must be settled
        self.busy = False
        self.accepted: Mark | None = None  # what this process signs, or has signed, last
        self.signature: str | None = None  # of that one
        self.finished = False  # whether the signature has yet to be stored
        self.storing: trio.CancelScope | None = None


class DynamoWatermarks:
    """Implements `signer.watermark.interface.WatermarkStore` on the table *name*.

    *write_timeout* is how long, in seconds, a mark may take. *prepare* is called with the opened table, and with
    whether it was made just now, before the store is ready.
    """

    backend = "aws"

    def __init__(
        self,
        client: Client,
        name: str,
        *,
        write_timeout: float = 3.0,
        prepare: Prepare | None = None,
        observer: TableObserver | None = None,
    ) -> None:
        self._table = MarkTable(client, name, observer=observer)
        self._write_timeout = write_timeout
        self._prepare = prepare
        self._lanes: dict[MarkKey, _Lane] = {}
        self._nursery: trio.Nursery | None = None
        self._opening = True
        self._failed = (float("-inf"), "")  # when (time.monotonic) the last write failed, and how

    @property
    def failure(self) -> str:
        if self._opening:
            return self._not_open_yet
        if self._nursery is None:
            return "closed"
        at, text = self._failed
        return text if time.monotonic() - at < _FAILURE_MEMORY else ""

    @property
    def _not_open_yet(self) -> str:
        return f"watermark table {self._table.name}: not open yet: {self._table.status}"

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        made = await self._table.open()
        if self._prepare is not None:
            await self._prepare(self._table, made)
        async with trio.open_nursery() as nursery:
            self._nursery, self._opening = nursery, False
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None  # what was handed in is still written: lanes are shielded, and have their limits

    def advance(
        self, key: MarkKey, level: int, round: int, digest: bytes, *, on_settled: Callable[[Advance], None]
    ) -> Advance:
        check_range(level, round)
        nursery = self._opened()
        advance = Advance(key, level, round, digest, on_settled)
        lane = self._lane(key)
        lane.waiting.append((advance, trio.current_time() + self._write_timeout))
        if lane.storing is not None:
            lane.storing.cancel(reason="a request has come, and nobody waits for the signature to be stored")
        self._set_off(lane, nursery)
        return advance

    def _opened(self) -> trio.Nursery:
        if self._opening:
            raise WatermarkUnavailableError(f"{self._not_open_yet}; nothing is signed")
        if self._nursery is None:
            raise WatermarkStoreError("the watermark store is closed; nothing is signed")
        return self._nursery

    async def recall(self, key: MarkKey, level: int, round: int, digest: bytes) -> str | None:
        check_range(level, round)
        self._opened()
        with trio.move_on_after(self._write_timeout + _GRACE), self._noting():
            found = await self._table.look(key, deadline=trio.current_time() + self._write_timeout)
            standing = self._table.marks(found)
            lane = self._lanes.get(key)
            if lane is not None and lane.accepted is not None:
                standing.append(lane.accepted)
            decision = items.judge(key, standing, level, round, digest)
            return decision.signature if isinstance(decision, Replay) else self._made(key, Mark(level, round, digest))
        raise self._too_slow("it was only read")

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        lane = self._lanes.get(key)
        if lane is None or lane.accepted is None or lane.accepted.digest != digest:
            return  # the slot has moved on
        lane.signature, lane.finished = signature, True
        if self._nursery is not None:
            self._set_off(lane, self._nursery)

    # -- a slot's lane

    def _lane(self, key: MarkKey) -> _Lane:
        """The lane of *key*, now the one used last."""
        lane = self._lanes.pop(key, None) or _Lane(key)
        if len(self._lanes) >= _MAX_LANES:
            idle = next((one for one, old in self._lanes.items() if not old.busy), None)
            if idle is not None:
                del self._lanes[idle]
        self._lanes[key] = lane
        return lane

    def _set_off(self, lane: _Lane, nursery: trio.Nursery) -> None:
        if not lane.busy:
            lane.busy = True
            nursery.start_soon(self._work, lane)

    async def _work(self, lane: _Lane) -> None:
        """Do what the slot has to do, then end."""
        with trio.CancelScope(shield=True):
            while lane.waiting or lane.finished:
                if lane.waiting:
                    await self._settle(lane, *lane.waiting.popleft())
                else:
                    await self._store(lane)
        lane.busy = False

    async def _settle(self, lane: _Lane, advance: Advance, deadline: float) -> None:
        try:
            if lane.accepted is not None:  # whatever has become of the table: emptied, restored from a backup
                decide(lane.key, lane.accepted, advance.level, advance.round, advance.digest)
            with trio.move_on_at(deadline + _GRACE) as scope, self._noting():
                advance.stored = await self._decide(lane, advance, deadline)
            if scope.cancelled_caught:
                advance.error = self._too_slow(self._table.unknown)
        except SignerError as exc:
            advance.error = exc
        except Exception as exc:  # a bug must not end the store and leave callers waiting, nor let a signature out
            logger.exception("internal error in the watermark store")
            advance.error = WatermarkStoreError(f"internal error in the watermark store: {exc!r}; nothing is signed")
        advance.settle()

    async def _decide(self, lane: _Lane, advance: Advance, deadline: float) -> str | None:
        """Set the mark, or find that it stands; returns the signature that these bytes were given before."""
        mark, names = Mark(advance.level, advance.round, advance.digest), items.NAMES[lane.key.slot]
        stored: str | None = None
        failed = await self._table.put(items.advance(self._table.name, lane.key, mark), deadline=deadline)
        while failed:
            standing = self._table.in_the_way(failed)
            decision = items.judge(lane.key, standing, mark.level, mark.round, advance.digest)
            if isinstance(decision, Replay):
                stored = decision.signature
            if stored is not None or len(failed) == len(names):
                break  # the mark of these bytes stands under every name, or was signed
            # the reference signed these bytes under one name: they become the mark under the others, too
            failed = await self._table.put(items.claim(self._table.name, lane.key, mark), deadline=deadline)
        if lane.accepted != mark:
            lane.accepted, lane.signature, lane.finished = mark, None, False
        return stored or lane.signature

    def _made(self, key: MarkKey, mark: Mark) -> str | None:
        """The signature that this process made for *mark* and may not have stored yet."""
        lane = self._lanes.get(key)
        return lane.signature if lane is not None and lane.accepted == mark else None

    async def _store(self, lane: _Lane) -> None:
        """Store the signature beside its mark, unless a request comes: then the slot moves on."""
        lane.finished = False
        accepted = lane.accepted
        assert accepted is not None
        mark = Mark(accepted.level, accepted.round, accepted.digest, lane.signature)
        with trio.move_on_after(_SIGNATURE_LIMIT) as scope:
            lane.storing = scope
            try:
                puts = items.remember(self._table.name, lane.key, mark)
                await self._table.put(puts, deadline=scope.deadline)
            except WatermarkStoreError as exc:  # no harm: the same bytes are signed again
                logger.warning("a signature was not stored beside its mark", error=str(exc))
            except Exception:  # as in _settle
                logger.exception("internal error in the watermark store")
        lane.storing = None
        lane.finished = scope.cancelled_caught and bool(lane.waiting)  # unless what has come becomes the mark

    # -- the state

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep what comes out of it as the state of the store; a refusal is an answer."""
        try:
            yield
        except WatermarkRefusedError:
            self._failed = (float("-inf"), "")
            raise
        except SignerError as exc:
            self._failed = (time.monotonic(), str(exc))
            raise
        self._failed = (float("-inf"), "")

    def _too_slow(self, meaning: str) -> WatermarkUnavailableError:
        text = f"watermark table {self._table.name}: no answer within {self._write_timeout:g} s; {meaning}"
        self._failed = (time.monotonic(), text)
        return WatermarkUnavailableError(text)
