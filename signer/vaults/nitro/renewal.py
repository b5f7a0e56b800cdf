"""Credentials for the enclave, kept fresh: fetched, and again before they expire, or when KMS takes them no more.

Section 4 of the signer specification; weakness 9 of the reference.
"""

from collections.abc import Callable

import trio

from signer.errors import SignerError
from signer.observe.tasks import Task
from signer.vaults.nitro.credentials import Credentials, CredentialsProvider
from signer.vaults.nitro.outage import Outage
from signer.vaults.nitro.pace import Pace

RESOLVING = Pace(shortest=1.0, longest=60.0)
RESOLVE_TIMEOUT = 30.0  # seconds
REFRESH_INTERVAL = 300.0  # seconds; the SDK renews what expires within 15 minutes, when it is asked
LOOKUP_INTERVAL = 4.0  # seconds for which the latest lookup is not doubted; below the first try of a blob again


class Renewal:
    """The credentials that *provider* gives, from one lookup to the next."""

    def __init__(self, provider: CredentialsProvider) -> None:
        self.current: Credentials | None = None
        self._provider = provider
        self._looked_up_at = float("-inf")  # Trio's clock: the end of the latest lookup
        self._wake = trio.Event()

    async def run(
        self,
        task: Task,
        *,
        on_attempt: Callable[[], None],
        on_new: Callable[[], None],
        on_none: Callable[[str], None],
    ) -> None:
        """Look for credentials until cancelled.

        *on_attempt* is called before each lookup, *on_new* when `current` is another than before, *on_none* with the
        reason when there are none yet. What was found stays in use while a later lookup fails.
        """
        outage = Outage()
        while True:
            on_attempt()
            try:
                with trio.fail_after(RESOLVE_TIMEOUT):
                    found = await self._provider()
            except (SignerError, OSError, trio.TooSlowError) as exc:
                why = str(exc) or f"(Nitro): no credentials within {RESOLVE_TIMEOUT:g} s"
                task.failing(why if self.current is None else f"{why}; the old ones stay in use")
                if self.current is None:
                    on_none(why)
                pause = outage.pause(RESOLVING)
            else:
                task.running()
                outage.over()
                if found != self.current:
                    self.current = found
                    on_new()
                pause = REFRESH_INTERVAL
            self._looked_up_at = trio.current_time()
            with trio.move_on_after(pause):
                await self._wake.wait()
            self._wake = trio.Event()

    def look_now(self) -> None:
        """Look for other credentials without waiting for the next time."""
        self._wake.set()

    def expired(self, credentials: Credentials) -> None:
        """KMS takes *credentials* no more: look for others, but once for all the blobs that they did not open."""
        is_news = trio.current_time() >= self._looked_up_at + LOOKUP_INTERVAL
        if is_news and credentials == self.current:
            self.look_now()
