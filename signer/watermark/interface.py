"""What a watermark store is: the marks that keep one slot from being signed twice.

Section 3.7 of the signer specification, with its weaknesses 19 to 26 mended. The rule itself is in
`signer.watermark.rules`.
"""

from collections.abc import Callable
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


class Advance:
    """One mark on its way to the disk. A caller that stops waiting leaves it advanced, never half written."""

    __slots__ = ("_on_settled", "_settled", "digest", "error", "key", "level", "moves", "round", "stored")

    def __init__(
        self,
        key: MarkKey,
        level: int,
        round: int,
        digest: bytes,
        on_settled: Callable[["Advance"], None],
        *,
        moves: bool = True,
    ) -> None:
        self.moves = moves  # False: the outcome is wanted, the mark stays where it is
        self.key = key
        self.level = level
        self.round = round
        self.digest = digest
        self.stored: str | None = None  # the signature (Base58) that exactly these bytes were given before
        self.error: SignerError | None = None
        self._on_settled = on_settled
        self._settled = trio.Event()

    def settle(self) -> None:
        """The outcome is known; called by the store, in the Trio thread."""
        self._on_settled(self)
        self._settled.set()

    async def wait(self) -> str | None:
        """Return when the mark is durable.

        Returns the stored signature if exactly these bytes stand in the slot and were signed before, else None: the
        caller signs, then calls `remember`. Raises `WatermarkRefusedError` or `WatermarkStoreError`.
        """
        await self._settled.wait()
        if self.error is not None:
            raise self.error
        return self.stored


class WatermarkStore(Protocol):
    """A durable set of marks."""

    backend: str  # "file", "mem": label of metrics and logs

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Open the store, report started once marks can be set, serve until cancelled; closes what it opened.

        Raises `WatermarkStoreError` where it cannot be opened.
        """

    def advance(
        self, key: MarkKey, level: int, round: int, digest: bytes, *, on_settled: Callable[["Advance"], None]
    ) -> "Advance":
        """Begin to check and set one mark, in one transaction; the work goes on while the caller does other things.

        *on_settled* is called in the Trio thread as soon as the outcome is known, before the waiter wakes. Raises
        `MalformedRequestError` for a level or round out of range, `WatermarkStoreError` if the store is closed.
        """

    async def recall(self, key: MarkKey, level: int, round: int, digest: bytes) -> str | None:
        """What `advance` would say, while the mark stays where it is.

        Returns the signature that exactly these bytes were given before, None where they have yet to be signed. Raises
        as `advance` and `Advance.wait` do.
        """

    @property
    def failure(self) -> str:
        """What keeps the store from setting marks now, for a person; empty if nothing is known to. No I/O."""

    def remember(self, key: MarkKey, digest: bytes, signature: str) -> None:
        """Store *signature* beside the mark if its digest still stands; in the background, never blocks."""
