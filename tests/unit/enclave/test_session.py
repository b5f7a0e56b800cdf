"""The rules of a session in the enclave, as a table; sealing for development."""

import stat
from pathlib import Path

import pytest

from signer.crypto import generate_secret_key, load_secret_key, verify, verify_possession
from signer.enclave import session as session_module
from signer.enclave.entropy import MixedEntropy
from signer.enclave.sealing.interface import SealingError
from signer.enclave.sealing.local import KeyFileError, LocalSealing, load_or_create_key_file
from signer.enclave.sealing.none import NoSealing
from signer.enclave.session import Session
from signer.rpc._cbor import dumps, loads
from signer.rpc.messages import (
    Call,
    Created,
    Generate,
    GenerateAndImport,
    Import,
    Imported,
    ImportUnencrypted,
    Initialize,
    ProvePossession,
    PublicKeyFrom,
    PublicKeyOf,
    RemoteError,
    Reseal,
    Result,
    Sign,
    SignWith,
    decode_reply,
    encode_call,
)
from signer.tezos.keys import Curve, Signature
from tests.attested.nsm import FakeNsm

SEALING = LocalSealing(bytes(32))


async def ask(session: Session, call: Call) -> Result:
    return decode_reply(call, await session.answer(encode_call(call)))


async def opened() -> Session:
    session = Session(SEALING)
    assert await ask(session, Initialize(access_key_id="a", secret_access_key="b")) is None
    return session


@pytest.mark.parametrize("curve", list(Curve))
async def test_every_call(curve: Curve) -> None:
    session = await opened()
    created = await ask(session, GenerateAndImport(curve))
    assert isinstance(created, Created)
    assert created.handle == 0
    key = created.public_key
    assert await ask(session, PublicKeyOf(0)) == key
    assert await ask(session, PublicKeyFrom(created.encrypted_private_key)) == key
    for call in (Sign(0, b"message", 2), SignWith(created.encrypted_private_key, b"message", 255)):
        signature = await ask(session, call)
        assert isinstance(signature, Signature)
        assert verify(key, b"message", signature)
    assert await ask(session, Import(created.encrypted_private_key)) == Imported(key, 1)
    generated = await ask(session, Generate(curve))
    assert isinstance(generated, Created)
    assert generated.handle is None
    assert await ask(session, Import(generated.encrypted_private_key)) == Imported(generated.public_key, 2)
    unencrypted = await ask(session, ImportUnencrypted(curve, bytes(range(1, 33))))
    assert isinstance(unencrypted, Created)
    assert unencrypted.public_key == load_secret_key(curve, bytes(range(1, 33))).public_key
    assert unencrypted.handle == session.number_of_keys - 1 == 3


async def test_possession() -> None:
    session = await opened()
    key = await ask(session, GenerateAndImport(Curve.BLS12_381))
    other = await ask(session, GenerateAndImport(Curve.BLS12_381))
    assert isinstance(key, Created)
    assert isinstance(other, Created)
    proof = await ask(session, ProvePossession(0))
    assert isinstance(proof, Signature)
    assert verify_possession(key.public_key, proof)
    over = await ask(session, ProvePossession(0, other.public_key.data))
    assert isinstance(over, Signature)
    assert verify_possession(key.public_key, over, over=other.public_key)


@pytest.mark.parametrize(
    ("call", "chain"),
    [
        (Sign(9, b"", 2), "signer error: invalid handle"),
        (PublicKeyOf(2**63), "signer error: invalid handle"),
        (ProvePossession(0), "signer error: Proof of possession is not supported"),
        (Sign(1, b"", 0), "signer error: Signing version 0 is not defined for BLS keys"),
        (Initialize(), "already initialized"),
        (Import(b"junk"), "encryption error: format: this is not a blob"),
        (Import(b"TZSB\x01"), "encryption error: format: this blob was sealed by an enclave image"),
        (ImportUnencrypted(Curve.P256, bytes(32)), "signer error: the P256 secret key is not below the order"),
    ],
)
async def test_refusals_leave_the_session_as_it_is(call: Call, chain: str) -> None:
    session = await opened()
    await ask(session, GenerateAndImport(Curve.ED25519))
    await ask(session, GenerateAndImport(Curve.BLS12_381))
    with pytest.raises(RemoteError, match=chain):
        await ask(session, call)
    assert isinstance(await ask(session, Sign(1, b"still there", 2)), Signature)


async def test_the_first_call_is_initialize() -> None:
    session = Session(SEALING)
    for call in (Sign(0, b"", 2), Generate(Curve.P256), PublicKeyOf(0)):
        with pytest.raises(RemoteError, match="^uninitialized$"):
            await ask(session, call)
    reply = loads(await session.answer(b"\xff\xff"))
    assert isinstance(reply, dict)
    assert "malformed CBOR" in reply["Err"]["message"]


async def test_version_0_is_fine_for_other_curves() -> None:
    session = await opened()
    created = await ask(session, GenerateAndImport(Curve.SECP256K1))
    assert isinstance(created, Created)
    signature = await ask(session, Sign(0, b"m", 0))
    assert isinstance(signature, Signature)
    assert verify(created.public_key, b"m", signature)


async def test_keys_are_limited_and_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_KEYS", 2)
    session = await opened()
    blobs = []
    for _ in range(2):
        created = await ask(session, GenerateAndImport(Curve.ED25519))
        assert isinstance(created, Created)
        blobs.append(created.encrypted_private_key)
    for call in (GenerateAndImport(Curve.P256), Import(blobs[0]), ImportUnencrypted(Curve.P256, bytes(31) + b"\1")):
        with pytest.raises(RemoteError, match="at most 2 keys"):
            await ask(session, call)
    kept = list(session._keys)
    session.close()
    assert session.number_of_keys == 0
    assert not any(any(held.key.secret_bytes()) for held in kept)
    with pytest.raises(RemoteError, match="uninitialized"):
        await ask(session, PublicKeyOf(0))


@pytest.mark.parametrize("curve", list(Curve))
async def test_entropy_makes_the_keys(curve: Curve) -> None:
    async def entropy() -> bytes:
        return b"\7" * 32

    session = Session(SEALING, entropy=entropy)
    await ask(session, Initialize())
    for call in (GenerateAndImport(curve), Generate(curve)):
        created = await ask(session, call)
        assert isinstance(created, Created)
        assert created.public_key == generate_secret_key(curve, lambda count: b"\7" * count).public_key


@pytest.mark.parametrize("curve", [Curve.P256, Curve.SECP256K1])
@pytest.mark.parametrize("bad", [bytes(32), b"\xff" * 32])
async def test_bytes_that_are_no_scalar_are_drawn_again(curve: Curve, bad: bytes) -> None:
    draws = [bad, bad, bytes(31) + b"\5"]

    async def entropy() -> bytes:
        return draws.pop(0)

    session = Session(SEALING, entropy=entropy)
    await ask(session, Initialize())
    created = await ask(session, GenerateAndImport(curve))
    assert isinstance(created, Created)
    assert created.public_key == load_secret_key(curve, bytes(31) + b"\5").public_key
    assert draws == []


async def test_no_key_without_random_bytes() -> None:
    """The module fails: an error of that call, and no key from the kernel alone in its place."""
    session = Session(SEALING, entropy=MixedEntropy(FakeNsm(failures={1: "InternalError"})))
    await ask(session, Initialize())
    with pytest.raises(RemoteError, match="^signer error: no random bytes: InternalError"):
        await ask(session, GenerateAndImport(Curve.ED25519))
    assert session.number_of_keys == 0
    assert isinstance(await ask(session, GenerateAndImport(Curve.ED25519)), Created)


async def test_an_update_keeps_the_keys() -> None:
    taken: list[Initialize] = []

    class Watched(LocalSealing):
        def update(self, credentials: Initialize) -> None:
            if not credentials.access_key_id:
                raise SealingError("encryption error", "no credentials")
            taken.append(credentials)

    session = Session(Watched(bytes(32)))
    await ask(session, Initialize(access_key_id="a", update=True))  # opens a session as any other
    assert taken == []
    await ask(session, GenerateAndImport(Curve.ED25519))
    await ask(session, Initialize(access_key_id="b", update=True))
    assert [one.access_key_id for one in taken] == ["b"]
    with pytest.raises(RemoteError, match="no credentials"):
        await ask(session, Initialize(update=True))
    with pytest.raises(RemoteError, match="^already initialized$"):
        await ask(session, Initialize(access_key_id="c"))
    assert isinstance(await ask(session, Sign(0, b"still there", 2)), Signature)
    assert len(taken) == 1


@pytest.mark.parametrize("curve", list(Curve))
async def test_reseal_gives_another_blob_of_the_same_key(curve: Curve) -> None:
    session = await opened()
    key = load_secret_key(curve, bytes(range(1, 33)))
    for marks in (None, "arn:aws:dynamodb:us-west-2:1:table/marks"):
        blob = await SEALING.seal(key, marks=marks)
        resealed = await ask(session, Reseal(blob))
        assert isinstance(resealed, Created)
        assert (resealed.public_key, resealed.handle) == (key.public_key, None)
        assert resealed.encrypted_private_key != blob
        assert (await SEALING.open(resealed.encrypted_private_key)).public_key == key.public_key
        assert SEALING.marks(resealed.encrypted_private_key) == marks
    assert session.number_of_keys == 0
    with pytest.raises(RemoteError, match="format"):
        await ask(session, Reseal(b"junk"))


async def test_a_strict_image_takes_no_key_in_clear() -> None:
    class Strict(LocalSealing):
        takes_unencrypted = False

    session = Session(Strict(bytes(32)))
    await ask(session, Initialize())
    with pytest.raises(RemoteError, match="^legacy blob refused"):
        await ask(session, ImportUnencrypted(Curve.P256, bytes(31) + b"\1"))
    assert session.number_of_keys == 0
    assert isinstance(await ask(session, GenerateAndImport(Curve.P256)), Created)


# -- sealing


@pytest.mark.parametrize("curve", list(Curve))
async def test_a_sealed_key_opens_only_unchanged_and_under_its_key(curve: Curve) -> None:
    key = load_secret_key(curve, bytes(range(1, 33)))
    blob = await SEALING.seal(key, marks="arn:aws:dynamodb:us-west-2:1:table/marks")
    assert bytes(range(1, 33)) not in blob
    assert (await SEALING.open(blob)).public_key == key.public_key
    for position in range(len(blob)):
        changed = bytearray(blob)
        changed[position] ^= 1
        with pytest.raises(SealingError):
            await SEALING.open(bytes(changed))
    for end in range(len(blob)):
        with pytest.raises(SealingError):
            await SEALING.open(blob[:end])
    with pytest.raises(SealingError, match="another key file"):
        await LocalSealing(b"\1" * 32).open(blob)
    assert await SEALING.seal(key) != blob


async def test_the_address_is_bound() -> None:
    """Whoever holds the key file can seal anything, but not under another key's address."""
    first, second = (load_secret_key(Curve.P256, bytes(31) + bytes([number])) for number in (1, 2))

    class Liar:
        curve = first.curve
        public_key = second.public_key

        def secret_bytes(self) -> bytearray:
            return first.secret_bytes()

    blob = await SEALING.seal(Liar())  # type: ignore[arg-type]
    with pytest.raises(SealingError, match="address mismatch"):
        await SEALING.open(blob)


async def test_no_sealing_is_the_plaintext_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    sealing = NoSealing()
    key = load_secret_key(
        Curve.ED25519, bytes.fromhex("cfe0c48fe7530d3aba4f5b3a9b33073251691a83fbc1ab248db31c42ec2b9703")
    )
    blob = await sealing.seal(key)
    assert blob.hex() == "a167456432353531395820cfe0c48fe7530d3aba4f5b3a9b33073251691a83fbc1ab248db31c42ec2b9703"
    assert (await sealing.open(blob)).public_key == key.public_key
    assert sealing.marks(blob) is None
    assert capsys.readouterr().err.count("WARNING sealing is off") == 2
    with pytest.raises(SealingError, match="cannot be bound"):
        await sealing.seal(key, marks="arn")
    with pytest.raises(SealingError, match="no version 1"):
        await sealing.reseal(blob)
    for bad in (b"", dumps({"Rsa": b""}), dumps({"NistP256": bytes(32)}), dumps({"Bls": bytes(5)})):
        with pytest.raises(SealingError, match="deserialization error"):
            await sealing.open(bad)


def test_the_key_file(tmp_path: Path) -> None:
    path = tmp_path / "key"
    key = load_or_create_key_file(path)
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert load_or_create_key_file(path) == key
    path.chmod(0o644)
    with pytest.raises(KeyFileError, match="chmod 600"):
        load_or_create_key_file(path)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(KeyFileError, match="5 bytes instead of 32"):
        load_or_create_key_file(path)
    with pytest.raises(KeyFileError, match="cannot use"):
        load_or_create_key_file(tmp_path / "no" / "key")
