"""What once broke the link to the enclave: each test is an attack that succeeded."""

import json
import os
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from signer.enclave.session import Session as EnclaveSession
from signer.errors import SignerError
from signer.observe.tasks import Tasks
from signer.rpc.frames import encode_frame
from signer.rpc.messages import Imported, Sign, encode_error, encode_reply
from signer.vaults.interface import VaultUnavailableError
from signer.vaults.nitro import credentials as credentials_module
from signer.vaults.nitro import discovery
from signer.vaults.nitro.credentials import MAX_LOOKUPS, Credentials, CredentialsError
from signer.vaults.nitro.discovery import Place
from signer.vaults.nitro.storage import FileStorage, StorageError
from tests.unit.vaults.fake import FakeEnclave, FakeLocator, honest, running, sign, signs, until
from tests.unit.vaults.test_link import NEW, OLD, Provider, Swallow, World, complete, stored


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery)


class Wrapped(trio.abc.Stream):
    """Another stream, for tests that change something about it."""

    def __init__(self, inner: trio.abc.Stream) -> None:
        self._inner = inner

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._inner.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._inner.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        return await self._inner.receive_some(max_bytes)

    async def aclose(self) -> None:
        await self._inner.aclose()


class LastWords(trio.abc.Stream):
    """Answers `Initialize`; later one reply arrives in the very step in which the next write fails."""

    def __init__(self, reply: bytes) -> None:
        self._replies = [encode_frame(encode_reply(None)), reply]
        self._sent = 0
        self._step = trio.Event()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self._sent += 1
        await trio.lowlevel.checkpoint()
        if self._sent > 1:
            self._step.set()
            await trio.lowlevel.checkpoint()
            raise trio.BrokenResourceError

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if len(self._replies) == 1:
            await self._step.wait()
        else:
            await trio.lowlevel.checkpoint()
        return self._replies.pop(0) if self._replies else await trio.sleep_forever()

    async def wait_send_all_might_not_block(self) -> None:
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


async def test_an_import_answered_in_the_moment_in_which_the_connection_breaks(
    path: Path, enclave: FakeEnclave
) -> None:
    """Trio wakes the importer and the end of its session in any order: neither may trip over the other."""
    (pkh,) = await stored(path, enclave)
    async with running(path, enclave) as vault:
        key = vault.keys()[pkh].public_key
    broken = 0

    async def connect(address: object) -> trio.abc.Stream:
        nonlocal broken
        await trio.lowlevel.checkpoint()
        if broken == 30:
            return await enclave.connect(address)
        broken += 1
        return LastWords(encode_frame(encode_reply(Imported(key, 0))))

    async with running(path, enclave, connect=connect) as vault:
        await until(lambda: broken == 30 and vault.ready)
        assert await signs(vault, pkh)


# -- looking for the enclave


class SlowLocator(FakeLocator):
    """As slow as nitro-cli."""

    async def locate(self) -> Place:
        await trio.sleep(0.3)
        return await super().locate()


@pytest.mark.parametrize("fixed", [True, False])
@pytest.mark.parametrize("replies", [1, 2])
async def test_sessions_that_end_at_once_are_not_rebuilt_in_a_busy_loop(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, fixed: bool, replies: int
) -> None:
    """An enclave that initializes, maybe imports, and closes: each such end is news, and no reason to hurry."""
    (pkh,) = await stored(path, enclave)
    provider, locator, dials, closing = Provider(), FakeLocator(fixed=fixed), 0, True

    async def connect(address: object) -> trio.abc.Stream:
        nonlocal dials
        dials += 1
        assert dials < 1000
        return Closing(await enclave.connect(address), replies) if closing else await enclave.connect(address)

    async with running(path, enclave, sessions=2, connect=connect, locator=locator, provider=provider) as vault:
        await trio.sleep(20)
        assert 20 < dials < 400
        assert locator.asked < 200
        assert provider.asked < 200
        closing = False
        await trio.sleep(2)
        assert await signs(vault, pkh)


class Closing(Wrapped):
    """Ends after a number of replies."""

    def __init__(self, inner: trio.abc.Stream, replies: int) -> None:
        super().__init__(inner)
        self._replies = replies

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if not self._replies:
            await trio.lowlevel.checkpoint()
            return b""
        self._replies -= 1
        return await super().receive_some(max_bytes)


async def test_a_session_that_comes_when_its_epoch_is_over(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    """The second session breaks while the first is on its way back: one of them was never rebuilt."""
    (pkh,) = await stored(path, enclave)
    dial = 0.0

    async def connect(address: object) -> trio.abc.Stream:
        await trio.sleep(dial)
        return await enclave.connect(address)

    locator = SlowLocator(fixed=False)
    async with running(path, enclave, sessions=2, connect=connect, locator=locator) as vault:
        await complete(vault)
        dial = 0.2
        enclave.kill_one()
        await trio.sleep(0.1)
        enclave.kill_one()
        await trio.sleep(5)
        assert enclave.serving == 2
        locator.faults = [SignerError("nitro-cli is away")] * 10
        dial = 2.0
        enclave.kill_one()
        await trio.sleep(1)
        enclave.kill_one()
        await trio.sleep(60)
        assert enclave.serving == 2, "nor if the enclave is not found at first"
        assert await signs(vault, pkh)


async def test_new_credentials_are_used_though_the_enclave_is_not_found_at_first(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    await stored(path, enclave)
    provider, tasks, locator = Provider(), Tasks(), FakeLocator(fixed=False)
    async with running(path, enclave, provider=provider, locator=locator, tasks=tasks) as vault:
        await complete(vault, 1)
        connections = enclave.connections
        locator.faults = [SignerError("nitro-cli is away")] * 3
        provider.current = Credentials("second", "secret", "token", "r")
        await vault.reload()
        await trio.sleep(1)
        assert not locator.faults
        assert enclave.connections == connections + 1
        assert tasks.all()["vault n discovery"].state == "running", "nor does a fault that is over stay in sight"


async def test_an_old_enclave_is_kept_if_the_new_one_dies_while_it_drains(
    path: Path, world: World, autojump_clock: trio.testing.MockClock
) -> None:
    """It was not needed any more when its drain began; when its last reply was late, it was the only one left."""
    (pkh,) = await stored(path, world.old)
    swallow = world.old.tamper = Swallow()
    async with running(path, world.old, connect=world.connect, locator=world.locator, sessions=2) as vault:
        await complete(vault)
        swallow.on = True
        assert await signs(vault, pkh), "one session owes a reply now"
        world.locator.place = NEW
        vault._link._look.set()
        await until(lambda: world.new.serving == 2)
        await trio.sleep(2)
        assert world.old.serving == 2, "it drains"
        world.new.up = False
        world.new.kill()
        await trio.sleep(30)
        swallow.gate.set()
        assert await signs(vault, pkh)
        world.new.up = True
        await trio.sleep(30)
        await until(lambda: (world.old.serving, world.new.serving) == (0, 2))
        assert await signs(vault, pkh)


async def test_an_old_enclave_is_not_dialled_any_more(
    path: Path, world: World, autojump_clock: trio.testing.MockClock
) -> None:
    (pkh,) = await stored(path, world.old)
    async with running(path, world.old, connect=world.connect, locator=world.locator, sessions=2) as vault:
        await complete(vault)
        world.locator.place, world.new.up, world.old.up = NEW, False, False
        world.old.kill_one()
        await trio.sleep(1)  # until that is known, a place where a session still answers may be dialled
        world.dialled.clear()
        await trio.sleep(20)
        assert len(world.dialled) > 10
        assert OLD.address not in world.dialled
        assert await signs(vault, pkh), "what is left of it serves"


@pytest.mark.parametrize("sessions", [1, 2])
async def test_a_session_that_was_good_for_long_is_rebuilt_at_once(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, sessions: int
) -> None:
    await stored(path, enclave)
    async with running(path, enclave, sessions=sessions) as vault:
        await complete(vault, sessions)
        for _ in range(4):
            await trio.sleep(1000)
            enclave.up = False
            enclave.kill_one()
            await trio.sleep(0.1)
            enclave.up = True
            await trio.sleep(0.1)
            assert enclave.serving == sessions


# -- blobs


class Opening:
    """Enclave sessions in which opening one blob hangs, as a call to KMS may, while *on*."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, blob: bytes) -> None:
        self.on = True
        answer = EnclaveSession.answer

        async def hang(session: EnclaveSession, payload: bytes) -> bytes:
            if self.on and blob in payload:
                await trio.Event().wait()
            return await answer(session, payload)

        monkeypatch.setattr(EnclaveSession, "answer", hang)


async def test_a_blob_that_hangs_stops_no_other_key(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All sessions hung with it, one reply timeout after the other: no key could sign."""
    keys = await stored(path, enclave, 10)
    opening = Opening(monkeypatch, FileStorage(path).load()[3].blob)
    with capture_logs() as logs:
        async with running(path, enclave, sessions=2, wait=2.5) as vault:
            good = [key for key in keys if key is not keys[3]]
            await trio.sleep(20)
            for round_ in range(100):
                await trio.sleep(1)
                assert await signs(vault, good[round_ % 9])
            with pytest.raises(VaultUnavailableError, match="did not answer within 10 s"):
                await sign(vault, keys[3])
            opening.on = False
            await trio.sleep(130)
            assert await signs(vault, keys[3]), "it is tried again"
            assert not vault.health().skipped
    told = [(log["event"], log.get("error")) for log in logs if log.get("pkh") == str(keys[3])]
    why = "the enclave did not answer within 10 s when it was to open the blob"
    assert told == [
        ("key skipped: its blob cannot be used", why),
        ("a key that was skipped can be used", None),
    ], "each once, in two minutes"


async def test_a_blob_that_was_refused_comes_back_over_the_only_session(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KMS throttled one call at the start; with `sessions: 1` nobody ever asked again."""
    first, second = await stored(path, enclave, 2)
    blob, answer, throttled = FileStorage(path).load()[1].blob, EnclaveSession.answer, True

    async def throttle(session: EnclaveSession, payload: bytes) -> bytes:
        if throttled and blob in payload:
            return encode_error("encryption error", "throttled")
        return await answer(session, payload)

    monkeypatch.setattr(EnclaveSession, "answer", throttle)
    async with running(path, enclave) as vault:
        assert await signs(vault, first)
        throttled = False
        await trio.sleep(10)
        assert await signs(vault, second)


async def test_when_every_blob_hangs_they_come_back_at_once(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then it is KMS that hangs: no blob is to blame."""
    keys = await stored(path, enclave, 5)
    opening = Opening(monkeypatch, b"Import")
    async with running(path, enclave, sessions=2) as vault:
        await trio.sleep(300)
        assert not vault.health().ready
        assert not vault.health().skipped
        opening.on = False
        await trio.sleep(12)
        for key in keys:
            assert await signs(vault, key)


async def test_every_key_signs_in_time_while_the_others_are_opened_slowly(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 keys at 0.3 s each: a key that is asked for comes first, and little is on the wire before it."""
    keys = await stored(path, enclave, 40)
    answer = EnclaveSession.answer

    async def slow(session: EnclaveSession, payload: bytes) -> bytes:
        if payload[2:].startswith(b"Import"):
            await trio.sleep(0.3)
        return await answer(session, payload)

    async with running(path, enclave, sessions=2, wait=2.5) as vault:
        monkeypatch.setattr(EnclaveSession, "answer", slow)
        enclave.kill()
        await trio.sleep(0.1)
        for key in reversed(keys):
            began = trio.current_time()
            assert await signs(vault, key)
            assert trio.current_time() - began < 1.6


async def test_one_refusal_of_a_blob_is_asked_about_again(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been the reply to another import."""
    (pkh,) = await stored(path, enclave)
    answer, refusals = EnclaveSession.answer, 1

    async def refuse_once(session: EnclaveSession, payload: bytes) -> bytes:
        nonlocal refusals
        if refusals and payload[2:].startswith(b"Import"):
            refusals -= 1
            return encode_error("encryption error", "throttled")
        return await answer(session, payload)

    monkeypatch.setattr(EnclaveSession, "answer", refuse_once)
    async with running(path, enclave) as vault:
        assert not refusals
        assert not vault.health().skipped
        assert await signs(vault, pkh)


# -- the patience of callers


async def test_a_session_that_only_errs_is_doubted_and_another_one_asked(path: Path, enclave: FakeEnclave) -> None:
    (pkh,) = await stored(path, enclave)
    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        bad = next(vault._link.epochs.lines())
        settle = bad.channel._settle

        def err(payload: bytes) -> None:
            is_signature = isinstance(bad.channel._slots[0].call, Sign)
            settle(encode_error("signer error", "busy") if is_signature else payload)

        bad.channel._settle = err  # type: ignore[method-assign]  # this session's own enclave, gone bad
        for number in range(4):
            assert await signs(vault, pkh, b"%d" % number)
        assert enclave.serving == 2, "it is in step, so it stays"


async def test_a_late_reply_wakes_the_caller_after_another_session_was_lost(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    """Not at the next look: each one is a quarter of a second later."""
    (pkh,) = await stored(path, enclave)
    replies = 0

    async def slow_or_dead(frame: bytes) -> bytes:
        nonlocal replies
        replies += 1
        number = replies
        await trio.sleep(0.32 if number == 1 else 0.05)
        if number == 2:
            enclave.tamper = honest
            enclave.up = False
            raise EOFError
        return frame

    async with running(path, enclave, sessions=2) as vault:
        await complete(vault)
        enclave.tamper = slow_or_dead
        began = trio.current_time()
        assert await signs(vault, pkh)
        assert trio.current_time() - began == pytest.approx(0.32)


async def test_a_key_is_wanted_no_longer_than_somebody_waits(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    (pkh,) = await stored(path, enclave)
    enclave.up = False
    async with running(path, enclave, wait=2.5) as vault:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(vault.wait_for, pkh, trio.current_time() + 10)
            await trio.testing.wait_all_tasks_blocked()
            assert dict(vault._link.standing.wanted) == {str(pkh): 2}
            nursery.cancel_scope.cancel()
        assert dict(vault._link.standing.wanted) == {}


@pytest.mark.parametrize("sessions", [1, 2])
async def test_an_error_followed_by_silence_keeps_nobody_beyond_the_patience(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock, sessions: int
) -> None:
    """Whether a session is in step is asked of the enclave too, which may not answer."""
    (pkh,) = await stored(path, enclave)
    replies = 0

    async def one_error(frame: bytes) -> bytes:
        nonlocal replies
        replies += 1
        if replies > 1:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return encode_frame(encode_error("signer error", "busy"))

    async with running(path, enclave, sessions=sessions, wait=2.5) as vault:
        await complete(vault, sessions)
        enclave.tamper = one_error
        began = trio.current_time()
        with pytest.raises(VaultUnavailableError, match="try again: RPC Error: signer error: busy"):
            await sign(vault, pkh)
        assert trio.current_time() - began == pytest.approx(2.5)


async def test_an_error_followed_by_silence_is_made_good_by_another_session(
    path: Path, enclave: FakeEnclave, autojump_clock: trio.testing.MockClock
) -> None:
    (pkh,) = await stored(path, enclave)

    async def silence(frame: bytes) -> bytes:
        enclave.tamper = honest
        await trio.Event().wait()
        return frame

    async def one_error(_frame: bytes) -> bytes:
        enclave.tamper = silence
        await trio.lowlevel.checkpoint()
        return encode_frame(encode_error("signer error", "busy"))

    async with running(path, enclave, sessions=2, wait=2.5) as vault:
        await complete(vault)
        enclave.tamper = one_error
        began = trio.current_time()
        assert await signs(vault, pkh)
        assert trio.current_time() - began < 0.5


# -- nitro-cli


async def test_a_command_that_cannot_be_ended_holds_up_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stuck in the kernel, or not ours to end: neither the search nor the shutdown waits for it."""
    program = tmp_path / "nitro-cli"
    program.write_text("#!/bin/sh\nexec sleep 1000\n")
    program.chmod(0o755)
    kill, open_process = os.killpg, trio.lowlevel.open_process
    processes: list[trio.Process] = []

    async def opened(*arguments: Any, **options: Any) -> trio.Process:
        processes.append(await open_process(*arguments, **options))
        return processes[-1]

    def refuse(_group: int, _number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(trio.lowlevel, "open_process", opened)
    monkeypatch.setattr("os.killpg", refuse)
    monkeypatch.setattr(discovery, "TIMEOUT", 0.05)
    monkeypatch.setattr(discovery, "KILL_TIMEOUT", 0.05)
    try:
        with trio.fail_after(5), pytest.raises(discovery.DiscoveryError, match="gave no answer"):
            await discovery._run(str(program))
    finally:
        (process,) = processes
        kill(process.pid, signal.SIGKILL)
        await process.wait()


# -- the key file


@pytest.mark.parametrize("blob", ['"\u00e9"', '"A"', '"\\ud800"', "7", "null"])
async def test_a_blob_that_is_no_base64_costs_its_own_key_only(path: Path, enclave: FakeEnclave, blob: str) -> None:
    (pkh,) = await stored(path, enclave)
    bad = f'{{"public_key_hash": "tz1bad", "encrypted_private_key": {blob}}}'
    async with running(path, enclave) as vault:
        path.write_text(f"[{bad}, {path.read_text()[1:]}", encoding="utf-8")
        await vault.refresh()
        assert await signs(vault, pkh)
        assert list(vault.health().skipped) == ["tz1bad"]


def test_a_key_file_nested_without_end_is_damaged(path: Path) -> None:
    path.write_text("[" * 200_000)
    with pytest.raises(StorageError, match="is damaged"):
        FileStorage(path).load()


# -- credentials


@pytest.mark.parametrize("kind", ["expired", "garbage", "binary"])
async def test_whatever_a_credential_process_prints_is_a_fault(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str
) -> None:
    """The SDK lets a RuntimeError, a ValueError and more through: none of them is a reason to end the signer."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    output = tmp_path / "output"
    expired = {
        "Version": 1,
        "AccessKeyId": "A",
        "SecretAccessKey": "never-shown",
        "SessionToken": "T",
        "Expiration": (datetime.now(UTC) - timedelta(hours=1)).isoformat(),
    }
    output.write_bytes({"expired": json.dumps(expired).encode(), "garbage": b"never-shown", "binary": b"\xff"}[kind])
    (tmp_path / "config").write_text(f"[default]\nregion = r\ncredential_process = cat {output}\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    resolve = credentials_module.provider(access_key_id="", secret_access_key="", session_token="", region="")
    with pytest.raises(CredentialsError, match="missing credentials: .*Error: ") as info:
        await resolve()
    assert "never-shown" not in str(info.value)


async def test_lookups_that_hang_leave_threads_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look-up that was given up keeps its thread; forty of them would stop everything that needs one."""
    release, entered = threading.Event(), 0

    def hang(_self: object) -> Credentials:
        nonlocal entered
        entered += 1
        release.wait()
        return Credentials("a", "b", None, "r")

    monkeypatch.setattr(credentials_module._Chain, "resolve", hang)
    resolve = credentials_module.provider(access_key_id="", secret_access_key="", session_token="", region="")
    try:
        async with trio.open_nursery() as nursery:
            for _ in range(MAX_LOOKUPS + 3):
                nursery.start_soon(resolve)
            await until(lambda: entered == MAX_LOOKUPS)
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            await trio.testing.wait_all_tasks_blocked()
            assert entered == MAX_LOOKUPS
            nursery.cancel_scope.cancel()
    finally:
        release.set()
    assert await resolve() == Credentials("a", "b", None, "r")


@pytest.mark.parametrize("call", ["Initialize", "Import", "Sign"])
async def test_an_enclave_that_quotes_the_credentials_in_its_errors(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """KMS quotes the session token in what it says of a wrong signature, a decoder what it could not decode."""
    (pkh,) = await stored(path, enclave)
    answer, provider, tasks = EnclaveSession.answer, Provider(), Tasks()
    provider.current = Credentials("A", "never-shown", "nor-this", "r")

    async def quote(session: EnclaveSession, payload: bytes) -> bytes:
        if payload[2:].startswith(call.encode()):
            return encode_error("encryption error", "SDK error", "x-amz-security-token:nor-this, not 'never-shown'")
        return await answer(session, payload)

    monkeypatch.setattr(EnclaveSession, "answer", quote)
    with capture_logs() as logs:
        async with running(path, enclave, provider=provider, tasks=tasks, wait=0.2) as vault:
            with pytest.raises(SignerError) as caught:
                await sign(vault, pkh)
            said = f"{caught.value!r} {vault.health()} {logs} {[task.fault for task in tasks.all().values()]}"
    assert "x-amz-security-token:(secret), not '(secret)'" in said
    assert "never-shown" not in said
    assert "nor-this" not in said
