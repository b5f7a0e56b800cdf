"""What the enclave says of itself, judged as the host does, and what is sealed to it."""

import json
from base64 import b64decode
from datetime import UTC, datetime
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from signer.attestation import claims
from signer.attestation.claims import Claims
from signer.attestation.document import Document, Expected, verify
from signer.attestation.sealed import CREDENTIALS, info, raw_public_key, seal
from signer.enclave import attestor as attestor_module
from signer.enclave.attestor import Attestor, AttestorError
from signer.enclave.entropy import kernel_entropy
from signer.enclave.import_keys import ImportKey
from signer.rpc.messages import Attest
from tests.attested.nsm import FakeNsm

IMPORTS = json.loads((Path(__file__).parents[2] / "vectors" / "attestation.json").read_text())["sealed_imports"]
BOOT_ID = bytes(range(16))
NONCE = b"\5" * 32
ADDRESS = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
ARN = "arn:aws:dynamodb:us-west-2:123456789012:table/marks"


class Time:
    """Seconds that a test sets."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def attestor_of(nsm: FakeNsm, time: Time | None = None) -> Attestor:
    return Attestor(nsm, boot_id=BOOT_ID, entropy=kernel_entropy, clock=time or Time())


def judged(nsm: FakeNsm, document: bytes) -> Document:
    expected = Expected(nonce=NONCE, root_sha256=nsm.root_sha256)
    return verify(document, expected, now=datetime.now(UTC))


async def test_a_document_for_a_session() -> None:
    nsm = FakeNsm()
    found = judged(nsm, await attestor_of(nsm).attest(Attest("session", NONCE, b"host")))
    assert claims.decode(found.user_data) == Claims(purpose="session", boot_id=BOOT_ID, caller_data=b"host")
    assert found.public_key is None
    plain = judged(nsm, await attestor_of(nsm).attest(Attest("session", NONCE)))
    assert plain.user_data is not None
    assert plain.user_data.hex() == (
        "a5016c74657a6f732d7369676e65720201036773657373696f6e04400550000102030405060708090a0b0c0d0e0f"
    )


async def test_a_document_for_an_import_has_a_fresh_key() -> None:
    nsm = FakeNsm()
    attestor = attestor_of(nsm)
    keys = set()
    for _ in range(4):
        found = judged(nsm, await attestor.attest(Attest("import", NONCE)))
        assert claims.decode(found.user_data) == Claims(purpose="import", boot_id=BOOT_ID)
        keys.add(raw_public_key(found.public_key))
    assert len(keys) == attestor.outstanding == 4


async def test_a_document_for_a_key() -> None:
    nsm = FakeNsm()
    for marks in (None, ARN):
        found = judged(nsm, await attestor_of(nsm).attest_key(NONCE, ADDRESS, marks))
        assert claims.decode(found.user_data) == Claims(purpose="key", boot_id=BOOT_ID, address=ADDRESS, marks=marks)
        assert found.public_key is None
    with pytest.raises(AttestorError, match="its marks are not an ARN"):
        await attestor_of(nsm).attest_key(NONCE, ADDRESS, "arn\0")


async def imported(nsm: FakeNsm, attestor: Attestor) -> tuple[bytes, bytes]:
    """A document for an import and the raw key in it."""
    document = await attestor.attest(Attest("import", NONCE))
    return document, raw_public_key(judged(nsm, document).public_key)


@pytest.mark.parametrize(("address", "marks"), [(ADDRESS, None), (ADDRESS, ARN), (CREDENTIALS, None)])
async def test_what_was_sealed_opens_once(address: str, marks: str | None) -> None:
    nsm = FakeNsm()
    attestor = attestor_of(nsm)
    document, key = await imported(nsm, attestor)
    enc, ciphertext = seal(key, info(document, address, marks), b"secret")
    assert attestor.open(key, enc, ciphertext, address, marks) == b"secret"
    with pytest.raises(AttestorError, match="^import error: unknown import key$"):
        attestor.open(key, enc, ciphertext, address, marks)


@pytest.mark.parametrize("fault", ["address", "marks", "document", "enc", "ciphertext", "cut"])
async def test_a_message_that_does_not_open_uses_the_key_up(fault: str) -> None:
    nsm = FakeNsm()
    attestor = attestor_of(nsm)
    document, key = await imported(nsm, attestor)
    other, _ = await imported(nsm, attestor)
    enc, ciphertext = seal(key, info(document, ADDRESS, ARN), b"secret")
    bad_enc, bad_ciphertext, address, marks = enc, ciphertext, ADDRESS, ARN
    match fault:
        case "address":
            address = "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME"
        case "marks":
            marks = ARN + "2"
        case "document":
            bad_enc, bad_ciphertext = seal(key, info(other, ADDRESS, ARN), b"secret")
        case "enc":
            bad_enc = bytes(32)
        case "ciphertext":
            bad_ciphertext = ciphertext[:-1] + bytes([ciphertext[-1] ^ 1])
        case "cut":
            bad_ciphertext = b""
    with pytest.raises(AttestorError, match="^import error: decryption failed$"):
        attestor.open(key, bad_enc, bad_ciphertext, address, marks)
    with pytest.raises(AttestorError, match="^import error: unknown import key$"):
        attestor.open(key, enc, ciphertext, ADDRESS, ARN)
    assert attestor.outstanding == 1


@pytest.mark.parametrize("case", IMPORTS, ids=lambda case: case["name"])
def test_the_vectors(case: dict[str, str]) -> None:
    attestor = attestor_of(FakeNsm())
    key = ImportKey(bytes.fromhex(case["enclave_secret"]))
    public = key.public_key
    key.vouched_by(b64decode(case["document"]))
    attestor._import_keys.add(key, 1000.0)
    sealed = public, bytes.fromhex(case["enc"]), bytes.fromhex(case["ciphertext"]), case["address"]
    if case["expect"] == "ok":
        assert attestor.open(*sealed).hex() == case["plaintext"]
    else:
        with pytest.raises(AttestorError, match="decryption failed"):
            attestor.open(*sealed)
    assert not any(key.secret)


async def test_an_import_key_dies_after_ten_minutes() -> None:
    nsm, time = FakeNsm(), Time()
    attestor = attestor_of(nsm, time)
    document, key = await imported(nsm, attestor)
    enc, ciphertext = seal(key, info(document, ADDRESS), b"secret")
    time.now += 600
    with pytest.raises(AttestorError, match="unknown import key"):
        attestor.open(key, enc, ciphertext, ADDRESS)


def test_keys_are_wiped_in_time_where_nobody_asks() -> None:
    nsm = FakeNsm()

    async def main() -> None:
        attestor = Attestor(nsm, boot_id=BOOT_ID, entropy=kernel_entropy)
        await attestor.attest(Attest("import", NONCE))
        (kept,) = attestor._import_keys._kept.values()
        with trio.move_on_after(590):
            await attestor.sweep()
        assert attestor.outstanding == 1
        with trio.move_on_after(100):
            await attestor.sweep()
        assert attestor.outstanding == 0
        assert not any(kept.key.secret)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_a_key_without_a_document_is_wiped(monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock) -> None:
    """The module fails, or whoever asked goes away while it works."""
    made: list[ImportKey] = []

    def make(secret: bytes) -> ImportKey:
        made.append(ImportKey(secret))
        return made[-1]

    monkeypatch.setattr(attestor_module, "ImportKey", make)
    nsm = FakeNsm(failures={1: "InternalError"})
    attestor = Attestor(nsm, boot_id=BOOT_ID, entropy=kernel_entropy)
    with pytest.raises(AttestorError, match="attestation error"):
        await attestor.attest(Attest("import", NONCE))
    monkeypatch.setattr(nsm, "attest", lambda **_: trio.sleep_forever())
    with trio.move_on_after(1) as left:
        await attestor.attest(Attest("import", NONCE))
    assert left.cancelled_caught
    assert attestor.outstanding == 0
    assert [any(key.secret) for key in made] == [False, False]


async def test_at_most_five_a_second(autojump_clock: MockClock) -> None:
    """Whoever comes sixth waits its turn: a refusal would look like an enclave that can't prove what it is."""
    nsm, began = FakeNsm(), trio.current_time()
    attestor = Attestor(nsm, boot_id=BOOT_ID, entropy=kernel_entropy)
    for purpose in ("session", "import", "session", "import", "session"):
        await attestor.attest(Attest(purpose, NONCE))
    await attestor.attest_key(NONCE, ADDRESS, None)  # keys are told one by one, and there may be many
    assert trio.current_time() == began
    async with trio.open_nursery() as nursery:
        for _ in range(7):
            nursery.start_soon(attestor.attest, Attest("session", NONCE))
        await trio.sleep(0.99)
        assert len(nsm.calls) == 6
        await trio.sleep(0.02)
        assert len(nsm.calls) == 11
    assert len(nsm.calls) == 13
    assert trio.current_time() == pytest.approx(began + 2)


async def test_a_caller_that_goes_away_while_it_waits_keeps_no_place(autojump_clock: MockClock) -> None:
    nsm = FakeNsm()
    attestor = Attestor(nsm, boot_id=BOOT_ID, entropy=kernel_entropy)
    for _ in range(5):
        await attestor.attest(Attest("session", NONCE))
    with trio.move_on_after(0.5):
        await attestor.attest(Attest("session", NONCE))
    await attestor.attest(Attest("session", NONCE))
    assert len(nsm.calls) == 6
    assert trio.current_time() == pytest.approx(1.0)


@pytest.mark.parametrize("purpose", ["session", "import"])
async def test_a_module_that_fails_is_an_error_of_the_call(purpose: str) -> None:
    nsm = FakeNsm(failures={1: "InternalError"})
    attestor = attestor_of(nsm)
    with pytest.raises(AttestorError) as caught:
        await attestor.attest(Attest(purpose, NONCE))
    assert caught.value.chain == ("attestation error", "InternalError (the module failed)")
    assert attestor.outstanding == 0
    await attestor.attest(Attest(purpose, NONCE))


async def test_no_import_key_without_random_bytes() -> None:
    nsm = FakeNsm()
    failing = FakeNsm(failures={1: "InternalError"})

    async def entropy() -> bytes:
        return await failing.get_random()

    attestor = Attestor(nsm, boot_id=BOOT_ID, entropy=entropy, clock=Time())
    with pytest.raises(AttestorError, match="^attestation error: no random bytes: InternalError"):
        await attestor.attest(Attest("import", NONCE))
    assert nsm.calls == []
