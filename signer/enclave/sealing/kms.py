"""Sealing by AWS KMS: what only an image whose measurement the key policy accepts can open; section 5 of the enclave
specification.

Two kinds of blob are read. The legacy one is KMS's ciphertext itself, as the reference makes it: KMS sees the key, and
nothing binds the blob to its address. Version 1 (`blob`) holds a key that never left an enclave. Legacy is written
unless the session asked for version 1, the key has marks, or the image is strict; a strict image refuses legacy blobs.
"""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from signer.crypto.interface import SecretKey
from signer.enclave.kms.client import Access, Clock, KmsClient, KmsError
from signer.enclave.kms.retries import Breaker
from signer.enclave.kms.sigv4 import Credentials
from signer.enclave.kms.transport import Transport
from signer.enclave.recipient import Recipient
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.blob import (
    DEVELOPMENT_MAGIC,
    MAX_WRAPPED,
    BlobError,
    encryption_context,
    is_version_1,
    open_key,
    parse,
    seal,
)
from signer.enclave.sealing.interface import SealedKey, SealingError
from signer.rpc.messages import SEAL_V1, Initialize

_REGION = re.compile(r"[a-z]{2,5}(-[a-z]+){1,3}-[0-9]{1,2}")
_ACCESS_KEY_ID = re.compile(r"[A-Za-z0-9_]{1,128}")
_PRINTABLE = re.compile(r"[\x21-\x7e]{1,16384}")  # of a secret or a token: it becomes part of a header
_KEY_ID = re.compile(r"[A-Za-z0-9:/_.-]{1,2048}")
_SUFFIXES = (("cn-", "amazonaws.com.cn"), ("eusc-", "amazonaws.eu"))
_SUFFIX = "amazonaws.com"
_ERROR = "encryption error"  # the outermost message of the reference


def kms_host(region: str) -> str:
    """The name of KMS in *region*, section 3.1. The host chooses the region, so it must not become another domain."""
    suffix = next((suffix for prefix, suffix in _SUFFIXES if region.startswith(prefix)), _SUFFIX)
    return f"kms.{region}.{suffix}"


class KmsSealing:
    """Seals by KMS; the sessions share connections, the breaker and the recipient.

    *make_transport* opens the connections to a host name; `aclose` closes them. *strict* is the image's SEAL_STRICT,
    *kms_key* its KMS_KEY: the host chooses credentials and key, so it could have an imported key sealed under a KMS key
    of its own, and open that elsewhere. An image that has the ARN seals and opens under that key alone.
    """

    name = "kms"

    def __init__(
        self,
        *,
        recipient: Recipient,
        make_transport: Callable[[str], Transport],
        clock: Clock,
        strict: bool = False,
        kms_key: str | None = None,
    ) -> None:
        self._kms_key = kms_key
        self.takes_unencrypted = not strict
        self._strict = strict
        self._recipient = recipient
        self._make_transport = make_transport
        self._clock = clock
        self._breaker = Breaker()
        self._transports: dict[str, Transport] = {}  # by host

    def session(self, credentials: Initialize) -> "KmsSealer":
        """The sealer of one session; raises `SealingError` for credentials that cannot work."""
        client = KmsClient(
            access_of(credentials, self._kms_key),
            transport=self._transport,
            recipient=self._recipient,
            clock=self._clock,
            breaker=self._breaker,
        )
        return KmsSealer(client, strict=self._strict, version_1=credentials.seal == SEAL_V1, kms_key=self._kms_key)

    async def aclose(self) -> None:
        """Close the connections that are kept."""
        for transport in self._transports.values():
            await transport.aclose()

    def _transport(self, region: str) -> Transport:
        host = kms_host(region)
        if host not in self._transports:
            self._transports[host] = self._make_transport(host)
        return self._transports[host]


class KmsSealer:
    """Seals and opens keys with one session's credentials."""

    def __init__(self, client: KmsClient, *, strict: bool, version_1: bool, kms_key: str | None) -> None:
        self._client = client
        self._kms_key = kms_key
        self._strict = strict
        self._version_1 = version_1

    async def seal(self, key: SecretKey, *, marks: str | None = None) -> bytes:
        if self._strict or self._version_1 or marks is not None:  # a legacy blob has no place for marks
            return await self._seal_version_1(key, marks)
        with _asking_kms():
            blob = await self._client.encrypt(_plaintext.encode(key))
        return _legacy(blob)

    async def open(self, blob: bytes) -> SecretKey:
        if blob.startswith(DEVELOPMENT_MAGIC):
            raise BlobError("format", "this key was sealed for development: an enclave image never opens it")
        if is_version_1(blob):
            return await self._open_version_1(blob)
        if self._strict:
            raise SealingError(
                "legacy blob refused",
                "this image opens keys of version 1 only: reseal this one with an image that is not strict",
            )
        return await self._open_legacy(blob)

    def marks(self, blob: bytes) -> str | None:
        return parse(blob).marks if is_version_1(blob) else None

    async def reseal(self, blob: bytes) -> SealedKey:
        key = await self.open(blob)
        try:
            return SealedKey(await self._seal_version_1(key, self.marks(blob)), key)
        except BaseException:
            key.wipe()
            raise

    def update(self, credentials: Initialize) -> None:
        self._client.access = access_of(credentials, self._kms_key)
        self._version_1 = self._version_1 or credentials.seal == SEAL_V1  # never back to blobs that bind less

    async def _seal_version_1(self, key: SecretKey, marks: str | None) -> bytes:
        context = encryption_context(str(key.public_key.hash))
        with _asking_kms():
            data_key = await self._client.generate_data_key(context)
        try:
            return seal(key, data_key.plain, data_key.wrapped, marks=marks)
        finally:
            _wipe(data_key.plain)

    async def _open_version_1(self, blob: bytes) -> SecretKey:
        read = parse(blob)
        with _asking_kms():
            data_key = await self._client.decrypt(read.wrapped_data_key, context=encryption_context(read.address))
        try:
            return open_key(read, data_key)
        finally:
            _wipe(data_key)

    async def _open_legacy(self, blob: bytes) -> SecretKey:
        with _asking_kms():
            plaintext = await self._client.decrypt(_legacy(blob))
        try:
            return _plaintext.decode(bytes(plaintext))
        finally:
            _wipe(plaintext)


@contextmanager
def _asking_kms() -> Iterator[None]:
    """What KMS refuses is told behind the reference's message."""
    try:
        yield
    except KmsError as exc:
        raise SealingError(_ERROR, *exc.chain) from exc


def _legacy(blob: bytes) -> bytes:
    """*blob*, of a length that KMS gives and takes: one that would not open again must not be handed out either."""
    if not 0 < len(blob) <= MAX_WRAPPED:
        raise BlobError("format", f"a sealed key of AWS KMS has 1 to {MAX_WRAPPED} bytes, not {len(blob)}")
    return blob


def access_of(credentials: Initialize, kms_key: str | None = None) -> Access:
    """What to ask KMS with; raises `SealingError`, which names the field and never shows a secret.

    *kms_key* is the only key to ask for, if there is one.
    """
    _check("region", credentials.region, _REGION)
    _check("encryption_key_id", credentials.encryption_key_id, _KEY_ID)
    if kms_key not in (None, credentials.encryption_key_id):
        raise SealingError(
            _ERROR, f"Initialize: encryption_key_id: this image seals under {kms_key} alone, configure that ARN"
        )
    _check("access_key_id", credentials.access_key_id, _ACCESS_KEY_ID)
    _check("secret_access_key", credentials.secret_access_key, _PRINTABLE, shown=False)
    if credentials.session_token is not None:
        _check("session_token", credentials.session_token, _PRINTABLE, shown=False)
    return Access(
        credentials=Credentials(
            access_key_id=credentials.access_key_id,
            secret_access_key=credentials.secret_access_key,
            session_token=credentials.session_token,
        ),
        region=credentials.region,
        key_id=credentials.encryption_key_id,
    )


def _check(name: str, value: str, pattern: re.Pattern[str], *, shown: bool = True) -> None:
    if pattern.fullmatch(value):
        return
    what = f"{value[:64]!r} is not one" if shown and value else "it is empty" if not value else "it is malformed"
    raise SealingError(_ERROR, f"Initialize: {name}: {what}")


def _wipe(secret: bytearray) -> None:
    secret[:] = bytes(len(secret))
