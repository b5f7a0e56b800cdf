"""The way of one request, with a vault that fails in every way and with both kinds of store."""

import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, MutableMapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from signer import crypto
from signer.crypto.interface import SecretKey
from signer.errors import KeyNotFoundError, MalformedRequestError, RefusedError, SignerError, UnavailableError
from signer.observe.metrics import Metrics
from signer.policy import Caller, KeyPolicy
from signer.signing import SignatureMismatchError, Signing
from signer.tezos.errors import DecodeError, TezosError
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash, Signature, chain_id_text, digest_of
from signer.vaults.interface import Accept, VaultError, VaultHealth, VaultKey, VaultUnavailableError
from signer.watermark.database import FILE_NAME
from signer.watermark.interface import (
    Advance,
    MarkKey,
    Slot,
    WatermarkRefusedError,
    WatermarkStore,
    WatermarkStoreError,
)
from signer.watermark.memory import MemoryWatermarks
from signer.watermark.sqlite import SqliteWatermarks

CHAIN = b"\x7a\x06\xa7\x70"
CONSENSUS = ("block", "preattestation", "attestation", "attestation_with_dal")
KEYS = {curve: crypto.load_secret_key(curve, bytes(range(1, 33))) for curve in Curve}
OTHERS = {curve: crypto.load_secret_key(curve, bytes(range(2, 34))) for curve in Curve}
ED, BLS = KEYS[Curve.ED25519], KEYS[Curve.BLS12_381]
TZ1, TZ4 = ED.public_key.hash, BLS.public_key.hash
CALLER = Caller("192.0.2.1", "r1")

Logs = Sequence[MutableMapping[str, Any]]


def i32(value: int) -> bytes:
    return value.to_bytes(4, "big", signed=True)


def attestation(level: int, round_: int = 0, *, payload: int = 0, tag: int = 21) -> bytes:
    """An attestation in any of its forms; *payload* makes it another one."""
    slot = b"" if tag == 41 else b"\0\1"
    dal = b"\5" if tag == 23 else b""
    return b"\x13" + CHAIN + bytes(32) + bytes([tag]) + slot + i32(level) + i32(round_) + bytes([payload] * 32) + dal


def preattestation(level: int) -> bytes:
    return b"\x12" + CHAIN + bytes(32) + bytes([20]) + b"\0\1" + i32(level) + i32(0) + bytes(32)


def block(level: int, round_: int = 0, *, payload: int = 0) -> bytes:
    elements = (b"\2", i32(level), b"", i32(-1), i32(round_))
    fitness = b"".join(len(one).to_bytes(4, "big") + one for one in elements)
    head = b"\x11" + CHAIN + i32(level) + b"\x18" + bytes(32) + bytes(8) + b"\4" + bytes(32)
    return head + len(fitness).to_bytes(4, "big") + fitness + bytes(32) + bytes([payload] * 32) + bytes(4 + 8 + 1 + 1)


TRANSACTION = bytes.fromhex("03" + "00" * 32 + "6c" + "00" * 21 + "0001000001" + "00" * 22 + "00")


class FakeVault:
    """A vault over keys in memory that can be slow, wrong, failing, away or cancelled.

    While *gate* is not set a signature waits for it. *faults* are raised instead of the next answers, *tamper* changes
    what is returned. *hidden* keys are found by `refresh`. *asked*, *answered* and *cancelled* count the exchanges.
    """

    kind = "Fake"

    def __init__(self, *secrets: SecretKey, name: str = "fake", hidden: Sequence[SecretKey] = ()) -> None:
        self.name = name
        self.secrets = {secret.public_key.hash: secret for secret in secrets}
        self.hidden = {secret.public_key.hash: secret for secret in hidden}
        self.gate = trio.Event()
        self.gate.set()
        self.ready = True
        self.detail = "away"
        self.patience = 5.0  # seconds of one caller, in all
        self.waits = 0.0  # seconds that `wait_for` waits
        self.refreshing = 0.0  # seconds that `refresh` takes
        self.skipped: Mapping[str, str] = {}
        self.faults: list[Exception] = []
        self.tamper: Callable[[Signature], Signature] = lambda signature: signature
        self.asked = self.answered = self.cancelled = self.refreshed = 0

    def hold(self) -> None:
        self.gate = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await trio.sleep_forever()

    def serves(self, key: PublicKeyHash) -> bool:
        return self.ready and key in self.secrets

    async def wait_change(self) -> None:
        await trio.sleep_forever()

    @property
    def last_sign_of_life(self) -> float:
        return trio.current_time()

    async def reload(self) -> None:
        await self.refresh()

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        with trio.move_on_at(min(deadline, trio.current_time() + self.waits)):
            while not self.ready:
                await trio.sleep(0.01)

    async def refresh(self) -> None:
        await trio.lowlevel.checkpoint()
        self.refreshed += 1
        self.secrets |= self.hidden
        await trio.sleep(self.refreshing)

    def keys(self) -> Mapping[PublicKeyHash, VaultKey]:
        return {pkh: VaultKey(secret.public_key) for pkh, secret in self.secrets.items()}

    def health(self) -> VaultHealth:
        return VaultHealth(self.ready, "up" if self.ready else self.detail, len(self.secrets), self.skipped)

    async def sign(
        self, key: PublicKeyHash, message: bytes, *, version: int, accept: Accept, deadline: float
    ) -> Signature:
        self.asked += 1
        try:
            await self.gate.wait()
        except trio.Cancelled:
            self.cancelled += 1
            raise
        if self.faults:
            raise self.faults.pop(0)
        self.answered += 1
        return await self._accepted(self.tamper(self.secrets[key].sign(message, version=version)), accept)

    async def prove_possession(self, key: PublicKeyHash, *, over: PublicKey | None = None, accept: Accept) -> Signature:
        await trio.lowlevel.checkpoint()
        return await self._accepted(self.tamper(self.secrets[key].prove_possession(over)), accept)

    async def _accepted(self, signature: Signature, accept: Accept) -> Signature:
        if not await accept(signature):
            raise SignatureMismatchError("it does not verify")
        return signature

    async def import_key(self, secret: SecretKey) -> PublicKey:
        raise NotImplementedError

    async def generate(self, curve: Curve) -> PublicKey:
        raise NotImplementedError


class HeldMarks(MemoryWatermarks):
    """A store whose commits take until `release`, which can tell that they failed."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Advance] = []

    def advance(
        self, key: MarkKey, level: int, round: int, digest: bytes, *, on_settled: Callable[[Advance], None]
    ) -> Advance:
        decided = super().advance(key, level, round, digest, on_settled=lambda _: None)
        told = Advance(key, level, round, digest, on_settled)
        told.stored, told.error = decided.stored, decided.error
        self.held.append(told)
        return told

    def release(self, error: SignerError | None = None) -> None:
        for one in self.held:
            one.error = error or one.error
            one.settle()
        self.held.clear()


def policy(**changes: Any) -> KeyPolicy:
    return KeyPolicy(**{"requests": (*CONSENSUS, "generic"), "operations": ("transaction",), **changes})


@asynccontextmanager
async def running(
    vaults: FakeVault | Sequence[FakeVault],
    store: WatermarkStore | None = None,
    policies: Mapping[PublicKeyHash, KeyPolicy] | None = None,
) -> AsyncIterator[Signing]:
    marks = store or MemoryWatermarks()
    signing = Signing(
        policies=policies or {secret.public_key.hash: policy() for secret in KEYS.values()},
        vaults=[vaults] if isinstance(vaults, FakeVault) else vaults,
        marks=marks,
        metrics=Metrics(),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(marks.run)
        await nursery.start(signing.run)
        yield signing
        nursery.cancel_scope.cancel()


async def ask(signing: Signing, message: bytes, *, key: SecretKey = ED, version: int = 2) -> Signature:
    """Have *message* signed, and check that what left is a signature of it."""
    signature = await signing.sign(key.public_key.hash, message, version=version, caller=CALLER)
    assert crypto.verify(key.public_key, message, signature, version=version)
    for _ in range(2):  # the account is written after the answer
        await trio.lowlevel.checkpoint()
    return signature


async def outcome(signing: Signing, message: bytes, into: list[object], **changes: Any) -> None:
    try:
        into.append(await ask(signing, message, **changes))
    except (SignerError, TezosError) as exc:
        into.append(exc)


@pytest.fixture(params=["file", "mem"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> WatermarkStore:
    return SqliteWatermarks(tmp_path / FILE_NAME) if request.param == "file" else MemoryWatermarks()


# -- what is signed


@pytest.mark.parametrize("curve", list(Curve))
async def test_every_kind_by_every_curve(curve: Curve, store: WatermarkStore) -> None:
    async with running(FakeVault(KEYS[curve]), store) as signing:
        for message in (block(1), preattestation(1), attestation(1), attestation(2, tag=23), attestation(3, tag=41)):
            assert (await ask(signing, message, key=KEYS[curve])).curve is curve
        for _ in range(2):
            await ask(signing, TRANSACTION, key=KEYS[curve])


async def test_the_same_bytes_get_the_same_signature_without_the_vault(store: WatermarkStore) -> None:
    vault = FakeVault(KEYS[Curve.P256])
    key = KEYS[Curve.P256]
    async with running(vault, store) as signing:
        first = await ask(signing, block(7), key=key)
        with capture_logs() as logs:
            assert await ask(signing, block(7), key=key) == first
        assert logs[0]["outcome"] == "replayed"
        with pytest.raises(WatermarkRefusedError):
            await ask(signing, block(7, payload=1), key=key)


async def test_a_repeat_and_a_conflict_need_no_enclave(store: WatermarkStore) -> None:
    """While the link is down: the stored signature, or the refusal, at once; what is new waits and moves no mark."""
    vault = FakeVault(ED)
    async with running(vault, store) as signing:
        first = await ask(signing, block(7))
        vault.ready = False
        vault.hold()
        with trio.fail_after(5):
            assert await ask(signing, block(7)) == first
            with pytest.raises(WatermarkRefusedError):
                await ask(signing, block(7, payload=1))
        assert vault.asked == 1
        vault.gate.set()
        vault.faults = [VaultUnavailableError("away")]
        with pytest.raises(VaultUnavailableError):
            await ask(signing, block(8))
        await ask(signing, block(8, payload=1))


async def test_a_signature_survives_a_restart(tmp_path: Path) -> None:
    vault = FakeVault(ED)
    async with running(vault, SqliteWatermarks(tmp_path / FILE_NAME)) as signing:
        first = await ask(signing, block(7))
    vault.faults = [VaultError("not to be asked for it")]
    async with running(vault, SqliteWatermarks(tmp_path / FILE_NAME)) as signing:
        assert await ask(signing, block(7)) == first
        with pytest.raises(WatermarkRefusedError):
            await ask(signing, block(7, payload=1))


async def test_twins_in_flight_share_one_exchange(store: WatermarkStore) -> None:
    vault = FakeVault(ED)
    vault.hold()
    found: list[object] = []
    async with running(vault, store) as signing, trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(outcome, signing, block(5), found)
        await trio.testing.wait_all_tasks_blocked()
        vault.gate.set()
        await signing.drain()
    assert vault.asked == 1
    assert len(found) == 20
    assert len({str(one) for one in found}) == 1


async def test_twins_share_a_failure_and_the_next_one_is_new() -> None:
    vault = FakeVault(ED)
    vault.hold()
    vault.faults = [VaultUnavailableError("away")]
    found: list[object] = []
    async with running(vault) as signing:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(outcome, signing, block(5), found)
            await trio.testing.wait_all_tasks_blocked()
            vault.gate.set()
        assert [type(one) for one in found] == [VaultUnavailableError] * 3
        await ask(signing, block(5))
    assert vault.asked == 2


async def test_the_two_schemes_of_bls_share_no_flight_and_no_stored_signature() -> None:
    """Version 1 and version 2 sign the same bytes differently; one mark stands for both."""
    vault = FakeVault(BLS)
    vault.hold()
    found: list[object] = []
    async with running(vault) as signing:
        async with trio.open_nursery() as nursery:
            for version in (1, 2):
                nursery.start_soon(lambda v: outcome(signing, attestation(5), found, key=BLS, version=v), version)
            await trio.testing.wait_all_tasks_blocked()
            vault.gate.set()
        assert vault.asked == 2
        for version in (1, 2):
            await ask(signing, attestation(5), key=BLS, version=version)
    assert len({str(one) for one in found}) == 2


# -- what is never signed twice


@pytest.mark.parametrize("ready", [True, False])
async def test_of_two_requests_for_a_slot_in_flight_one_is_signed(store: WatermarkStore, ready: bool) -> None:
    vault = FakeVault(ED)
    vault.ready = ready
    vault.hold()
    found: list[object] = []
    async with running(vault, store) as signing, trio.open_nursery() as nursery:
        for payload in range(8):
            nursery.start_soon(outcome, signing, block(5, payload=payload), found)
        await trio.testing.wait_all_tasks_blocked()
        vault.gate.set()
        await signing.drain()
    assert sum(isinstance(one, Signature) for one in found) == 1
    assert sum(isinstance(one, WatermarkRefusedError) for one in found) == 7


@pytest.mark.parametrize("first", [21, 23, 41])
@pytest.mark.parametrize("second", [21, 23, 41])
async def test_all_forms_of_attestation_share_a_slot(first: int, second: int, store: WatermarkStore) -> None:
    async with running(FakeVault(ED), store) as signing:
        await ask(signing, attestation(5, 1, tag=first))
        with pytest.raises(WatermarkRefusedError) as caught:
            await ask(signing, attestation(5, 1, payload=1, tag=second))
        assert caught.value.status == 409
        assert caught.value.standing.level == 5
        with pytest.raises(WatermarkRefusedError):
            await ask(signing, attestation(5, 0, tag=second))
        await ask(signing, preattestation(5))
        await ask(signing, attestation(5, 2, payload=1, tag=second))


async def test_version_1_does_not_open_a_second_slot() -> None:
    """In version 1 a tag of 23 is a plain attestation (weakness 21)."""
    async with running(FakeVault(ED)) as signing:
        await ask(signing, attestation(5, tag=23), version=1)
        for version in (0, 1, 2):
            with pytest.raises(WatermarkRefusedError):
                await ask(signing, attestation(5, tag=23, payload=1), version=version)


async def test_levels_do_not_wrap() -> None:
    async with running(FakeVault(ED)) as signing:
        await ask(signing, attestation(1000))
        with pytest.raises(DecodeError):
            await ask(signing, attestation(1000 - 2**31))
        for level in (0, 999, 1000):
            with pytest.raises(WatermarkRefusedError):
                await ask(signing, attestation(level, payload=1))
        await ask(signing, attestation(2**31 - 1, 2**31 - 1))


async def test_neither_a_refusal_nor_a_repeat_waits_for_a_slow_vault(store: WatermarkStore) -> None:
    vault = FakeVault(ED)
    async with running(vault, store) as signing:
        first = await ask(signing, block(5))
        vault.hold()
        with trio.fail_after(10):
            assert await ask(signing, block(5)) == first
            with pytest.raises(WatermarkRefusedError):
                await ask(signing, block(5, payload=1))
    assert vault.answered == 1
    assert vault.cancelled == vault.asked - 1


# -- callers that go away


@pytest.mark.parametrize("vault_held", [True, False])
@pytest.mark.parametrize("mark_held", [True, False])
@pytest.mark.parametrize("ready", [True, False])
async def test_a_caller_that_goes_away_changes_nothing(vault_held: bool, mark_held: bool, ready: bool) -> None:
    """Before, during and after the vault's answer, and while the mark is being written."""
    vault, marks = FakeVault(ED), HeldMarks()
    vault.ready = ready
    async with running(vault, marks) as signing:
        if vault_held:
            vault.hold()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, signing, block(5))
                await trio.testing.wait_all_tasks_blocked()
                if not mark_held:
                    marks.release()
                scope.cancel()
        assert scope.cancelled_caught
        vault.gate.set()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(signing.drain)
            await trio.testing.wait_all_tasks_blocked()
            marks.release()
        assert (vault.asked, vault.answered, vault.cancelled) == (1, 1, 0)
        found: list[object] = []
        for message in (block(5), block(5, payload=1)):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcome, signing, message, found)
                await trio.testing.wait_all_tasks_blocked()
                marks.release()
        assert [type(one) for one in found] == [Signature, WatermarkRefusedError]


async def test_a_caller_gone_before_its_flight_began(store: WatermarkStore) -> None:
    vault = FakeVault(ED)
    async with running(vault, store) as signing:
        for _ in range(3):
            with trio.move_on_after(0) as gone:
                await ask(signing, block(5))
            assert gone.cancelled_caught
        await signing.drain()
        assert vault.asked == 1
        await ask(signing, block(5))
        with pytest.raises(WatermarkRefusedError):
            await ask(signing, block(5, payload=1))


async def test_one_of_two_twins_goes_away() -> None:
    vault = FakeVault(ED)
    vault.hold()
    found: list[object] = []
    async with running(vault) as signing, trio.open_nursery() as nursery:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as leaving:
                leaving.start_soon(ask, signing, block(5))
                nursery.start_soon(outcome, signing, block(5), found)
                await trio.testing.wait_all_tasks_blocked()
                scope.cancel()
        vault.gate.set()
        await signing.drain()
    assert (vault.asked, len(found)) == (1, 1)


async def test_a_flight_without_callers_leaves_a_line_in_the_log() -> None:
    vault = FakeVault(ED)
    async with running(vault) as signing:
        for fault, text in ((None, "signed"), (VaultError("broken"), "failed")):
            vault.faults = [] if fault is None else [fault]
            with capture_logs() as logs:
                with trio.move_on_after(0):
                    await ask(signing, block(5 if fault is None else 6))
                await signing.drain()
            (line,) = logs
            assert (line["outcome"], line["pkh"], line["lvl"]) == (text, str(TZ1), 5 if fault is None else 6)
            assert "its caller has gone" in line["event"]


async def test_a_caller_that_goes_away_while_a_large_request_is_decoded() -> None:
    large = b"\x05\x0a" + (9000).to_bytes(4, "big") + bytes(9000)
    async with running(FakeVault(ED), policies={TZ1: policy(requests=("pack",))}) as signing:
        with trio.move_on_after(0) as gone:
            await ask(signing, large)
        assert gone.cancelled_caught
        await ask(signing, large)


# -- the store fails


async def test_a_signature_that_was_made_is_withheld_when_the_store_fails() -> None:
    vault, marks = FakeVault(ED), HeldMarks()
    found: list[object] = []
    async with running(vault, marks) as signing:
        for ready in (True, False):
            vault.ready = ready
            async with trio.open_nursery() as nursery:
                nursery.start_soon(outcome, signing, block(5), found)
                await trio.testing.wait_all_tasks_blocked()
                assert vault.answered, "the signature is there, the mark isn't"
                assert len(found) == (0 if ready else 1)
                marks.release(WatermarkStoreError("the disk is full"))
    assert vault.answered == 2
    for one in found:
        assert isinstance(one, WatermarkStoreError)
        assert one.status == 500


async def test_a_database_that_cannot_be_written(tmp_path: Path) -> None:
    path, vault = tmp_path / FILE_NAME, FakeVault(ED)
    async with running(vault, SqliteWatermarks(path)) as signing:
        await ask(signing, block(5))
    with sqlite3.connect(path) as database:
        database.execute("CREATE TRIGGER t BEFORE INSERT ON mark BEGIN SELECT RAISE(ABORT, 'out of order'); END")
    database.close()
    async with running(vault, SqliteWatermarks(path)) as signing:
        for _ in range(2):
            with capture_logs() as logs, pytest.raises(WatermarkStoreError) as caught:
                await ask(signing, block(6))
            assert caught.value.status == 500
            assert logs[0]["outcome"] == "failed"
        await ask(signing, TRANSACTION)


async def test_a_store_that_is_closed_signs_nothing(tmp_path: Path) -> None:
    vault = FakeVault(ED)
    marks = SqliteWatermarks(tmp_path / FILE_NAME)
    async with trio.open_nursery() as nursery:
        signing = Signing(policies={TZ1: policy()}, vaults=[vault], marks=marks, metrics=Metrics())
        await nursery.start(signing.run)
        with pytest.raises(WatermarkStoreError, match="closed"):
            await ask(signing, block(5))
        nursery.cancel_scope.cancel()


# -- the vault fails


@pytest.mark.parametrize(
    ("fault", "status"),
    [
        (VaultError("the enclave says no"), 500),
        (VaultUnavailableError("away"), 502),
        (KeyNotFoundError("gone"), 404),
        (ZeroDivisionError("a bug"), 500),
    ],
)
async def test_after_a_fault_of_the_vault_the_same_bytes_pass(
    fault: Exception, status: int, store: WatermarkStore
) -> None:
    vault = FakeVault(ED)
    vault.faults = [fault]
    async with running(vault, store) as signing:
        with pytest.raises(SignerError) as caught:
            await ask(signing, block(5))
        assert caught.value.status == status
        with pytest.raises(WatermarkRefusedError):
            await ask(signing, block(5, payload=1))
        await ask(signing, block(5))


async def test_a_bug_in_one_flight_leaves_the_others_alone() -> None:
    vault, found = FakeVault(ED), list[object]()
    vault.hold()
    vault.faults = [ZeroDivisionError("a bug")]
    async with running(vault) as signing, trio.open_nursery() as nursery:
        for level in (1, 2):
            nursery.start_soon(outcome, signing, TRANSACTION if level == 1 else block(level), found)
        await trio.testing.wait_all_tasks_blocked()
        vault.gate.set()
        await signing.drain()
    assert sorted(type(one).__name__ for one in found) == ["Signature", "SignerError"]


WRONG: dict[str, Callable[[Curve], Callable[[Signature], Signature]]] = {
    "of another key": lambda curve: lambda _: OTHERS[curve].sign(block(5), version=2),
    "over other bytes": lambda curve: lambda _: KEYS[curve].sign(block(5, payload=1), version=2),
    "of another curve": lambda curve: (
        lambda _: (ED if curve is not Curve.ED25519 else KEYS[Curve.P256]).sign(block(5), version=2)
    ),
    "another curve's bytes": lambda curve: (
        lambda right: Signature(Curve.P256 if curve is Curve.SECP256K1 else Curve.SECP256K1, right.data[:64])
    ),
    "zero": lambda _: lambda right: Signature(right.curve, bytes(len(right.data))),
    "infinity": lambda _: lambda right: Signature(right.curve, b"\xc0" + bytes(len(right.data) - 1)),
    "all ones": lambda _: lambda right: Signature(right.curve, b"\xff" * len(right.data)),
    "a flipped bit": lambda _: lambda right: Signature(right.curve, right.data[:-1] + bytes([right.data[-1] ^ 1])),
}


@pytest.mark.parametrize("curve", list(Curve))
@pytest.mark.parametrize("how", WRONG)
async def test_a_wrong_signature_never_leaves(curve: Curve, how: str) -> None:
    vault = FakeVault(KEYS[curve])
    right = vault.tamper
    async with running(vault) as signing:
        for ready in (True, False):
            vault.ready, vault.tamper = ready, WRONG[how](curve)
            with pytest.raises(SignatureMismatchError) as caught:
                await signing.sign(KEYS[curve].public_key.hash, block(5), version=2, caller=CALLER)
            assert caught.value.status == 500
        vault.tamper = right
        await ask(signing, block(5), key=KEYS[curve])
        with pytest.raises(WatermarkRefusedError):
            await ask(signing, block(5, payload=1), key=KEYS[curve])


async def test_a_bls_signature_of_the_other_scheme_never_leaves() -> None:
    vault = FakeVault(BLS)
    vault.tamper = lambda _: BLS.sign(block(5), version=1)
    async with running(vault) as signing:
        with pytest.raises(SignatureMismatchError):
            await ask(signing, block(5), key=BLS, version=2)


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "junk",
        "sigéé",
        str(TZ1),
        str(OTHERS[Curve.ED25519].sign(block(5), version=2)),
        str(ED.sign(block(5, payload=1), version=2)),
        str(BLS.sign(block(5), version=2)),
    ],
)
@pytest.mark.parametrize("vault_first", [True, False])
async def test_a_stored_signature_that_is_damaged_is_not_handed_out(
    damaged: str, vault_first: bool, store: WatermarkStore
) -> None:
    vault = FakeVault(ED)
    mark = MarkKey(chain_id_text(CHAIN), TZ1, Slot.BLOCK)
    async with running(vault, store) as signing:
        await ask(signing, block(5))
        store.remember(mark, digest_of(block(5)), damaged)
        vault.ready = not vault_first
        await ask(signing, block(5))
        before = vault.answered
        vault.ready = True
        with capture_logs() as logs:
            await ask(signing, block(5))
        assert logs[0]["outcome"] == "replayed", "mended by the signature made anew"
        assert vault.answered <= before + 1


# -- what is refused moves no mark


async def unmoved(signing: Signing, *, key: SecretKey = ED, version: int = 2) -> None:
    """The lowest levels can still be signed."""
    for message in (block(0), preattestation(0), attestation(0)):
        await ask(signing, message, key=key, version=version)


@pytest.mark.parametrize("message", [block(5), attestation(5), preattestation(5)])
async def test_version_0_is_refused_for_tz4_before_anything_moves(message: bytes) -> None:
    vault = FakeVault(BLS)
    async with running(vault) as signing:
        with pytest.raises(MalformedRequestError, match="version 0") as caught:
            await ask(signing, message, key=BLS, version=0)
        assert caught.value.status == 400
        assert vault.asked == 0
        await unmoved(signing, key=BLS)


@pytest.mark.parametrize(
    ("message", "changes", "expected"),
    [
        (block(5)[:-1], {}, DecodeError),
        (block(5) + b"\0", {}, DecodeError),
        (b"", {}, DecodeError),
        (b"\x04" + bytes(40), {}, DecodeError),
        (block(5), {"requests": ("attestation",)}, RefusedError),
        (block(5), {"chains": frozenset({"NetXnHfVqm9iesp"})}, RefusedError),
        (attestation(5, tag=41), {"strict_forms": True}, RefusedError),
        (TRANSACTION, {"operations": ()}, RefusedError),
    ],
)
async def test_what_is_refused_moves_no_mark(
    message: bytes, changes: dict[str, Any], expected: type[Exception]
) -> None:
    vault, marks = FakeVault(ED), MemoryWatermarks()
    async with running(vault, marks, {TZ1: policy(**changes)}) as signing:
        with pytest.raises(expected):
            await ask(signing, message)
    assert vault.asked == 0
    async with running(vault, marks) as signing:
        await unmoved(signing)


async def test_an_unlisted_key_is_refused_even_for_bytes_that_are_no_request() -> None:
    vault = FakeVault(ED, OTHERS[Curve.ED25519])
    async with running(vault, policies={TZ1: policy()}) as signing:
        with pytest.raises(RefusedError, match="is not listed in config") as caught:
            await ask(signing, b"nonsense", key=OTHERS[Curve.ED25519])
        assert caught.value.status == 403
    assert vault.asked == 0


@pytest.mark.parametrize("ready", [True, False])
async def test_a_key_in_no_vault_moves_no_mark(ready: bool) -> None:
    """404 where it is certain, 502 while a vault that may hold it is away."""
    vault, marks = FakeVault(BLS), MemoryWatermarks()
    vault.ready = ready
    async with running(vault, marks) as signing:
        with pytest.raises(KeyNotFoundError if ready else UnavailableError) as caught:
            await ask(signing, block(5))
        assert caught.value.status == (404 if ready else 502)
        assert vault.refreshed == 1
        if not ready:
            assert "fake: away" in str(caught.value)
    async with running(FakeVault(ED), marks) as signing:
        await unmoved(signing)


async def test_an_enclave_that_stays_away_moves_no_mark(store: WatermarkStore) -> None:
    vault = FakeVault(ED)
    vault.ready = False
    vault.faults = [VaultUnavailableError("away") for _ in range(5)]
    async with running(vault, store) as signing:
        for _ in range(5):
            with pytest.raises(VaultUnavailableError) as caught:
                await ask(signing, block(5))
            assert caught.value.status == 502
        await ask(signing, block(5, payload=1))
        vault.ready = True
        await unmoved_below(signing)


async def unmoved_below(signing: Signing) -> None:
    with pytest.raises(WatermarkRefusedError):
        await ask(signing, block(5))


# -- which vault


async def test_a_key_may_be_bound_to_a_vault() -> None:
    first, second = FakeVault(ED, name="first"), FakeVault(ED, name="second")
    async with running([first, second], policies={TZ1: policy(vault="second")}) as signing:
        await ask(signing, block(5))
    assert (first.asked, second.asked) == (0, 1)


async def test_a_bound_key_is_not_looked_for_elsewhere() -> None:
    """Nor is the state of another vault an excuse: the answer is 404, not "ask again"."""
    first, second = FakeVault(ED, name="first", hidden=[ED]), FakeVault(BLS, name="second")
    first.ready = False
    async with running([first, second], policies={TZ1: policy(vault="second")}) as signing:
        assert signing.known_keys() == []
        for _ in range(2):
            with pytest.raises(KeyNotFoundError):
                await ask(signing, block(5))
            with pytest.raises(KeyNotFoundError):
                await signing.public_key(TZ1)
    assert (first.asked, first.refreshed, second.refreshed) == (0, 0, 4)


async def test_a_key_in_two_vaults_is_asked_of_the_one_that_is_up() -> None:
    first, second = FakeVault(ED, name="first"), FakeVault(ED, name="second")
    first.ready = False
    async with running([first, second]) as signing:
        await ask(signing, block(5))
        first.ready = True
        await ask(signing, block(6))
    assert (first.asked, second.asked) == (1, 1)


async def test_a_blob_that_cannot_be_used_is_named() -> None:
    """A vault that serves other keys is up; the reason why this one is missing is what the operator needs."""
    vault = FakeVault(BLS)
    vault.skipped = {str(TZ1): "encryption error: SDK error: throttled"}
    async with running(vault) as signing:
        with pytest.raises(UnavailableError, match=r"now \(fake: encryption error.*throttled"):
            await ask(signing, block(5))  # the client asks again: the key is there, and KMS may be back soon
        with pytest.raises(KeyNotFoundError, match="not found in any vault$"):
            await ask(signing, block(5), key=KEYS[Curve.P256])
        vault.ready = False
        with pytest.raises(UnavailableError, match="fake: away; fake: encryption error.*throttled"):
            await ask(signing, block(5))


async def test_a_key_stored_meanwhile_is_found() -> None:
    vault = FakeVault(hidden=[ED])
    async with running(vault) as signing:
        assert signing.known_keys() == []
        await ask(signing, block(5))
        assert await signing.public_key(TZ1) == ED.public_key
        assert signing.known_keys() == [TZ1]
        assert signing.authorized_keys() is None
    assert vault.refreshed == 1, "a key that is known costs no look at the store"


async def test_nobody_waits_longer_for_a_key_than_the_patience(autojump_clock: trio.testing.MockClock) -> None:
    """Neither for two vaults in turn, nor for their key files and then for their links."""
    vaults = [FakeVault(BLS, name="first"), FakeVault(BLS, name="second")]
    for vault in vaults:
        vault.ready, vault.patience, vault.refreshing, vault.waits = False, 2.5, 2.0, 60.0
    async with running(vaults) as signing:
        began = trio.current_time()
        with pytest.raises(UnavailableError, match="first: away; second: away"):
            await ask(signing, block(5))
        assert trio.current_time() - began == pytest.approx(2.5)
        vaults[1].refreshing, vaults[1].hidden = 0.0, {TZ1: ED}
        vaults[1].ready = True
        began = trio.current_time()
        await ask(signing, block(5))
        assert trio.current_time() == began, "a vault that has the key is not kept waiting by one that is away"


async def test_an_unlisted_key_has_a_public_key_but_no_place_in_the_list() -> None:
    async with running(FakeVault(ED, BLS), policies={TZ4: policy()}) as signing:
        assert await signing.public_key(TZ1) == ED.public_key
        assert signing.known_keys() == [TZ4]


# -- proof of possession


async def test_possession() -> None:
    vault = FakeVault(BLS)
    async with running(vault, policies={TZ4: policy(allow_proof_of_possession=True)}) as signing:
        for over in (None, OTHERS[Curve.BLS12_381].public_key):
            proof = await signing.prove_possession(TZ4, over=over, caller=CALLER)
            assert crypto.verify_possession(BLS.public_key, proof, over=over)
        vault.tamper = lambda _: OTHERS[Curve.BLS12_381].prove_possession(None)
        with pytest.raises(SignatureMismatchError):
            await signing.prove_possession(TZ4, caller=CALLER)
        with pytest.raises(RefusedError):
            await signing.prove_possession(TZ1, caller=CALLER)
    async with running(vault) as signing:
        with pytest.raises(MalformedRequestError):
            await signing.prove_possession(TZ4, caller=CALLER)
        with pytest.raises(KeyNotFoundError):
            await signing.prove_possession(TZ1, caller=CALLER)


async def test_a_refused_possession_is_logged_with_its_setting() -> None:
    with capture_logs() as logs:
        async with running(FakeVault(BLS)) as signing:
            with pytest.raises(MalformedRequestError):
                await signing.prove_possession(TZ4, caller=CALLER)
    (line,) = logs
    assert (line["log_level"], line["status"], line["pkh"]) == ("warning", 400, str(TZ4))
    assert "allow_proof_of_possession" in line["event"]


async def test_a_vault_that_comes_up_in_time_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    """Whoever asks while the signer starts loses no slot, and nobody waits for a key that is not configured."""
    vault = FakeVault()
    vault.ready, vault.waits, vault.hidden = False, 2.5, {}

    async def come_up() -> None:
        await trio.sleep(1)
        vault.secrets[TZ1], vault.ready = ED, True

    async with running(vault) as signing, trio.open_nursery() as nursery:
        nursery.start_soon(come_up)
        signature = await signing.sign(TZ1, attestation(1), version=2, caller=CALLER)
        assert crypto.verify(ED.public_key, attestation(1), signature)
        assert trio.current_time() == pytest.approx(1, abs=0.1)
        vault.ready = False
        with pytest.raises(KeyNotFoundError):
            await signing.public_key(OTHERS[Curve.P256].public_key.hash)
        assert trio.current_time() < 1.1


async def test_other_policies_count_at_once_and_a_request_on_its_way_keeps_its_own(
    autojump_clock: trio.testing.MockClock,
) -> None:
    first, second = FakeVault(ED, name="first"), FakeVault(name="second")
    second.ready, second.patience = False, 2.5
    found: list[object] = []
    async with running([first, second], policies={TZ1: policy(vault="second")}) as signing:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(outcome, signing, block(5), found)
            await trio.sleep(1)  # it waits for the second vault
            signing.replace_policies({})
            assert signing.known_keys() == []
            with pytest.raises(RefusedError):
                await ask(signing, block(6))
        assert isinstance(found[0], UnavailableError), "not by the first vault, which it was never allowed"
        assert first.asked == 0
        signing.replace_policies({TZ1: policy(vault="first")})
        await ask(signing, block(6))


async def test_a_bug_in_the_account_of_one_request_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("a bug")

    async with running(FakeVault(ED)) as signing:
        monkeypatch.setattr(signing._metrics, "signed", broken)
        with capture_logs() as logs:
            await ask(signing, attestation(1))
        assert [line["event"] for line in logs] == ["internal error: the account of a request is lost"]
        monkeypatch.undo()
        with capture_logs() as logs:
            await ask(signing, attestation(2))
        assert [line["outcome"] for line in logs] == ["signed"]


async def test_the_account_of_the_last_request_is_written_at_the_end() -> None:
    with capture_logs() as logs:
        async with running(FakeVault(ED)) as signing:
            await signing.sign(TZ1, attestation(1), version=2, caller=CALLER)
    assert [line["outcome"] for line in logs] == ["signed"]


# -- the end


async def test_shutting_down_ends_flights_with_502() -> None:
    vault = FakeVault(ED)
    vault.hold()
    found: list[object] = []
    async with trio.open_nursery() as callers:
        async with running(vault) as signing:
            for message in (block(5), attestation(5)):
                callers.start_soon(outcome, signing, message, found)
            await trio.testing.wait_all_tasks_blocked()
        await trio.testing.wait_all_tasks_blocked()
        assert [type(one) for one in found] == [UnavailableError] * 2
        with trio.fail_after(5):
            for _ in range(2):
                with pytest.raises(UnavailableError, match="ask again") as caught:
                    await ask(signing, block(5))
                assert caught.value.status == 502
            await signing.drain()


async def test_a_request_in_the_very_moment_of_the_end() -> None:
    """Whichever task comes first: 502, or a signature; never an internal error."""
    for _ in range(30):
        found: list[object] = []
        async with trio.open_nursery() as callers, running(FakeVault(BLS)) as signing:
            callers.start_soon(lambda s, f: outcome(s, block(5), f, key=BLS), signing, found)
        (one,) = found
        assert isinstance(one, Signature | UnavailableError)


async def test_draining_waits_for_flights_only(autojump_clock: trio.testing.MockClock) -> None:
    vault = FakeVault(ED)
    vault.hold()
    async with running(vault) as signing, trio.open_nursery() as nursery:
        await signing.drain()
        nursery.start_soon(ask, signing, block(5))
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(10) as limit:
            await signing.drain()
        assert limit.cancelled_caught
        vault.gate.set()
        await signing.drain()


# -- the log


async def one_line(signing: Signing, message: bytes, **changes: Any) -> MutableMapping[str, Any]:
    with capture_logs() as logs:
        await outcome(signing, message, [], **changes)
    (line,) = logs
    assert (line["request_id"], "duration_ms" in line) == ("r1", True)
    return line


async def test_every_request_leaves_one_line() -> None:
    vault = FakeVault(ED)
    async with running(vault, policies={TZ1: policy(requests=("block", "generic"), operations=())}) as signing:
        line = await one_line(signing, block(5, 1))
        assert (
            line.items()
            >= {
                "event": "Signed block successfully",
                "outcome": "signed",
                "log_level": "info",
                "pkh": str(TZ1),
                "vault": "Fake",
                "request": "block",
                "chain_id": chain_id_text(CHAIN),
                "lvl": 5,
                "round": 1,
            }.items()
        )
        line = await one_line(signing, block(4))
        assert (
            line.items()
            >= {
                "rule": "watermark",
                "outcome": "refused",
                "status": 409,
                "standing_level": 5,
                "standing_round": 1,
                "lvl": 4,
            }.items()
        )
        line = await one_line(signing, attestation(5))
        assert line.items() >= {"rule": "allow", "outcome": "refused", "status": 403}.items()
        line = await one_line(signing, TRANSACTION)
        assert line.items() >= {"rule": "allow.generic", "ops": {"transaction": 1}, "ops_total": 1}.items()
        line = await one_line(signing, b"\x11junk")
        assert line.items() >= {"outcome": "refused", "status": 400}.items()
        line = await one_line(signing, block(5), key=BLS)
        assert line.items() >= {"rule": f"tezos.{TZ4}", "status": 403}.items()
        vault.faults = [VaultUnavailableError("away")]
        line = await one_line(signing, block(9))
        assert line.items() >= {"outcome": "failed", "status": 502, "event": "Error signing request: away"}.items()


@pytest.mark.parametrize("message", [block(5), b"\x11junk", attestation(5)])
async def test_payloads_are_logged_only_when_asked_for(message: bytes) -> None:
    for wanted in (False, True):
        policies = {TZ1: policy(requests=("block",), log_payloads=wanted)}
        async with running(FakeVault(ED), policies=policies) as signing:
            line = await one_line(signing, message)
            assert line.get("raw") == (message.hex() if wanted else None)
            assert wanted or message.hex() not in str(line)
