"""Sealing by KMS: both kinds of blob, what is bound to what, and the chains that the host is told."""

import base64
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from trio.testing import MockClock

from signer.crypto import load_secret_key
from signer.crypto.interface import SecretKey
from signer.enclave.kms.transport import Transport, tls_context
from signer.enclave.recipient import Recipient
from signer.enclave.sealing import _plaintext, blob
from signer.enclave.sealing import kms as kms_module
from signer.enclave.sealing.interface import Sealer, SealingError
from signer.enclave.sealing.kms import KmsSealing, kms_host
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.session import Session
from signer.rpc.messages import GenerateAndImport, Import, Initialize, RemoteError, Sign, decode_reply, encode_call
from signer.tezos.keys import Curve
from tests.unit.enclave.kms.custody import ARN, PCR0, Custody, FixedClock, Module, fault
from tests.unit.enclave.kms.peer import Peer, authority

INITIALIZE = Initialize(
    access_key_id="AKIDEXAMPLE", secret_access_key="secret", encryption_key_id="alias/baker", region="us-west-2"
)
VERSION_1 = replace(INITIALIZE, seal="v1")
MARKS = "arn:aws:dynamodb:us-west-2:123456789012:table/marks"
SECRET = bytes(range(1, 33))


class World:
    """A sealing, the KMS behind it and what it was connected to."""

    def __init__(self, nursery: trio.Nursery, key: RSAPrivateKey, *, strict: bool, kms_key: str | None) -> None:
        self.custody = Custody()
        self.hosts: list[str] = []
        self.peer = Peer(nursery, self.custody.script)
        self._key = key
        self.sealing = KmsSealing(
            recipient=Recipient(Module(), make_key=self._make_key),
            make_transport=self._make_transport,
            clock=FixedClock(),
            strict=strict,
            kms_key=kms_key,
        )

    def session(self, credentials: Initialize = INITIALIZE) -> Sealer:
        return self.sealing.session(credentials)

    async def _make_key(self) -> RSAPrivateKey:
        await trio.lowlevel.checkpoint()
        return self._key

    def _make_transport(self, host: str) -> Transport:
        self.hosts.append(host)
        return Transport(host, self.peer.connect, tls_context(authority().pem), place="vsock:3:8000")


@asynccontextmanager
async def world(
    rsa_keys: list[RSAPrivateKey], *, strict: bool = False, kms_key: str | None = None
) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        here = World(nursery, rsa_keys[0], strict=strict, kms_key=kms_key)
        yield here
        await here.sealing.aclose()
        nursery.cancel_scope.cancel()


def key_of(curve: Curve = Curve.ED25519, secret: bytes = SECRET) -> SecretKey:
    return load_secret_key(curve, secret)


async def chain(opening: Callable[[bytes], object], data: bytes) -> tuple[str, ...]:
    """The messages of an opening that fails."""
    with pytest.raises(SealingError) as caught:
        await opening(data)  # type: ignore[misc]
    return caught.value.chain


@pytest.mark.parametrize("curve", list(Curve))
async def test_legacy_blobs_are_those_of_the_reference(
    curve: Curve, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        sealer, key = here.session(), key_of(curve)
        sealed = await sealer.seal(key)
        assert here.custody.blobs[sealed] == (_plaintext.encode(key), None)
        assert (await sealer.open(sealed)).public_key == key.public_key
        assert sealer.marks(sealed) is None
        assert here.custody.operations() == ["Encrypt", "Decrypt"]
        assert all(request.members["KeyId"] == "alias/baker" for request in here.custody.requests)
        assert "EncryptionContext" not in here.custody.requests[1].members


async def test_a_blob_that_would_not_open_again_is_not_handed_out(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    def too_long(_operation: str, _members: dict[str, Any]) -> dict[str, Any]:
        return {"KeyId": ARN, "CiphertextBlob": base64.b64encode(bytes(6145)).decode()}

    async with world(rsa_keys) as here:
        sealer = here.session()
        here.custody.replies = [too_long]
        assert (await chain(lambda _: sealer.seal(key_of()), b""))[:2] == ("encryption error", "format")


@pytest.mark.parametrize("curve", list(Curve))
@pytest.mark.parametrize("marks", [None, MARKS])
@pytest.mark.parametrize("strict", [False, True])
async def test_version_1(
    curve: Curve, marks: str | None, strict: bool, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    """KMS never sees the key, nor anything derived from it but the address."""
    async with world(rsa_keys, strict=strict) as here:
        sealer, key = here.session(VERSION_1), key_of(curve)
        sealed = await sealer.seal(key, marks=marks)
        assert sealed.startswith(b"TZSB\x01")
        assert sealer.marks(sealed) == marks
        assert (await sealer.open(sealed)).public_key == key.public_key
        assert here.custody.operations() == ["GenerateDataKey", "Decrypt"]
        context = {"tezos-signer:format": "1", "tezos-signer:pkh": str(key.public_key.hash)}
        assert [request.members["EncryptionContext"] for request in here.custody.requests] == [context, context]
        assert all(plaintext != _plaintext.encode(key) for plaintext, _ in here.custody.blobs.values())


async def test_who_writes_version_1(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        sealer = here.session()
        assert (await sealer.seal(key_of()))[:4] == b"\1\2\2\0"
        assert (await sealer.seal(key_of(), marks=MARKS))[:5] == b"TZSB\1", "a legacy blob would lose the marks"
        sealer.update(VERSION_1)
        assert (await sealer.seal(key_of()))[:5] == b"TZSB\1"
        sealer.update(INITIALIZE)
        assert (await sealer.seal(key_of()))[:5] == b"TZSB\1", "new credentials don't take it back"
    async with world(rsa_keys, strict=True) as here:
        assert (await here.session().seal(key_of()))[:5] == b"TZSB\1"


async def test_reseal(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        sealer, key = here.session(), key_of()
        for marks in (None, MARKS):
            old = await sealer.seal(key, marks=marks)
            new = await sealer.reseal(old)
            assert new.key.public_key == key.public_key
            assert new.blob[:5] == b"TZSB\1"
            assert new.blob != old
            assert sealer.marks(new.blob) == marks
            assert (await sealer.open(new.blob)).public_key == key.public_key


async def test_a_reseal_that_fails_wipes_the_key(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[SecretKey] = []
    wiped: list[SecretKey] = []
    async with world(rsa_keys) as here:
        sealer = here.session()
        sealed, open_ = await sealer.seal(key_of()), sealer.open

        async def opening(data: bytes) -> SecretKey:
            opened.append(await open_(data))
            here.custody.replies = [fault("DisabledException")]
            return opened[-1]

        monkeypatch.setattr(sealer, "open", opening)
        monkeypatch.setattr(type(key_of()), "wipe", lambda self: wiped.append(self))
        with pytest.raises(SealingError, match="DisabledException"):
            await sealer.reseal(sealed)
    assert len(opened) == 1
    assert wiped == opened


async def test_a_strict_image(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        legacy = await here.session().seal(key_of())
        assert here.sealing.takes_unencrypted
    async with world(rsa_keys, strict=True) as here:
        assert not here.sealing.takes_unencrypted
        sealer = here.session()
        for opening in (sealer.open, sealer.reseal):
            assert (await chain(opening, legacy))[0] == "legacy blob refused"
        assert here.custody.requests == []


async def test_development_stays_outside_and_the_image_s_inside(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    local = LocalSealing(bytes(32))
    async with world(rsa_keys) as here:
        sealer = here.session()
        ours, theirs = await here.session(VERSION_1).seal(key_of()), await local.seal(key_of())
        for data in (theirs, b"TZSD\x02", b"TZSD"):
            assert (await chain(sealer.open, data))[:2] == ("encryption error", "format")
            assert (await chain(sealer.reseal, data))[2].startswith("this key was sealed for development")
        assert (await chain(local.open, ours))[2] == "this blob was sealed by an enclave image"
        assert here.custody.operations() == ["GenerateDataKey"], "KMS is not asked about them"


@pytest.mark.parametrize("data", [b"", bytes(6145), b"TZSB", b"TZSB\x02", b"TZSB\x01\0\0"])
async def test_what_is_no_blob(data: bytes, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        assert (await chain(here.session().open, data))[:2] == ("encryption error", "format")
        assert here.custody.requests == []


async def test_a_swapped_blob_never_opens(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    """The host puts the header of one key before the body of another, or changes the address."""
    async with world(rsa_keys) as here:
        sealer = here.session(VERSION_1)
        keys = [key_of(secret=bytes(31) + bytes([number])) for number in (1, 2)]
        first, second = [await sealer.seal(key) for key in keys]
        ends = [len(blob.parse(sealed).prefix) for sealed in (first, second)]
        glued = first[: ends[0]] + second[ends[1] :]
        assert (await chain(sealer.open, glued))[:2] == ("encryption error", "decrypt")
        addresses = [str(key.public_key.hash).encode() for key in keys]
        renamed = first.replace(addresses[0], addresses[1])
        refused = await chain(sealer.open, renamed)
        assert refused[:2] == ("encryption error", "SDK error")
        assert refused[2].startswith("InvalidCiphertextException")
        assert "belongs to another address" in refused[3]


async def test_every_single_byte_change(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        sealer = here.session(VERSION_1)
        sealed = await sealer.seal(key_of())
        for position in range(len(sealed)):
            changed = sealed[:position] + bytes([sealed[position] ^ 1]) + sealed[position + 1 :]
            await chain(sealer.open, changed)


async def test_chains(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        legacy, sealed = await here.session().seal(key_of()), await here.session(VERSION_1).seal(key_of())
        for data in (legacy, sealed):
            here.custody.replies = [fault("AccessDeniedException", "no")]
            outer, kind, name, cause = await chain(here.session().open, data)
            assert (outer, kind, name) == ("encryption error", "SDK error", "AccessDeniedException: no")
            assert PCR0.hex() in cause
            here.custody.replies = [fault("ExpiredTokenException", "is expired")]
            refused = await chain(here.session().open, data)
            assert refused[2] == "ExpiredTokenException: is expired"
        for credentials in (INITIALIZE, VERSION_1):
            here.custody.replies = [fault("DisabledException", f"{ARN} is disabled.")]
            with pytest.raises(SealingError, match="encryption error: SDK error: DisabledException.*custody key dis"):
                await here.session(credentials).seal(key_of())
        here.custody.blobs[legacy] = (b"no key", None)
        assert (await chain(here.session().open, legacy))[0] == "deserialization error"


async def test_credentials_are_replaced_while_the_session_lives(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        sealer = here.session()
        sealed = await sealer.seal(key_of())
        sealer.update(replace(INITIALIZE, access_key_id="AKIDNEW", session_token="token"))
        await sealer.open(sealed)
        with pytest.raises(SealingError, match="secret_access_key"):
            sealer.update(replace(INITIALIZE, secret_access_key=""))
        await sealer.open(sealed)
        ids = [request.headers["authorization"].partition("/")[0][-7:] for request in here.custody.requests]
        assert ids == ["EXAMPLE", "AKIDNEW", "AKIDNEW"]


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("region", "", "it is empty"),
        ("region", "us-west-2.evil.example/", "is not one"),
        ("region", "evil", "is not one"),
        ("region", "US-WEST-2", "is not one"),
        ("encryption_key_id", "", "it is empty"),
        ("encryption_key_id", "a b", "is not one"),
        ("access_key_id", "", "it is empty"),
        ("access_key_id", "AKID/x", "is not one"),
        ("secret_access_key", "", "it is empty"),
        ("secret_access_key", "hidden\nvalue", "it is malformed"),
        ("session_token", "hidden\r\nHost: x", "it is malformed"),
        ("session_token", "", "it is empty"),
    ],
)
async def test_credentials_that_cannot_work(
    field: str, value: str, text: str, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        change: dict[str, Any] = {field: value}
        with pytest.raises(SealingError, match=f"encryption error: Initialize: {field}: .*{text}") as caught:
            here.session(replace(INITIALIZE, **change))
        assert "hidden" not in str(caught.value)


async def test_an_image_with_a_key_of_its_own_takes_no_other(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    """The parent names a KMS key that it may use itself, to open elsewhere what was imported or made here."""
    async with world(rsa_keys, kms_key=ARN) as here:
        for other in ("alias/baker", ARN.rpartition("/")[2], ARN.replace("123456789012", "666666666666"), ""):
            with pytest.raises(SealingError, match=f"encryption_key_id: .*(seals under {ARN} alone|empty)"):
                here.session(replace(INITIALIZE, encryption_key_id=other))
        sealer = here.session(replace(INITIALIZE, encryption_key_id=ARN))
        with pytest.raises(SealingError, match="alone"):
            sealer.update(INITIALIZE)
        await sealer.open(await sealer.seal(key_of()))
        assert {request.members["KeyId"] for request in here.custody.requests} == {ARN}


@pytest.mark.parametrize(
    ("region", "host"),
    [
        ("us-west-2", "kms.us-west-2.amazonaws.com"),
        ("us-gov-east-1", "kms.us-gov-east-1.amazonaws.com"),
        ("cn-north-1", "kms.cn-north-1.amazonaws.com.cn"),
        ("eusc-de-east-1", "kms.eusc-de-east-1.amazonaws.eu"),
        ("ap-southeast-10", "kms.ap-southeast-10.amazonaws.com"),
    ],
)
def test_hosts(region: str, host: str) -> None:
    assert kms_host(region) == host
    assert kms_module.access_of(replace(INITIALIZE, region=region)).region == region


async def test_sessions_share_connections_but_not_regions(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        for _ in range(3):
            await here.session().seal(key_of())
        assert here.peer.connections == 1
        elsewhere = here.session(replace(INITIALIZE, region="eu-west-1"))
        with pytest.raises(SealingError, match="the other side is not kms.eu-west-1.amazonaws.com"):
            await elsewhere.seal(key_of())
        assert here.hosts == ["kms.us-west-2.amazonaws.com", "kms.eu-west-1.amazonaws.com"]


async def test_secrets_are_wiped(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    wiped: list[bytearray] = []
    wipe = kms_module._wipe

    def watched(secret: bytearray) -> None:
        assert any(secret)
        wipe(secret)
        wiped.append(secret)

    monkeypatch.setattr(kms_module, "_wipe", watched)
    async with world(rsa_keys) as here:
        sealer = here.session()
        await sealer.open(await sealer.seal(key_of()))
        await sealer.open(await here.session(VERSION_1).seal(key_of()))
    assert [len(secret) for secret in wiped] == [43, 32, 32]
    assert not any(any(secret) for secret in wiped)


async def test_a_session_of_the_program(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    """Through the wire: a failing key leaves the session and its other keys as they are."""
    async with world(rsa_keys) as here:
        session = Session(here.sealing)
        for call in (VERSION_1, GenerateAndImport(Curve.BLS12_381)):
            decode_reply(call, await session.answer(encode_call(call)))
        here.custody.replies = [fault("InvalidCiphertextException")]
        bad = Import(b"\1\2\2\0x" + bytes(100))
        with pytest.raises(RemoteError) as caught:
            decode_reply(bad, await session.answer(encode_call(bad)))
        assert caught.value.chain.messages[:3] == ("encryption error", "SDK error", "InvalidCiphertextException")
        sign = Sign(0, b"message", 2)
        decode_reply(sign, await session.answer(encode_call(sign)))
