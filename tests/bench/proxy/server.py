"""The server behind the proxies: `python -m tests.bench.proxy.server DESCRIPTOR` serves on that listening socket.

One process, one epoll, no copy that can be avoided: it shares the processor with the proxy that is measured.
"""

import select
import socket
import sys
from collections.abc import Callable

from tests.bench.proxy import wire

_READ, _BOTH = select.EPOLLIN, select.EPOLLIN | select.EPOLLOUT


class _Server:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._epoll = select.epoll()
        self._handlers: dict[int, Callable[[int], None]] = {}
        self._buffer = memoryview(bytearray(wire.CHUNK))
        self._source = memoryview(bytes(wire.CHUNK))

    def run(self) -> None:
        self._listener.setblocking(False)
        self._epoll.register(self._listener.fileno(), _READ)
        self._handlers[self._listener.fileno()] = self._accept
        while True:
            for number, events in self._epoll.poll():
                self._handlers[number](events)

    def _accept(self, _: int) -> None:
        try:
            while True:
                connection, _where = self._listener.accept()
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._handlers[connection.fileno()] = self._begin(connection)
                self._epoll.register(connection.fileno(), _READ)
        except BlockingIOError:
            pass

    def _close(self, connection: socket.socket) -> None:
        del self._handlers[connection.fileno()]
        connection.close()

    def _begin(self, connection: socket.socket) -> Callable[[int], None]:
        def read_head(_: int) -> None:
            try:
                head = connection.recv(wire.HEAD.size)
            except OSError:
                head = b""
            if len(head) < wire.HEAD.size:  # written at once, it arrives at once; else nobody's benchmark
                self._close(connection)
                return
            incoming, outgoing = wire.HEAD.unpack(head)
            if incoming == wire.ECHO:
                self._handlers[connection.fileno()] = self._echo(connection)
                connection.send(head)
            else:
                self._handlers[connection.fileno()] = self._bulk(connection, incoming, outgoing)
                self._epoll.modify(connection.fileno(), _BOTH if outgoing else _READ)

        return read_head

    def _echo(self, connection: socket.socket) -> Callable[[int], None]:
        receive, send, buffer = connection.recv_into, connection.send, self._buffer

        def echo(_: int) -> None:
            try:
                count = receive(buffer)
                if count and send(buffer[:count]) == count:
                    return
            except OSError:
                pass
            self._close(connection)

        return echo

    def _bulk(self, connection: socket.socket, incoming: int, outgoing: int) -> Callable[[int], None]:
        receive, send, buffer, source = connection.recv_into, connection.send, self._buffer, self._source

        def move(events: int) -> None:
            nonlocal incoming, outgoing
            try:
                if events & ~select.EPOLLOUT:
                    count = receive(buffer)
                    if not count:
                        self._close(connection)
                        return
                    incoming -= count
                    if not incoming:
                        outgoing += 1
                        self._epoll.modify(connection.fileno(), _BOTH)
                if events & select.EPOLLOUT and outgoing:
                    outgoing -= send(source[:outgoing])
                    if not outgoing:
                        self._epoll.modify(connection.fileno(), _READ)
            except BlockingIOError:
                pass
            except OSError:
                self._close(connection)

        return move


if __name__ == "__main__":
    wire.raise_descriptor_limit()
    _Server(socket.socket(fileno=int(sys.argv[1]))).run()
