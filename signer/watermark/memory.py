"""Marks in memory, `watermark.driver: mem`: lost at exit, so two runs can sign one slot twice. For tests."""

import trio

from signer.watermark.interface import Mark, MarkKey
from signer.watermark.rules import Replay, check_range, decide


class MemoryWatermarks:
    """Implements `signer.watermark.interface.WatermarkStore` without durability."""

    backend = "mem"

    def __init__(self) -> None:
        self._marks: dict[MarkKey, Mark] = {}

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    async def advance(self, key: MarkKey, level: int, round: int, digest: bytes) -> str | None:
        await trio.lowlevel.checkpoint()
        check_range(level, round)
        decision = decide(key, self._marks.get(key), level, round, digest)
        if isinstance(decision, Replay):
            return decision.signature
        if decision.moves:
            self._marks[key] = Mark(level, round, digest)
        return None

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        standing = self._marks.get(key)
        if standing is not None and standing.digest == digest:
            self._marks[key] = Mark(standing.level, standing.round, digest, signature)
