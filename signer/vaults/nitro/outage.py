"""How long something has been failing, and so how long to wait before the next try."""

import trio

from signer.vaults.nitro.pace import Pace


class Outage:
    """Since when something has been failing, on Trio's clock."""

    def __init__(self) -> None:
        self._since: float | None = None

    def pause(self, pace: Pace) -> float:
        """It fails: seconds until the next try."""
        now = trio.current_time()
        if self._since is None:
            self._since = now
        return pace.pause(now - self._since)

    @property
    def lasts(self) -> bool:
        """Whether it has failed, and not worked since."""
        return self._since is not None

    def over(self) -> None:
        """It works."""
        self._since = None
