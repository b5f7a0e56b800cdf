"""The load on a proxy: `python -m tests.bench.proxy.load HOST PORT KIND ARGUMENT...` prints its result as JSON.

One process, one epoll and non-blocking sockets, so that it costs little beside the proxy that is measured. Kinds:
`bulk` STREAMS UP DOWN (bytes each way, of all streams together), `connect` CALLERS SECONDS, `ping` CONNECTIONS SECONDS,
`hold` CONNECTIONS, which keeps them open, with one message each sent and answered, until standard input ends.
"""

import errno
import json
import select
import socket
import sys
from collections.abc import Callable
from time import perf_counter

from tests.bench.proxy import wire

_IN, _OUT, _BOTH = select.EPOLLIN, select.EPOLLOUT, select.EPOLLIN | select.EPOLLOUT
_STUCK = 20.0  # seconds without any event: the proxy lets somebody wait for ever
_MAX_FAILED = 200

Where = tuple[str, int]
Handlers = dict[int, Callable[[int], None]]  # by descriptor


class StuckError(Exception):
    """Nothing happens any more."""


def _connected(where: Where) -> socket.socket:
    connection = socket.create_connection(where, timeout=_STUCK)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _opened(where: Where) -> socket.socket:
    """A connection that the server behind the proxy has answered."""
    connection = _connected(where)
    try:
        connection.sendall(wire.ECHO_HEAD)
        _receive_exactly(connection, len(wire.ECHO_HEAD))
    except BaseException:
        connection.close()
        raise
    return connection


def _receive_exactly(connection: socket.socket, number: int) -> None:
    while number:
        data = connection.recv(number)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed before the answer")
        number -= len(data)


def _run(epoll: select.epoll, handlers: Handlers, goes_on: Callable[[], bool]) -> None:
    while goes_on():
        ready = epoll.poll(_STUCK)
        if not ready:
            raise StuckError(f"nothing has happened for {_STUCK:g} s")
        for number, events in ready:
            handler = handlers.get(number)
            if handler is not None:
                handler(events)


def bulk(where: Where, streams: int, up: int, down: int) -> dict[str, float]:
    """Seconds until *up* and *down* bytes have arrived."""
    epoll, handlers, left = select.epoll(), Handlers(), streams
    buffer, source = memoryview(bytearray(wire.CHUNK)), memoryview(bytes(wire.CHUNK))

    def start(connection: socket.socket, outgoing: int, incoming: int) -> None:
        def move(events: int) -> None:
            nonlocal outgoing, incoming, left
            try:
                if events & ~_OUT:
                    count = connection.recv_into(buffer)
                    if not count:
                        raise ConnectionResetError(errno.ECONNRESET, "closed before the end")
                    incoming -= count
                    if not incoming:
                        left -= 1
                if events & _OUT and outgoing:
                    outgoing -= connection.send(source[:outgoing])
                    if not outgoing:
                        epoll.modify(connection.fileno(), _IN)
            except BlockingIOError:
                pass

        connection.sendall(wire.HEAD.pack(outgoing, incoming))
        incoming += 1  # says that all has arrived
        connection.setblocking(False)
        handlers[connection.fileno()] = move
        epoll.register(connection.fileno(), _BOTH)

    connections = [_connected(where) for _ in range(streams)]
    began = perf_counter()
    for connection in connections:
        start(connection, up // streams, down // streams)
    _run(epoll, handlers, lambda: left > 0)
    return {"seconds": perf_counter() - began}


def connect(where: Where, callers: int, seconds: float) -> dict[str, float]:
    """Connections a second, each for one short message and its answer, by *callers* that wait for nothing else."""
    epoll, handlers = select.epoll(), Handlers()
    done = failed = open_ = 0
    size = len(wire.ECHO_HEAD)

    def call() -> None:
        nonlocal open_
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        connection.connect_ex(where)
        open_ += 1
        number = connection.fileno()

        def end(good: bool) -> None:
            nonlocal done, failed, open_
            open_ -= 1
            done, failed = done + good, failed + (not good)
            del handlers[number]
            connection.close()
            if perf_counter() < until and failed < _MAX_FAILED:
                call()

        def advance(events: int) -> None:
            try:
                if events & _OUT:
                    connection.send(wire.ECHO_HEAD)
                    epoll.modify(number, _IN)
                else:
                    end(len(connection.recv(size)) == size)
            except OSError:
                end(False)

        handlers[number] = advance
        try:
            connection.send(wire.ECHO_HEAD)  # on loopback the connection is there at once
            epoll.register(number, _IN)
        except BlockingIOError:
            epoll.register(number, _OUT)
        except OSError:
            end(False)

    began = perf_counter()
    until = began + seconds
    for _ in range(callers):
        call()
    _run(epoll, handlers, lambda: bool(open_))
    return {"rate": done / (perf_counter() - began), "failed": failed}


def ping(where: Where, connections: int, seconds: float) -> dict[str, float]:
    """Latencies in seconds of 1 KiB there and back, one message under way on each connection."""
    epoll, handlers = select.epoll(), Handlers()
    latencies: list[float] = []
    buffer = memoryview(bytearray(wire.CHUNK))
    size = len(wire.MESSAGE)

    def start(connection: socket.socket) -> None:
        sent_at, missing = 0.0, size
        receive, send = connection.recv_into, connection.send

        def answer(_: int) -> None:
            nonlocal sent_at, missing
            count = receive(buffer)
            if not count:
                raise ConnectionResetError(errno.ECONNRESET, "closed before the end")
            missing -= count
            if not missing:
                now = perf_counter()
                latencies.append(now - sent_at)
                sent_at, missing = now, size
                send(wire.MESSAGE)

        connection.setblocking(False)
        handlers[connection.fileno()] = answer
        epoll.register(connection.fileno(), _IN)
        sent_at = perf_counter()
        send(wire.MESSAGE)

    kept = [_opened(where) for _ in range(connections)]
    began = perf_counter()
    until = began + seconds
    for connection in kept:
        start(connection)
    _run(epoll, handlers, lambda: perf_counter() < until)
    elapsed = perf_counter() - began
    latencies.sort()
    number = len(latencies)
    return {"p50": latencies[number // 2], "p99": latencies[number * 99 // 100], "rate": number / elapsed}


def hold(where: Where, connections: int) -> dict[str, float]:
    """How many of *connections* the server has answered; they stay open."""
    held = []
    for _ in range(connections):
        try:
            held.append(_opened(where))
        except OSError:
            break
    live = 0
    for connection in held:  # each of them, while all the others are there
        try:
            connection.sendall(wire.MESSAGE)
            _receive_exactly(connection, len(wire.MESSAGE))
        except OSError:
            continue
        live += 1
    _keep.extend(held)
    return {"live": live}


_keep: list[socket.socket] = []


def main(arguments: list[str]) -> None:
    where, kind, numbers = (arguments[0], int(arguments[1])), arguments[2], arguments[3:]
    wire.raise_descriptor_limit()
    try:
        if kind == "bulk":
            result = bulk(where, int(numbers[0]), int(numbers[1]), int(numbers[2]))
        elif kind == "connect":
            result = connect(where, int(numbers[0]), float(numbers[1]))
        elif kind == "ping":
            result = ping(where, int(numbers[0]), float(numbers[1]))
        else:
            result = hold(where, int(numbers[0]))
    except (OSError, StuckError) as exc:
        sys.exit(f"{kind} {' '.join(numbers)}: {exc}")
    print(json.dumps(result), flush=True)
    if kind == "hold":
        sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1:])
