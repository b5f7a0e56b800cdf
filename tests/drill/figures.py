"""`python -m tests.drill.figures`: what a restart of the enclave costs, and what sessions bring.

The enclave that comes next is started beforehand, so that its own start does not count; "back" is the moment in which
the signer can find it under its new CID.
"""

import argparse
import random
import sys
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, cycle, islice
from pathlib import Path

import trio

from signer.tezos.keys import Curve
from tests.bench import load as bench
from tests.bench.messages import attestation
from tests.drill import client
from tests.drill.client import HttpSigner
from tests.drill.keys import Key
from tests.drill.ledger import Ledger
from tests.drill.messages import Kind, Slot, message
from tests.drill.plan import Plan, Rates
from tests.drill.world import START_WITHIN, World, open_world

DOWN = 2.0  # seconds of a restart
_EVERY = 0.02  # seconds between two requests of bakers while the enclave is away
_BEFORE = 0.3  # seconds before the enclave is back, in which the first request arrives
_WORK = 30  # requests between two restarts: an enclave that was of no use is not a restart, it is dialled with pauses
_QUEUE = 8  # kept connections of the throughput


@dataclass
class Restarts:
    """What several restarts cost."""

    asked: int = 0
    signed: int = 0
    first: list[float] = field(default_factory=list)  # seconds from "back" to a signature of a key at random
    alone: list[float] = field(default_factory=list)  # the same where nobody else asks
    every: list[float] = field(default_factory=list)  # seconds from "back" until every key is in
    ledger: Ledger = field(default_factory=Ledger)
    chains: Iterator[int] = field(default_factory=lambda: count(1))


def main() -> None:
    options = _parser().parse_args()
    held = True
    for number in options.keys:
        result = Restarts()
        _in_world(partial(_restarts, result, options.rounds), number)
        _print_restarts(number, result)
        held &= not result.ledger.violations
    for number in options.sessions:
        rates: dict[str, float] = {}
        _in_world(partial(_throughput, rates, options.requests), len(Curve), sessions=number)
        told = ", ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
        print(f"{number} session(s), {_QUEUE} connections, signatures a second: {told}", flush=True)
    sys.exit(0 if held else 1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.drill.figures", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="restarts for each figure; default %(default)s")
    parser.add_argument("--keys", type=int, nargs="*", default=[1, 50, 200], help="default %(default)s")
    parser.add_argument("--sessions", type=int, nargs="*", default=[1, 2, 4], help="default %(default)s")
    parser.add_argument("--requests", type=int, default=4000, help="for each throughput; default %(default)s")
    return parser


def _in_world(work: Callable[[World], Awaitable[None]], keys: int, **nitro: object) -> None:
    """Run *work* beside a signer with *keys* keys, of all curves in turn; times are those of the configuration."""

    async def run(directory: Path) -> None:
        plan = Plan(0, Rates())
        async with open_world(directory, plan, curves=islice(cycle(Curve), keys), nitro=nitro) as world:
            await world.start_signer()
            await work(world)

    with tempfile.TemporaryDirectory(prefix="drill-") as directory:
        trio.run(run, Path(directory))


# -- restarts


async def _restarts(result: Restarts, rounds: int, world: World) -> None:
    for number in range(2 * rounds):
        alone = number % 2 == 0
        spare = await world.boot()
        await world.guest.kill()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(_bakers, result, world, alone=alone))
            await trio.sleep(DOWN)
            cid = world.cid + 1
            await world.settle_in(spare, cid)
            world.show(cid)
            back = trio.current_time()
            await world.ready(START_WITHIN)
            if alone:
                result.every.append(trio.current_time() - back)
        for _ in range(_WORK):
            await _ask(result, world)


async def _bakers(result: Restarts, world: World, *, alone: bool) -> None:
    """A request every now and then while the enclave is away, the last one shortly before it is back, or only that."""
    back = trio.current_time() + DOWN
    async with trio.open_nursery() as nursery:
        while trio.current_time() < back - _BEFORE:
            if not alone:
                nursery.start_soon(_ask, result, world)
            await trio.sleep(_EVERY)
        await trio.sleep(_BEFORE / 2)
        await _ask(result, world)
        (result.alone if alone else result.first).append(trio.current_time() - back)


async def _ask(result: Restarts, world: World) -> None:
    """One request of a key at random, by the Octez client's rule; on a chain of its own: none refuses another."""
    key, signer = random.choice(world.keys), HttpSigner(world.setup.port)
    slot = Slot(next(result.chains), key.address, Kind.ATTESTATION, 1, 0)
    text = message(slot, key.public_key.curve, 0)
    answer, _ = await client.octez(lambda: signer.post(key.address, text))
    result.asked += 1
    result.ledger.status(answer.status, slot, answer.body)
    if answer.status == 200:
        result.signed += 1
        result.ledger.signature(slot, key.public_key, text, answer.signature)


def _print_restarts(keys: int, result: Restarts) -> None:
    share = 100 * result.signed / result.asked
    print(f"{keys} key(s): {result.asked} requests while the enclave was away for {DOWN:g} s, {share:.2f} % signed")
    print(f"    every key in             {_quantiles(result.every)}")
    print(f"    the only request         {_quantiles(result.alone)}")
    print(f"    the last of some ninety  {_quantiles(result.first)}")
    for text in result.ledger.violations:
        print(f"    VIOLATED: {text}")
    sys.stdout.flush()


def _quantiles(seconds: Sequence[float]) -> str:
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1000:.0f} ms, max {ordered[-1] * 1000:.0f} ms after it was back"


# -- throughput


async def _throughput(rates: dict[str, float], requests: int, world: World) -> None:
    for key in world.keys:
        name = key.public_key.curve.address_prefix
        rates[name] = (await trio.to_thread.run_sync(_rate, world.setup.port, [key], requests)).rate
    rates["all four"] = (await trio.to_thread.run_sync(_rate, world.setup.port, world.keys, requests)).rate


def _rate(port: int, keys: Sequence[Key], requests: int) -> bench.Timing:
    """Kept connections, each with a chain of its own; one key after the other on each."""
    host, chains = f"127.0.0.1:{port}", range(len(keys) * 100, len(keys) * 100 + _QUEUE)

    def post(chain: int, level: int) -> bytes:
        key = keys[(chain + level) % len(keys)]
        return bench.post(host, key.address, attestation(key.public_key.curve, chain=chain, level=level))

    series = [[post(chain, level) for level in range(1, requests // _QUEUE + 1)] for chain in chains]
    return bench.run(("127.0.0.1", port), series)


if __name__ == "__main__":
    main()
