"""The program of an image: sessions that seal by KMS and attest, made after the duties of section 1.5."""

from collections.abc import Callable

import trio

from signer.enclave.clock import Clock, keep
from signer.enclave.entropy import seed_kernel
from signer.enclave.kms.transport import Connect, Transport, pinned_roots, tls_context
from signer.enclave.log import journal
from signer.enclave.nsm.interface import Nsm
from signer.enclave.recipient import Recipient
from signer.enclave.sealing.kms import KmsSealing
from signer.enclave.session import Session
from signer.enclave.settings import Settings
from signer.enclave.start import Enclave, Seed, prepare


class Program:
    """Makes sessions; made by `start`. `tend` runs beside them, `aclose` comes last."""

    def __init__(self, enclave: Enclave, sealing: KmsSealing) -> None:
        self._enclave = enclave
        self._sealing = sealing
        journal.gauge("clock_offset", lambda: round(enclave.clock.offset, 3))
        journal.gauge("clock_steps", lambda: enclave.clock.steps)
        journal.gauge("import_keys", lambda: enclave.attestor.outstanding)

    def new_session(self) -> Session:
        """The state of one connection."""
        return Session(self._sealing, entropy=self._enclave.entropy, attestor=self._enclave.attestor)

    async def tend(self) -> None:
        """Keep the clock, and wipe import keys whose time is over; never returns."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, self._enclave.clock, self._enclave.nsm)
            nursery.start_soon(self._enclave.attestor.sweep)

    async def aclose(self) -> None:
        """Close the connections to KMS."""
        await self._sealing.aclose()


async def start(
    nsm: Nsm,
    settings: Settings,
    connect: Connect,
    *,
    roots: Callable[[], str] = pinned_roots,
    clock: Clock | None = None,
    seed: Seed = seed_kernel,
    make_recipient: Callable[[Nsm], Recipient] = Recipient,
) -> Program:
    """Do the duties with *nsm*; *connect* opens a stream to the parent's proxy. Raises `NsmError` and `SeedError`.

    The RSA key for KMS is made here, in its first document: whoever connects finds everything there.
    """
    enclave = await prepare(nsm, clock=clock, seed=seed)
    recipient = make_recipient(nsm)
    await recipient.addressee()
    await recipient.pcr0()  # for refusals, which must not wait for a module that hangs by then
    tls, place = tls_context(roots()), f"vsock:{settings.proxy_cid}:{settings.proxy_port}"

    def make_transport(host: str) -> Transport:
        return Transport(settings.endpoint or host, connect, tls, place=place)

    sealing = KmsSealing(
        recipient=recipient,
        make_transport=make_transport,
        clock=enclave.clock,
        strict=settings.strict,
        kms_key=settings.kms_key,
    )
    return Program(enclave, sealing)
