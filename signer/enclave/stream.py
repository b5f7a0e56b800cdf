"""The log stream: lines of JSON for whoever connects; section 10.7 of the enclave specification.

First what was kept, then each line as it comes, and all counters at once and every minute. Reading changes nothing: a
reader that does not read is left, and never holds up a session.
"""

import trio

from signer.enclave.log import Journal, journal

MAX_READERS = 4
INTERVAL = 60.0  # seconds between two lines of counters
_SEND_TIMEOUT = 10.0  # seconds for one line


class LogStream:
    """Serves the lines of *source*."""

    def __init__(self, source: Journal = journal) -> None:
        self._source = source
        self._readers = 0

    async def serve(self, stream: trio.abc.Stream) -> None:
        """Tell one reader until it goes, or is too slow; closes *stream*."""
        async with stream:
            if self._readers >= MAX_READERS:
                return
            self._readers += 1
            try:
                with self._source.reading() as (kept, coming):
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(_until_gone, stream, nursery.cancel_scope)
                        await self._tell(stream, kept, coming)
                        nursery.cancel_scope.cancel(reason="the reader is too slow")
            except* (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError, OSError):
                pass
            finally:
                self._readers -= 1

    async def _tell(self, stream: trio.abc.Stream, kept: list[bytes], coming: trio.MemoryReceiveChannel[bytes]) -> None:
        for line in kept:
            await _send(stream, line)
        due = trio.current_time()
        while True:
            with trio.move_on_at(due) as minute:
                try:
                    line = await coming.receive()
                except trio.EndOfChannel:
                    return
            if minute.cancelled_caught:  # read now: before the wait they were those of a minute ago
                line = self._source.counters()
                due = trio.current_time() + INTERVAL
            await _send(stream, line)


async def _until_gone(stream: trio.abc.Stream, scope: trio.CancelScope) -> None:
    """What a reader sends is nothing to us; its end is."""
    while await stream.receive_some(1024):
        pass
    scope.cancel(reason="the reader has gone")


async def _send(stream: trio.abc.Stream, line: bytes) -> None:
    with trio.fail_after(_SEND_TIMEOUT):
        await stream.send_all(line + b"\n")
