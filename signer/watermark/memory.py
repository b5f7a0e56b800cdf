"""Marks in memory, `watermark.driver: mem`: lost at exit, so two runs can sign one slot twice. For tests."""

from collections.abc import Callable

import trio

from signer.watermark.interface import Advance, Mark, MarkKey, WatermarkRefusedError
from signer.watermark.rules import Replay, check_range, decide


class MemoryWatermarks:
    """Implements `signer.watermark.interface.WatermarkStore` without durability."""

    backend = "mem"
    failure = ""

    def __init__(self) -> None:
        self._marks: dict[MarkKey, Mark] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def advance(
        self, key: MarkKey, level: int, round: int, digest: bytes, *, on_settled: Callable[[Advance], None]
    ) -> Advance:
        check_range(level, round)
        advance = Advance(key, level, round, digest, on_settled)
        try:
            decision = decide(key, self._marks.get(key), level, round, digest)
        except WatermarkRefusedError as exc:
            advance.error = exc
        else:
            if isinstance(decision, Replay):
                advance.stored = decision.signature
            else:
                self._marks[key] = Mark(level, round, digest)
        advance.settle()
        return advance

    async def recall(self, key: MarkKey, level: int, round: int, digest: bytes) -> str | None:
        await trio.lowlevel.checkpoint()
        check_range(level, round)
        decision = decide(key, self._marks.get(key), level, round, digest)
        return decision.signature if isinstance(decision, Replay) else None

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        standing = self._marks.get(key)
        if standing is not None and standing.digest == digest:
            self._marks[key] = Mark(standing.level, standing.round, digest, signature)
