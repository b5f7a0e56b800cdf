"""The rules of one session, section 4.3 of the signer specification: a decoded call goes in, a reply comes out.

The calls around attestation are those of section 7.2 of the enclave specification; documents and the keys that others
seal to are left to `signer.enclave.attestor`. All other state lives as long as the connection: the sealer with its
credentials, the keys and their handles. Sockets and framing are left to `signer.enclave.server`. Every error is a
reply; none ends the session.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from traceback import extract_tb
from typing import assert_never

import trio

from signer.attestation.sealed import CREDENTIALS
from signer.crypto import CryptoError, InvalidKeyError, UnsupportedError, derive_secret_key, load_secret_key
from signer.crypto.interface import SecretKey
from signer.enclave.attestor import Attestor, AttestorError
from signer.enclave.entropy import Entropy, kernel_entropy
from signer.enclave.log import OTHER, count, say
from signer.enclave.nsm.interface import NsmError
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.interface import Sealer, Sealing, SealingError
from signer.rpc.messages import (
    Attest,
    Attested,
    AttestKey,
    Call,
    Created,
    Generate,
    GenerateAndImport,
    Import,
    Imported,
    ImportSealed,
    ImportUnencrypted,
    Initialize,
    InitializeSealed,
    MalformedCallError,
    ProvePossession,
    PublicKeyFrom,
    PublicKeyOf,
    Reseal,
    Result,
    Sign,
    SignWith,
    decode_call,
    decode_credentials,
    encode_error,
    encode_reply,
)
from signer.tezos.keys import Curve, PublicKey

_ERRORS = (  # outermost texts, counted by name
    "signer error",
    "encryption error",
    "deserialization error",
    "attestation error",
    "import error",
    "internal error",
    "legacy blob refused",
    "uninitialized",
    "already initialized",
)
MAX_AHEAD = 16  # blobs that a session opens at once
MAX_KEYS = 1024  # per session
CALL_TIMEOUT = 9.5  # seconds for all that a call asks of the module and of KMS: the host gives up a session at 10
_TOO_SLOW = f"not done within {CALL_TIMEOUT:g} s: the security module and AWS KMS took too long, one after the other"


class _CallError(Exception):
    """The call is answered with this chain of messages, outermost first."""

    def __init__(self, *chain: str) -> None:
        super().__init__(": ".join(chain))
        self.chain = chain


@dataclass(frozen=True, slots=True)
class _Held:
    """A key under a handle, and the ARN of its marks."""

    key: SecretKey = field(repr=False)
    marks: str | None


class _Opening:
    """A blob that is opened before its turn has come; `run` does it, once for each that is waited for."""

    def __init__(self, payload: bytes, blob: bytes) -> None:
        self.payload = payload
        self.started = False
        self._blob = blob
        self._done = trio.Event()
        self._key: SecretKey | None = None
        self._error: Exception = SealingError("internal error", "the program ends")
        self._abandoned = False

    async def run(self, sealer: Sealer) -> None:
        try:
            key = await sealer.open(self._blob)
        except Exception as exc:  # it is the answer to the call
            self._error = exc
        else:
            self._key = key
            if self._abandoned:
                self.abandon()
        finally:
            self._done.set()

    async def result(self) -> SecretKey:
        """The key, which is the caller's now; raises what opening it raised."""
        await self._done.wait()
        if self._key is None:
            raise self._error
        key, self._key = self._key, None
        return key

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        self._abandoned = True
        if self._key is not None:
            self._key.wipe()
            self._key = None


class Session:
    """Answers the calls of one connection; keys are made of *entropy*, documents by *attestor*, if there is one."""

    def __init__(
        self, sealing: Sealing, *, entropy: Entropy = kernel_entropy, attestor: Attestor | None = None
    ) -> None:
        self._sealing = sealing
        self._entropy = entropy
        self._attestor = attestor
        self._sealer: Sealer | None = None
        self._keys: list[_Held] = []
        self._ahead: deque[_Opening] = deque()  # in the order of the calls; the first `MAX_AHEAD` of them run
        self._start_soon: Callable[..., None] | None = None

    def foresee(self, payloads: Sequence[bytes], start_soon: Callable[..., None]) -> None:
        """*payloads* are to be answered next, in this order: open the blobs in them side by side.

        KMS takes some twenty milliseconds for each: one after the other, two hundred keys would take four seconds.
        """
        if self._sealer is None or len(payloads) < 2:
            return
        for payload in payloads:
            try:
                call = decode_call(payload)
            except MalformedCallError:
                continue
            if isinstance(call, Initialize | InitializeSealed):
                break  # what comes behind it is opened with other credentials
            if isinstance(call, Import):
                self._ahead.append(_Opening(payload, call.blob))
        self._start_soon = start_soon
        self._run_ahead()

    def _run_ahead(self) -> None:
        """Start what has come within reach: each answer lets the next one begin.

        A full session refuses the rest at once, without a wait for those that run: nothing more begins then.
        """
        if self._sealer is None or self._start_soon is None or len(self._keys) >= MAX_KEYS:
            return
        for opening in islice(self._ahead, MAX_AHEAD):
            if not opening.started:
                opening.started = True
                self._start_soon(opening.run, self._sealer)

    @property
    def number_of_keys(self) -> int:
        return len(self._keys)

    async def answer(self, payload: bytes) -> bytes:
        """The payload of the reply to the call in *payload*; never raises for anything in it."""
        try:
            call = decode_call(payload)
        except MalformedCallError as exc:
            count("errors", "malformed call")
            return encode_error(str(exc))
        count("calls", type(call).__name__)
        opening = self._ahead[0] if self._ahead and self._ahead[0].payload is payload else None
        try:
            with trio.fail_after(CALL_TIMEOUT):
                return encode_reply(await self._perform(call, opening))
        except trio.TooSlowError:
            chain: tuple[str, ...] = ("signer error", _TOO_SLOW)
        except (_CallError, SealingError, AttestorError) as exc:
            chain = exc.chain
        except NsmError as exc:
            chain = ("signer error", "no random bytes", str(exc))
        except UnsupportedError as exc:
            chain = ("signer error", _capital(str(exc)))
        except CryptoError as exc:
            chain = ("signer error", str(exc))
        except Exception as exc:  # a bug must not cost the other sessions their keys
            _report(exc)
            chain = ("internal error", type(exc).__name__)
        finally:
            if opening is not None:
                self._ahead.popleft().abandon()  # its key is ours by now, or nobody's
                self._run_ahead()
        count("errors", chain[0] if chain[0] in _ERRORS else OTHER)
        return encode_error(*chain)

    def close(self) -> None:
        """Forget all keys, overwriting them as far as `signer.crypto` can."""
        for held in self._keys:
            held.key.wipe()
        self._keys.clear()
        for opening in self._ahead:
            opening.abandon()
        self._ahead.clear()
        self._sealer = None

    async def _perform(self, call: Call, opening: _Opening | None = None) -> Result:
        match call:
            case Initialize():
                return self._initialize(call)
            case InitializeSealed():
                return self._initialize(self._unsealed_credentials(call))
            case Attest():
                return Attested(await self._with_attestor().attest(call))
        if self._sealer is None:
            raise _CallError("uninitialized")
        match call:
            case Sign(handle, message, version):
                return self._held(handle).key.sign(message, version=version)
            case PublicKeyOf(handle):
                return self._held(handle).key.public_key
            case ProvePossession(handle, over):
                subject = None if over is None else PublicKey(Curve.BLS12_381, over)
                return self._held(handle).key.prove_possession(subject)
            case AttestKey(handle, nonce):
                held = self._held(handle)
                address = str(held.key.public_key.hash)
                return Attested(await self._with_attestor().attest_key(nonce, address, held.marks))
            case Import(blob):
                return await self._import(blob, opening, self._sealer)
            case _:
                return await self._perform_sealed(call, self._sealer)

    async def _import(self, blob: bytes, opening: _Opening | None, sealer: Sealer) -> Imported:
        self._room()
        key = await (sealer.open(blob) if opening is None else opening.result())
        return Imported(key.public_key, self._keep(key, sealer.marks(blob)))

    def _initialize(self, call: Initialize) -> Result:
        if self._sealer is None:
            self._sealer = self._sealing.session(call)
        elif call.update:
            self._sealer.update(call)
        else:
            raise _CallError("already initialized")
        return None

    def _with_attestor(self) -> Attestor:
        if self._attestor is None:
            raise _CallError("attestation error", "this enclave program has no security module: it cannot attest")
        return self._attestor

    def _unsealed_credentials(self, call: InitializeSealed) -> Initialize:
        plaintext = self._with_attestor().open(call.key, call.enc, call.ciphertext, CREDENTIALS)
        try:
            return decode_credentials(plaintext)
        except MalformedCallError as exc:
            raise _CallError("import error", "deserialization error", str(exc)) from None

    def _unsealed_key(self, call: ImportSealed) -> SecretKey:
        """The key that was sealed for the address that the caller gives; the caller wipes it."""
        plaintext = self._with_attestor().open(call.key, call.enc, call.ciphertext, call.address, call.marks)
        try:
            key = _plaintext.decode(plaintext)
        except SealingError as exc:
            raise _CallError("import error", *exc.chain) from None
        if str(key.public_key.hash) != call.address:
            key.wipe()
            raise _CallError("import error", "address mismatch")
        return key

    async def _perform_sealed(
        self,
        call: ImportUnencrypted | ImportSealed | Generate | GenerateAndImport | SignWith | PublicKeyFrom | Reseal,
        sealer: Sealer,
    ) -> Result:
        """The calls that seal or open a key."""
        match call:
            case ImportUnencrypted(curve, secret):
                if not self._sealing.takes_unencrypted:
                    raise _CallError("legacy blob refused", "this image takes keys sealed to it only")
                self._room()
                return await self._created(load_secret_key(curve, secret), sealer)
            case ImportSealed(marks=marks):
                self._room()
                return await self._created(self._unsealed_key(call), sealer, marks)
            case GenerateAndImport(curve):
                self._room()
                return await self._created(await self._generated(curve), sealer)
            case Generate(curve):
                key = await self._generated(curve)
                try:
                    return Created(await sealer.seal(key), key.public_key, None)
                finally:
                    key.wipe()
            case SignWith(blob, message, version):
                key = await sealer.open(blob)
                try:
                    return key.sign(message, version=version)
                finally:
                    key.wipe()
            case PublicKeyFrom(blob):
                key = await sealer.open(blob)
                try:
                    return key.public_key
                finally:
                    key.wipe()
            case Reseal(blob):
                sealed = await sealer.reseal(blob)
                try:
                    return Created(sealed.blob, sealed.key.public_key, None)
                finally:
                    sealed.key.wipe()
            case _:
                assert_never(call)

    async def _generated(self, curve: Curve) -> SecretKey:
        """A new key; draws again in the unlikely case that the bytes are no scalar."""
        while True:
            try:
                return derive_secret_key(curve, await self._entropy())
            except InvalidKeyError:
                continue

    async def _created(self, key: SecretKey, sealer: Sealer, marks: str | None = None) -> Created:
        try:
            blob = await sealer.seal(key, marks=marks)
        except BaseException:
            key.wipe()
            raise
        return Created(blob, key.public_key, self._keep(key, marks))

    def _held(self, handle: int) -> _Held:
        if handle >= len(self._keys):
            raise _CallError("signer error", "invalid handle")
        return self._keys[handle]

    def _keep(self, key: SecretKey, marks: str | None) -> int:
        self._keys.append(_Held(key, marks))
        return len(self._keys) - 1

    def _room(self) -> None:
        if len(self._keys) >= MAX_KEYS:
            raise _CallError("signer error", f"a session holds at most {MAX_KEYS} keys")


def _report(exc: Exception) -> None:
    """Say where a bug was met; its text and values stay inside, they may hold a key."""
    where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(extract_tb(exc.__traceback__)))
    say(f"internal error: {type(exc).__name__} in {where}", "error")


def _capital(text: str) -> str:
    """The reference writes `Proof of possession is not supported`."""
    return text[:1].upper() + text[1:]
