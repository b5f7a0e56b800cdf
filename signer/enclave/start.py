"""What an enclave program does before it listens, in this order; section 1.5 of the enclave specification.

1. The security module is there. 2. The kernel's pool is filled from it: nothing is drawn from the kernel before.
3. The clock is set from it, for TLS and signed requests. 4. The boot id is drawn. What else needs random bytes or the
time (the RSA key for KMS) is made from an `Enclave`, and so comes after all of these; listening comes last.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from signer.attestation.claims import BOOT_ID_LENGTH
from signer.enclave.attestor import Attestor
from signer.enclave.clock import Clock
from signer.enclave.entropy import Entropy, MixedEntropy, seed_kernel
from signer.enclave.log import say
from signer.enclave.nsm.interface import Description, Nsm

Seed = Callable[[Nsm], Awaitable[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Enclave:
    """What the rest of the program needs of the machine; it exists only where all duties were done."""

    nsm: Nsm
    description: Description
    entropy: Entropy
    clock: Clock
    attestor: Attestor


async def prepare(nsm: Nsm, *, clock: Clock | None = None, seed: Seed = seed_kernel) -> Enclave:
    """Do the duties with *nsm*. Raises `NsmError` and `SeedError`: then the program ends, nothing was made yet."""
    fed = await seed(nsm)
    description = await nsm.describe()
    clock = clock or Clock()
    await clock.look(nsm)
    entropy = MixedEntropy(nsm)
    boot_id = (await entropy())[:BOOT_ID_LENGTH]
    version = ".".join(map(str, description.version))
    say(f"security module {version} of {description.module_id}, {fed} random bytes from it, boot id {boot_id.hex()}")
    return Enclave(
        nsm=nsm,
        description=description,
        entropy=entropy,
        clock=clock,
        attestor=Attestor(nsm, boot_id=boot_id, entropy=entropy),
    )
