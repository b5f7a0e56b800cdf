"""The vault against an enclave, a key file and credentials that misbehave, and callers that go away."""

import base64
import fcntl
import json
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from proxy.address import parse
from signer import crypto
from signer.errors import KeyNotFoundError
from signer.observe.metrics import Metrics
from signer.policy import Caller, KeyPolicy
from signer.rpc.frames import MAX_FRAME, encode_frame
from signer.rpc.messages import Created, Imported, encode_error, encode_reply
from signer.signing import Signing
from signer.tezos.keys import Curve, PublicKey, PublicKeyHash
from signer.vaults.interface import VaultError, VaultUnavailableError
from signer.vaults.nitro import credentials as credentials_module
from signer.vaults.nitro import link as link_module
from signer.vaults.nitro import vault as vault_module
from signer.vaults.nitro.credentials import Credentials, CredentialsError
from signer.vaults.nitro.discovery import Place
from signer.vaults.nitro.pace import Pace
from signer.vaults.nitro.storage import FileStorage, KeyExistsError, KeyFile, StorageError, StoredKey
from signer.vaults.nitro.vault import NitroVault
from signer.watermark.memory import MemoryWatermarks
from tests.unit.vaults.fake import FakeEnclave, FakeLocator, credentials, honest, running, sign, signs, until

SECRET = crypto.load_secret_key(Curve.P256, bytes(range(1, 33)))
OTHER = crypto.load_secret_key(Curve.P256, bytes(range(2, 34)))


def says(reply: bytes) -> Callable[[bytes], Awaitable[bytes]]:
    """A tamper that gives this reply to every call."""

    async def tamper(_frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return encode_frame(reply)

    return tamper


class Held:
    """A tamper that holds replies until `gate` is set; *waiting* counts them."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.waiting = 0

    async def __call__(self, frame: bytes) -> bytes:
        self.waiting += 1
        await self.gate.wait()
        return frame


class Once:
    """A tamper that acts on one reply only."""

    def __init__(self, tamper: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._tamper: Callable[[bytes], Awaitable[bytes]] = tamper

    async def __call__(self, frame: bytes) -> bytes:
        tamper, self._tamper = self._tamper, honest
        return await tamper(frame)


# -- the link


@pytest.mark.parametrize(
    "fault",
    [
        trio.BrokenResourceError(),
        trio.ClosedResourceError(),
        ConnectionResetError(104, "Connection reset by peer"),
        OSError("no number"),
    ],
)
async def test_whatever_ends_the_dialling_is_retried(path: Path, enclave: FakeEnclave, fault: Exception) -> None:
    """An enclave that goes down within a hybrid handshake resets the stream: no reason to end the signer."""
    faults = [fault]

    async def connect(address: object) -> trio.abc.Stream:
        await trio.lowlevel.checkpoint()
        if faults:
            raise faults.pop()
        return await enclave.connect(address)

    async with running(path, enclave, connect=connect) as vault:
        assert "dial unix:/fake:2000" in vault.health().detail
        await until(lambda: vault.ready)


@pytest.mark.parametrize(
    ("place", "fixed", "advised"),
    [("vsock:16:2000", True, True), ("vsock:16:2000", False, False), ("unix:/fake:2000", True, False)],
)
async def test_a_cid_that_is_written_down_may_be_an_old_one(
    path: Path, enclave: FakeEnclave, place: str, fixed: bool, advised: bool
) -> None:
    enclave.up = False
    locator = FakeLocator(fixed=fixed)
    locator.place = Place(parse(place))
    async with running(path, enclave, locator=locator) as vault:
        assert f"dial {place}: Connection refused" in vault.health().detail
        assert ("enclave_cid: auto" in vault.health().detail) is advised


def tells(vault: NitroVault, detail: str) -> bool:
    return vault.health().detail == detail


async def test_the_first_attempt_says_what_it_waits_for(path: Path, enclave: FakeEnclave) -> None:
    waits, locator = [trio.Event(), trio.Event()], FakeLocator()

    async def provider() -> Credentials:
        await waits[0].wait()
        return await credentials()

    async def connect(address: object) -> trio.abc.Stream:
        await waits[1].wait()
        return await enclave.connect(address)

    vault = NitroVault(
        name="n",
        locator=locator,
        storage=KeyFile(path),
        credentials=provider,
        encryption_key_id="k",
        connect=connect,
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(vault.run)
        for waiting, what in zip(waits, ("looking for credentials", "connecting to unix:/fake:2000"), strict=True):
            await until(partial(tells, vault, f"not connected yet: {what}"))
            waiting.set()
        await until(lambda: vault.ready)
        nursery.cancel_scope.cancel()


async def test_credentials_that_fail_at_first(path: Path, enclave: FakeEnclave) -> None:
    faults = [CredentialsError("(Nitro): missing credentials: nowhere"), OSError(2, "no such file")]

    async def provider() -> Credentials:
        await trio.lowlevel.checkpoint()
        if faults:
            raise faults.pop(0)
        return await credentials()

    async with running(path, enclave, provider=provider) as vault:
        assert "nowhere" in vault.health().detail
        assert await signs(vault, (await vault.generate(Curve.ED25519)).hash)


async def test_credentials_too_large_for_a_frame(path: Path, enclave: FakeEnclave) -> None:
    found = [Credentials("a", "b", "x" * (MAX_FRAME + 1), "r")]

    async def provider() -> Credentials:
        return found.pop() if found else await credentials()

    async with running(path, enclave, provider=provider) as vault:
        assert "Initialize: a frame of" in vault.health().detail
        await until(lambda: vault.ready)


async def test_a_refusal_by_the_sdk_is_an_error_of_the_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    """A role that may not be assumed is a ClientError, which is no BotoCoreError."""
    import botocore.exceptions
    import botocore.session

    def refuse(_self: object) -> None:
        raise botocore.exceptions.ClientError({"Error": {"Code": "AccessDenied", "Message": "no"}}, "AssumeRole")

    monkeypatch.setattr(botocore.session.Session, "get_credentials", refuse)
    resolve = credentials_module.provider(access_key_id="", secret_access_key="", session_token="", region="r")
    with pytest.raises(CredentialsError, match="AccessDenied"):
        await resolve()


async def test_an_enclave_that_dies_between_initialize_and_import(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as vault:
        keys = [(await vault.generate(curve)).hash for curve in Curve]
    deaths = 0

    async def die(frame: bytes) -> bytes:
        nonlocal deaths
        deaths += 1
        if deaths in (1, 3, 6):  # at the first, the second and the third blob of a session
            raise EOFError
        return frame

    enclave.tamper = die
    async with running(path, enclave) as vault:
        for key in keys:
            assert await signs(vault, key)
        assert vault.health().ready
        assert not vault.health().skipped
        assert list(vault.keys()) == keys
    assert deaths > 6


async def test_not_ready_before_the_keys_are_there(path: Path, enclave: FakeEnclave) -> None:
    """While blobs are being opened a signature may have to wait; the mark must not move before it."""
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
        held = enclave.tamper = Held()
        enclave.kill()
        await until(lambda: held.waiting > 0)
        health = vault.health()
        assert (vault.ready, health.ready, health.keys, health.detail) == (False, False, 0, "importing keys, 0 of 1 in")
        assert pkh in vault.keys()
        held.gate.set()
        assert await signs(vault, pkh)
        await until(lambda: vault.ready)


async def test_a_command_waits_for_the_link_no_longer_than_needed(path: Path, enclave: FakeEnclave) -> None:
    enclave.up = False
    async with running(path, enclave, wait=600) as vault:
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vault.generate, Curve.ED25519)
                await trio.testing.wait_all_tasks_blocked()
                enclave.up = True
        assert len(vault.keys()) == 1


async def test_thirty_calls_in_flight_survive_the_loss_of_the_session(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as vault:
        keys = [(await vault.generate(curve)).hash for curve in (Curve.ED25519, Curve.SECP256K1, Curve.P256)]
        held = enclave.tamper = Held()
        good: list[bool] = []

        async def ask(number: int) -> None:
            good.append(await signs(vault, keys[number % 3], b"%d" % number))

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(ask, number)
            await until(lambda: held.waiting > 0)
            enclave.tamper = honest
            enclave.kill()
        assert good == [True] * 30


async def test_messages_of_any_length(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
        for length in (0, 4095, 4096, 4097, 256 * 1024):
            assert await signs(vault, pkh, b"\xff" * length)
        connections = enclave.connections
        with pytest.raises(VaultError, match="over the limit"):
            await sign(vault, pkh, b"\xff" * MAX_FRAME)
        assert await signs(vault, pkh)
        assert enclave.connections == connections, "what is too large to send is no fault of the session"


# -- an enclave that returns something else


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (OTHER.public_key, "for the key of p2pk"),
        (crypto.load_secret_key(Curve.ED25519, bytes(32)).public_key, "for the key of p2pk"),
        (PublicKey(Curve.P256, b"\2" + b"\xff" * 32), "for the key of p2pk"),
    ],
)
async def test_another_key_than_the_one_imported_is_not_stored(
    path: Path, enclave: FakeEnclave, made: PublicKey, text: str
) -> None:
    async with running(path, enclave) as vault:
        enclave.tamper = says(encode_reply(Created(b"blob", made, 0)))
        with pytest.raises(VaultError, match=text):
            await vault.import_key(SECRET)
        assert not vault.keys()
        assert FileStorage(path).load() == []
        enclave.tamper = honest
        assert await vault.import_key(SECRET) == SECRET.public_key


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (crypto.load_secret_key(Curve.ED25519, bytes(32)).public_key, "for a new tz3 key"),
        (PublicKey(Curve.P256, b"\2" + b"\xff" * 32), "malformed public key RPC response"),
    ],
)
async def test_another_key_than_the_one_to_be_made_is_not_stored(
    path: Path, enclave: FakeEnclave, made: PublicKey, text: str
) -> None:
    async with running(path, enclave) as vault:
        enclave.tamper = says(encode_reply(Created(b"blob", made, 0)))
        with pytest.raises(VaultError, match=text):
            await vault.generate(Curve.P256)
        assert not vault.keys()
        assert FileStorage(path).load() == []


async def test_another_key_for_a_blob_is_not_used(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as vault:
        await vault.import_key(SECRET)

    async def of_another(frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return encode_frame(encode_reply(Imported(OTHER.public_key, 0) if b"handle" in frame else OTHER.public_key))

    enclave.tamper = of_another
    async with running(path, enclave) as vault:
        assert not vault.keys()
        assert f"holds the key of {OTHER.public_key.hash}" in vault.health().skipped[str(SECRET.public_key.hash)]
        for key in (SECRET, OTHER):
            with pytest.raises((VaultUnavailableError, KeyNotFoundError)):
                await sign(vault, key.public_key.hash, b"m")


async def test_exchanged_replies_to_imports_cost_no_key(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as vault:
        keys = [await vault.generate(curve) for curve in (Curve.ED25519, Curve.P256)]
    held: list[bytes] = []

    async def exchanged(frame: bytes) -> bytes:
        """The first two replies with a handle change places."""
        await trio.lowlevel.checkpoint()
        if b"handle" not in frame or len(held) > 1:
            return frame
        held.append(frame)
        return b"" if len(held) == 1 else frame + held[0]

    enclave.tamper = exchanged
    async with running(path, enclave, sessions=1) as vault:
        assert len(held) == 2
        assert vault.health().skipped == {}
        for key in keys:
            assert await signs(vault, key.hash)


async def test_an_import_answered_twice_costs_its_session_and_no_key(path: Path, enclave: FakeEnclave) -> None:
    """Every later reply would be that of the call before: all other keys were skipped for it."""
    async with running(path, enclave) as vault:
        keys = [await vault.generate(Curve.ED25519) for _ in range(5)]

    async def twice(frame: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return frame + frame

    enclave.tamper = Once(twice)
    connections = enclave.connections
    with capture_logs() as logs:
        async with running(path, enclave, sessions=1) as vault:
            await until(lambda: vault.ready and enclave.connections == connections + 2)
            for key in keys:
                assert await signs(vault, key.hash)
    assert not [log for log in logs if "skipped" in log["event"]]


async def test_an_address_of_what_is_no_key_is_not_used(path: Path, enclave: FakeEnclave) -> None:
    """Its replies fit the key file, but nothing could verify under it."""
    no_key = PublicKey(Curve.P256, b"\2" + b"\xff" * 32)
    FileStorage(path).append(no_key.hash, b"blob")
    enclave.tamper = says(encode_reply(Imported(no_key, 0)))
    async with running(path, enclave) as vault:
        await until(lambda: vault.ready)
        assert not vault.keys()
        assert not vault.serves(no_key.hash)
        assert list(vault.health().skipped) == [str(no_key.hash)]


async def test_replies_that_belong_to_others_cost_no_slot(path: Path, enclave: FakeEnclave) -> None:
    """An enclave one reply behind: nothing wrong leaves, and the request is answered over a new session."""
    async with running(path, enclave) as vault:
        keys = [await vault.generate(curve) for curve in (Curve.ED25519, Curve.P256)]
        late: list[bytes] = []

        async def one_behind(frame: bytes) -> bytes:
            await trio.lowlevel.checkpoint()
            late.append(frame)
            return late.pop(0) if len(late) > 1 and enclave.connections == 1 else frame

        signing = Signing(
            policies={key.hash: KeyPolicy(requests=("pack",), operations=()) for key in keys},
            vaults=[vault],
            marks=MemoryWatermarks(),
            metrics=Metrics(),
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(signing.run)
            enclave.tamper = one_behind
            for key in keys:
                signature = await signing.sign(key.hash, b"\x05\x00\x01", version=2, caller=Caller())
                assert crypto.verify(key, b"\x05\x00\x01", signature)
            nursery.cancel_scope.cancel()
        assert enclave.connections == 2


# -- blobs that do not open, for a time


async def test_when_no_blob_opens_they_are_tried_again(
    path: Path, enclave: FakeEnclave, monkeypatch: pytest.MonkeyPatch
) -> None:
    """KMS was away while the link came up: nobody should have to restart anything."""
    monkeypatch.setattr(link_module, "RETRY_REFUSED", Pace(shortest=0.01, longest=0.01))
    monkeypatch.setattr(vault_module, "WATCH_INTERVAL", 0.01)
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
    enclave.tamper = says(encode_error("encryption error", "SDK error", "dispatch failure"))
    async with running(path, enclave) as vault:
        assert not vault.health().ready
        assert "dispatch failure" in vault.health().skipped[str(pkh)]
        with pytest.raises(VaultUnavailableError, match="dispatch failure"):
            await sign(vault, pkh, b"m")
        enclave.tamper = honest
        await until(lambda: pkh in vault.keys())
        assert await signs(vault, pkh)
        assert not vault.health().skipped
        assert enclave.connections == 2


async def test_a_key_that_opens_no_more_is_not_offered(path: Path, enclave: FakeEnclave) -> None:
    """After a restart of the enclave one blob is refused: its requests must move no mark, the others go on."""
    async with running(path, enclave) as vault:
        first, second = [(await vault.generate(Curve.ED25519)).hash for _ in range(2)]
        replies = 0

        async def refuse_first(frame: bytes) -> bytes:
            """The first blob is refused, and once more when it is asked for again."""
            nonlocal replies
            await trio.lowlevel.checkpoint()
            replies += 1
            return encode_frame(encode_error("encryption error", "throttled")) if replies in (1, 3) else frame

        enclave.tamper = refuse_first
        enclave.kill()
        await until(lambda: enclave.connections == 2 and vault.ready)
        (refused,) = vault.health().skipped
        served = second if refused == str(first) else first
        assert not vault.serves(PublicKeyHash.from_base58(refused))
        assert vault.serves(served)
        assert await signs(vault, served)
        with pytest.raises(VaultUnavailableError, match="throttled"):
            await sign(vault, PublicKeyHash.from_base58(refused), b"m")
        path.write_text(path.read_text() + "\n")  # what an operator can do without a restart
        await vault.refresh()
        assert list(vault.keys()) == [first, second]
        assert not vault.health().skipped


# -- the key file


@pytest.mark.parametrize("content", [None, "", "[]", "[ damaged", "{}", "\x00", "5"])
async def test_a_key_file_that_loses_its_keys_costs_no_slot(
    path: Path, enclave: FakeEnclave, content: str | None
) -> None:
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
        await vault.refresh()
        with capture_logs() as logs:
            if content is None:
                path.unlink()
            else:
                path.write_text(content)
            for _ in range(3):
                await vault.refresh()
        assert len([line for line in logs if line["log_level"] == "error"]) == 1
        assert await signs(vault, pkh)
        enclave.kill()
        await until(lambda: enclave.connections == 2)
        assert await signs(vault, pkh), "nor does the next session"


async def test_a_key_file_that_is_replaced(path: Path, enclave: FakeEnclave, tmp_path: Path) -> None:
    async with running(tmp_path / "other.json", enclave) as vault:
        other = (await vault.generate(Curve.P256)).hash
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
        await vault.refresh()
        (tmp_path / "other.json").rename(path)
        await vault.refresh()
        assert await signs(vault, pkh)
        assert await signs(vault, other)
        third = (await vault.generate(Curve.ED25519)).hash
        await vault.refresh()
        assert set(vault.keys()) == {pkh, other, third}


async def test_an_entry_that_is_taken_out_is_reported_no_more(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
    entries = json.loads(path.read_text())
    bad = {"public_key_hash": str(SECRET.public_key.hash), "encrypted_private_key": "AQID"}
    path.write_text(json.dumps([*entries, bad]))
    async with running(path, enclave) as vault:
        assert list(vault.health().skipped) == [str(SECRET.public_key.hash)]
        path.write_text(json.dumps(entries))
        await vault.refresh()
        assert not vault.health().skipped
        assert list(vault.keys()) == [pkh]


@pytest.mark.parametrize("bad_first", [True, False])
async def test_a_second_entry_of_a_key_that_serves(path: Path, enclave: FakeEnclave, bad_first: bool) -> None:
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
    (good,) = json.loads(path.read_text())
    bad = {**good, "encrypted_private_key": base64.b64encode(b"junk").decode()}
    path.write_text(json.dumps([bad, good] if bad_first else [good, bad]))
    async with running(path, enclave) as vault:
        assert await signs(vault, pkh)
        assert not vault.health().skipped


# -- several at once, and callers that go away


async def test_keys_made_at_once_are_all_stored(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as first, running(path, enclave) as second:
        async with trio.open_nursery() as nursery:
            for vault in (first, second) * 4:
                nursery.start_soon(vault.generate, Curve.ED25519)
        assert len({stored.public_key_hash for stored in FileStorage(path).load()}) == 8
        for vault in (first, second):
            await vault.refresh()
            assert len(vault.keys()) == 8


async def test_one_key_imported_twice_at_once(path: Path, enclave: FakeEnclave) -> None:
    refused: list[Exception] = []
    async with running(path, enclave) as vault:

        async def load() -> None:
            try:
                await vault.import_key(SECRET)
            except (KeyExistsError, VaultError) as exc:
                refused.append(exc)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(load)
        assert len(refused) == 2
        assert len(FileStorage(path).load()) == 1
        assert await signs(vault, SECRET.public_key.hash)


@pytest.mark.parametrize("importing", [True, False])
async def test_creating_a_key_is_cancelled_before_the_enclave_answers(
    path: Path, enclave: FakeEnclave, importing: bool
) -> None:
    async with running(path, enclave) as vault:
        held = enclave.tamper = Held()

        async def create() -> None:
            await (vault.import_key(SECRET) if importing else vault.generate(Curve.P256))

        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(create)
                await until(lambda: held.waiting == 1)
                scope.cancel()
        held.gate.set()
        enclave.tamper = honest
        assert not vault.keys()
        assert FileStorage(path).load() == []
        await create()
        assert len(vault.keys()) == len(FileStorage(path).load()) == 1
        assert vault.ready
        assert enclave.connections == 1


async def test_creating_a_key_is_cancelled_while_it_is_stored(path: Path, enclave: FakeEnclave) -> None:
    """What is being written is finished: a key in the file that the vault denies would be worse."""
    async with running(path, enclave) as vault:
        with path.with_name("enclave_keys.json.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(vault.import_key, SECRET)
                await until(lambda: enclave.calls == 2)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
                stored_before = len(FileStorage(path).load())
                fcntl.flock(lock, fcntl.LOCK_UN)
        assert stored_before == 0
        assert len(FileStorage(path).load()) == 1
        assert await signs(vault, SECRET.public_key.hash)


async def test_a_caller_that_goes_away_while_new_keys_are_imported(path: Path, enclave: FakeEnclave) -> None:
    async with running(path, enclave) as server:
        async with running(path, enclave) as command:
            pkh = (await command.generate(Curve.ED25519)).hash
        held = enclave.tamper = Held()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.refresh)
                await until(lambda: held.waiting == 1)
                scope.cancel()
        held.gate.set()
        enclave.tamper = honest
        await server.refresh()
        assert await signs(server, pkh)


def test_a_blob_is_exchanged_only_for_the_one_that_was_seen(path: Path) -> None:
    storage = FileStorage(path)
    keys = [crypto.load_secret_key(Curve.ED25519, bytes([number]) * 32).public_key.hash for number in (1, 2)]
    for key in keys:
        storage.append(key, b"old")
    other = StoredKey(str(keys[0]), b"another")
    with pytest.raises(StorageError, match="has changed meanwhile; nothing was changed"):
        storage.replace(other, b"new")
    storage.replace(StoredKey(str(keys[1]), b"old"), b"new")
    assert storage.load() == [StoredKey(str(keys[0]), b"old"), StoredKey(str(keys[1]), b"new")]
