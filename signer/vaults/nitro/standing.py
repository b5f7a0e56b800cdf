"""Where the link to the enclave stands: what its tasks bring about, and what those who ask wait for.

The choices between connections are those of `signer.vaults.nitro.epochs`; this adds who waits, and what to tell them.
"""

from collections import Counter
from typing import NamedTuple

import trio

from signer.rpc.messages import PublicKeyOf, RemoteError
from signer.tezos.keys import PublicKey, PublicKeyHash
from signer.vaults.interface import VaultUnavailableError
from signer.vaults.nitro.credentials import Credentials
from signer.vaults.nitro.discovery import Place
from signer.vaults.nitro.epochs import Epoch, Epochs, Line
from signer.vaults.nitro.session import Session, SessionLostError


class Life(NamedTuple):
    """What makes one epoch another than the one before."""

    place: Place
    credentials: Credentials


SessionLine = Line[Session, Life]
SessionEpoch = Epoch[Session, Life]


class Standing:
    """The epochs, why nothing answers, and the addresses that callers wait for."""

    def __init__(self) -> None:
        self.epochs: Epochs[Session, Life] = Epochs()
        self.failure = "not connected yet"
        self.changed = trio.Event()  # set, and replaced, whenever something here or in `epochs` changes
        self.wanted: Counter[str] = Counter()

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    def may_come(self, address: str) -> bool:
        """Whether waiting may bring the key of *address*: not every blob was tried, or its own is being tried."""
        return not self.epochs.loaded or self.epochs.expects(address)

    async def next_change(self, address: str) -> None:
        """Wait for a change, and let the key of *address* be imported before the others meanwhile."""
        self.wanted[address] += 1
        try:
            await self.changed.wait()
        finally:
            self.wanted[address] -= 1
            if not self.wanted[address]:
                del self.wanted[address]


def unavailable(reason: str) -> VaultUnavailableError:
    """What a caller is told who may try again."""
    return VaultUnavailableError(
        f"(Nitro): the enclave cannot be asked now, try again: {reason.removeprefix('(Nitro): ')}"
    )


async def in_step(line: SessionLine, key: PublicKeyHash, handle: int) -> bool:
    """Whether the replies of *line* are those to its calls; if not, it is closed.

    The call is of another kind than any that could be in doubt, so a reply that belongs to another cannot pass.
    """
    why = "did not answer"
    try:
        result = await line.channel.call(PublicKeyOf(handle))
        if isinstance(result, PublicKey) and result.hash == key:
            return True
        why = "named another key"
    except RemoteError as exc:
        why = f"answered with an error ({exc})"
    except SessionLostError:
        return False
    line.channel.close(f"the enclave is out of step: asked for the key of {key}, it {why}")
    return False
