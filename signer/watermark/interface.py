"""What a watermark store is: the marks that keep one slot from being signed twice.

Section 3.7 of the signer specification, with its weaknesses 19 to 26 mended. The rule itself is in
`signer.watermark.rules`.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

import trio

from signer.errors import SignerError
from signer.tezos.keys import PublicKeyHash
from signer.tezos.kinds import RequestKind

MAX_LEVEL = 2**31 - 1  # levels and rounds are non-negative int32 on the wire


class Slot(StrEnum):
    """What is signed once per level and round. All forms of attestation (tags 21, 23, 41) share one slot."""

    BLOCK = "block"
    PREATTESTATION = "preattestation"
    ATTESTATION = "attestation"


SLOT_OF_KIND: dict[RequestKind, Slot] = {
    RequestKind.BLOCK: Slot.BLOCK,
    RequestKind.PREATTESTATION: Slot.PREATTESTATION,
    RequestKind.ATTESTATION: Slot.ATTESTATION,
    RequestKind.ATTESTATION_WITH_DAL: Slot.ATTESTATION,
}


@dataclass(frozen=True, slots=True)
class MarkKey:
    """One row: a chain, a key, a slot."""

    chain_id: str  # "Net…"
    public_key_hash: PublicKeyHash
    slot: Slot


@dataclass(frozen=True, slots=True)
class Mark:
    """The highest that was signed; *digest* and *signature* are None where another signer didn't store them."""

    level: int
    round: int
    digest: bytes | None = None  # BLAKE2b-256 of the whole request
    signature: str | None = None  # Base58


class WatermarkRefusedError(SignerError):
    """Signing would repeat or undercut what stands; nothing was signed. The text names the level that stands."""

    status = 409

    def __init__(self, message: str, *, standing: Mark, reason: str) -> None:
        super().__init__(message)
        self.standing = standing
        self.reason = reason  # "level_below", "round_below", "conflict": a bounded metric label


class WatermarkStoreError(SignerError):
    """The store cannot be read or written: nothing may be signed. The text says what to do."""

    status = 500


class WatermarkStore(Protocol):
    """A durable set of marks."""

    backend: str  # "file", "mem": label of metrics and logs

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the store, report started once marks can be set, serve until cancelled; closes what it opened.

        Raises `WatermarkStoreError` where it cannot be opened.
        """

    async def advance(self, key: MarkKey, level: int, round: int, digest: bytes) -> str | None:
        """Check-and-set one mark in one transaction; returns when it is durable.

        Returns the stored signature (Base58) if exactly these bytes stand in the slot and were signed before,
        else None: the caller signs, then calls `remember`. The same bytes without a stored signature are
        accepted. Cancelling the caller may leave the mark advanced, never half written.

        Raises `WatermarkRefusedError` or `WatermarkStoreError`.
        """

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        """Store *signature* beside the mark if its digest still stands; in the background, never blocks."""
