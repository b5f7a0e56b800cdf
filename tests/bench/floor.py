"""The floor: what any signer must pay on this machine, without HTTP, without an enclave, without checks.

One raw signature of the same bytes, plus one raw durable commit (a row replaced in SQLite in WAL mode with
`synchronous=FULL`, the same guarantee as a watermark).
"""

import sqlite3
import statistics
import time
from pathlib import Path

from signer.crypto import generate_secret_key
from signer.tezos.keys import Curve
from tests.bench.messages import attestation

_ROUNDS = 300


def raw_signing(curve: Curve) -> float:
    """Median seconds of one signature of an attestation."""
    key = generate_secret_key(curve)
    times = []
    for level in range(_ROUNDS):
        message = attestation(curve, chain=1, level=level)
        began = time.perf_counter()
        key.sign(message, version=2)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def raw_commit(directory: Path) -> float:
    """Median seconds of one durable commit of one row."""
    database = sqlite3.connect(directory / "floor.db", isolation_level=None)
    database.execute("PRAGMA journal_mode=WAL")
    database.execute("PRAGMA synchronous=FULL")
    database.execute("CREATE TABLE mark (id INTEGER PRIMARY KEY, level INTEGER, digest BLOB)")
    times = []
    for level in range(_ROUNDS):
        began = time.perf_counter()
        database.execute("INSERT OR REPLACE INTO mark VALUES (1, ?, ?)", (level, bytes(32)))
        times.append(time.perf_counter() - began)
    database.close()
    return statistics.median(times)
