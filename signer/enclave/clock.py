"""The time, from the module instead of the parent; section 3.5 of the enclave specification.

The timestamp of a document of one's own comes from the hypervisor. Beyond a second the system's clock is stepped, for
TLS knows no other; what is left, or all of it where stepping is refused, is added to the times of signed requests.
Deadlines are Trio's and don't notice.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import NoReturn

import trio

from signer.attestation.cbor import CborError, decode, split_tag
from signer.enclave.log import say
from signer.enclave.nsm.interface import INVALID_RESPONSE, Nsm, NsmError

INTERVAL = 600.0  # seconds between two looks
TOLERANCE = 1.0  # seconds that the system's clock may be off
_LATEST = 253_402_300_799_999  # milliseconds: the end of the year 9999, beyond which Python knows no date


class Clock:
    """The system's clock and how far it is off."""

    def __init__(
        self,
        *,
        read: Callable[[], float] = time.time,
        step: Callable[[int, float], None] = time.clock_settime,
    ) -> None:
        self._read = read
        self._step = step
        self._refused = False  # whether stepping was refused before: said once
        self.offset = 0.0  # seconds to add to the system's clock
        self.steps = 0

    def now(self) -> datetime:
        """The time, in UTC."""
        return datetime.fromtimestamp(self._read() + self.offset, UTC)

    async def look(self, nsm: Nsm) -> None:
        """Compare with the module and correct; raises `NsmError`, and changes nothing then."""
        before, began = self._read(), time.monotonic()
        document = await nsm.attest()
        elapsed = time.monotonic() - began  # the document was made at some moment of it
        self.correct(timestamp_of(document) / 1000 - (before + elapsed / 2), uncertainty=elapsed / 2)

    def correct(self, offset: float, *, uncertainty: float = 0.0) -> None:
        """The system's clock is *offset* seconds behind the true time (ahead, if negative), give or take."""
        self.offset = offset
        if abs(offset) <= TOLERANCE + uncertainty:
            return
        try:
            self._step(time.CLOCK_REALTIME, self._read() + offset)
        except OSError as exc:
            self._say_refused(offset, exc)
            return
        self.offset = 0.0
        self.steps += 1
        say(f"clock: stepped by {offset:+.3f} s")

    def _say_refused(self, offset: float, exc: OSError) -> None:
        if not self._refused:
            why = f"{exc.strerror}; requests are signed with the right time"
            say(f"clock: off by {offset:+.3f} s and cannot be set ({why})")
        self._refused = True


async def keep(clock: Clock, nsm: Nsm) -> NoReturn:
    """Look at the module's time every ten minutes; one that fails is said, and asked again."""
    while True:
        await trio.sleep(INTERVAL)
        try:
            await clock.look(nsm)
        except NsmError as exc:
            say(f"clock: the security module gave no time: {exc}")


def timestamp_of(document: bytes) -> int:
    """Milliseconds since 1970 in a document of one's own device, which is not verified; raises `NsmError`."""
    try:
        _, rest = split_tag(document)
        match decode(rest):
            case [_, _, bytes(payload), _]:
                fields = decode(payload)
                timestamp = fields.get("timestamp") if isinstance(fields, dict) else None
                if type(timestamp) is int and 0 < timestamp <= _LATEST:
                    return timestamp
    except CborError as exc:
        raise NsmError(INVALID_RESPONSE, f"the document cannot be read: {exc}") from exc
    raise NsmError(INVALID_RESPONSE, "the document holds no time")
