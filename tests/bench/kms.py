"""`make bench-kms`: signing with keys in KMS, beside plain boto3 asking the same server alone, the limit.

KMS is moto's in a process of its own (`tests.kms_server`), so the figures say what the signer adds, not what AWS takes:
Python serves both sides here, on the same cores. Start-up is from the process' start until every key of the account is
in, and beside it until the first one is.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config

from signer.tezos.keys import Curve
from tests.bench import load
from tests.bench.messages import attestation
from tests.integration.conftest import ENVIRONMENT, Setup, running, wait_for
from tests.kms_server import CREDENTIALS, REGION, environment

CALLERS = (1, 8, 32)
KEYS = (1, 150, 1000)


@contextmanager
def kms(keys: int) -> Iterator[str]:
    """The address of a server with so many keys."""
    command = [sys.executable, "-m", "tests.kms_server", "--keys", str(keys)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        yield process.stdout.readline().decode().strip()
    finally:
        process.stdin.close()
        process.wait(10)
        process.stdout.close()


@contextmanager
def signer(directory: Path, url: str) -> Iterator[Setup]:
    directory.mkdir()
    with running(directory) as setup:
        setup.environment |= environment(url, directory)
        setup.top["vaults"] = {"kms": {"driver": "awskms", "config": CREDENTIALS}}
        setup.write_config()
        yield setup


def plain(url: str, callers: int, total: int) -> load.Timing:
    """boto3 alone, a thread for each caller."""
    client = boto3.client(
        "kms",
        region_name=REGION,
        aws_access_key_id="AKID",
        aws_secret_access_key="SECRET",
        endpoint_url=url,
        config=Config(max_pool_connections=callers, retries={"total_max_attempts": 1}),
    )
    arn = client.list_keys()["Keys"][0]["KeyArn"]
    facts = {"KeyId": arn, "Message": bytes(32), "MessageType": "DIGEST", "SigningAlgorithm": "ECDSA_SHA_256"}
    latencies: list[float] = []

    def call() -> None:
        for _ in range(total // callers):
            began = time.perf_counter()
            client.sign(**facts)
            latencies.append(time.perf_counter() - began)

    threads = [threading.Thread(target=call) for _ in range(callers)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return load.Timing(latencies, time.perf_counter() - began)


def signing(setup: Setup, pkh: str, callers: int, total: int, levels: Iterator[int]) -> load.Timing:
    """The signer over kept connections, each with a chain of its own: every request moves a mark."""
    each, host = total // callers, f"127.0.0.1:{setup.port}"
    span = [next(levels) for _ in range(each)]
    series = [
        [load.post(host, pkh, attestation(Curve.SECP256K1, chain=chain, level=level)) for level in span]
        for chain in range(callers)
    ]
    return load.run(("127.0.0.1", setup.port), series)


def start_up(directory: Path, number: int, tries: int) -> tuple[float, float]:
    """Seconds until the first key signs, and until all are in; medians."""
    first, last = [], []
    with kms(number) as url:
        for attempt in range(tries):
            with signer(directory / f"start-{number}-{attempt}", url) as setup:
                began = time.perf_counter()
                setup.start_signer(wait=False)
                wait_for(lambda: _keys(setup) >= 1, "the first key")
                first.append(time.perf_counter() - began)
                wait_for(lambda: _keys(setup) >= number, "all keys")
                last.append(time.perf_counter() - began)
    return statistics.median(first), statistics.median(last)


def _keys(setup: Setup) -> int:
    try:
        health: dict[str, Any] = setup.utility.get("/healthz?verbose")[1]
    except OSError:
        return 0
    return int(health["vaults"]["kms"]["keys"])


def print_signing(directory: Path, total: int) -> None:
    levels = iter(range(1_000_000, 2_000_000))
    print("callers   boto3 p50 ms   /s      signer p50 ms   /s      share of the limit")
    with kms(1) as url, signer(directory / "signing", url) as setup:
        pkh = setup_key(setup)
        for callers in CALLERS:
            signing(setup, pkh, callers, total // 4, levels)  # warms connections and threads
            limit = plain(url, callers, total)
            ours = signing(setup, pkh, callers, total, levels)
            print(
                f"{callers:<10}{limit.quantile(0.5) * 1000:<15.2f}{limit.rate:<8.0f}"
                f"{ours.quantile(0.5) * 1000:<16.2f}{ours.rate:<8.0f}{ours.rate / limit.rate:.0%}"
            )


def setup_key(setup: Setup) -> str:
    """Allow the account's only key, and start the signer."""
    import json

    (key,) = json.loads(setup.run("list", "--json").stdout)
    pkh = str(key["public_key_hash"])
    setup.policies[pkh] = {"allow": {"attestation": None}}
    setup.write_config()
    setup.start_signer("--no-list")
    return pkh


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.kms", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: only to see it run")
    options = parser.parse_args()
    print(
        "Keys in KMS, which is moto's in a process of its own; the limit is plain boto3 asking it, a thread a caller.\n"
    )
    with tempfile.TemporaryDirectory(prefix="nitro-signer-bench-", dir=os.environ.get("BENCH_DIR")) as name:
        directory = Path(name)
        print_signing(directory, 160 if options.quick else 1600)
        print("\nStart-up, from the process' start.\n\nkeys      first key in, s   all keys in, s")
        for number in KEYS:
            first, last = start_up(directory, number, 1 if options.quick else 3)
            print(f"{number:<10}{first:<18.2f}{last:.2f}")


if __name__ == "__main__":
    main()
