"""The link judges before it tells credentials, and keys that were sealed elsewhere get into the vault."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio

from signer import crypto
from signer.attestation.document import DocumentError, Expected
from signer.enclave.attestor import Attestor
from signer.enclave.entropy import kernel_entropy
from signer.rpc.frames import encode_frame
from signer.rpc.messages import Attest, Call, Import, ImportSealed, Initialize, decode_call, encode_error
from signer.tezos.keys import Curve
from signer.vaults.interface import VaultError, VaultUnavailableError
from signer.vaults.nitro import link as link_module
from signer.vaults.nitro import sealed_import
from signer.vaults.nitro.judge import Judge, Wanted
from signer.vaults.nitro.session import Session as LinkSession
from signer.vaults.nitro.session import Slot
from signer.vaults.nitro.storage import FileStorage
from tests.attested.documents import PCRS, root
from tests.attested.nsm import FakeNsm
from tests.unit.vaults.fake import FakeEnclave, running, sign, signs, until

ROOT = root().sha256
WANTED = Wanted(pcrs={0: [PCRS[0]]}, root_sha256=ROOT)
SECRET = crypto.load_secret_key(Curve.BLS12_381, bytes(31) + b"\x05")


def attestor(boot: bytes = b"b", **options: Any) -> Attestor:
    return Attestor(FakeNsm(**options), boot_id=boot * 16, entropy=kernel_entropy)


def require(wanted: Wanted = WANTED) -> Judge:
    return Judge("n", "require", wanted)


@pytest.fixture
def calls(enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch) -> list[Call]:
    """What sessions of the enclave are asked."""
    from signer.enclave.session import Session

    heard: list[Call] = []
    answer = Session.answer

    async def listening(self: Session, payload: bytes) -> bytes:
        heard.append(decode_call(payload))
        return await answer(self, payload)

    monkeypatch.setattr(Session, "answer", listening)
    return heard


async def test_an_attested_enclave_serves(path: Path, enclave: FakeEnclave, calls: list[Call]) -> None:
    enclave.attestor = attestor()
    async with running(path, enclave, sessions=2, judge=require()) as vault:
        await sign(vault, (await vault.generate(Curve.ED25519)).hash)
    assert [type(call) for call in calls if isinstance(call, Attest | Initialize)].count(Initialize) == 2
    assert isinstance(calls[0], Attest)


@pytest.mark.parametrize(
    ("nsm", "text"),
    [
        ({"pcrs": PCRS | {0: PCRS[1]}}, "PCR0 is"),
        ({"debug": True}, "debug mode"),
        (None, "no security module"),
        ({"drift": -400}, "stale"),
    ],
)
async def test_no_credentials_for_what_does_not_prove_itself(
    path: Path, enclave: FakeEnclave, calls: list[Call], nsm: dict[str, Any] | None, text: str
) -> None:
    enclave.attestor = None if nsm is None else attestor(**nsm)
    async with running(path, enclave, judge=require(), wait=0.3) as vault:
        assert text in vault.health().detail
        assert "told no credentials" in vault.health().detail
        with pytest.raises(VaultUnavailableError, match="told no credentials"):
            await vault.generate(Curve.ED25519)
        assert not any(isinstance(call, Initialize) for call in calls)
        enclave.attestor = attestor()  # another image is started
        with trio.fail_after(10):
            while not vault.ready:
                await vault.wait_change()
        await sign(vault, (await vault.generate(Curve.ED25519)).hash)


async def test_sessions_of_an_enclave_that_is_gone_end_when_the_next_one_proves_itself(
    path: Path, enclave: FakeEnclave
) -> None:
    """The first connection looks alive for as long as nobody asks over it."""
    enclave.attestor = attestor(b"1")
    async with running(path, enclave, sessions=2, judge=require()) as vault:
        key = (await vault.generate(Curve.ED25519)).hash
        await until(lambda: enclave.serving == 2)
        enclave.attestor = attestor(b"2")
        enclave.kill_one()
        await until(lambda: enclave.connections >= 4)
        await until(lambda: vault.serves(key))
        assert await signs(vault, key)


async def test_another_enclave_on_the_same_session_ends_it(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    enclave.attestor = first = attestor(b"1")
    async with running(path, enclave, judge=require()) as vault:
        assert vault.ready
        await trio.sleep(link_module.JUDGE_INTERVAL + 1)
        assert enclave.connections == 1
        first.boot_id = b"2" * 16  # somebody hands our session on
        await trio.sleep(link_module.JUDGE_INTERVAL + 1)
        assert enclave.connections == 2


@pytest.mark.parametrize(
    ("nsm", "boot", "text"),
    [
        (
            {"pcrs": PCRS | {0: PCRS[1]}},
            b"1",
            "the enclave is not admitted any more: attestation document refused, pcr",
        ),
        ({}, b"2", "another enclave answers than the one that the session was opened with"),
    ],
)
async def test_a_session_that_was_handed_on_is_reported_although_another_serves(
    path: Path,
    enclave: FakeEnclave,
    autojump_clock: trio.testing.MockClock,
    nsm: dict[str, Any],
    boot: bytes,
    text: str,
) -> None:
    """Credentials were told over it, so nothing may say that they were not."""
    enclave.attestor = good = attestor(b"1")
    async with running(path, enclave, sessions=2, judge=require()) as vault:
        key = (await vault.generate(Curve.ED25519)).hash
        await until(lambda: enclave.serving == 2)
        attest, asked = good.attest, 0

        async def first_by_another(call: Attest) -> bytes:
            nonlocal asked
            asked += 1
            return await (attestor(boot, **nsm).attest if asked == 1 else attest)(call)

        good.attest = first_by_another  # type: ignore[method-assign]
        with structlog.testing.capture_logs() as logs:
            await trio.sleep(link_module.JUDGE_INTERVAL + 1)
            assert await signs(vault, key)
    (told,) = [line for line in logs if line["log_level"] == "error"]
    assert told["error"].startswith(f"(Nitro): on a session that was told credentials, {text}")


async def test_a_session_that_is_refused_is_reported_although_another_serves(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    """Somebody else answers on one of two: the link is up, and nothing else would say so."""
    enclave.attestor = good = attestor(b"1")
    async with running(path, enclave, sessions=2, judge=require()) as vault:
        key = (await vault.generate(Curve.ED25519)).hash
        await until(lambda: enclave.serving == 2)
        good.attest = attestor(pcrs=PCRS | {0: PCRS[1]}).attest  # type: ignore[method-assign]
        with structlog.testing.capture_logs() as logs:
            enclave.kill_one()
            await until(lambda: enclave.connections >= 5)  # it is tried again and again
            assert await signs(vault, key)
    (told,) = [line for line in logs if line["log_level"] == "error"]
    assert "told no credentials: attestation document refused, pcr" in told["error"]


async def test_a_module_that_fails_later_costs_no_session(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    """The keys are in the enclave's memory, and need no module."""
    nsm = FakeNsm()
    enclave.attestor = Attestor(nsm, boot_id=b"b" * 16, entropy=kernel_entropy)
    async with running(path, enclave, sessions=2, judge=require()) as vault:
        key = (await vault.generate(Curve.ED25519)).hash
        await until(lambda: enclave.serving == 2)
        asked = len(nsm.calls)
        nsm.failures = dict.fromkeys(range(asked + 1, asked + 100), "InternalError")
        await trio.sleep(2 * link_module.JUDGE_INTERVAL + 10)
        assert len(nsm.calls) >= asked + 4, "each session twice; the file's thread may have taken time before that"
        assert enclave.connections == 2
        assert await signs(vault, key)
        nsm.failures, nsm.registers[0] = {}, PCRS[1]  # but another enclave is another one
        await trio.sleep(link_module.JUDGE_INTERVAL + 5)
        assert not vault.serves(key)


async def test_a_module_that_hangs_later_costs_no_session(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    nsm = FakeNsm()
    enclave.attestor = Attestor(nsm, boot_id=b"b" * 16, entropy=kernel_entropy)
    async with running(path, enclave, sessions=2, judge=require()) as vault:
        key = (await vault.generate(Curve.ED25519)).hash
        await until(lambda: enclave.serving == 2)
        monkeypatch.setattr(nsm, "_exchange", lambda _: trio.sleep_forever())
        await trio.sleep(link_module.JUDGE_INTERVAL + 1)  # one session waits for the module
        began = trio.current_time()
        assert await signs(vault, key)
        assert trio.current_time() - began < 1
        await trio.sleep(30)
        assert enclave.connections == 2
        assert await signs(vault, key)


async def test_sessions_are_judged_again_one_after_the_other(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Signatures wait behind a module that is slow."""
    enclave.attestor = slow = attestor()
    attest, at_once, most = slow.attest, 0, 0

    async def slowly(call: Attest) -> bytes:
        nonlocal at_once, most
        at_once, most = at_once + 1, max(most, at_once + 1)
        await trio.sleep(2)
        at_once -= 1
        return await attest(call)

    async with running(path, enclave, sessions=3, judge=require()) as vault:
        key = (await vault.generate(Curve.ED25519)).hash
        await until(lambda: enclave.serving == 3)
        monkeypatch.setattr(slow, "attest", slowly)
        await trio.sleep(link_module.JUDGE_INTERVAL + 1)
        began = trio.current_time()
        assert await signs(vault, key)
        assert trio.current_time() - began < 1
        await trio.sleep(30)
    assert (most, enclave.connections) == (1, 3)


@pytest.mark.parametrize(
    ("judge", "at_once"), [(None, link_module.IMPORTS_ON_THE_WIRE), (require(), link_module.IMPORTS_SIDE_BY_SIDE)]
)
async def test_what_proved_to_be_ours_is_given_many_blobs_at_once(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch, judge: Judge | None, at_once: int
) -> None:
    """It opens them side by side; tee-signer one after the other, with a signature behind each."""
    async with running(path, enclave) as vault:
        for _ in range(link_module.IMPORTS_SIDE_BY_SIDE + 4):
            await vault.generate(Curve.ED25519)
    loads: list[int] = []
    submit = LinkSession.submit

    def watched(self: LinkSession, call: Call, settled: trio.Event | None = None) -> Slot:
        slot = submit(self, call, settled)
        if isinstance(call, Import):
            loads.append(self.load)
        return slot

    monkeypatch.setattr(LinkSession, "submit", watched)
    enclave.attestor = attestor()
    async with running(path, enclave, judge=judge) as vault:
        await until(lambda: vault.ready)
    assert max(loads) == at_once


async def test_the_enclave_is_asked_for_the_format(path: Path, enclave: FakeEnclave, calls: list[Call]) -> None:
    async with running(path, enclave, seal="v1") as vault:
        await vault.generate(Curve.ED25519)
    assert [call.seal for call in calls if isinstance(call, Initialize)] == ["v1"]


# -- sealed imports


def expected(nonce: bytes, **other: Any) -> Expected:
    return Expected(nonce=nonce, pcrs={0: [PCRS[0]]}, root_sha256=ROOT, needs_public_key=True, **other)


async def test_a_sealed_key_signs(path: Path, enclave: FakeEnclave, calls: list[Call]) -> None:
    enclave.attestor, nonce = attestor(), bytes(range(32))
    async with running(path, enclave, judge=require()) as vault:
        document = await vault.attest_import(nonce)
        order, found = sealed_import.seal_for(document, SECRET, expected(nonce), now=datetime.now(UTC))
        assert found.pcrs[0] == PCRS[0]
        assert await vault.import_sealed(order) == SECRET.public_key
        assert await signs(vault, SECRET.public_key.hash)
        with pytest.raises(VaultError, match="in the vault already"):
            await vault.import_sealed(order)
    assert [stored.public_key_hash for stored in FileStorage(path).load()] == [str(SECRET.public_key.hash)]
    assert not any(bytes(SECRET.secret_bytes()) in repr(call).encode() for call in calls)


async def test_a_used_key_opens_nothing_more(path: Path, enclave: FakeEnclave) -> None:
    enclave.attestor, nonce = attestor(), bytes(32)
    async with running(path, enclave) as vault:
        document = await vault.attest_import(nonce)
        order, _ = sealed_import.seal_for(document, SECRET, expected(nonce), now=datetime.now(UTC))
        other = ImportSealed(order.key, order.enc, order.ciphertext, "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q")
        with pytest.raises(VaultError, match="import error: decryption failed"):
            await vault.import_sealed(other)
        with pytest.raises(VaultError, match=r"import error: unknown import key \(it was used .*run seal-for again"):
            await vault.import_sealed(order)
        assert FileStorage(path).load() == []


async def test_tee_signer_is_named_where_it_cannot_do_what_is_asked(path: Path, enclave: FakeEnclave) -> None:
    text = 'Semantic(None, "unknown variant `{}`, expected one of `Initialize`, `Import`")'
    async with running(path, enclave) as vault:
        call = "Attest"

        async def tee_signer(_frame: bytes) -> bytes:
            return encode_frame(encode_error(text.format(call)))

        async def other_error(_frame: bytes) -> bytes:
            return encode_frame(encode_error("attestation error", "unknown variant `x`"))

        enclave.tamper = tee_signer
        with pytest.raises(VaultError, match="does not know Attest: it runs tee-signer, or an older image"):
            await vault.attest_import(bytes(32))
        call = "ImportSealed"
        with pytest.raises(VaultError, match="does not know ImportSealed: it runs tee-signer"):
            await vault.import_sealed(ImportSealed(bytes(32), bytes(32), b"", str(SECRET.public_key.hash)))
        enclave.tamper = other_error
        with pytest.raises(VaultError, match="RPC Error: attestation error: unknown variant"):
            await vault.attest_import(bytes(32))


async def test_nothing_is_sealed_for_what_is_not_expected(path: Path, enclave: FakeEnclave) -> None:
    nonce, now = bytes(32), datetime.now(UTC)
    enclave.attestor = attestor(pcrs=PCRS | {0: PCRS[1]})
    async with running(path, enclave) as vault:
        with pytest.raises(DocumentError, match="PCR0"):
            sealed_import.seal_for(await vault.attest_import(nonce), SECRET, expected(nonce), now=now)
    enclave.attestor = attestor(debug=True)
    async with running(path, enclave) as vault:
        with pytest.raises(DocumentError, match="debug"):
            sealed_import.seal_for(await vault.attest_import(nonce), SECRET, expected(nonce), now=now)
        with pytest.raises(DocumentError, match="nonce"):
            sealed_import.seal_for(
                await vault.attest_import(nonce), SECRET, expected(bytes(31) + b"\1", allow_debug=True), now=now
            )
    session = await attestor().attest(Attest("session", nonce))
    with pytest.raises(DocumentError, match="public_key"):
        sealed_import.seal_for(session, SECRET, expected(nonce), now=now)
