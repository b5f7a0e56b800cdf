"""Marks and blobs in DynamoDB over real HTTP: two signers on one table, whatever the network does; real processes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

from signer.aws.client import AwsClient
from signer.config.models import AwsCredentials
from signer.tezos.keys import Curve, PublicKeyHash
from signer.watermark.dynamodb import DynamoWatermarks
from signer.watermark.interface import MarkKey, Slot, WatermarkRefusedError, WatermarkStore
from signer.watermark.table import WatermarkUnavailableError
from tests.integration.conftest import Api, Setup, attestation, wait_for
from tests.moto_server import FAULTS, Front, plain, serving

CHAIN = "NetXdQprcVkpaWU"
CREDENTIALS = {"access_key_id": "AKID", "secret_access_key": "SECRET", "region": "eu-west-1"}
_LEVELS, _CALLERS = 12, 6


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, Front]]:
    with serving() as (url, front):
        for name, value in environment(url, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield url, front


def environment(url: str, directory: Path) -> dict[str, str]:
    """Nothing of this machine's AWS configuration, and every call to *url*."""
    return {
        "AWS_ENDPOINT_URL_DYNAMODB": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(directory / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(directory / "none"),
    }


def store() -> DynamoWatermarks:
    client = AwsClient(
        "dynamodb", AwsCredentials.model_validate(CREDENTIALS), component="t", connect_timeout=0.5, read_timeout=0.5
    )
    return DynamoWatermarks(client, "watermark", write_timeout=2.0)


def reference_signs(client: Any, key: MarkKey, level: int) -> bool:
    """The conditional put of the reference."""
    try:
        client.put_item(
            TableName="watermark",
            Item={
                "idx": {"S": f"{key.chain_id}/{key.public_key_hash}"},
                "request": {"S": key.slot.value},
                "lvl": {"N": str(level)},
                "round": {"N": "0"},
                "digest": {"B": b"r" * 32},
            },
            ConditionExpression="attribute_not_exists(idx) OR lvl < :l OR (lvl = :l AND #r < :r)",
            ExpressionAttributeNames={"#r": "round"},
            ExpressionAttributeValues={":l": {"N": str(level)}, ":r": {"N": "0"}},
        )
    except client.exceptions.ConditionalCheckFailedException:
        return False
    return True


async def test_two_signers_and_the_reference_never_sign_a_slot_twice(server: tuple[str, Front], seed: int) -> None:
    """For each slot one digest at most is let out, with replies lost, cut, held and doubled, requests lost and late."""
    print(f"--seed {seed}")
    url, front = server
    chance, client = random.Random(seed), plain(url)
    keys = [
        MarkKey(CHAIN, PublicKeyHash(Curve.ED25519, bytes([number]) * 20), slot)
        for number in range(2)
        for slot in (Slot.BLOCK, Slot.ATTESTATION)
    ]
    signed: dict[tuple[MarkKey, int], set[bytes]] = {}
    outcomes = {"signed": 0, "refused": 0, "unavailable": 0, "reference": 0}

    async def caller(stores: tuple[WatermarkStore, ...], key: MarkKey, number: int) -> None:
        for level in range(1, _LEVELS):
            digest = bytes([number % 3 + 1]) * 32
            if number == 0 and chance.random() < 0.5:
                if await trio.to_thread.run_sync(reference_signs, client, key, level):
                    outcomes["reference"] += 1
                    signed.setdefault((key, level), set()).add(b"r" * 32)
                continue
            chosen = chance.choice(stores)
            try:
                await chosen.advance(key, level, 0, digest, on_settled=lambda _: None).wait()
            except WatermarkRefusedError:
                outcomes["refused"] += 1
            except WatermarkUnavailableError:
                outcomes["unavailable"] += 1
            else:
                outcomes["signed"] += 1
                signed.setdefault((key, level), set()).add(digest)
                chosen.remember(key, digest, f"signature of {digest.hex()}")

    async with trio.open_nursery() as nursery:
        first, second = store(), store()
        await nursery.start(first.run)
        await nursery.start(second.run)
        front.choose = lambda _: chance.choice(FAULTS) if chance.random() < 0.3 else ""
        async with trio.open_nursery() as callers:
            for key in keys:
                for number in range(_CALLERS):
                    callers.start_soon(caller, (first, second), key, number)
        front.choose = lambda _: ""
        for key in keys:  # whatever happened, the next slot is signed, by both with the same bytes
            for one in (first, second):
                await one.advance(key, 1000, 0, b"z" * 32, on_settled=lambda _: None).wait()
                with pytest.raises(WatermarkRefusedError):
                    await one.advance(key, 1000, 0, b"y" * 32, on_settled=lambda _: None).wait()
        nursery.cancel_scope.cancel()
    client.close()
    assert [place for place, digests in signed.items() if len(digests) > 1] == []
    assert all(outcomes[name] for name in ("signed", "refused", "reference")), outcomes
    assert all(front.met.get(fault) for fault in FAULTS), front.met


async def test_a_lost_reply_costs_nothing(server: tuple[str, Front]) -> None:
    """The client repeats the call; the store finds its own digest."""
    _, front = server
    key = MarkKey(CHAIN, PublicKeyHash(Curve.ED25519, bytes(20)), Slot.ATTESTATION)
    async with trio.open_nursery() as nursery:
        marks = store()
        await nursery.start(marks.run)
        for level, fault in enumerate(FAULTS, 1):
            waiting = [fault]
            front.choose = lambda action, waiting=waiting: (  # type: ignore[misc]
                waiting.pop() if waiting and action == "TransactWriteItems" else ""
            )
            assert await marks.advance(key, level, 0, b"a" * 32, on_settled=lambda _: None).wait() is None
        nursery.cancel_scope.cancel()


def in_tables(setup: Setup, url: str) -> None:
    setup.environment = environment(url, setup.directory)
    setup.nitro["storage"] = {"driver": "dynamodb", "config": CREDENTIALS}
    setup.top["watermark"] = {"driver": "aws", "config": CREDENTIALS}


def test_marks_and_keys_in_dynamodb(setup: Setup, server: tuple[str, Front]) -> None:
    url, front = server
    in_tables(setup, url)
    (pkh,) = setup.generate("p256")
    signer = setup.start_signer()
    status, answer = setup.api.sign(pkh, attestation(Curve.P256, 10))
    assert status == 200
    assert setup.api.sign(pkh, attestation(Curve.P256, 10, payload=1))[0] == 409

    second = setup.twin()  # another machine with the same tables
    second.start_signer()
    assert second.api.sign(pkh, attestation(Curve.P256, 10)) == (200, answer)
    assert second.api.sign(pkh, attestation(Curve.P256, 10, payload=1))[0] == 409
    assert second.api.sign(pkh, attestation(Curve.P256, 11, payload=1))[0] == 200
    assert setup.api.sign(pkh, attestation(Curve.P256, 11))[0] == 409

    assert setup.stop(signer) == 0
    setup.start_signer()
    assert setup.api.sign(pkh, attestation(Curve.P256, 11))[0] == 409
    assert setup.api.sign(pkh, attestation(Curve.P256, 11, payload=1))[0] == 200

    front.choose = lambda _: "throttled"
    status, answer = setup.api.sign(pkh, attestation(Curve.P256, 12))
    assert status == 502
    assert "slow down" in str(answer)
    assert setup.utility.get("/healthz")[0] == 503
    front.choose = lambda _: ""
    assert setup.api.sign(pkh, attestation(Curve.P256, 12))[0] == 200
    assert setup.utility.get("/healthz")[0] == 200
    metrics = setup.utility.request("GET", "/metrics")[1].decode()
    assert (
        'watermark_io_operations_total{backend="aws",operation="write",result="success",table_name="watermark"}'
        in metrics
    )

    assert f"{pkh} attestation    level 12 round 0" in setup.run("watermark", "list").stdout.decode()
    assert setup.run("watermark", "set", pkh, CHAIN, "attestation", "20").returncode == 0
    assert setup.run("watermark", "set", pkh, CHAIN, "attestation", "19").returncode == 1
    assert setup.api.sign(pkh, attestation(Curve.P256, 20))[0] == 409
    sure = ("--confirm-key", pkh, "--confirm-chain", CHAIN)
    assert "level 20" in setup.run("watermark", "reset", pkh, CHAIN, *sure).stdout.decode()
    assert "no marks in the table watermark" in setup.run("watermark", "list").stderr.decode()
    assert not (setup.base_dir / "watermarks.db").exists()
    assert not (setup.base_dir / "enclave_keys.json").exists()


def test_no_table_holds_up_the_start(setup: Setup, server: tuple[str, Front]) -> None:
    """Without its table of keys one vault waits, and the others serve; without marks the servers answer."""
    url, front = server
    (pkh,) = setup.generate("p256")  # in a file
    in_tables(setup, url)
    table = setup.nitro.pop("storage")
    setup.vaults["tables"] = {
        "driver": "nitro",
        "config": {
            "enclave_address": f"unix:{setup.socket}:2000",
            "encryption_key_id": "development",
            "credentials": {"access_key_id": "AKID", "secret_access_key": "SECRETKEY", "region": "none"},
            "storage": table,
        },
    }
    setup.write_config()

    front.choose = lambda action: "broken" if action == "Scan" else ""
    signer = setup.start_signer()
    wait_for(lambda: setup.api.sign(pkh, attestation(Curve.P256, 1))[0] == 200, "a signature of the other vault")
    status, health = setup.utility.get("/healthz")
    assert status == 503
    assert "cannot open DynamoDB table encrypted_keys" in health["vaults"]["tables"]["detail"]
    front.choose = lambda _: ""
    wait_for(lambda: bool(setup.utility.get("/healthz")[1]["ready"]), "the vault to open its table")
    assert setup.stop(signer) == 0

    front.choose = lambda _: "broken"
    signer = setup.start_signer(wait=False)
    wait_for(lambda: answers(setup.utility, "/healthz"), "the utility server")
    status, health = setup.utility.get("/healthz")
    assert (status, "watermark table watermark: not open yet" in health["watermarks"]) == (503, True)
    wait_for(setup.answers, "the signing API")
    status, answer = setup.api.sign(pkh, attestation(Curve.P256, 2))
    assert (status, "not open yet: watermark: dynamodb:DescribeTable" in answer[0]["msg"]) == (502, True)
    assert "Ready: " not in setup.log.read_text().partition("Shutting down")[2]
    front.choose = lambda _: ""
    wait_for(lambda: setup.api.sign(pkh, attestation(Curve.P256, 2))[0] == 200, "the marks")
    wait_for(lambda: "Ready: " in setup.log.read_text().partition("Shutting down")[2], "the announcement")
    assert setup.stop(signer) == 0


def answers(api: Api, path: str) -> bool:
    try:
        api.get(path)
    except OSError:
        return False
    return True


def test_two_processes_never_sign_a_slot_twice(setup: Setup, server: tuple[str, Front], seed: int) -> None:
    """As above through the whole signer: different messages of a level are asked of both, while the network fails."""
    print(f"--seed {seed}")
    url, front = server
    chance = random.Random(seed)
    (pkh,) = setup.generate("p256")
    setup.environment = environment(url, setup.directory)
    setup.nitro["storage"] = {"driver": "file", "config": str(setup.base_dir / "enclave_keys.json")}
    setup.top["watermark"] = {"driver": "aws", "config": CREDENTIALS | {"write_timeout": 1.0}}
    setup.write_config()
    twin = setup.twin()
    for one in (setup, twin):
        one.start_signer()
        wait_for(lambda one=one: one.api.sign(pkh, attestation(Curve.P256, 1))[0] == 200, "a signature")  # type: ignore[misc]
    front.choose = lambda _: chance.choice(FAULTS) if chance.random() < 0.4 else ""
    signed: dict[int, set[int]] = {}
    statuses: dict[int, int] = {}

    def caller(number: int) -> None:
        for level in range(2, 2 + _LEVELS):
            status, _ = (setup, twin)[number % 2].api.sign(pkh, attestation(Curve.P256, level, payload=number % 3))
            statuses[status] = statuses.get(status, 0) + 1
            if status == 200:
                signed.setdefault(level, set()).add(number % 3)

    with ThreadPoolExecutor(_CALLERS) as callers:
        list(callers.map(caller, range(_CALLERS)))
    front.choose = lambda _: ""
    assert [level for level, payloads in signed.items() if len(payloads) > 1] == []
    assert statuses.get(200), statuses
    assert set(statuses) <= {200, 409, 502}, statuses
    assert sum(front.met.get(fault, 0) for fault in FAULTS) > _LEVELS, front.met
