"""Judges an enclave before it is told any credentials; section 7.3 of the enclave specification.

This protects against mistakes, and against images that others than root started. What keeps keys from an image that is
not ours is the policy of the KMS key.
"""

import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Literal, Protocol

import structlog

from signer.attestation import claims
from signer.attestation.claims import Claims, ClaimsError
from signer.attestation.document import ROOT_SHA256, Document, DocumentError, Expected, verify
from signer.config import NitroSettings
from signer.errors import SignerError
from signer.rpc.messages import Attest, Attested, Call, RemoteError, Result

logger = structlog.get_logger(__name__)

NONCE_SIZE = 32  # bytes
_NO_ANSWER = "no answer"
_UNINITIALIZED = ("uninitialized",)

Ask = Callable[[Call], Awaitable[Result]]


class NotAdmittedError(SignerError):
    """The enclave did not prove what it has to be; the text says what is wrong (*why*), and what to do."""

    def __init__(self, why: str) -> None:
        super().__init__(f"the enclave is not admitted, and was told no credentials: {why}")
        self.why = why


class NoProofError(NotAdmittedError):
    """The enclave answered with an error in the place of a document: nothing speaks for it, nor against it."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """A document that an enclave made for us, verified."""

    document: Document
    claims: Claims


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What an enclave has to be."""

    pcrs: Mapping[int, Collection[bytes]] = field(default_factory=dict)  # values accepted for each register
    allow_debug: bool = False
    root_sha256: bytes = ROOT_SHA256


class JudgeObserver(Protocol):
    """Hears of each judgement; called in the Trio thread."""

    def enclave_judged(self, vault: str, outcome: str) -> None:
        """*outcome*: `ok`, `no answer`, or the reason of the verification."""


def wanted_of(nitro: NitroSettings) -> Wanted:
    return Wanted(
        pcrs=registers_of(nitro.pcrs),
        allow_debug=bool(nitro.allow_debug_mode),
        root_sha256=bytes.fromhex(nitro.attestation_root) if nitro.attestation_root else ROOT_SHA256,
    )


def registers_of(told: Mapping[str, Iterable[str]]) -> dict[int, frozenset[bytes]]:
    """The values accepted for each register, as the configuration tells them (`PCR0`: hexadecimal digits)."""
    return {int(name.removeprefix("PCR")): frozenset(map(bytes.fromhex, values)) for name, values in told.items()}


def no_proof(error: RemoteError) -> str:
    """Why an enclave answered with *error* in the place of a document, for a person.

    Attest may come before Initialize: whoever wants that first has rules that know nothing of it.
    """
    if error.unknown_call or error.chain.messages == _UNINITIALIZED:
        return "it does not know how to (tee-signer, or an older image)"
    return str(error)


async def evidence(ask: Ask, wanted: Wanted, *, now: Callable[[], datetime] | None = None) -> Evidence:
    """Have an enclave attest itself to us, now.

    Raises `RemoteError` (it can't), `DocumentError`, `ClaimsError`, and what *ask* does.
    """
    nonce = secrets.token_bytes(NONCE_SIZE)
    result = await ask(Attest(claims.SESSION, nonce))
    assert isinstance(result, Attested)
    expected = Expected(nonce=nonce, pcrs=wanted.pcrs, allow_debug=wanted.allow_debug, root_sha256=wanted.root_sha256)
    document = verify(result.document, expected, now=datetime.now(UTC) if now is None else now())
    told = claims.decode(document.user_data)
    if told.purpose != claims.SESSION or told.caller_data:
        raise ClaimsError("user data of an attestation document: it was made for another purpose than a session")
    return Evidence(document, told)


class Judge:
    """Admits enclaves to the vault *name*, by *mode*: `require` that they are *wanted*, only `warn`, or `off`."""

    def __init__(
        self,
        name: str,
        mode: Literal["off", "warn", "require"],
        wanted: Wanted,
        *,
        observer: JudgeObserver | None = None,
        now: Callable[[], datetime] | None = None,
    ) -> None:
        self._name = name
        self._mode = mode
        self._wanted = wanted
        self._observer = observer
        self._now = now
        self._told = ""  # what was last said

    async def admit(self, ask: Ask) -> bytes | None:
        """The boot id of an enclave that is what it has to be; None for one that may be anything.

        Raises `NotAdmittedError`, of which `NoProofError` is one, and what *ask* does for a connection that is lost.
        """
        if self._mode == "off":
            self._tell("off")
            return None
        try:
            found = await evidence(ask, self._wanted, now=self._now)
        except RemoteError as exc:
            why, outcome = f"it does not attest itself: {no_proof(exc)}", _NO_ANSWER
        except DocumentError as exc:
            why, outcome = str(exc), exc.reason
        except ClaimsError as exc:
            why, outcome = str(exc), "user_data"
        else:
            self._count("ok")
            self._tell(found.claims.boot_id.hex(), found)
            return found.claims.boot_id
        self._count(outcome)
        self._tell(why)
        if self._mode == "require":
            refusal = NoProofError if outcome == _NO_ANSWER else NotAdmittedError
            raise refusal(why)
        return None

    def _count(self, outcome: str) -> None:
        if self._observer is not None:
            self._observer.enclave_judged(self._name, outcome)

    def _tell(self, what: str, found: Evidence | None = None) -> None:
        """Say it once; sessions are opened again and again."""
        if what == self._told:
            return
        self._told = what
        if found is not None:
            document = found.document
            log = logger.warning if document.is_debug else logger.info
            log(
                "the enclave runs in debug mode, which is allowed" if document.is_debug else "the enclave is attested",
                vault_name=self._name,
                module=document.module_id,
                pcr0=document.pcrs[0].hex(),
                boot=found.claims.boot_id.hex(),
            )
        elif self._mode == "warn":
            logger.warning("the enclave is not what it has to be; going on", vault_name=self._name, error=what)
        elif self._mode == "off":
            logger.warning(
                "enclaves are not attested: whatever answers, in debug mode too, is told the credentials; pcrs in the "
                "configuration of the vault has them prove what they are",
                vault_name=self._name,
            )
