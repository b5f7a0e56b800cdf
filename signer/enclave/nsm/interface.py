"""What a security module can do, section 1.2 of the enclave specification: the device and the fake of the tests."""

from dataclasses import dataclass
from typing import Protocol

INTERNAL_ERROR = "InternalError"
INVALID_RESPONSE = "InvalidResponse"
INVALID_ARGUMENT = "InvalidArgument"
INPUT_TOO_LARGE = "InputTooLarge"
ERROR_VALUES = {
    INVALID_ARGUMENT: "a value is not acceptable",
    "InvalidIndex": "there is no such register",
    INVALID_RESPONSE: "the answer does not fit the request",
    "ReadOnlyIndex": "the register is locked",
    "InvalidOperation": "the module does not know the call, or could not decode it",
    "BufferTooSmall": "the answer does not fit the buffer",
    INPUT_TOO_LARGE: "the request is over 4,096 bytes",
    INTERNAL_ERROR: "the module failed",
}
"""The words of a module's errors with their meanings. `Success` is none of them: never an error, so internal."""


class NsmError(Exception):
    """The module refused a call or failed; *value* is the word of `ERROR_VALUES`. Nothing has changed in the module,
    except where the answer to `extend_pcr` or to a lock was lost."""

    def __init__(self, value: str, detail: str = "") -> None:
        self.value = value if value in ERROR_VALUES else INTERNAL_ERROR
        super().__init__(f"{self.value} ({detail or ERROR_VALUES[self.value]})")


class NoNsmError(Exception):
    """There is no module to talk to; the text says why and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What the module says of itself."""

    version: tuple[int, int, int]
    module_id: str
    max_pcrs: int
    locked_pcrs: frozenset[int]
    digest: str


@dataclass(frozen=True, slots=True)
class Register:
    """A platform configuration register."""

    locked: bool
    data: bytes  # 48 bytes


class Nsm(Protocol):
    """A security module. Every call raises `NsmError`; calls queue up, one at a time."""

    async def describe(self) -> Description:
        """Version, module id, number of registers and which of them are locked."""

    async def describe_pcr(self, index: int) -> Register:
        """The register *index*."""

    async def extend_pcr(self, index: int, data: bytes) -> bytes:
        """Extend an unlocked register; its new value, SHA-384 of the old one and *data*."""

    async def lock_pcr(self, index: int) -> None:
        """Forbid changes of the register *index* for the life of the enclave."""

    async def lock_pcrs(self, range: int) -> None:
        """Forbid changes of the registers 0 … *range* - 1."""

    async def get_random(self) -> bytes:
        """Random bytes, as many as the module gives (256 today), at least one."""

    async def attest(
        self, *, user_data: bytes | None = None, nonce: bytes | None = None, public_key: bytes | None = None
    ) -> bytes:
        """A signed document with these fields, section 2; those not given are null in it."""
