"""One question to an enclave, with no credentials and no keys: what are you?"""

from dataclasses import dataclass
from datetime import UTC, datetime

import trio

from proxy.address import connect
from signer.config import NitroSettings
from signer.errors import SignerError
from signer.rpc.messages import RemoteError
from signer.vaults.interface import VaultError
from signer.vaults.nitro.discovery import Place, locator
from signer.vaults.nitro.judge import Evidence, Wanted, evidence, no_proof
from signer.vaults.nitro.session import Session, SessionLostError


@dataclass(frozen=True, slots=True)
class Visit:
    """What an enclave proved to be, and where it was met."""

    place: Place
    evidence: Evidence
    at: datetime


async def visit(nitro: NitroSettings, wanted: Wanted) -> Visit:
    """Have the enclave of a vault attest itself, whatever nitro-cli says of it: it is told nothing.

    Raises `VaultError`, `DocumentError` (what it says is no proof, or not *wanted*), `ClaimsError`, `DiscoveryError`.
    """
    place = await locator(nitro.model_copy(update={"allow_debug_mode": True, "expected_pcrs": {}})).locate()
    try:
        with trio.fail_after(nitro.connect_timeout):
            stream = await connect(place.address)
    except (OSError, trio.TooSlowError, trio.BrokenResourceError, trio.ClosedResourceError) as exc:
        raise VaultError(
            f"cannot reach the enclave at {place}: {str(exc) or type(exc).__name__}; is it running?"
        ) from exc
    session = Session(stream, timeout=nitro.exchange_timeout)
    outcome: Visit | Exception
    async with trio.open_nursery() as nursery:
        nursery.start_soon(session.run)
        try:
            outcome = Visit(place, await evidence(session.call, wanted), datetime.now(UTC))
        except RemoteError as exc:
            outcome = VaultError(f"the enclave at {place} does not attest itself: {no_proof(exc)}")
        except SessionLostError as exc:
            outcome = VaultError(f"the enclave at {place}: {exc}")
        except SignerError as exc:
            outcome = exc
        session.close("done")
    if isinstance(outcome, Exception):
        raise outcome
    return outcome
