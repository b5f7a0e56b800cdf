"""What a vault is: it holds keys and makes signatures with them.

Section 4 and 5 of the signer specification describe the two that exist. A vault supervises itself in `run`, and
a request never holds a reference to a connection: it asks the vault.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import trio

from signer.crypto.interface import SecretKey
from signer.errors import SignerError, UnavailableError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature


class VaultError(SignerError):
    """The vault answered with an error: nothing was signed. The text shows the whole chain of causes."""

    status = 500


class VaultUnavailableError(UnavailableError):
    """The vault's link is down or was lost during the request; the same bytes may be asked again."""


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


class Vault(Protocol):
    """One entry of `vaults:`."""

    name: str  # the configuration's name, as `--vault` takes it
    kind: str  # "NitroEnclave", "AWSKMS": as logs, listings and metrics show it

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Connect, load the keys, keep the link up until cancelled.

        Reports started after the first attempt to connect has either loaded the keys or failed; from then on it
        retries with back-off by itself. Raises `ConfigurationError` only for what no retry can mend.
        """

    @property
    def ready(self) -> bool:
        """Whether a signature can be asked for now; cheap, read for every request."""

    async def wait_ready(self) -> bool:
        """Wait until a signature can be asked for, no longer than the vault allows; returns whether it can."""

    async def refresh(self) -> None:
        """Look for keys that another process has stored since; cheap when nothing has changed, never raises."""

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        """The keys that are known now; no I/O. Empty while the link has never been up."""

    def health(self) -> VaultHealth:
        """The state of the link and of the keys; no I/O."""

    async def sign(self, key: PublicKeyHash, message: bytes, *, version: int) -> Signature:
        """Sign a request's bytes. The caller verifies the signature.

        Cancelling the caller never disturbs other callers. Raises `VaultError`, `VaultUnavailableError`,
        `KeyNotFoundError`.
        """

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None) -> Signature:
        """A BLS proof of possession over *over*, by default over the key itself."""

    async def import_key(self, secret: SecretKey) -> PublicKey:
        """Store a key; returns after it is durable. A key that is there already is an error that says so."""

    async def generate(self, curve: Curve) -> PublicKey:
        """Make and store a key; returns after it is durable."""


@runtime_checkable
class Distrusting(Protocol):
    """A vault whose answers can get out of step with what was asked."""

    def distrust(self, reason: str) -> bool:
        """A signature did not verify. Returns whether the link is opened anew, so that asking again makes sense."""
