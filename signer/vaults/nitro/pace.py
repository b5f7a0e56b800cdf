"""How long to wait before the next try, pure: a share of how long it has failed already.

So an enclave that only restarted is found at once, one that stays away costs little, and nobody waits for longer than
a twentieth of the outage on top of it.
"""

import random
from dataclasses import dataclass

SHARE = 0.05  # of the outage so far
JITTER = 0.2  # of the pause, either way: several signers of one host don't try in step


@dataclass(frozen=True, slots=True)
class Pace:
    """Bounds of the pause, in seconds."""

    shortest: float
    longest: float

    def pause(self, down: float) -> float:
        """Seconds to wait when it has been failing for *down* seconds."""
        bounded = min(max(SHARE * down, self.shortest), self.longest)
        return bounded * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311  # jitter, not a secret
