"""The key that KMS answers to, its documents and its renewal."""

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from trio.testing import MockClock

from signer.enclave.nsm.interface import NsmError
from signer.enclave.recipient import KEY_LIFE, Recipient, make_key
from signer.enclave.sealing.envelope import EnvelopeError
from tests.unit.enclave.kms.custody import PCR0, Module, envelope


def public(key: RSAPrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


class Maker:
    """Hands out keys that were made before; holds each back while *gate* is closed."""

    def __init__(self, keys: list[RSAPrivateKey]) -> None:
        self.keys = list(keys)
        self.made = 0
        self.gate = trio.Event()
        self.gate.set()

    async def __call__(self) -> RSAPrivateKey:
        self.made += 1
        key = self.keys.pop(0)
        await self.gate.wait()
        return key


async def test_a_document_for_each_call(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    module = Module()
    recipient = Recipient(module, make_key=Maker(rsa_keys))
    first, second = await recipient.addressee(), await recipient.addressee()
    assert first.document != second.document
    assert first.document[4:] == second.document[4:] == public(rsa_keys[0])
    assert len(first.document[4:]) == 294
    for addressee in (first, second):
        plaintext = addressee.open(envelope(public(rsa_keys[0]), b"secret"))
        assert isinstance(plaintext, bytearray)
        assert plaintext == b"secret"
        with pytest.raises(EnvelopeError, match="recipient_key"):
            addressee.open(envelope(public(rsa_keys[1]), b"secret"))
    assert "RSAPrivateKey" not in repr(first)


async def test_calls_at_the_start_share_one_key(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    maker = Maker(rsa_keys)
    maker.gate = trio.Event()
    recipient, documents = Recipient(Module(), make_key=maker), []

    async def ask() -> None:
        documents.append((await recipient.addressee()).document[4:])

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        maker.gate.set()
    assert documents == [public(rsa_keys[0])] * 5
    assert maker.made == 1


async def test_the_key_is_renewed_every_day(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    maker = Maker(rsa_keys)
    recipient = Recipient(Module(), make_key=maker)
    old = await recipient.addressee()
    assert KEY_LIFE == 24 * 60 * 60
    await trio.sleep(KEY_LIFE - 1)
    assert (await recipient.addressee()).document[4:] == public(rsa_keys[0])
    await trio.sleep(1)
    maker.gate = trio.Event()
    renewed = []

    async def ask() -> None:
        renewed.append((await recipient.addressee()).document[4:])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        assert (await recipient.addressee()).document[4:] == public(rsa_keys[0]), "nobody waits for the renewal"
        assert renewed == []
        maker.gate.set()
    assert renewed == [public(rsa_keys[1])]
    assert (await recipient.addressee()).document[4:] == public(rsa_keys[1])
    assert maker.made == 2
    assert old.open(envelope(public(rsa_keys[0]), b"x")) == b"x", "a call that runs finishes with its own key"


async def test_a_cancelled_renewal_is_done_by_the_next_call(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    maker = Maker([rsa_keys[0], rsa_keys[0], rsa_keys[1]])
    recipient = Recipient(Module(), make_key=maker)
    await recipient.addressee()
    await trio.sleep(KEY_LIFE)
    maker.gate = trio.Event()
    with trio.move_on_after(1):
        await recipient.addressee()
    maker.gate.set()
    assert (await recipient.addressee()).document[4:] == public(rsa_keys[1])


async def test_the_measurement() -> None:
    module = Module()
    recipient = Recipient(module)
    module.fails = True
    assert await recipient.pcr0() is None
    with pytest.raises(NsmError):
        await Recipient(module, make_key=make_key).addressee()
    module.fails = False
    assert await recipient.pcr0() == PCR0
    module.fails = True
    assert await recipient.pcr0() == PCR0


async def test_a_real_key() -> None:
    key = await make_key()
    assert key.key_size == 2048
    assert key.public_key().public_numbers().e == 65537
