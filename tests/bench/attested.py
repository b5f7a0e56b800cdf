"""`make bench-attested`: how soon keys sealed by KMS are there, with a KMS that takes 20 ms for each call.

The enclave's program, its host and the KMS of the tests run as processes on the same cores, so the figures are an upper
bound. One Decrypt a key and session: one after the other, 200 keys would take 4 s of waiting alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from tests.attested.world import World, attested_world

KEYS = (1, 50, 200)
DELAY = 0.02  # seconds of each call of KMS


def keys_of(world: World) -> int:
    """Keys that can sign now."""
    try:
        answer = world.setup.utility.get("/healthz?verbose")[1]
    except OSError:
        return 0
    return int(answer["vaults"]["nitro"]["keys"])


def started(world: World, keys: int) -> tuple[float, float]:
    """Seconds from the start of the signer to the first key, and to all *keys*."""
    began = time.monotonic()
    signer = world.setup.start_signer(wait=False)
    first = 0.0
    while (found := keys_of(world)) < keys:
        if found and not first:
            first = time.monotonic() - began
        time.sleep(0.005)
    every = time.monotonic() - began
    world.setup.stop(signer)
    return first or every, every


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.attested")
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(f"keys of version 1, KMS with {DELAY * 1000:g} ms a call, median (greatest) of {rounds} starts of the signer")
    for keys in KEYS:
        with (
            tempfile.TemporaryDirectory() as directory,
            attested_world(Path(directory), "--delay", str(DELAY)) as world,
        ):
            world.start_enclave()
            began = time.monotonic()
            world.setup.generate("tz1", keys)
            made = time.monotonic() - began
            world.tell_kms(calls=True)
            times = [started(world, keys) for _ in range(rounds)]
            calls = len(world.tell_kms(calls=True)["calls"])
            firsts, everys = zip(*times, strict=True)
            print(
                f"{keys:4} keys: first {statistics.median(firsts):.2f} s ({max(firsts):.2f}), "
                f"all {statistics.median(everys):.2f} s ({max(everys):.2f}); "
                f"{calls / rounds:.0f} calls of KMS a start; made in {made:.1f} s"
            )


if __name__ == "__main__":
    main()
