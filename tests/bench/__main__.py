"""`make bench`: the signer as a baker meets it, beside its floor and beside the reference's figures.

Starts `signer demo` (real HTTP, durable watermarks, the enclave program as a process of its own), loads it from
this process, and prints a table. Latencies are in milliseconds.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from signer.tezos.keys import Curve
from tests.bench import floor, load
from tests.bench.messages import attestation

CURVES = {"tz1": Curve.ED25519, "tz2": Curve.SECP256K1, "tz3": Curve.P256, "tz4": Curve.BLS12_381}

# Measured on a machine of two cores (ext4): Signatory 1.4 over TCP, its watermark file never synced, nothing
# verified. p50 in milliseconds, rates per second.
REFERENCE = {
    ("tz1", "kept 1"): 0.74,
    ("tz4", "kept 1"): 1.38,
    ("tz1", "kept 8"): 1325.0,
    ("tz4", "kept 8"): 1023.0,
    ("tz1", "kept 32"): 1382.0,
    ("tz4", "kept 32"): 885.0,
    ("tz1", "baker"): 1.25,
    ("tz4", "baker"): 1.73,
}


@dataclass
class Demo:
    """A running `signer demo`."""

    process: subprocess.Popen[bytes]
    address: tuple[str, int]
    keys: dict[str, list[str]]  # "tz1" to addresses
    ready_after: float  # seconds from the start of the process to the first answer

    @property
    def host(self) -> str:
        return f"{self.address[0]}:{self.address[1]}"

    def resident(self) -> float:
        """Resident memory of the signer process (without the enclave's), MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS")


@contextmanager
def demo(directory: Path, keys: dict[str, int]) -> Iterator[Demo]:
    """Run `signer demo` in *directory* with so many keys of each type; ends it on exit."""
    command = [sys.executable, "-m", "signer", "--log", "error", "demo", "--dir", str(directory), "--json"]
    command += ["--address", "127.0.0.1:16732", "--utility-address", "127.0.0.1:19583"]
    for kind, number in keys.items():
        command += ["--keys", f"{kind}={number}"]
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the demo ended with {process.wait()}")
        ready = time.perf_counter() - began
        found: dict[str, list[str]] = {}
        for key in json.loads(line)["keys"]:
            found.setdefault(key["type"], []).append(key["public_key_hash"])
        yield Demo(process, ("127.0.0.1", 16732), found, ready)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


class Levels:
    """Levels that rise with every run: a mark stands for ever."""

    def __init__(self) -> None:
        self._next = 1_000_000

    def take(self, number: int) -> range:
        self._next += number
        return range(self._next - number, self._next)


def kept(running: Demo, kind: str, connections: int, total: int, levels: Levels) -> load.Timing:
    """*connections* kept connections, each with a chain of its own, so that levels rise on each."""
    pkh, each = running.keys[kind][0], total // connections
    span = levels.take(each)
    series = [
        [load.post(running.host, pkh, attestation(CURVES[kind], chain=chain, level=level)) for level in span]
        for chain in range(connections)
    ]
    return load.run(running.address, series)


def baker(running: Demo, kind: str, total: int, levels: Levels) -> load.Timing:
    """The baker's way: a fresh connection for `GET /authorized_keys`, another for the `POST`."""
    pkh = running.keys[kind][0]
    requests = []
    for level in levels.take(total):
        requests.append(load.get_authorized_keys(running.host))
        requests.append(load.post(running.host, pkh, attestation(CURVES[kind], chain=99, level=level)))
    timing = load.run(running.address, [requests], fresh=True)
    pairs = [sum(timing.latencies[i : i + 2]) for i in range(0, len(timing.latencies), 2)]
    return load.Timing(pairs, timing.elapsed)


def burst(running: Demo, kind: str, levels: Levels) -> float:
    """Seconds until all keys of *kind* have signed the same attestation, each on a fresh connection."""
    (level,) = levels.take(1)
    message = attestation(CURVES[kind], chain=100, level=level)
    series = [[load.post(running.host, pkh, message)] for pkh in running.keys[kind]]
    return load.run(running.address, series, fresh=True).elapsed


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: only to see it run")
    options = parser.parse_args()
    total = 160 if options.quick else 1600
    levels = Levels()
    with tempfile.TemporaryDirectory(prefix="nitro-signer-bench-", dir=os.environ.get("BENCH_DIR")) as directory:
        commit = floor.raw_commit(Path(directory))
        floors = {kind: floor.raw_signing(curve) + commit for kind, curve in CURVES.items()}
        print(f"one durable commit: {commit * 1e3:.3f} ms; cores: {os.cpu_count()}; Python {sys.version.split()[0]}\n")
        with demo(Path(directory) / "main", {"tz1": 1, "tz2": 1, "tz3": 1, "tz4": 1}) as running:
            print_signing(running, total, levels, floors)
            memory = running.resident()
        with demo(Path(directory) / "burst", {"tz1": 50, "tz4": 50}) as running:
            print_bursts(running, levels)
        print_start_up(Path(directory))
        print(f"\nmemory of the signer after the load: {memory:.0f} MiB (reference 38)")


def print_signing(running: Demo, total: int, levels: Levels, floors: dict[str, float]) -> None:
    print("key  way       p50 ms  p99 ms  rate/s  floor ms  p50/floor  rate*floor  against the reference")
    for kind in CURVES:
        kept(running, kind, 1, 100, levels)  # warm
        for connections in (1, 8, 32):
            timing = kept(running, kind, connections, total, levels)
            print_row(kind, f"kept {connections}", timing, floors[kind])
        print_row(kind, "baker", baker(running, kind, total // 2, levels), floors[kind])


def print_row(kind: str, way: str, timing: load.Timing, floor_seconds: float) -> None:
    p50, p99 = timing.quantile(0.5), timing.quantile(0.99)
    against = ""
    if (reference := REFERENCE.get((kind, way))) is not None:
        is_rate = way in {"kept 8", "kept 32"}
        factor = reference / timing.rate if is_rate else p50 * 1e3 / reference
        against = f"{factor:.2f} x of {reference} {'a second' if is_rate else 'ms'}"
    print(
        f"{kind}  {way:8}  {p50 * 1e3:6.2f}  {p99 * 1e3:6.2f}  {timing.rate:6.0f}  {floor_seconds * 1e3:8.3f}"
        f"  {p50 / floor_seconds:9.1f}  {timing.rate * floor_seconds:10.2f}  {against}",
        flush=True,
    )


def print_bursts(running: Demo, levels: Levels) -> None:
    print()
    for kind, reference in (("tz1", 51), ("tz4", 63)):
        times = sorted(burst(running, kind, levels) for _ in range(9))
        print(
            f"burst of 50 {kind} on fresh connections: {times[4] * 1e3:.0f} ms to the last signature, "
            f"worst {times[-1] * 1e3:.0f} ({times[4] * 1e3 / reference:.2f} x of {reference} ms)",
            flush=True,
        )


def print_start_up(directory: Path) -> None:
    print()
    for number, reference in ((1, 37), (50, 47), (200, 124)):
        place = directory / f"start-{number}"
        with demo(place, {"tz4": number}):
            pass  # the first run makes the keys
        with demo(place, {"tz4": number}) as running:
            print(
                f"start-up with {number} tz4 keys, self-test of each included: {running.ready_after * 1e3:.0f} ms "
                f"(reference {reference} ms, without a self-test)",
                flush=True,
            )


if __name__ == "__main__":
    main()
