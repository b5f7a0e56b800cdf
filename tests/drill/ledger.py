"""What the signer let out, and whether that was right. Pure: the judge of every drill.

Nothing here is taken from the signer's own account: a signature counts as good if it verifies over the bytes that were
sent under the key that was asked, and a slot as kept if all signatures received for it are over one message.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass, field

from signer import crypto
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKey, Signature
from tests.drill.messages import Slot

ALLOWED = frozenset({200, 409, 500, 502})
"""Statuses that a request of the load may get. Every key is served and allowed, and every request well formed: others
would tell the baker something untrue (404: no such key), or end its retries (503)."""

INTERNAL_ERROR = 500
_ADDRESS = re.compile(r"tz[1-4][1-9A-HJ-NP-Za-km-z]{33}")


@dataclass
class Ledger:
    """Counts of one drill, and every violation of what must hold, as a line for a person."""

    statuses: Counter[int] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # signatures
    doubles: list[str] = field(default_factory=list)  # slots with two signatures
    others: list[str] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)  # texts of 500s, without what differs from key to key
    signed: int = 0  # signatures received
    _messages: dict[Slot, bytes] = field(default_factory=dict)  # signed ones
    _signatures: dict[Slot, str] = field(default_factory=dict)

    @property
    def violations(self) -> list[str]:
        return [*self.wrong, *self.doubles, *self.others]

    def signature(self, slot: Slot, key: PublicKey, message: bytes, text: str) -> None:
        """*text* was received for *message*."""
        self.signed += 1
        if not _verifies(key, message, text):
            self.wrong.append(f"wrong signature for {slot}: {text} over {message.hex()}")
            return
        known = self._messages.setdefault(slot, message)
        if known != message:
            self.doubles.append(f"two signatures for {slot}: over {known.hex()} and {message.hex()}")
        elif self._signatures.setdefault(slot, text) != text:
            self.others.append(f"the same bytes got another signature for {slot}: {text}")

    def status(self, status: int, slot: Slot, body: str) -> None:
        """A request for *slot* was answered with *status*."""
        self.statuses[status] += 1
        if status == INTERNAL_ERROR:
            self.reasons[_ADDRESS.sub("tz…", _text(body))] += 1
        if status not in ALLOWED:
            self.others.append(f"status {status} for {slot}: {body}")

    def failed(self, what: str) -> None:
        """Something else that must not happen did."""
        self.others.append(what)

    def is_signed(self, slot: Slot) -> bool:
        return slot in self._messages


def _text(body: str) -> str:
    """What an error answer says to a person; the whole of it where it is none."""
    try:
        return str(json.loads(body)[0]["msg"])
    except (ValueError, LookupError, TypeError):
        return body


def _verifies(key: PublicKey, message: bytes, text: str) -> bool:
    try:
        signature = Signature.from_base58(text)
    except TezosError:
        return False
    return signature.curve is key.curve and crypto.verify(key, message, signature)
