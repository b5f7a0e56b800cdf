"""Where the enclave is."""

from dataclasses import dataclass
from typing import Protocol

import trio

from proxy.address import Address


@dataclass(frozen=True, slots=True)
class Place:
    """Where one life of the enclave listens; two that differ are two lives."""

    address: Address
    enclave_id: str = ""  # EnclaveID of nitro-cli; empty where nobody knows it

    def __str__(self) -> str:
        return f"{self.address} ({self.enclave_id})" if self.enclave_id else str(self.address)


class Locator(Protocol):
    """Finds the enclave."""

    @property
    def fixed(self) -> bool:
        """Whether the place never changes, and asking costs nothing."""

    async def locate(self) -> Place:
        """The place now. Raises a `SignerError` that says why it isn't known, and what to do."""


class FixedLocator:
    """The place that the configuration names."""

    fixed = True

    def __init__(self, address: Address) -> None:
        self._place = Place(address)

    async def locate(self) -> Place:
        await trio.lowlevel.checkpoint()
        return self._place
