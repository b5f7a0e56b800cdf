"""`make bench-proxy`: the proxy on loopback, beside a direct connection as the limit and beside other proxies.

Load, proxy and server are processes of their own that share the machine. Each figure is the median of several rounds,
in which the candidates take turns. `--against 'COMMAND with {listen} and {target}'` measures another proxy too, for
example `--against 'socat TCP-LISTEN:{listen_port},bind=127.0.0.1,fork,reuseaddr TCP:{target}'`; a name can stand
before it (`socat=socat ...`).
"""

import argparse
import os
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench.proxy.process import FailedError, Proxy, held, load, running, server
from tests.bench.proxy.wire import raise_descriptor_limit

GIB = 2**30
_NAMED = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)

# The measures in the order of the table: unit, and the project's goal in that unit. Both ways counts all bytes.
MEASURES = {
    "bulk one way, 1 stream": ("GiB/s", ">= 1.4"),
    "  processor time": ("s/GiB", "<= 0.35"),
    "bulk one way, 8 streams": ("GiB/s", ">= 1.4"),
    "  processor time, 8 streams": ("s/GiB", "<= 0.35"),
    "bulk both ways, 1 stream": ("GiB/s", ">= 1.4"),
    "  processor time, both ways": ("s/GiB", "<= 0.35"),
    "bulk both ways, 8 streams": ("GiB/s", ">= 1.4"),
    "  processor time, both ways, 8": ("s/GiB", "<= 0.35"),
    "new connections, 1 caller": ("1/s", ""),
    "new connections, 16 callers": ("1/s", ">= 2000"),
    "ping-pong p50, 1 connection": ("ms", "<= 0.15"),
    "ping-pong p99, 1 connection": ("ms", ""),
    "ping-pong p50, 16 connections": ("ms", ""),
    "ping-pong p99, 16 connections": ("ms", ""),
    "ping-pong p50, 256 connections": ("ms", "<= 6"),
    "ping-pong p99, 256 connections": ("ms", ""),
    "memory at the start": ("MiB", ""),
    "memory, 1,000 idle connections": ("MiB", ""),
    "live of 5,000 connections": ("", ">= 5000"),
    "memory, 5,000 connections": ("MiB", "<= 150"),
}


@dataclass(frozen=True)
class Size:
    """How much is done for one figure."""

    rounds: int
    bulk: int  # bytes
    seconds: float

    @classmethod
    def of(cls, *, quick: bool, rounds: int) -> "Size":
        return cls(1, GIB // 4, 0.3) if quick else cls(rounds, 4 * GIB, 2.0)


@dataclass
class Candidate:
    """What is measured, and the figures so far."""

    name: str
    start: Callable[[], AbstractContextManager[Proxy]]
    figures: dict[str, list[float]] = field(default_factory=dict)

    def note(self, measure: str, value: float) -> None:
        assert measure in MEASURES
        self.figures.setdefault(measure, []).append(value)

    def figure(self, measure: str) -> float | None:
        values = self.figures.get(measure)
        return statistics.median(values) if values else None


def measure_bulk(candidate: Candidate, proxy: Proxy, size: Size) -> None:
    for streams in (1, 8):
        for way, suffix in (("one way", ""), ("both ways", ", both ways")):
            up, down = (size.bulk, 0) if way == "one way" else (size.bulk // 2, size.bulk // 2)
            before = proxy.processor_time()
            seconds = load(proxy.port, "bulk", streams, up, down)["seconds"]
            used, gib = proxy.processor_time() - before, size.bulk / GIB
            name = f"bulk {way}, {streams} stream{'s' if streams > 1 else ''}"
            candidate.note(name, gib / seconds)
            several = "" if streams == 1 else ", 8" if suffix else ", 8 streams"
            if candidate.name != "direct":
                candidate.note(f"  processor time{suffix}{several}", used / gib)


def measure_connections(candidate: Candidate, proxy: Proxy, size: Size) -> None:
    for callers in (1, 16):
        result = load(proxy.port, "connect", callers, size.seconds)
        if result["failed"]:
            say(f"{candidate.name}: {result['failed']:.0f} new connections failed")
        candidate.note(f"new connections, {callers} caller{'s' if callers > 1 else ''}", result["rate"])


def measure_ping(candidate: Candidate, proxy: Proxy, size: Size) -> None:
    for connections in (1, 16, 256):
        result = load(proxy.port, "ping", connections, size.seconds)
        for quantile in ("p50", "p99"):
            plural = "s" if connections > 1 else ""
            candidate.note(f"ping-pong {quantile}, {connections} connection{plural}", result[quantile] * 1e3)


def measure_memory(candidate: Candidate, proxy: Proxy) -> None:
    """Of a proxy that has done nothing else yet."""
    if candidate.name == "direct":
        return
    candidate.note("memory at the start", proxy.resident())
    with held(proxy.port, 1000) as live:
        if live == 1000:
            candidate.note("memory, 1,000 idle connections", proxy.resident())
    with held(proxy.port, 5000) as live:
        candidate.note("live of 5,000 connections", live)
        if live == 5000:
            candidate.note("memory, 5,000 connections", proxy.resident())


def measure(candidate: Candidate, size: Size, *, memory: bool) -> None:
    """One round; a part that fails is said, and has no figure."""
    if memory:
        with candidate.start() as proxy:
            attempt(candidate, lambda: measure_memory(candidate, proxy))
    with candidate.start() as proxy:
        for part in (measure_bulk, measure_connections, measure_ping):
            attempt(candidate, lambda part=part: part(candidate, proxy, size))  # type: ignore[misc]


def attempt(candidate: Candidate, part: Callable[[], None]) -> None:
    try:
        part()
    except FailedError as exc:
        say(f"{candidate.name}: {exc}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def own_command(directory: Path, target: int) -> str:
    """Our proxy, as issue and manual start it."""
    allow = directory / "allow.yaml"
    allow.write_text(f"allowlist: [{{address: 127.0.0.1, port: {target}}}]\n")
    python, config = shlex.quote(sys.executable), shlex.quote(str(allow))
    return f"{python} -m proxy --listen tcp:{{listen}} 127.0.0.1 {{target_port}} --config {config} -w 6000"


def candidates(directory: Path, target: int, against: list[str]) -> list[Candidate]:
    found = [Candidate("direct", lambda: nullcontext(Proxy(target, None)))]
    for number, text in enumerate([f"ours={own_command(directory, target)}", *against]):
        named = _NAMED.fullmatch(text)
        name, command = named.groups() if named else (Path(shlex.split(text)[0]).name, text)
        log = directory / f"{number}.log"
        found.append(Candidate(name, lambda command=command, log=log: running(command, target, log)))  # type: ignore[misc]
    return found


def print_table(measured: list[Candidate]) -> None:
    direct, *proxies = measured
    widths = [max(18, len(one.name) + 2) for one in proxies]
    head = "".join(one.name.rjust(width) for one, width in zip(proxies, widths, strict=True))
    print(f"{'':32}{'':>6} {'goal':>8} {'direct':>9}{head}")
    for name, (unit, goal) in MEASURES.items():
        limit = direct.figure(name)
        cells = "".join(cell(one.figure(name), limit).rjust(width) for one, width in zip(proxies, widths, strict=True))
        print(f"{name:32}{unit:>6} {goal:>8} {shown(limit):>9}{cells}")


def missed(candidate: Candidate) -> list[str]:
    """The measures for which there is a goal that *candidate* does not reach."""
    found = []
    for name, (_, goal) in MEASURES.items():
        value = candidate.figure(name)
        sign, _, number = goal.partition(" ")
        if goal and (value is None or (value < float(number) if sign == ">=" else value > float(number))):
            found.append(name.strip())
    return found


def cell(value: float | None, limit: float | None) -> str:
    """A figure, and its ratio to the direct one."""
    return shown(value) + (f" ({value / limit:.2f}x)" if value is not None and limit else "")


def shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="make bench-proxy", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--quick", action="store_true", help="one short round: only to see it run")
    parser.add_argument("--rounds", type=int, default=3, help="of which the median is shown (default: 3)")
    parser.add_argument(
        "--against",
        metavar="[NAME=]COMMAND",
        action="append",
        default=[],
        help="another proxy, told {listen}, {target}, {listen_port} and {target_port}; repeatable",
    )
    options = parser.parse_args()
    size = Size.of(quick=options.quick, rounds=options.rounds)
    raise_descriptor_limit()
    with tempfile.TemporaryDirectory(prefix="bench-proxy-") as directory, server() as target:
        began, measured = time.monotonic(), candidates(Path(directory), target, options.against)
        for number in range(size.rounds):
            for candidate in measured:
                try:
                    measure(candidate, size, memory=number == 0)
                except FailedError as exc:
                    say(f"{candidate.name}: {exc}")
        print(
            f"loopback TCP, {os.cpu_count()} cores, Python {sys.version.split()[0]}, {time.monotonic() - began:.0f} s"
        )
        print_table(measured)
        print(f"\ngoals not reached: {'; '.join(missed(measured[1])) or 'none'}")


if __name__ == "__main__":
    main()
