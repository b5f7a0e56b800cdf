"""What a vault is: it holds keys and makes signatures with them.

Section 4 and 5 of the signer specification describe the two that exist. A vault supervises itself in `run`, and
a request never holds a reference to a connection: it asks the vault.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import trio

from signer.crypto.interface import SecretKey
from signer.errors import SignerError, UnavailableError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature


class VaultError(SignerError):
    """The vault answered with an error: nothing was signed. The text shows the whole chain of causes."""

    status = 500


class VaultUnavailableError(UnavailableError):
    """The vault's link is down or was lost during the request; the same bytes may be asked again."""


class SignatureMismatchError(SignerError):
    """The vault returned a signature that does not verify: it was thrown away and never left."""


class UnsupportedByVaultError(SignerError):
    """This kind of vault has no such operation."""

    status = 400


@dataclass(frozen=True, slots=True)
class VaultKey:
    """A key that a vault can use now. *reference* is the vault's own id of it, empty for nitro."""

    public_key: PublicKey
    reference: str = ""


@dataclass(frozen=True, slots=True)
class VaultHealth:
    """What `/healthz` tells about one vault; *detail* says what is missing, for a person."""

    ready: bool
    detail: str
    keys: int  # usable now
    skipped: Mapping[str, str]  # public key hash (or position) of each unusable key, and why


Accept = Callable[[Signature], Awaitable[bool]]
"""The caller's verification of a signature: one that it declines never leaves, and may only show a link out of step."""


class Vault(Protocol):
    """One entry of `vaults:`."""

    name: str  # the configuration's name, as `--vault` takes it
    kind: str  # "NitroEnclave", "AWSKMS": as logs, listings and metrics show it
    patience: float  # seconds that one caller waits at most, in all

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, load the keys, keep the link up until cancelled.

        Reports started after the first attempt to connect has either loaded the keys or failed; from then on it
        retries with back-off by itself. Raises `ConfigurationError` only for what no retry can mend.
        """

    @property
    def ready(self) -> bool:
        """Whether the link is up and every key was tried: one that cannot be used has nothing to wait for."""

    def serves(self, key: PublicKeyHash) -> bool:
        """Whether a signature by *key* can be asked for now; cheap, read for every request."""

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        """Return when *key* can be asked for, or will not be, no later than *deadline* (Trio's clock)."""

    async def wait_change(self) -> None:
        """Return at the next change of the link's state or of the keys."""

    @property
    def last_sign_of_life(self) -> float:
        """Trio's clock: the last reply, or the last finished attempt to reach a vault that is known to be away."""

    async def refresh(self) -> None:
        """Look for keys that another process has stored since; cheap when nothing has changed, never raises."""

    async def reload(self) -> None:
        """Take the stored keys as they are now, as an operator asks for it: what is gone there is dropped.

        Returns when what is new was tried, as far as *patience* goes.

        Raises a `SignerError` where they cannot be read; then the keys known stay in use.
        """

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        """The keys that are known now; no I/O. Empty while the link has never been up."""

    def health(self) -> VaultHealth:
        """The state of the link and of the keys; no I/O."""

    async def sign(
        self, key: PublicKeyHash, message: bytes, *, version: int, accept: Accept, deadline: float
    ) -> Signature:
        """Sign a request's bytes before *deadline* (Trio's clock); *accept* verifies the signature.

        Cancelling the caller never disturbs other callers. Raises `VaultError`, `VaultUnavailableError`,
        `SignatureMismatchError`, `KeyNotFoundError`.
        """

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None, accept: Accept) -> Signature:
        """A BLS proof of possession over *over*, by default over the key itself; *accept* verifies it."""

    async def import_key(self, secret: SecretKey) -> PublicKey:
        """Store a key; returns after it is durable. A key that is there already is an error that says so."""

    async def generate(self, curve: Curve) -> PublicKey:
        """Make and store a key; returns after it is durable."""
