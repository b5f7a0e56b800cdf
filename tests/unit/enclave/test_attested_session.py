"""The calls around attestation through a session, as a host and an operator's machine see them."""

from datetime import UTC, datetime

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from signer.attestation import claims
from signer.attestation.claims import Claims
from signer.attestation.document import Document, Expected, verify
from signer.attestation.sealed import CREDENTIALS, info, raw_public_key, seal
from signer.crypto import load_secret_key
from signer.crypto import verify as verify_signature
from signer.crypto.interface import SecretKey
from signer.enclave import session as session_module
from signer.enclave.attestor import Attestor
from signer.enclave.entropy import MixedEntropy, kernel_entropy
from signer.enclave.sealing import _plaintext
from signer.enclave.sealing.local import LocalSealing
from signer.enclave.sealing.none import NoSealing
from signer.enclave.session import Session
from signer.rpc._cbor import dumps
from signer.rpc.messages import (
    Attest,
    Attested,
    AttestKey,
    Call,
    Created,
    GenerateAndImport,
    Import,
    Imported,
    ImportSealed,
    Initialize,
    InitializeSealed,
    PublicKeyOf,
    RemoteError,
    Result,
    Sign,
    decode_reply,
    encode_call,
    encode_credentials,
)
from signer.tezos.keys import Curve, Signature
from tests.attested.nsm import FakeNsm

SEALING = LocalSealing(bytes(32))
BOOT_ID = bytes(range(16))
NONCE = b"\5" * 32
ARN = "arn:aws:dynamodb:us-west-2:123456789012:table/marks"
SECRET = bytes(range(1, 33))


class Enclave:
    """A program with a module: sessions of one process."""

    def __init__(self) -> None:
        self.nsm = FakeNsm()
        self.now = 0.0
        self.attestor = Attestor(self.nsm, boot_id=BOOT_ID, entropy=kernel_entropy, clock=self._time)

    def _time(self) -> float:
        self.now += 1  # a second between any two calls: the limit of a second is tested elsewhere
        return self.now

    def session(self) -> Session:
        return Session(SEALING, attestor=self.attestor)

    def judged(self, reply: Result) -> Document:
        assert isinstance(reply, Attested)
        expected = Expected(nonce=NONCE, root_sha256=self.nsm.root_sha256)
        return verify(reply.document, expected, now=datetime.now(UTC))

    async def import_key(self, session: Session) -> tuple[bytes, bytes]:
        """The document of a fresh import key, and the key."""
        reply = await ask(session, Attest("import", NONCE))
        assert isinstance(reply, Attested)
        return reply.document, raw_public_key(self.judged(reply).public_key)


async def ask(session: Session, call: Call) -> Result:
    return decode_reply(call, await session.answer(encode_call(call)))


def sealed_for(key: bytes, document: bytes, address: str, plaintext: bytes, marks: str | None = None) -> ImportSealed:
    """What the operator's machine sends."""
    return ImportSealed(key, *seal(key, info(document, address, marks), plaintext), address, marks)


def secret_of(curve: Curve) -> tuple[SecretKey, str]:
    key = load_secret_key(curve, SECRET)
    return key, str(key.public_key.hash)


async def test_attest_before_and_after_initialize() -> None:
    enclave = Enclave()
    session = enclave.session()
    for _ in range(2):
        found = enclave.judged(await ask(session, Attest("session", NONCE, b"host")))
        assert claims.decode(found.user_data) == Claims(purpose="session", boot_id=BOOT_ID, caller_data=b"host")
        if session._sealer is None:
            assert await ask(session, Initialize()) is None


async def test_a_slow_module_that_is_asked_twice_does_not_outlast_the_host(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    """An import key is drawn, then vouched for; the host would give up the session, and its keys, after ten seconds."""
    enclave = Enclave()
    exchange = enclave.nsm._exchange

    async def slow(request: bytes) -> bytes:
        await trio.sleep(5.5)  # within the limit of one call of the module
        return await exchange(request)

    attestor = Attestor(enclave.nsm, boot_id=BOOT_ID, entropy=MixedEntropy(enclave.nsm))
    session = Session(SEALING, entropy=MixedEntropy(enclave.nsm), attestor=attestor)
    await ask(session, Initialize())
    monkeypatch.setattr(enclave.nsm, "_exchange", slow)
    began = trio.current_time()
    with pytest.raises(RemoteError, match=r"^signer error: not done within 9.5 s: the security module and AWS KMS"):
        await ask(session, Attest("import", NONCE))
    assert trio.current_time() - began == pytest.approx(9.5)
    assert attestor.outstanding == 0
    assert isinstance(await ask(session, GenerateAndImport(Curve.ED25519)), Created), "one question is in time"
    assert isinstance(await ask(session, Attest("session", NONCE)), Attested)


@pytest.mark.parametrize("marks", [None, ARN])
@pytest.mark.parametrize("curve", list(Curve))
async def test_a_sealed_key_is_imported(curve: Curve, marks: str | None) -> None:
    enclave = Enclave()
    session = enclave.session()
    await ask(session, Initialize())
    key, address = secret_of(curve)
    document, public = await enclave.import_key(session)
    created = await ask(session, sealed_for(public, document, address, _plaintext.encode(key), marks))
    assert isinstance(created, Created)
    assert (created.public_key, created.handle) == (key.public_key, 0)
    assert SEALING.marks(created.encrypted_private_key) == marks
    signature = await ask(session, Sign(0, b"message", 2))
    assert isinstance(signature, Signature)
    assert verify_signature(key.public_key, b"message", signature)
    assert await ask(session, Import(created.encrypted_private_key)) == Imported(key.public_key, 1)
    for handle in (0, 1):  # imported now, and opened from its blob
        found = enclave.judged(await ask(session, AttestKey(handle, NONCE)))
        expected = Claims(purpose="key", boot_id=BOOT_ID, address=address, marks=marks)
        assert claims.decode(found.user_data) == expected


async def test_the_key_may_be_asked_for_on_another_session() -> None:
    """The document is asked for before the operator goes away to seal; the connection may be a new one by then."""
    enclave = Enclave()
    first, second = enclave.session(), enclave.session()
    document, public = await enclave.import_key(first)
    first.close()
    await ask(second, Initialize())
    key, address = secret_of(Curve.ED25519)
    assert isinstance(await ask(second, sealed_for(public, document, address, _plaintext.encode(key))), Created)


async def test_a_message_is_good_once() -> None:
    enclave = Enclave()
    session = enclave.session()
    await ask(session, Initialize())
    key, address = secret_of(Curve.P256)
    document, public = await enclave.import_key(session)
    call = sealed_for(public, document, address, _plaintext.encode(key))
    await ask(session, call)
    with pytest.raises(RemoteError, match="^import error: unknown import key$"):
        await ask(session, call)
    assert session.number_of_keys == 1


KEY, ADDRESS = secret_of(Curve.ED25519)
OTHER = str(secret_of(Curve.P256)[0].public_key.hash)


@pytest.mark.parametrize(
    ("sealed_address", "sent_address", "plaintext", "text"),
    [
        (ADDRESS, OTHER, _plaintext.encode(KEY), "decryption failed"),
        (OTHER, OTHER, _plaintext.encode(KEY), "address mismatch"),
        ("tz1", "tz1", _plaintext.encode(KEY), "address mismatch"),
        (CREDENTIALS, CREDENTIALS, encode_credentials(Initialize()), "deserialization error: .*"),
        (ADDRESS, ADDRESS, b"", "deserialization error: .*"),
        (ADDRESS, ADDRESS, _plaintext.encode(KEY)[:-1], "deserialization error: .*"),
        (ADDRESS, ADDRESS, _plaintext.encode(KEY) + b"\0", "deserialization error: .*"),
        (ADDRESS, ADDRESS, dumps({"Ed25519": SECRET, "Bls": SECRET}), "deserialization error: .*"),
        (ADDRESS, ADDRESS, dumps({"NistP256": bytes(32)}), "deserialization error: .*"),
        (ADDRESS, ADDRESS, dumps(SECRET), "deserialization error: .*"),
    ],
)
async def test_what_is_refused_uses_the_key_up(
    sealed_address: str, sent_address: str, plaintext: bytes, text: str
) -> None:
    enclave = Enclave()
    session = enclave.session()
    await ask(session, Initialize())
    document, public = await enclave.import_key(session)
    enc, ciphertext = seal(public, info(document, sealed_address), plaintext)
    with pytest.raises(RemoteError, match=f"^import error: {text}$") as caught:
        await ask(session, ImportSealed(public, enc, ciphertext, sent_address))
    assert SECRET[4:12].decode("latin-1") not in str(caught.value)
    assert SECRET.hex()[8:16] not in str(caught.value)
    with pytest.raises(RemoteError, match="^import error: unknown import key$"):
        await ask(session, sealed_for(public, document, ADDRESS, _plaintext.encode(KEY)))
    assert session.number_of_keys == 0


async def test_other_marks_than_sealed_for_do_not_open() -> None:
    enclave = Enclave()
    session = enclave.session()
    await ask(session, Initialize())
    for sealed_marks, sent in ((ARN, None), (None, ARN), (ARN, ARN + "2")):
        document, public = await enclave.import_key(session)
        enc, ciphertext = seal(public, info(document, ADDRESS, sealed_marks), _plaintext.encode(KEY))
        with pytest.raises(RemoteError, match="^import error: decryption failed$"):
            await ask(session, ImportSealed(public, enc, ciphertext, ADDRESS, sent))


async def test_a_full_session_says_so_before_the_key_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_module, "MAX_KEYS", 1)
    enclave = Enclave()
    full, other = enclave.session(), enclave.session()
    await ask(full, Initialize())
    await ask(full, GenerateAndImport(Curve.P256))
    document, public = await enclave.import_key(full)
    call = sealed_for(public, document, ADDRESS, _plaintext.encode(KEY))
    with pytest.raises(RemoteError, match="at most 1 keys"):
        await ask(full, call)
    await ask(other, Initialize())
    assert isinstance(await ask(other, call), Created)


async def test_the_secrets_are_wiped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key that was sealed to after its use, the imported one wherever the import fails behind its opening."""
    enclave = Enclave()
    opened: list[SecretKey] = []
    decode = _plaintext.decode

    def watched(plaintext: bytes) -> SecretKey:
        opened.append(decode(plaintext))
        return opened[-1]

    monkeypatch.setattr(_plaintext, "decode", watched)
    unsealing = Session(NoSealing(), attestor=enclave.attestor)  # cannot bind a key to its marks
    await ask(unsealing, Initialize())
    for address, marks, text in ((OTHER, None, "address mismatch"), (ADDRESS, ARN, "cannot be bound")):
        document, public = await enclave.import_key(unsealing)
        kept = enclave.attestor._import_keys._kept[public].key
        assert any(kept.secret)
        with pytest.raises(RemoteError, match=text):
            await ask(unsealing, sealed_for(public, document, address, _plaintext.encode(KEY), marks))
        assert not any(kept.secret)
    assert len(opened) == 2
    assert not any(any(key.secret_bytes()) for key in opened)


# -- credentials


async def sealed_credentials(enclave: Enclave, session: Session, plaintext: bytes) -> InitializeSealed:
    document, public = await enclave.import_key(session)
    return InitializeSealed(public, *seal(public, info(document, CREDENTIALS), plaintext))


async def test_sealed_credentials_open_a_session() -> None:
    taken: list[Initialize] = []

    class Watched(LocalSealing):
        def session(self, credentials: Initialize) -> "Watched":
            taken.append(credentials)
            return self

        def update(self, credentials: Initialize) -> None:
            taken.append(credentials)

    enclave = Enclave()
    session = Session(Watched(bytes(32)), attestor=enclave.attestor)
    first = Initialize(access_key_id="a", secret_access_key="b", region="us-west-2", seal="v1")
    later = Initialize(access_key_id="c", secret_access_key="d", session_token="e", update=True)
    for credentials in (first, later):
        call = await sealed_credentials(enclave, session, encode_credentials(credentials))
        assert await ask(session, call) is None
        with pytest.raises(RemoteError, match="^import error: unknown import key$"):
            await ask(session, call)
    assert taken == [first, later]
    again = await sealed_credentials(enclave, session, encode_credentials(first))
    with pytest.raises(RemoteError, match="^already initialized$"):
        await ask(session, again)


@pytest.mark.parametrize("plaintext", [b"", b"\xff", dumps({"region": 1}), dumps(["hush"]), _plaintext.encode(KEY)[:9]])
async def test_sealed_credentials_that_are_none(plaintext: bytes) -> None:
    enclave = Enclave()
    session = enclave.session()
    with pytest.raises(RemoteError, match="^import error: deserialization error: ") as caught:
        await ask(session, await sealed_credentials(enclave, session, plaintext))
    assert "hush" not in str(caught.value)
    with pytest.raises(RemoteError, match="^uninitialized$"):
        await ask(session, PublicKeyOf(0))


async def test_a_key_is_no_credential() -> None:
    """What was sealed for an address doesn't open as credentials, nor the other way round."""
    enclave = Enclave()
    session = enclave.session()
    await ask(session, Initialize())
    document, public = await enclave.import_key(session)
    call = sealed_for(public, document, ADDRESS, _plaintext.encode(KEY))
    with pytest.raises(RemoteError, match="^import error: decryption failed$"):
        await ask(session, InitializeSealed(call.key, call.enc, call.ciphertext))
    credentials = await sealed_credentials(enclave, session, encode_credentials(Initialize()))
    with pytest.raises(RemoteError, match="^import error: decryption failed$"):
        await ask(session, ImportSealed(credentials.key, credentials.enc, credentials.ciphertext, ADDRESS))


# -- what is missing


async def test_calls_that_need_an_open_session() -> None:
    enclave = Enclave()
    session = enclave.session()
    document, public = await enclave.import_key(session)
    call = sealed_for(public, document, ADDRESS, _plaintext.encode(KEY))
    for early in (call, AttestKey(0, NONCE)):
        with pytest.raises(RemoteError, match="^uninitialized$"):
            await ask(session, early)
    await ask(session, Initialize())
    assert isinstance(await ask(session, call), Created)  # the early one was no use of the key
    with pytest.raises(RemoteError, match="^signer error: invalid handle$"):
        await ask(session, AttestKey(1, NONCE))


async def test_a_program_without_a_module_says_so() -> None:
    session = Session(SEALING)
    calls: list[Call] = [Attest("session", NONCE), InitializeSealed(bytes(32), bytes(32), b"")]
    await ask(session, Initialize())
    await ask(session, GenerateAndImport(Curve.P256))
    calls += [AttestKey(0, NONCE), ImportSealed(bytes(32), bytes(32), b"", ADDRESS)]
    for call in calls:
        with pytest.raises(
            RemoteError, match="^attestation error: this enclave program has no security module"
        ) as caught:
            await ask(session, call)
        assert not caught.value.unknown_call
    assert isinstance(await ask(session, Sign(0, b"still there", 2)), Signature)


async def test_a_module_that_fails_leaves_the_session_as_it_is() -> None:
    enclave = Enclave()
    session = enclave.session()
    await ask(session, Initialize())
    await ask(session, GenerateAndImport(Curve.P256))
    enclave.nsm.failures = {1: "InternalError", 2: "InternalError"}
    for call in (Attest("session", NONCE), AttestKey(0, NONCE)):
        with pytest.raises(RemoteError, match="^attestation error: InternalError"):
            await ask(session, call)
    assert isinstance(await ask(session, Sign(0, b"still there", 2)), Signature)


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=60), st.binary(min_size=32, max_size=32), st.binary(max_size=200))
def test_hostile_sealed_messages(plaintext: bytes, enc: bytes, ciphertext: bytes) -> None:
    """Well sealed nonsense, and nonsense that was never sealed: one documented error, and no key."""

    async def main() -> None:
        enclave = Enclave()
        session = enclave.session()
        await ask(session, Initialize())
        document, public = await enclave.import_key(session)
        with pytest.raises(RemoteError, match="^import error: (deserialization error|address mismatch)"):
            await ask(session, sealed_for(public, document, ADDRESS, plaintext))
        _, public = await enclave.import_key(session)
        with pytest.raises(RemoteError, match="^import error: decryption failed$"):
            await ask(session, ImportSealed(public, enc, ciphertext, ADDRESS))
        assert session.number_of_keys == 0

    trio.run(main)
