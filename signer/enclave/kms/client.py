"""The calls of KMS that sealing needs: signed, attested where KMS takes a document, repeated where that can help.

Sections 3.3 to 3.8 of the enclave specification. Beyond the reference: KMS is always told which key a blob must be of
(otherwise the blob chooses the key), the key that it names in its answer is compared, and a plaintext in clear beside a
document is refused, never used.
"""

import base64
import binascii
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Protocol

import trio

from signer.enclave.kms.errors import (
    Call,
    Fault,
    Repeat,
    cause_of,
    is_about_credentials,
    known_name,
    parse_fault,
    repeat_of,
    request_id_of,
)
from signer.enclave.kms.retries import MAX_ATTEMPTS, Breaker, pause
from signer.enclave.kms.sigv4 import Credentials, signed_headers
from signer.enclave.kms.transport import Answer, Transport, TransportError, TrustError
from signer.enclave.log import count
from signer.enclave.nsm.interface import NsmError
from signer.enclave.recipient import Addressee, Recipient
from signer.enclave.sealing.envelope import EnvelopeError

CALL_TIMEOUT = 9.0  # seconds for all attempts of a call: the host gives up at 10, and could not be told why
_EXPLAIN_TIMEOUT = 0.5  # seconds, perhaps behind those, for what a refusal is explained with
_RECIPIENT_ALGORITHM = "RSAES_OAEP_SHA_256"  # the only one that KMS knows


class KmsError(Exception):
    """A call failed; *chain* is what the host is told, outermost message first. *fault* is KMS's refusal, if it is one.

    The call may have been executed; each may be repeated.
    """

    def __init__(self, *chain: str, fault: Fault | None = None) -> None:
        super().__init__(": ".join(chain))
        self.chain = chain
        self.fault = fault


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """What a session asks KMS with."""

    credentials: Credentials
    region: str
    key_id: str  # id, ARN or alias


class Clock(Protocol):
    """The time for signatures; `signer.enclave.clock` keeps it."""

    offset: float  # seconds added to the system's clock

    def now(self) -> datetime:
        """The time, aware."""

    def correct(self, offset: float) -> None:
        """The system's clock is *offset* seconds behind."""


@dataclass(frozen=True, slots=True)
class DataKey:
    """A data key and how KMS will know it again; the caller wipes *plain*."""

    plain: bytearray
    wrapped: bytes


class KmsClient:
    """KMS for one session. *access* may be replaced at any time: attempts that begin later use it.

    *transport* gives the connections to a region, *breaker* is shared by all that use them.
    """

    def __init__(
        self,
        access: Access,
        *,
        transport: Callable[[str], Transport],
        recipient: Recipient,
        clock: Clock,
        breaker: Breaker,
        chance: Callable[[], float] = random.random,
        call_timeout: float = CALL_TIMEOUT,
    ) -> None:
        self.access = access
        self._transport = transport
        self._recipient = recipient
        self._clock = clock
        self._breaker = breaker
        self._chance = chance
        self._call_timeout = call_timeout
        self._arns: dict[tuple[str, str], str] = {}  # by region and key id that names none: as KMS answered first

    async def encrypt(self, plaintext: bytes) -> bytes:
        """A legacy blob of *plaintext*: without a context, as the reference makes it. KMS sees the plaintext."""
        reply = await self._call("Encrypt", {"Plaintext": _text(plaintext)})
        return reply.bytes("CiphertextBlob")

    async def decrypt(self, blob: bytes, *, context: Mapping[str, str] | None = None) -> bytearray:
        """The plaintext of *blob*, for the caller to wipe."""
        parameters: dict[str, object] = {"CiphertextBlob": _text(blob)}
        if context is not None:
            parameters["EncryptionContext"] = dict(context)
        return (await self._call("Decrypt", parameters, attested=True)).open()

    async def generate_data_key(self, context: Mapping[str, str]) -> DataKey:
        """A new data key of 32 bytes under *context*."""
        parameters = {"KeySpec": "AES_256", "EncryptionContext": dict(context)}
        reply = await self._call("GenerateDataKey", parameters, attested=True)
        wrapped = reply.bytes("CiphertextBlob")
        return DataKey(reply.open(), wrapped)

    async def _call(self, operation: str, parameters: Mapping[str, object], *, attested: bool = False) -> "_Reply":
        """What KMS answered for the key that was asked for. Raises `KmsError`."""
        attempts = _Attempts(self._breaker, self._chance, trio.current_time() + self._call_timeout)
        with trio.move_on_after(self._call_timeout):
            return await self._repeatedly(operation, parameters, attempts, attested=attested)
        last = f"; before that: {attempts.last}" if attempts.last else ""
        if not attempts.asking:  # no fault of KMS, nor of the way to it
            why = f"the security module gave no document for {operation} within {self._call_timeout:g} s"
            raise KmsError("attestation error", f"{why}{last}")
        why = f"AWS KMS gave no answer to {operation} within {self._call_timeout:g} s"
        self._breaker.failed(trio.current_time(), why)
        raise KmsError("SDK error", f"{why}{last}")

    async def _repeatedly(
        self, operation: str, parameters: Mapping[str, object], attempts: "_Attempts", *, attested: bool
    ) -> "_Reply":
        while True:
            access = self.access
            attempts.asking = not attested
            addressee = await self._addressee() if attested else None
            attempts.asking = True
            now = self._clock.now()
            try:
                answer = await self._attempt(access, operation, parameters, addressee, now)
            except TransportError as exc:
                count("kms_failures", type(exc).__name__)
                wait = attempts.behind_silence(exc)
                if wait is None:
                    raise KmsError("SDK error", str(exc)) from exc
                await trio.sleep(wait)
                continue
            if answer.status == 200:
                reply = _Reply(operation, _members(answer.body), addressee, request_id_of(answer.headers))
                self._check_key(reply, access)
                return reply
            fault = parse_fault(answer.status, answer.headers, answer.body, secrets=access.credentials.secrets)
            count("kms_failures", known_name(fault))
            wait = self._wait_behind(fault, attempts, access, attested=attested, now=now)
            if wait is None:
                raise await self._refused(fault, operation, access, attested=attested, now=now)
            await trio.sleep(wait)

    async def _addressee(self) -> Addressee:
        try:
            return await self._recipient.addressee()
        except NsmError as exc:
            raise KmsError("attestation error", str(exc)) from exc

    async def _attempt(
        self,
        access: Access,
        operation: str,
        parameters: Mapping[str, object],
        addressee: Addressee | None,
        now: datetime,
    ) -> Answer:
        members: dict[str, object] = {"KeyId": access.key_id, **parameters}
        if addressee is not None:
            document = _text(addressee.document)
            members["Recipient"] = {"KeyEncryptionAlgorithm": _RECIPIENT_ALGORITHM, "AttestationDocument": document}
        body = json.dumps(members, separators=(",", ":")).encode()
        if not self._breaker.admit(trio.current_time()):
            raise KmsError(
                "SDK error",
                f"AWS KMS did not answer {self._breaker.failures} times in a row: waiting for the next probe; "
                f"the last time: {self._breaker.last}",
            )
        count("kms_calls", operation)
        transport = self._transport(access.region)
        headers = signed_headers(
            access.credentials,
            host=transport.host,
            region=access.region,
            target=f"TrentService.{operation}",
            body=body,
            now=now,
        )
        try:
            answer = await transport.post(headers, body)
        except TransportError as exc:
            self._breaker.failed(trio.current_time(), str(exc))
            raise
        self._breaker.worked()
        return answer

    def _wait_behind(
        self, fault: Fault, attempts: "_Attempts", access: Access, *, attested: bool, now: datetime
    ) -> float | None:
        """Seconds until the next attempt, None where there is none; sets the clock if that was wrong."""
        if is_about_credentials(fault) and self.access is not access:
            return attempts.behind(fault, Repeat.LATER)  # new credentials came while the call ran
        repeat = repeat_of(fault, attested=attested, now=now)
        wait = attempts.behind(fault, repeat)
        if wait is not None and repeat is Repeat.NEW_TIME and fault.date is not None:
            self._clock.correct(self._clock.offset + (fault.date - self._clock.now()).total_seconds())
        return wait

    async def _refused(
        self, fault: Fault, operation: str, access: Access, *, attested: bool, now: datetime
    ) -> KmsError:
        pcr0 = None
        if attested:
            # KMS has answered: a slow module must not undo that.
            with trio.move_on_after(_EXPLAIN_TIMEOUT, shield=True):
                pcr0 = await self._recipient.pcr0()
        cause = cause_of(fault, Call(operation, access.key_id, attested, access.region, pcr0, now))
        return KmsError("SDK error", str(fault), *([cause] if cause else []), fault=fault)

    def _check_key(self, reply: "_Reply", access: Access) -> None:
        """Refuse an answer for another key than the one that was asked for."""
        arn = reply.text("KeyId")
        if not self._is_expected(arn, access):
            known = self._arns.get((access.region, access.key_id), access.key_id)
            raise reply.error("SDK error", f"for another key: {arn[:200]!r} instead of {known}")

    def _is_expected(self, arn: str, access: Access) -> bool:
        key_id = access.key_id
        if key_id.startswith("arn:") and ":key/" in key_id:
            return arn == key_id
        if "alias/" not in key_id:
            return arn.endswith(f":key/{key_id}")
        return self._arns.setdefault((access.region, key_id), arn) == arn


class _Attempts:
    """Counts what one call has spent."""

    def __init__(self, breaker: Breaker, chance: Callable[[], float], deadline: float) -> None:
        self.last = ""  # why the latest attempt has to be repeated
        self.asking = False  # KMS, no more the security module
        self._breaker = breaker
        self._chance = chance
        self._deadline = deadline
        self._made = 0
        self._once: set[Repeat | type[TrustError]] = set()  # repeats that are allowed once, and are spent

    def behind_silence(self, exc: TransportError) -> float | None:
        """Seconds to wait behind an attempt without an answer, None to give up."""
        self.last = str(exc)
        if not self._breaker.may_retry(trio.current_time()):
            return None
        if isinstance(exc, TrustError) and not self._first(TrustError):
            return None
        return self._next(None)

    def behind(self, fault: Fault, repeat: Repeat) -> float | None:
        """Seconds to wait behind a refusal, None to give up."""
        self.last = str(fault)
        if repeat is Repeat.NEVER:
            return None
        if repeat is not Repeat.LATER and not self._first(repeat):
            return None
        return self._next(fault.retry_after)

    def _first(self, repeat: Repeat | type[TrustError]) -> bool:
        if repeat in self._once:
            return False
        self._once.add(repeat)
        return True

    def _next(self, retry_after: float | None) -> float | None:
        self._made += 1
        wait = pause(self._made, self._chance(), at_least=retry_after)
        if self._made >= MAX_ATTEMPTS or trio.current_time() + wait >= self._deadline:
            return None
        return wait


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _members(body: bytes) -> dict[str, Any] | None:
    try:
        members = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return members if isinstance(members, dict) else None


class _Reply:
    """An answer with status 200. What is wrong with it is a `KmsError` that names the request, as a refusal does."""

    def __init__(
        self, operation: str, members: Mapping[str, Any] | None, addressee: Addressee | None, request_id: str
    ) -> None:
        self._operation = operation
        self._addressee = addressee
        self._request = f" (request {request_id})" if request_id else ""
        if members is None:
            raise self.error("SDK error", "with something that is no JSON object")
        self._members = members

    def error(self, kind: str, what: str) -> KmsError:
        return KmsError(kind, f"AWS KMS answered {self._operation} {what}{self._request}")

    def text(self, name: str) -> str:
        """A member that must be there; without it the answer is none."""
        value = self._members.get(name)
        if not isinstance(value, str) or not value:
            raise self.error("zero output", f"without {name}")
        return value

    def bytes(self, name: str) -> bytes:
        """A member that holds bytes."""
        try:
            return base64.b64decode(self.text(name), validate=True)
        except (binascii.Error, ValueError):
            raise self.error("SDK error", f"with a {name} that is not Base64") from None

    def open(self) -> bytearray:
        """What KMS put into the envelope of an attested call."""
        assert self._addressee is not None
        if self._members.get("Plaintext") not in (None, ""):
            raise self.error(
                "SDK error",
                "in clear although it was sent an attestation document: refused; "
                "is an emulator in the place of AWS KMS?",
            )
        try:
            return self._addressee.open(self.bytes("CiphertextForRecipient"))
        except EnvelopeError as exc:
            raise KmsError("envelope error", f"{exc}{self._request}") from exc
