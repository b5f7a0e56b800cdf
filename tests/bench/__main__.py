"""`make bench`: the signer as a baker meets it, beside its floor and beside the reference's figures.

Runs `signer serve` (real HTTP, durable watermarks, one log line a request) and the enclave program as processes of
their own, loads them from this process, and prints a table. Latencies are in milliseconds. `--profile tz4` prints where
the signer's main thread spends its time instead.
"""

import argparse
import os
import pstats
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from signer.tezos.keys import Curve
from tests.bench import floor, load
from tests.bench.messages import attestation
from tests.integration.conftest import ENVIRONMENT, Setup, running

_ROOT = Path(__file__).parents[2]
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
class Running:
    """A running signer with its enclave."""

    setup: Setup
    process: subprocess.Popen[bytes]
    keys: dict[str, list[str]]  # "tz1" to addresses

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.setup.port)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.setup.port}"

    def resident(self) -> float:
        """Resident memory of the signer process (without the enclave's), MiB."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("no VmRSS")

    def processor_time(self) -> float:
        """Seconds of processor time that the signer has used, all threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def signer(directory: Path, keys: dict[str, int]) -> Iterator[Running]:
    """A signer in *directory* with so many new keys of each type; ends it on exit."""
    directory.mkdir()
    with running(directory) as setup:
        setup.start_enclave()
        made = {kind: setup.generate(kind, number) for kind, number in keys.items()}
        yield Running(setup, setup.start_signer(), made)


class Levels:
    """Levels that rise with every run: a mark stands for ever."""

    def __init__(self) -> None:
        self._next = 1_000_000

    def take(self, number: int) -> range:
        self._next += number
        return range(self._next - number, self._next)


def kept(target: Running, kind: str, connections: int, total: int, levels: Levels) -> load.Timing:
    """*connections* kept connections, each with a chain of its own, so that levels rise on each."""
    pkh, each = target.keys[kind][0], total // connections
    span = levels.take(each)
    series = [
        [load.post(target.host, pkh, attestation(CURVES[kind], chain=chain, level=level)) for level in span]
        for chain in range(connections)
    ]
    return load.run(target.address, series)


def baker(target: Running, kind: str, total: int, levels: Levels) -> load.Timing:
    """The baker's way: a fresh connection for `GET /authorized_keys`, another for the `POST`."""
    pkh = target.keys[kind][0]
    requests = []
    for level in levels.take(total):
        requests.append(load.get_authorized_keys(target.host))
        requests.append(load.post(target.host, pkh, attestation(CURVES[kind], chain=99, level=level)))
    timing = load.run(target.address, [requests], fresh=True)
    pairs = [sum(timing.latencies[i : i + 2]) for i in range(0, len(timing.latencies), 2)]
    return load.Timing(pairs, timing.elapsed)


def burst(target: Running, kind: str, levels: Levels) -> float:
    """Seconds until all keys of *kind* have signed the same attestation, each on a fresh connection."""
    (level,) = levels.take(1)
    message = attestation(CURVES[kind], chain=100, level=level)
    series = [[load.post(target.host, pkh, message)] for pkh in target.keys[kind]]
    return load.run(target.address, series, fresh=True).elapsed


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench")
    parser.add_argument("--quick", action="store_true", help="a tenth of the requests: only to see it run")
    parser.add_argument("--profile", metavar="TYPE", choices=CURVES, help="where the time goes, at 8 connections")
    options = parser.parse_args()
    total = 160 if options.quick else 1600
    with tempfile.TemporaryDirectory(prefix="nitro-signer-bench-", dir=os.environ.get("BENCH_DIR")) as directory:
        if options.profile:
            print_profile(Path(directory), options.profile, total)
        else:
            print_all(Path(directory), total)


def print_all(directory: Path, total: int) -> None:
    levels = Levels()
    commit = floor.raw_commit(directory)
    floors = {kind: floor.raw_signing(curve) + commit for kind, curve in CURVES.items()}
    print(f"one durable commit: {commit * 1e3:.3f} ms; cores: {os.cpu_count()}; Python {sys.version.split()[0]}\n")
    with signer(directory / "main", {"tz1": 1, "tz2": 1, "tz3": 1, "tz4": 1}) as target:
        fresh = target.resident()
        print_signing(target, total, levels, floors)
        memory = target.resident()
    with signer(directory / "burst", {"tz1": 50, "tz4": 50}) as target:
        print_bursts(target, levels, floors)
    print_start_up(directory)
    print(f"\nmemory of the signer: {fresh:.0f} MiB, after the load {memory:.0f} MiB (reference 38)")


def print_signing(target: Running, total: int, levels: Levels, floors: dict[str, float]) -> None:
    print("key  way       p50 ms  p99 ms  rate/s  cpu ms  floor ms  p50/floor  rate*floor  against the reference")
    for kind in CURVES:
        kept(target, kind, 8, 400, levels)  # warm
        for connections in (1, 8, 32):
            used = target.processor_time()
            timing = kept(target, kind, connections, total, levels)
            used = target.processor_time() - used
            print_row(kind, f"kept {connections}", timing, used / total, floors[kind])
        used = target.processor_time()
        timing = baker(target, kind, total // 2, levels)
        print_row(kind, "baker", timing, (target.processor_time() - used) / (total // 2), floors[kind])


def print_row(kind: str, way: str, timing: load.Timing, processor: float, floor_seconds: float) -> None:
    p50, p99 = timing.quantile(0.5), timing.quantile(0.99)
    against = ""
    if (reference := REFERENCE.get((kind, way))) is not None:
        is_rate = way in {"kept 8", "kept 32"}
        factor = reference / timing.rate if is_rate else p50 * 1e3 / reference
        against = f"{factor:.2f} x of {reference} {'a second' if is_rate else 'ms'}"
    print(
        f"{kind}  {way:8}  {p50 * 1e3:6.2f}  {p99 * 1e3:6.2f}  {timing.rate:6.0f}  {processor * 1e3:6.2f}"
        f"  {floor_seconds * 1e3:8.3f}  {p50 / floor_seconds:9.1f}  {timing.rate * floor_seconds:10.2f}  {against}",
        flush=True,
    )


def print_bursts(target: Running, levels: Levels, floors: dict[str, float]) -> None:
    print()
    for kind, reference in (("tz1", 51), ("tz4", 63)):
        times = sorted(burst(target, kind, levels) for _ in range(9))
        print(
            f"burst of 50 {kind} on fresh connections: {times[4] * 1e3:.0f} ms to the last signature, "
            f"worst {times[-1] * 1e3:.0f} ({times[4] * 1e3 / reference:.2f} x of {reference} ms; "
            f"50 floors are {50 * floors[kind] * 1e3:.0f} ms)",
            flush=True,
        )


def print_start_up(directory: Path) -> None:
    print()
    for number, reference in ((1, 37), (50, 47), (200, 124)):
        with signer(directory / f"start-{number}", {"tz4": number}) as target:
            times = []
            for _ in range(3):
                target.setup.stop(target.process)
                seconds, target.process = start_up(target.setup, target.keys["tz4"][-1])
                times.append(seconds)
            print(
                f"start-up to the first answer about the last of {number} tz4 keys: {min(times) * 1e3:.0f} to "
                f"{max(times) * 1e3:.0f} ms ({min(times) * 1e3 / reference:.1f} x of {reference} ms)",
                flush=True,
            )


def start_up(setup: Setup, pkh: str) -> tuple[float, subprocess.Popen[bytes]]:
    """Seconds from the start of the process until it answers what the public key of *pkh* is."""
    began = time.perf_counter()
    process = setup.start_signer(wait=False)
    while process.poll() is None:
        try:
            if setup.api.request("GET", f"/keys/{pkh}")[0] == 200:
                return time.perf_counter() - began, process
        except OSError:
            time.sleep(0.001)
    raise RuntimeError(setup.log.read_text())


def print_profile(directory: Path, kind: str, total: int) -> None:
    """Own time of the main thread by library or room, at 8 connections; the profiler itself doubles the cost."""
    output = directory / "profile"
    directory = directory / "profiled"
    directory.mkdir()
    with running(directory) as setup:
        setup.start_enclave()
        keys = {kind: setup.generate(kind)}
        command = setup.command("serve")
        command[1:1] = ["-m", "cProfile", "-o", str(output)]
        process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.DEVNULL)
        setup.processes.append(process)
        while not setup.answers():
            time.sleep(0.01)
        kept(Running(setup, process, keys), kind, 8, total, Levels())
        setup.stop(process)
    stats = pstats.Stats(str(output))
    shares: Counter[str] = Counter()
    for (file, _, function), (_, _, own, _, _) in stats.stats.items():  # type: ignore[attr-defined]  # not in typeshed
        if "importlib" not in file and function not in {
            "<built-in method builtins.compile>",
            "<built-in method posix.stat>",
        }:
            shares[_room(file, function)] += own
    for name, seconds in shares.most_common(24):
        print(f"{name:40} {seconds / total * 1e3:6.3f} ms a request")


def _room(file: str, function: str) -> str:
    """The library or module of ours that a profiled function belongs to."""
    if "site-packages" in file:
        return file.partition("site-packages/")[2].partition("/")[0]
    for package in ("signer", "proxy"):
        place = Path(file)
        if place.is_relative_to(_ROOT / package):
            return ".".join(place.relative_to(_ROOT).with_suffix("").parts[:3])
    return function if file == "~" else f"standard library: {Path(file).name}"


if __name__ == "__main__":
    main()
