"""The link over fake enclaves: several sessions, lives that follow each other, credentials that change."""

from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from proxy.address import Address, parse
from signer import crypto
from signer.errors import SignerError
from signer.observe.tasks import Tasks
from signer.rpc.frames import encode_frame
from signer.rpc.messages import encode_error
from signer.tezos.keys import Curve, PublicKeyHash
from signer.vaults.interface import VaultError, VaultUnavailableError
from signer.vaults.nitro import asking, renewal
from signer.vaults.nitro.credentials import Credentials, CredentialsError
from signer.vaults.nitro.discovery import Place
from signer.vaults.nitro.vault import NitroVault
from tests.unit.vaults.fake import FakeEnclave, FakeLocator, honest, running, sign, signs, until

OLD, NEW = Place(parse("unix:/old:2000"), "i-0-enc1"), Place(parse("unix:/new:2000"), "i-0-enc2")


async def stored(path: Path, enclave: FakeEnclave, number: int = 1) -> list[PublicKeyHash]:
    """Keys that are in the file before the vault under test begins."""
    async with running(path, enclave) as vault:
        return [(await vault.generate(Curve.ED25519)).hash for _ in range(number)]


class Swallow:
    """A tamper that keeps replies back while *on*; `gate` lets them go."""

    def __init__(self) -> None:
        self.on = False
        self.kept = 0
        self.gate = trio.Event()

    async def __call__(self, frame: bytes) -> bytes:
        if self.on:
            self.on = False  # only one
            self.kept += 1
            await self.gate.wait()
        return frame


async def complete(vault: NitroVault, sessions: int = 2) -> None:
    await until(lambda: vault.ready and f"{sessions} session(s)" in vault.health().detail)
    await trio.testing.wait_all_tasks_blocked()


async def test_a_reply_that_does_not_come_is_asked_for_elsewhere(path: Path, enclave: FakeEnclave) -> None:
    (pkh,) = await stored(path, enclave)
    swallow = enclave.tamper = Swallow()
    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        connections = enclave.connections
        swallow.on = True
        assert await signs(vault, pkh)
        assert swallow.kept == 1
        assert await signs(vault, pkh, b"and again"), "the other session goes on"
        swallow.gate.set()
        for number in range(4):
            assert await signs(vault, pkh, b"%d" % number), "the late reply reached nobody"
        assert enclave.connections == connections


async def test_a_session_lost_in_mid_exchange_costs_no_wait(path: Path, enclave: FakeEnclave) -> None:
    (pkh,) = await stored(path, enclave)

    async def die(_frame: bytes) -> bytes:
        enclave.up = False
        enclave.tamper = honest
        raise EOFError

    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        enclave.tamper = die
        assert await signs(vault, pkh)
        assert vault.health().ready
        assert "1 session(s)" in vault.health().detail
        enclave.up = True
        await complete(vault)


@pytest.mark.parametrize("patience", [2.5, 2.6])  # the second is no multiple of the time for one session
async def test_nobody_waits_longer_than_the_patience(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, patience: float
) -> None:
    (pkh,) = await stored(path, enclave)

    async def hang(frame: bytes) -> bytes:
        await trio.Event().wait()
        return frame

    async with running(path, enclave, sessions=2, wait=patience) as vault:
        await complete(vault)
        enclave.tamper = hang
        began = trio.current_time()
        with pytest.raises(VaultUnavailableError, match=f"did not answer within {patience} s"):
            await sign(vault, pkh)
        assert trio.current_time() - began == pytest.approx(patience)
        health = vault.health()
        assert not health.ready
        assert f"has not answered for {patience} s" in health.detail


async def test_replies_one_behind_close_their_session_only(path: Path, enclave: FakeEnclave) -> None:
    first, second = await stored(path, enclave, 2)
    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        behind: list[bytes] = []

        async def shift(frame: bytes) -> bytes:
            await trio.lowlevel.checkpoint()
            behind.append(frame)
            return frame + frame if len(behind) == 1 else frame  # a duplicated reply

        connections = enclave.connections
        enclave.tamper = shift
        for number in range(6):
            assert await signs(vault, (first, second)[number % 2], b"%d" % number)
        await complete(vault)
        assert enclave.connections == connections + 1


async def test_an_error_that_belongs_to_another_call(path: Path, enclave: FakeEnclave) -> None:
    """A duplicated error reply: the caller who gets it asks again, instead of giving up."""
    (pkh,) = await stored(path, enclave)

    async def refuse_twice(_frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        enclave.tamper = honest
        error = encode_frame(encode_error("signer error", "invalid handle"))
        return error + error

    async with running(path, enclave, sessions=1) as vault:
        await complete(vault, 1)
        enclave.tamper = refuse_twice
        assert await signs(vault, pkh)
        connections, key = enclave.connections, (await vault.generate(Curve.BLS12_381)).hash
        await complete(vault, 1)
        calls = enclave.calls
        with pytest.raises(VaultError, match="Signing version 0"):
            await sign(vault, key, version=0)
        assert enclave.connections == connections, "an error that is meant costs no session"
        assert enclave.calls == calls + 2 * asking.MAX_DOUBTS, "each time it is asked whether it is in step"


async def test_the_vault_has_started_when_every_blob_was_tried(path: Path, enclave: FakeEnclave) -> None:
    keys = await stored(path, enclave, 8)
    gate, answered = trio.Event(), 0

    async def hold(frame: bytes) -> bytes:
        nonlocal answered
        answered += 1
        if answered == 3:
            await gate.wait()
        return frame

    enclave.tamper = hold
    async with trio.open_nursery() as nursery:
        vault_ready = trio.Event()

        async def run() -> None:
            async with running(path, enclave) as vault:
                vault_ready.set()
                for key in keys:
                    assert await signs(vault, key)
                nursery.cancel_scope.cancel()

        nursery.start_soon(run)
        await until(lambda: answered == 3)
        assert not vault_ready.is_set(), "the third import hangs"
        gate.set()


async def test_a_signature_comes_before_the_last_import(path: Path, enclave: FakeEnclave) -> None:
    keys = await stored(path, enclave, 20)
    enclave.up = False
    async with running(path, enclave) as vault:
        enclave.up = True
        assert await signs(vault, keys[3])
        assert not vault.ready, "the other imports are under way"
        await complete(vault, 1)


async def test_a_key_that_a_caller_waits_for_is_imported_first(path: Path, enclave: FakeEnclave) -> None:
    keys = await stored(path, enclave, 20)
    enclave.up = False
    async with running(path, enclave) as vault:
        order: list[PublicKeyHash] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(sign_unverified, vault, keys[-1])
            await trio.testing.wait_all_tasks_blocked()
            enclave.up = True
            while len(vault.keys()) < len(keys):
                order += [key for key in vault.keys() if key not in order]
                await trio.lowlevel.checkpoint()
        assert order.index(keys[-1]) < 5


async def sign_unverified(vault: NitroVault, pkh: PublicKeyHash) -> None:
    async def accept(_signature: object) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    await vault.sign(pkh, b"m", version=2, accept=accept, deadline=trio.current_time() + 10)


# -- lives


class World:
    """Two enclaves at two places, and a locator that says which one runs."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.old, self.new = FakeEnclave(nursery), FakeEnclave(nursery)
        self.locator = FakeLocator(fixed=False)
        self.locator.place = OLD
        self.dialled: list[Address] = []

    async def connect(self, address: Address) -> trio.abc.Stream:
        self.dialled.append(address)
        return await (self.old if address == OLD.address else self.new).connect(address)


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery)


async def test_an_enclave_that_is_back_at_another_place(path: Path, world: World) -> None:
    keys = await stored(path, world.old, 3)
    world.new.up = False
    async with running(path, world.old, connect=world.connect, locator=world.locator, sessions=2) as vault:
        await complete(vault)
        world.locator.place, world.new.up, world.old.up = NEW, True, False
        world.old.kill()
        for key in keys:
            assert await signs(vault, key)
        assert "unix:/new:2000" in vault.health().detail
        await complete(vault)


async def test_make_before_break(path: Path, world: World) -> None:
    """One session breaks, and another enclave runs by now: the old one serves until the new one has the keys."""
    keys = await stored(path, world.old, 3)
    gate = trio.Event()

    async def hold(frame: bytes) -> bytes:
        await gate.wait()
        return frame

    world.new.tamper = hold
    async with running(path, world.old, connect=world.connect, locator=world.locator, sessions=2) as vault:
        await complete(vault)
        world.locator.place = NEW
        world.old.kill_one()
        await until(lambda: world.new.connections == 2)
        calls = world.old.calls
        for key in keys:
            assert await signs(vault, key)
        assert world.old.calls == calls + 3, "the old one answers"
        gate.set()
        await until(lambda: world.old.serving == 0)
        for key in keys:
            assert await signs(vault, key)
        assert vault.health().ready


async def test_nothing_is_dialled_that_was_not_found(path: Path, world: World) -> None:
    """While discovery fails, the place known before may belong to another enclave by now."""
    (key,) = await stored(path, world.old)
    tasks = Tasks()
    async with running(
        path, world.old, connect=world.connect, locator=world.locator, sessions=2, wait=0.3, tasks=tasks
    ) as vault:
        await complete(vault)
        refusal = "two enclaves are RUNNING: a, b; set enclave_name"
        world.locator.faults = [SignerError(refusal)] * 1000
        world.dialled.clear()
        world.old.kill()
        with pytest.raises(VaultUnavailableError, match="two enclaves are RUNNING"):
            await sign(vault, key)
        assert world.dialled == []
        assert refusal in vault.health().detail
        assert tasks.all()["vault n discovery"].fault == refusal
        world.locator.faults.clear()
        await complete(vault)
        assert await signs(vault, key)


async def test_a_changed_boot_at_the_same_place(path: Path, world: World) -> None:
    (key,) = await stored(path, world.old)
    async with running(path, world.old, connect=world.connect, locator=world.locator, sessions=2) as vault:
        await complete(vault)
        world.locator.place = Place(OLD.address, "i-0-enc9")
        world.old.kill_one()
        await until(lambda: "enc9" in vault.health().detail or world.old.connections >= 5)
        await until(lambda: world.old.serving == 2)
        assert await signs(vault, key)


async def test_a_silent_death_is_noticed_without_a_request(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    await stored(path, enclave)

    async def hang(frame: bytes) -> bytes:
        await trio.Event().wait()
        return frame

    async with running(path, enclave, sessions=2, exchange=5) as vault:
        await complete(vault)
        alive = vault.last_sign_of_life
        await trio.sleep(60)
        assert vault.last_sign_of_life > alive + 50, "it is asked now and then"
        enclave.tamper = hang
        await trio.sleep(20)
        assert not vault.health().ready
        enclave.tamper = honest
        await trio.sleep(20)
        assert vault.health().ready


# -- credentials


class Provider:
    """Credentials that change when a test wants it."""

    def __init__(self) -> None:
        self.current = Credentials("first", "secret", None, "r")
        self.fault: Exception | None = None
        self.asked = 0

    async def __call__(self) -> Credentials:
        await trio.lowlevel.checkpoint()
        self.asked += 1
        if self.fault is not None:
            raise self.fault
        return self.current


async def test_new_credentials_open_new_sessions(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    (key,) = await stored(path, enclave)
    provider, tasks = Provider(), Tasks()
    async with running(path, enclave, sessions=2, provider=provider, tasks=tasks) as vault:
        await complete(vault)
        connections = enclave.connections
        await trio.sleep(renewal.REFRESH_INTERVAL + 1)
        assert enclave.connections == connections, "the same ones change nothing"
        provider.fault = CredentialsError("(Nitro): missing credentials: nowhere")
        await trio.sleep(renewal.REFRESH_INTERVAL + 1)
        task = tasks.all()["vault n credentials"]
        assert task.state == "failing"
        assert "nowhere; the old ones stay in use" in task.fault
        assert await signs(vault, key)
        assert vault.health().ready
        provider.fault, provider.current = None, Credentials("second", "secret", "token", "r")
        await trio.sleep(renewal.RESOLVING.longest * 2)
        assert task.state == "running"
        assert enclave.connections == connections + 2
        assert enclave.serving == 2, "the old sessions are closed"
        assert await signs(vault, key)


async def test_credentials_that_open_nothing_leave_the_old_sessions(path: Path, enclave: FakeEnclave) -> None:
    (key,) = await stored(path, enclave)
    provider = Provider()

    refusing = True

    async def refuse(frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return encode_frame(encode_error("encryption error", "AccessDeniedException")) if refusing else frame

    async with running(path, enclave, sessions=2, provider=provider) as vault:
        await complete(vault)
        provider.current = Credentials("second", "secret", "token", "r")
        connections = enclave.connections
        enclave.tamper_new = refuse
        await vault.reload()
        await until(lambda: enclave.connections == connections + 2)
        await trio.testing.wait_all_tasks_blocked()
        for number in range(4):
            assert await signs(vault, key, b"%d" % number)
        assert enclave.serving == 4
        refusing = False
        await vault.reload()
        await until(lambda: enclave.serving == 2)
        assert await signs(vault, key)


# -- the operator


async def test_reload_drops_what_the_file_has_no_more(path: Path, enclave: FakeEnclave) -> None:
    first, second = await stored(path, enclave, 2)
    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        text = path.read_text()
        for damaged in ("[ damaged", "{}"):
            path.write_text(damaged)
            with pytest.raises(SignerError, match="is damaged"):
                await vault.reload()
            assert await signs(vault, first)
        path.unlink()
        with pytest.raises(SignerError, match="is gone; the keys known stay in use"):
            await vault.reload()
        assert await signs(vault, second)
        entries = text.split("},")
        path.write_text(entries[0] + "}\n]")
        await vault.refresh()
        assert await signs(vault, second), "without being asked for, no key is dropped"
        await vault.reload()
        assert list(vault.keys()) == [first]
        assert await signs(vault, first)
        with pytest.raises(SignerError, match="not found in any vault"):
            await sign(vault, second)
        assert crypto.generate_secret_key(Curve.P256).public_key.hash not in vault.keys()
        path.write_text(text)
        await vault.reload()
        assert list(vault.keys()) == [first, second], "it returns when what is new is in"


async def test_a_key_that_serves_is_not_said_to_be_skipped(path: Path, enclave: FakeEnclave) -> None:
    """Its blob opens over one session, and not over the one that came later."""
    keys = await stored(path, enclave, 2)

    async def refuse(frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return encode_frame(encode_error("encryption error", "throttled")) if b"handle" in frame else frame

    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        connections, enclave.tamper_new = enclave.connections, refuse
        with capture_logs() as logs:
            enclave.kill_one()
            await until(lambda: enclave.connections == connections + 1)
            await complete(vault)
            for key in keys:
                assert await signs(vault, key)
        assert not [log for log in logs if "pkh" in log]
        assert not vault.health().skipped


async def test_new_keys_reach_every_session(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave, sessions=3) as vault:
        await complete(vault, 3)
        key = (await vault.generate(Curve.BLS12_381)).hash
        await trio.testing.wait_all_tasks_blocked()
        assert all(key in line.handles for line in vault._link.epochs.lines())


async def test_a_blob_taken_out_while_its_import_is_waited_for(path: Path, enclave: FakeEnclave) -> None:
    keys = await stored(path, enclave, 7)
    gate, answered = trio.Event(), 0

    async def hold(frame: bytes) -> bytes:
        nonlocal answered
        answered += 1
        if answered >= 2:
            await gate.wait()
        return frame

    enclave.up = False
    async with running(path, enclave) as vault:
        enclave.tamper, enclave.up = hold, True
        await until(lambda: answered == 2)
        path.write_text("[" + path.read_text()[1:].split("},")[0] + "}]")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(vault.refresh)
            await until(lambda: len(vault._blobs.entries) == 1)
            gate.set()
        assert vault.ready
        assert list(vault.keys()) == keys[:1]
        assert await signs(vault, keys[0])


async def test_credentials_that_expired_and_are_not_found_again_are_not_looked_for_for_each_key(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    await stored(path, enclave, 40)
    provider = Provider()

    async def refuse(frame: bytes) -> bytes:
        provider.fault = CredentialsError("no metadata server")
        await trio.sleep(0.02)  # as KMS
        return encode_frame(encode_error("encryption error", "SDK error", "ExpiredTokenException: is expired"))

    enclave.tamper_new = refuse
    async with running(path, enclave, sessions=2, provider=provider):
        await trio.sleep(12)
    assert 2 <= provider.asked <= 16, "about once a second"


async def test_credentials_that_expired_are_looked_for_at_once(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    """Not in five minutes, and not once for each key."""
    keys = await stored(path, enclave, 40)
    provider, began = Provider(), trio.current_time()

    async def refuse(frame: bytes) -> bytes:
        await trio.sleep(0.02)  # as KMS
        return encode_frame(encode_error("encryption error", "SDK error", "ExpiredTokenException: is expired"))

    enclave.tamper_new = refuse
    async with running(path, enclave, sessions=2, provider=provider) as vault:
        await trio.sleep(12)
        assert 2 <= provider.asked <= 4, "each blob was refused over two sessions, and again after some seconds"
        enclave.tamper_new = None
        provider.current = Credentials("second", "secret", "token", "r")
        with trio.fail_after(60):
            while not vault.serves(keys[-1]):
                await vault.wait_change()
        assert trio.current_time() - began < renewal.REFRESH_INTERVAL / 3
        assert await signs(vault, keys[0])
