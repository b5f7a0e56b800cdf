"""The vault over a fake enclave: epochs, waiting, blobs, and what it says of itself."""

import json
from pathlib import Path

import pytest
import trio
import trio.testing

from signer import crypto
from signer.errors import KeyNotFoundError
from signer.tezos.keys import Curve, PublicKeyHash
from signer.vaults.interface import VaultError, VaultUnavailableError
from signer.vaults.nitro.credentials import Credentials, CredentialsError
from signer.vaults.nitro.storage import FileStorage, KeyExistsError, StorageError
from tests.unit.vaults.fake import FakeEnclave, prove, running, sign, signs

OTHER = PublicKeyHash(Curve.P256, bytes(20))


async def test_generate_import_sign_and_load_again(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    secret = crypto.generate_secret_key(Curve.P256)
    async with running(path, enclave) as vault:
        assert vault.health().ready
        made = [await vault.generate(curve) for curve in Curve]
        assert await vault.import_key(secret) == secret.public_key
        for key in (*made, secret.public_key):
            assert await signs(vault, key.hash)
        with pytest.raises(VaultError, match="is in the vault already"):
            await vault.import_key(secret)
        with pytest.raises(VaultError, match=r"\(Nitro\): RPC Error: signer error: Signing version 0"):
            await sign(vault, made[3].hash, b"", version=0)
        proof = await prove(vault, made[3])
        assert crypto.verify_possession(made[3], proof)
        with pytest.raises(KeyNotFoundError):
            await sign(vault, PublicKeyHash(Curve.P256, bytes(20)), b"")
    stored = json.loads(path.read_text())
    assert path.read_text() == json.dumps(stored, indent=4)
    assert [entry["public_key_hash"] for entry in stored] == [str(key.hash) for key in (*made, secret.public_key)]
    async with running(path, enclave) as vault:
        assert list(vault.keys()) == [key.hash for key in (*made, secret.public_key)]
        assert await signs(vault, secret.public_key.hash)


async def test_a_new_enclave_is_found_and_requests_wait_for_it(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave, wait=0.3) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
        enclave.kill()
        assert await signs(vault, pkh), "asked while the link is being rebuilt"
        assert enclave.connections == 2
        enclave.up = False
        enclave.kill()
        with pytest.raises(VaultUnavailableError, match="Connection refused"):
            await sign(vault, pkh, b"m", version=2)
        health = vault.health()
        assert (health.ready, vault.ready, health.keys) == (False, False, 0)
        assert "Connection refused" in health.detail
        with pytest.raises(VaultUnavailableError):
            await vault.generate(Curve.ED25519)
        enclave.up = True
        while not vault.ready:  # no request is needed to notice that the enclave is back
            await trio.sleep(0.01)
        assert await signs(vault, pkh)


async def test_down_at_start(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash
    enclave.up = False
    async with running(path, enclave) as vault:
        assert not vault.ready
        assert not vault.keys()
        enclave.up = True
        assert await signs(vault, pkh)


async def test_a_request_whose_session_dies_is_repeated(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave) as vault:
        pkh = (await vault.generate(Curve.BLS12_381)).hash
        cuts = 0

        async def cut(frame: bytes) -> bytes:
            nonlocal cuts
            cuts += 1
            if cuts == 1:
                raise EOFError
            return frame

        enclave.tamper = cut
        assert await signs(vault, pkh)
        assert cuts > 1


async def test_an_enclave_that_hangs(path: Path, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave, exchange=0.1, wait=0.3) as vault:
        pkh = (await vault.generate(Curve.ED25519)).hash

        async def hang(frame: bytes) -> bytes:
            await trio.sleep(10_000)
            return frame

        enclave.tamper = hang
        with pytest.raises(VaultUnavailableError, match="did not answer within 0.1 s"):
            await sign(vault, pkh, b"m", version=2)


async def test_wrong_credentials_are_retried_and_told(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)

    async def none() -> Credentials:
        await trio.lowlevel.checkpoint()
        raise CredentialsError("(Nitro): missing credentials: nowhere")

    async with running(path, enclave, provider=none) as vault:
        assert "missing credentials: nowhere" in vault.health().detail


async def test_blobs_that_cannot_be_used(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave) as vault:
        first, second, third = [(await vault.generate(Curve.ED25519)).hash for _ in range(3)]
    entries = json.loads(path.read_text())
    entries[0]["encrypted_private_key"] = "!!!"
    entries[1]["encrypted_private_key"] = entries[2]["encrypted_private_key"]
    entries.append({"public_key_hash": "tz1nonsense", "encrypted_private_key": "AQID"})
    entries += [{"public_key_hash": str(OTHER)}, {"public_key_hash": 5}, "text"]
    path.write_text(json.dumps(entries))
    async with running(path, enclave) as vault:
        health = vault.health()
        assert list(vault.keys()) == [third]
        assert health.ready
        assert "no encrypted_private_key in Base64" in health.skipped[str(first)]
        assert f"holds the key of {third}" in health.skipped[str(second)]
        assert "gotez" in health.skipped["tz1nonsense"]
        assert "no encrypted_private_key in Base64" in health.skipped[str(OTHER)]
        assert {"entry 6", "entry 7"} < set(health.skipped)
        await vault.generate(Curve.P256)
    assert json.loads(path.read_text())[:-1] == entries, "whoever mends them still has them"


async def test_keys_of_another_process_are_found(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave) as server, running(path, enclave) as command:
        made = await command.generate(Curve.SECP256K1)
        assert made.hash not in server.keys()
        await server.refresh()
        assert await signs(server, made.hash)
        again = await server.generate(Curve.ED25519)
        assert [key.public_key_hash for key in FileStorage(path).load()] == [str(made.hash), str(again.hash)]
        path.write_text("[ damaged")
        await server.refresh()
        assert await signs(server, made.hash), "the keys known go on serving"


async def test_a_key_that_cannot_be_stored_does_not_count(path: Path, nursery: trio.Nursery) -> None:
    enclave = FakeEnclave(nursery)
    async with running(path, enclave) as vault:
        path.with_name("enclave_keys.json.lock").mkdir()
        with pytest.raises(StorageError, match="cannot lock"):
            await vault.generate(Curve.ED25519)
        assert not vault.keys()


def test_the_file_refuses_duplicates_and_damage(path: Path) -> None:
    storage = FileStorage(path)
    pkh = PublicKeyHash(Curve.P256, bytes(20))
    assert storage.load() == []
    assert storage.stamp() is None
    storage.append(pkh, b"\1\2\3")
    assert path.read_text() == (
        f'[\n    {{\n        "public_key_hash": "{pkh}",\n        "encrypted_private_key": "AQID"\n    }}\n]'
    )
    with pytest.raises(KeyExistsError, match="already"):
        storage.append(pkh, b"")
    for content in ("{}", "5", "[", b"\xff"):
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(StorageError, match=str(path)):
            storage.load()
    path.write_text(" \n")
    assert storage.load() == []
    path.unlink()
    path.mkdir()
    with pytest.raises(StorageError, match="cannot read"):
        storage.load()
    with pytest.raises(StorageError, match="cannot write"):
        FileStorage(Path("/proc/none/enclave_keys.json")).check_writable()


def test_a_lock_that_is_held_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    from signer.vaults.nitro import storage as module

    monkeypatch.setattr(module, "_LOCK_TIMEOUT", 0.05)
    with path.with_name("enclave_keys.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StorageError, match="fuser"):
            FileStorage(path).append(PublicKeyHash(Curve.P256, bytes(20)), b"")
