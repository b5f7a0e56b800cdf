"""TCP connections to the first of several addresses that answers; RFC 8305 (happy eyeballs), P2.10 and P2.12.

The usual case, one address that answers, costs no more than the connect itself.
"""

import errno
import os
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import trio

from proxy.names import IpAddress
from proxy.splice import close

STAGGER = 0.25  # seconds before the next address is tried beside the one that hasn't answered yet
_KEEP_ALIVE_IDLE = 60  # seconds
_MIN_BUFFER = 64 * 1024  # bytes

Report = Callable[[IpAddress, OSError | None], None]


async def dial(addresses: Sequence[IpAddress], port: int, *, report: Report) -> tuple[socket.socket, IpAddress]:
    """A connected, non-blocking socket, and the address that it goes to.

    *report* hears of each address that failed or answered, and with a `TimeoutError` of each that a later one overtook:
    else an address that never answers would hold up every connection. Raises the last `OSError`; the deadline is the
    caller's.
    """
    if len(addresses) == 1:
        return await _one(addresses[0], port, report), addresses[0]
    winner: tuple[socket.socket, IpAddress] | None = None
    waiting: list[IpAddress] = []  # for an answer, in the order of their start
    last: OSError = OSError(errno.EADDRNOTAVAIL, "no address to connect to")

    async def attempt(address: IpAddress, over: trio.Event) -> None:
        nonlocal winner, last
        try:
            connection = await _one(address, port, report)
        except OSError as exc:
            last = exc
            waiting.remove(address)
            over.set()
            return
        if winner is None:
            winner = (connection, address)
            nursery.cancel_scope.cancel(reason="another address answered")
        else:
            waiting.remove(address)
            close(connection, reset=True)

    try:
        async with trio.open_nursery() as nursery:
            for address in addresses:
                over = trio.Event()
                waiting.append(address)
                nursery.start_soon(attempt, address, over)
                with trio.move_on_after(STAGGER):
                    await over.wait()
    except BaseException:  # cancelled in the moment of success
        if winner is not None:
            close(winner[0], reset=True)
        raise
    if winner is None:
        raise last
    for overtaken in waiting[: waiting.index(winner[1])]:
        report(overtaken, TimeoutError(errno.ETIMEDOUT, f"no answer before {winner[1]} gave one"))
    return winner


async def _one(address: IpAddress, port: int, report: Report) -> socket.socket:
    try:
        connection = await _connect(address, port)
    except OSError as exc:
        report(address, exc)
        raise
    report(address, None)
    return connection


async def _connect(address: IpAddress, port: int) -> socket.socket:
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    connection = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        number = connection.connect_ex((str(address), port))
        if number == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(connection)
            number = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        else:
            await trio.lowlevel.checkpoint()
        if number:
            raise OSError(number, os.strerror(number))
        prepare_tcp(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def prepare_tcp(connection: socket.socket) -> None:
    """No delay, keep-alive, and buffers that hold a piece (P2.6); a socket that isn't TCP is left alone."""
    if connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    with suppress(OSError):  # the peer may be gone already
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEP_ALIVE_IDLE)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            if connection.getsockopt(socket.SOL_SOCKET, option) < _MIN_BUFFER:  # else the kernel's own tuning is better
                connection.setsockopt(socket.SOL_SOCKET, option, _MIN_BUFFER)
