"""What this enclave says of itself, and what is sealed to it; sections 7.2 and 7.4 of the enclave specification.

One object for the process: import keys and the limit of documents are shared by all sessions. An import key is used up
by the first message sealed to it, whether that opens or not, and dies by itself after ten minutes.
"""

from collections import deque
from collections.abc import Callable
from typing import NoReturn

import trio

from signer.attestation import claims, sealed
from signer.attestation.claims import Claims, ClaimsError
from signer.enclave.entropy import Entropy
from signer.enclave.import_keys import ImportKey, ImportKeys
from signer.enclave.nsm.interface import Nsm, NsmError
from signer.rpc.messages import Attest

MAX_RATE = 5  # documents for `Attest` in one second
_SWEEP = 60.0  # seconds between two looks for keys whose time is over; each use looks too


class AttestorError(Exception):
    """No document, or nothing opened; *chain* is what the host is told, outermost message first."""

    def __init__(self, *chain: str) -> None:
        super().__init__(": ".join(chain))
        self.chain = chain


class Attestor:
    """Makes documents in the name of *boot_id*, and opens what was sealed to the keys in them."""

    def __init__(
        self, nsm: Nsm, *, boot_id: bytes, entropy: Entropy, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self.boot_id = boot_id
        self._nsm = nsm
        self._entropy = entropy
        self._clock = clock
        self._import_keys = ImportKeys()
        self._turns = trio.Lock()  # first come, first served
        self._recent: deque[float] = deque(maxlen=MAX_RATE)  # times of the last documents for `Attest`

    @property
    def outstanding(self) -> int:
        """How many keys may still be sealed to."""
        return len(self._import_keys)

    async def attest(self, call: Attest) -> bytes:
        """The document that *call* asks for; raises `AttestorError`."""
        await self._turn()
        said = Claims(purpose=call.purpose, boot_id=self.boot_id, caller_data=call.user_data)
        if call.purpose != claims.IMPORT:
            return await self._document(said, call.nonce)
        key = await self._fresh_key()
        try:
            document = await self._document(said, call.nonce, key.subject_public_key_info)
        except BaseException:
            key.wipe()
            raise
        key.vouched_by(document)
        self._import_keys.add(key, self._clock())
        return document

    async def attest_key(self, nonce: bytes, address: str, marks: str | None) -> bytes:
        """A document that says that the key of *address* is here; raises `AttestorError`."""
        try:
            said = Claims(purpose=claims.KEY, boot_id=self.boot_id, address=address, marks=marks)
        except ClaimsError as exc:  # marks of a blob whose maker was no signer of ours
            raise AttestorError("attestation error", str(exc)) from exc
        return await self._document(said, nonce)

    def open(self, public_key: bytes, enc: bytes, ciphertext: bytes, address: str, marks: str | None = None) -> bytes:
        """What was sealed to *public_key* for *address*; the key is used up. Raises `AttestorError`."""
        key = self._import_keys.take(public_key, self._clock())
        if key is None:
            raise AttestorError("import error", "unknown import key")
        try:
            bound_to = sealed.info_of_digest(key.document_sha256, address, marks)
            return sealed.open_(key.secret, enc, ciphertext, bound_to)
        except sealed.SealedError:
            raise AttestorError("import error", "decryption failed") from None
        finally:
            key.wipe()

    async def sweep(self) -> NoReturn:
        """Wipe import keys when their time is over, also where nobody asks for anything any more."""
        while True:
            await trio.sleep(_SWEEP)
            self._import_keys.expire(self._clock())

    async def _turn(self) -> None:
        """Wait until one more document is within the limit; the session that asked waits, and nobody else."""
        async with self._turns:
            if len(self._recent) == MAX_RATE:
                await trio.sleep(max(0.0, self._recent[0] + 1.0 - self._clock()))
            self._recent.append(self._clock())

    async def _fresh_key(self) -> ImportKey:
        try:
            return ImportKey(await self._entropy())
        except NsmError as exc:
            raise AttestorError("attestation error", "no random bytes", str(exc)) from exc

    async def _document(self, said: Claims, nonce: bytes, public_key: bytes | None = None) -> bytes:
        try:
            return await self._nsm.attest(user_data=claims.encode(said), nonce=nonce, public_key=public_key)
        except NsmError as exc:
            raise AttestorError("attestation error", str(exc)) from exc
