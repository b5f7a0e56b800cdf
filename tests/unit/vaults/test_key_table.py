"""The blobs in DynamoDB: pages, consistency, keys that are never overwritten, and a vault that serves from them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import trio

from signer.crypto import generate_secret_key
from signer.errors import UnavailableError
from signer.tezos.keys import Curve, PublicKeyHash
from signer.vaults.nitro.dynamodb import KeyTable
from signer.vaults.nitro.storage import KeyExistsError, StorageError, StoredKey
from tests.dynamo import Dynamo, dynamo
from tests.unit.vaults.fake import FakeEnclave, running

PKH = PublicKeyHash(Curve.ED25519, bytes(20))


@pytest.fixture
def server() -> Iterator[Dynamo]:
    with dynamo() as tables:
        yield tables


@pytest.fixture
async def table(server: Dynamo) -> KeyTable:
    made = KeyTable(server, "encrypted_keys")
    await made.open()
    return made


async def test_entries_are_stored_in_the_layout_of_the_reference(server: Dynamo, table: KeyTable) -> None:
    assert await table.load() == []
    await table.append(PKH, b"\1\2")
    assert server.boto.scan(TableName="encrypted_keys")["Items"] == [{"pkh": {"S": str(PKH)}, "value": {"B": b"\1\2"}}]
    assert await table.load() == [StoredKey(str(PKH), b"\1\2")]


async def test_a_key_is_never_overwritten(server: Dynamo, table: KeyTable) -> None:
    await table.append(PKH, b"\1")
    with pytest.raises(KeyExistsError, match=f"{PKH} is in DynamoDB table encrypted_keys already"):
        await table.append(PKH, b"\2")
    assert await table.load() == [StoredKey(str(PKH), b"\1")]
    await table.append(PKH, b"\1")  # the repeat of a put whose reply was lost


async def test_a_blob_is_exchanged_only_for_the_one_that_was_seen(server: Dynamo, table: KeyTable) -> None:
    await table.append(PKH, b"\1")
    for old in (StoredKey(str(PKH), b"\2"), StoredKey("tz1other", b"\1")):
        with pytest.raises(StorageError, match="has changed meanwhile; nothing was changed"):
            await table.replace(old, b"\3")
    assert await table.load() == [StoredKey(str(PKH), b"\1")]
    await table.replace(StoredKey(str(PKH), b"\1"), b"\3")
    assert await table.load() == [StoredKey(str(PKH), b"\3")]
    await table.replace(StoredKey(str(PKH), b"\1"), b"\3")  # the repeat of a put whose reply was lost


async def test_every_page_is_read_consistently(server: Dynamo, table: KeyTable) -> None:
    keys = [PublicKeyHash(Curve.P256, bytes([number]) * 20) for number in range(12)]
    for key in keys:
        await table.append(key, bytes(200_000))
    server.calls.clear()
    assert [stored.public_key_hash for stored in await table.load()] == sorted(map(str, keys))
    assert len(server.calls) > 1
    assert all(action == "Scan" and parameters["ConsistentRead"] for action, parameters in server.calls)


async def test_an_item_without_a_blob_does_not_hide_the_others(server: Dynamo, table: KeyTable) -> None:
    server.boto.put_item(TableName="encrypted_keys", Item={"pkh": {"S": "tz1other"}})
    await table.append(PKH, b"\1")
    assert await table.load() == [StoredKey(str(PKH), b"\1"), StoredKey("tz1other", b"")]


async def test_the_table_is_scanned_now_and_then(
    server: Dynamo, table: KeyTable, autojump_clock: trio.testing.MockClock
) -> None:
    before = await table.stamp()
    server.calls.clear()
    server.boto.put_item(TableName="encrypted_keys", Item={"pkh": {"S": str(PKH)}, "value": {"B": b"\1"}})
    for _ in range(9):
        await trio.sleep(1)
        assert await table.stamp() == before
    await trio.sleep(1)
    assert await table.stamp() != before
    assert len(server.calls) == 1
    server.faults.append("throttled")
    await trio.sleep(10)
    for _ in range(5):  # a failure is no reason to ask more often
        with pytest.raises(StorageError, match="cannot read DynamoDB table encrypted_keys: no answer from Scan"):
            await table.stamp()
    assert len(server.calls) == 2
    await trio.sleep(10)
    assert await table.stamp() == (StoredKey(str(PKH), b"\1"),)


async def test_a_new_key_that_can_not_be_stored(
    server: Dynamo, table: KeyTable, autojump_clock: trio.testing.MockClock
) -> None:
    server.denied = {"PutItem"}
    with pytest.raises(StorageError, match=f"cannot store {PKH} in DynamoDB table.*AccessDenied"):
        await table.append(PKH, b"\1")
    server.denied.clear()
    server.faults.append("throttled")
    with pytest.raises(UnavailableError):
        await table.append(PKH, b"\1")
    server.gate = trio.Event()
    with pytest.raises(UnavailableError, match="no answer within 15 s"):
        await table.append(PKH, b"\1")
    server.gate = None
    assert await table.load() == []


async def test_a_caller_that_goes_away_leaves_the_key_stored(server: Dynamo, table: KeyTable) -> None:
    server.gate = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(table.append, PKH, b"\1")
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        server.gate.set()
    assert await table.load() == [StoredKey(str(PKH), b"\1")]


async def test_a_role_that_may_only_scan(server: Dynamo, table: KeyTable) -> None:
    await table.append(PKH, b"\1")
    server.denied = {"DescribeTable", "CreateTable", "PutItem"}
    other = KeyTable(server, "encrypted_keys")
    await other.open()
    assert await other.load() == [StoredKey(str(PKH), b"\1")]
    with pytest.raises(StorageError, match="doesn't exist, and the role may not make it"):
        await KeyTable(server, "another").open()
    server.denied.add("Scan")
    with pytest.raises(StorageError, match="cannot open DynamoDB table encrypted_keys: AccessDenied"):
        await KeyTable(server, "encrypted_keys").open()


async def test_a_vault_serves_from_the_table(
    server: Dynamo, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock
) -> None:
    enclave = FakeEnclave(nursery)
    async with running(KeyTable(server, "encrypted_keys"), enclave) as vault:
        made = await vault.generate(Curve.SECP256K1)
        assert made.hash in vault.keys()
    async with running(KeyTable(server, "encrypted_keys"), enclave) as vault:
        await vault.wait_for(made.hash, trio.current_time() + 5)
        assert list(vault.keys()) == [made.hash]
        async with running(KeyTable(server, "encrypted_keys"), enclave) as another:
            later = await another.import_key(generate_secret_key(Curve.ED25519))
        await trio.sleep(12)
        assert set(vault.keys()) == {made.hash, later.hash}
        server.denied = {"Scan"}
        await trio.sleep(12)
        assert set(vault.keys()) == {made.hash, later.hash}, "what is known serves on"


async def test_an_emptied_table_costs_no_key_that_serves(server: Dynamo, nursery: trio.Nursery) -> None:
    """SIGHUP drops what the operator took out; everything at once is more likely a fault, and said."""
    async with running(KeyTable(server, "encrypted_keys"), FakeEnclave(nursery)) as vault:
        first, second = [await vault.generate(Curve.ED25519) for _ in range(2)]
        server.boto.delete_item(TableName="encrypted_keys", Key={"pkh": {"S": str(first.hash)}})
        await vault.reload()
        assert list(vault.keys()) == [second.hash]
        server.boto.delete_item(TableName="encrypted_keys", Key={"pkh": {"S": str(second.hash)}})
        with pytest.raises(StorageError, match="holds no key; the keys known stay in use"):
            await vault.reload()
        server.denied = {"Scan"}
        with pytest.raises(StorageError, match="AccessDenied"):
            await vault.reload()
        assert list(vault.keys()) == [second.hash]
        server.denied = set()
        await server.call(
            "PutItem", TableName="encrypted_keys", Item={"pkh": {"S": str(second.hash)}, "value": {"B": b""}}
        )
        await vault.reload()


@pytest.mark.parametrize("fault", ["throttled", "AccessDeniedException"])
async def test_a_table_that_is_away_at_the_start_is_asked_until_it_is_back(
    server: Dynamo, table: KeyTable, nursery: trio.Nursery, autojump_clock: trio.testing.MockClock, fault: str
) -> None:
    """The vault says so, and has started: whatever else the signer has doesn't wait for it."""
    enclave = FakeEnclave(nursery)
    async with running(table, enclave) as vault:
        made = await vault.generate(Curve.ED25519)
    server.faults.extend([fault] * 1000)
    began = trio.current_time()
    async with running(KeyTable(server, "encrypted_keys"), enclave) as vault:
        assert trio.current_time() - began < 1
        for _ in range(3):
            assert not vault.ready
            assert "cannot open DynamoDB table encrypted_keys" in vault.health().detail
            await trio.sleep(200)
            assert trio.current_time() - vault.last_sign_of_life < 15
        server.faults.clear()
        await trio.sleep(15)
        await vault.wait_for(made.hash, trio.current_time() + 5)
        assert vault.ready
        assert list(vault.keys()) == [made.hash]
