"""The rules of one session, section 4.3 of the signer specification: a decoded call goes in, a reply comes out.

All state lives as long as the connection: the sealer with its credentials, the keys and their handles. Sockets and
framing are left to `signer.enclave.server`. Every error is a reply; none ends the session.
"""

import os
from collections.abc import Callable
from traceback import extract_tb
from typing import assert_never

from signer.crypto import CryptoError, UnsupportedError, generate_secret_key, load_secret_key
from signer.crypto.interface import SecretKey
from signer.enclave.log import say
from signer.enclave.sealing.interface import Sealer, Sealing, SealingError
from signer.rpc.messages import (
    Attest,
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
    encode_error,
    encode_reply,
)
from signer.tezos.keys import Curve, PublicKey

MAX_KEYS = 1024  # per session


class _CallError(Exception):
    """The call is answered with this chain of messages, outermost first."""

    def __init__(self, *chain: str) -> None:
        super().__init__(": ".join(chain))
        self.chain = chain


class Session:
    """Answers the calls of one connection; *entropy* returns so many random bytes."""

    def __init__(self, sealing: Sealing, *, entropy: Callable[[int], bytes] = os.urandom) -> None:
        self._sealing = sealing
        self._entropy = entropy
        self._sealer: Sealer | None = None
        self._keys: list[SecretKey] = []

    @property
    def number_of_keys(self) -> int:
        return len(self._keys)

    async def answer(self, payload: bytes) -> bytes:
        """The payload of the reply to the call in *payload*; never raises for anything in it."""
        try:
            return encode_reply(await self._perform(decode_call(payload)))
        except MalformedCallError as exc:
            return encode_error(str(exc))
        except _CallError as exc:
            return encode_error(*exc.chain)
        except SealingError as exc:
            return encode_error(*exc.chain)
        except UnsupportedError as exc:
            return encode_error("signer error", _capital(str(exc)))
        except CryptoError as exc:
            return encode_error("signer error", str(exc))
        except Exception as exc:  # a bug must not cost the other sessions their keys
            _report(exc)
            return encode_error("internal error", type(exc).__name__)

    def close(self) -> None:
        """Forget all keys, overwriting them as far as `signer.crypto` can."""
        for key in self._keys:
            key.wipe()
        self._keys.clear()
        self._sealer = None

    async def _perform(self, call: Call) -> Result:
        if isinstance(call, Initialize):
            self._initialize(call)
            return None
        if isinstance(call, Attest | ImportSealed | AttestKey | InitializeSealed):
            raise _CallError("attestation error", "this enclave program has no security module: it cannot attest")
        if self._sealer is None:
            raise _CallError("uninitialized")
        match call:
            case Sign(handle, message, version):
                return self._key(handle).sign(message, version=version)
            case PublicKeyOf(handle):
                return self._key(handle).public_key
            case ProvePossession(handle, over):
                subject = None if over is None else PublicKey(Curve.BLS12_381, over)
                return self._key(handle).prove_possession(subject)
            case _:
                return await self._perform_sealed(call, self._sealer)

    def _initialize(self, call: Initialize) -> None:
        if self._sealer is None:
            self._sealer = self._sealing.session(call)
        elif call.update:
            self._sealer.update(call)
        else:
            raise _CallError("already initialized")

    async def _perform_sealed(
        self,
        call: Import | ImportUnencrypted | Generate | GenerateAndImport | SignWith | PublicKeyFrom | Reseal,
        sealer: Sealer,
    ) -> Result:
        """The calls that seal or open a key."""
        match call:
            case Import(blob):
                self._room()
                key = await sealer.open(blob)
                return Imported(key.public_key, self._keep(key))
            case ImportUnencrypted(curve, secret):
                if not self._sealing.takes_unencrypted:
                    raise _CallError("legacy blob refused", "this image takes keys sealed to it only")
                self._room()
                return await self._created(load_secret_key(curve, secret), sealer)
            case GenerateAndImport(curve):
                self._room()
                return await self._created(generate_secret_key(curve, self._entropy), sealer)
            case Generate(curve):
                key = generate_secret_key(curve, self._entropy)
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

    async def _created(self, key: SecretKey, sealer: Sealer) -> Created:
        try:
            blob = await sealer.seal(key)
        except BaseException:
            key.wipe()
            raise
        return Created(blob, key.public_key, self._keep(key))

    def _key(self, handle: int) -> SecretKey:
        if handle >= len(self._keys):
            raise _CallError("signer error", "invalid handle")
        return self._keys[handle]

    def _keep(self, key: SecretKey) -> int:
        self._keys.append(key)
        return len(self._keys) - 1

    def _room(self) -> None:
        if len(self._keys) >= MAX_KEYS:
            raise _CallError("signer error", f"a session holds at most {MAX_KEYS} keys")


def _report(exc: Exception) -> None:
    """Say where a bug was met; its text and values stay inside, they may hold a key."""
    where = " < ".join(f"{frame.name}:{frame.lineno}" for frame in reversed(extract_tb(exc.__traceback__)))
    say(f"internal error: {type(exc).__name__} in {where}")


def _capital(text: str) -> str:
    """The reference writes `Proof of possession is not supported`."""
    return text[:1].upper() + text[1:]
