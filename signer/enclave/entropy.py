"""Random bytes that no single source decides, section 1.5 of the enclave specification.

An enclave has next to no sources of its own, so the kernel's pool is filled from the security module before anything
is drawn from it. Key material is then SHA-512 of bytes of both: the reference draws from the module alone.
"""

import fcntl
import hashlib
import os
import struct
from collections.abc import Awaitable, Callable

from signer.enclave.nsm.device import Ioctl
from signer.enclave.nsm.interface import Nsm

RNDADDENTROPY = 0x40085203
POOL = "/dev/random"
SEED = 1024  # bytes fed into the pool at least, as the reference does
DRAW = 32  # bytes of one draw
_INFO = struct.Struct("=ii")  # credited bits, bytes that follow

Entropy = Callable[[], Awaitable[bytes]]
"""Returns 32 random bytes; raises `NsmError` where a module takes part and fails."""


class SeedError(Exception):
    """The kernel's pool could not be filled: no key may be made. The text says why and what to do."""


async def seed_kernel(nsm: Nsm, *, pool: str = POOL, ioctl: Ioctl = fcntl.ioctl) -> int:
    """Feed at least `SEED` bytes of the module into the kernel's pool, credited in full; returns how many.

    Raises `NsmError`, and `SeedError` also where the module repeats itself: then it gives no random bytes.
    """
    try:
        descriptor = os.open(pool, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        raise SeedError(f"the kernel's pool cannot be opened ({pool}: {exc.strerror})") from exc
    try:
        return await _feed(nsm, descriptor, ioctl)
    except PermissionError as exc:
        raise SeedError("the kernel's pool takes no bytes from this process: it needs CAP_SYS_ADMIN") from exc
    except OSError as exc:
        raise SeedError(f"the kernel's pool takes no bytes ({exc.strerror})") from exc
    finally:
        os.close(descriptor)


async def _feed(nsm: Nsm, descriptor: int, ioctl: Ioctl) -> int:
    fed, before = 0, b""
    while fed < SEED:
        chunk = await nsm.get_random()
        if chunk == before:
            raise SeedError("the security module gave the same random bytes twice; end this enclave")
        ioctl(descriptor, RNDADDENTROPY, bytearray(_INFO.pack(8 * len(chunk), len(chunk)) + chunk), True)
        fed, before = fed + len(chunk), chunk
    return fed


class MixedEntropy:
    """Draws 32 bytes: the first half of SHA-512 over 32 bytes of the kernel and 32 of the module."""

    def __init__(self, nsm: Nsm, *, kernel: Callable[[int], bytes] = os.urandom) -> None:
        self._nsm = nsm
        self._kernel = kernel

    async def __call__(self) -> bytes:
        """The bytes; raises `NsmError`."""
        theirs = b""
        while len(theirs) < DRAW:
            theirs += await self._nsm.get_random()
        return hashlib.sha512(self._kernel(DRAW) + theirs[:DRAW]).digest()[:DRAW]


async def kernel_entropy() -> bytes:
    """32 bytes of the kernel alone: outside an enclave there is nothing else."""
    return os.urandom(DRAW)
