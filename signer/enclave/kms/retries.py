"""When a call of KMS is tried again, section 3.8 of the enclave specification. Pure: times and chances come as values.

Every call here may be repeated: a second Encrypt or GenerateDataKey merely makes another blob.
"""

MAX_ATTEMPTS = 4
_FIRST_LIMIT = 0.05  # seconds
_LAST_LIMIT = 2.0  # seconds

_FAILURES = 20  # consecutive ones of the transport, until retries stop
_QUIET = 5.0  # seconds without retries
_PROBE_INTERVAL = 1.0  # seconds


def pause(attempt: int, chance: float, *, at_least: float | None = None) -> float:
    """Seconds to wait behind failed attempt number *attempt* (from 1); *chance* is random in 0 … 1.

    *at_least* is what the other side asked for by Retry-After.
    """
    limit: float = min(_LAST_LIMIT, _FIRST_LIMIT * 2.0 ** (attempt - 1))
    return max(chance * limit, at_least or 0.0)


class Breaker:
    """Keeps a dead way to KMS from being beaten on: behind 20 failures one probe a second, and no retries, for 5 s.

    Shared by all sessions, for they share the way. Times are of a monotonic clock.
    """

    def __init__(self) -> None:
        self._failures = 0
        self._quiet_until = 0.0
        self._next_probe = 0.0
        self.last = ""  # why the latest attempt failed

    @property
    def failures(self) -> int:
        """Consecutive failures of the transport."""
        return self._failures

    def admit(self, now: float) -> bool:
        """Whether an attempt may begin at *now*; in the quiet time this takes the second's probe."""
        if now >= self._quiet_until:
            return True
        if now < self._next_probe:
            return False
        self._next_probe = now + _PROBE_INTERVAL
        return True

    def may_retry(self, now: float) -> bool:
        """Whether a failed attempt may be followed by another one of the same call."""
        return now >= self._quiet_until

    def worked(self) -> None:
        """KMS answered, whatever it said."""
        self._failures = 0
        self._quiet_until = 0.0

    def failed(self, now: float, why: str) -> None:
        """No answer: connection, TLS or time."""
        self.last = why
        self._failures += 1
        if self._failures >= _FAILURES and now >= self._quiet_until:
            self._quiet_until = now + _QUIET
            self._next_probe = now + _PROBE_INTERVAL
