"""How Hypercorn's Trio worker is run inside our nursery.

Hypercorn's own accept loop is replaced by one of ours, for what it lacks: a limit for the head of a request apart from
the keep-alive time, a cap on open connections that is taken before `accept`, and binding errors that say what to do.
Each connection is served by Hypercorn's `TCPServer` as it is.
"""

import errno
import resource
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState, LifespanState

from signer.errors import ConfigurationError
from signer.http.app import AsgiApp

BACKLOG = 1024  # connections that the kernel completes for us meanwhile; bakers open two for each signature
MAX_HEAD = 32 * 1024  # bytes of request line and headers; an authentication parameter alone can have 3.3 kB
MAX_CONNECTIONS = 4096
_NO_LIMIT = 10**12  # requests on one kept connection; Hypercorn's default of 1,000 would end a baker's


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """Seconds, from the configuration."""

    header_timeout: float = 5.0
    keep_alive_timeout: float = 75.0
    shutdown_timeout: float = 10.0


async def serve_app(
    app: AsgiApp,
    address: str,
    limits: ServerLimits,
    *,
    stop: trio.Event,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *app* on *address* (`host:port`) until *stop*, then finish what runs within the shutdown time.

    Started with the URL once connections are accepted. Raises `ConfigurationError` where it cannot listen.
    """
    listeners = await _listen(address)
    config, context = _config(limits), WorkerContext(None)
    connections = _Connections(app, config, context, limits)
    async with trio.open_nursery() as open_connections:
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(connections.accept, listener, open_connections)
            task_status.started(_url(listeners[0]))
            await stop.wait()
            accepting.cancel_scope.cancel(reason="shutting down")
        await context.terminated.set()  # a connection ends after the request that is being answered
        connections.close_idle()
        open_connections.cancel_scope.deadline = trio.current_time() + limits.shutdown_timeout


async def _listen(address: str) -> list[trio.SocketListener]:
    host, _, port = address.rpartition(":")
    try:
        return await trio.open_tcp_listeners(int(port), host=host.strip("[]") or None, backlog=BACKLOG)
    except OSError as exc:
        advice = "set another address"
        if exc.errno == errno.EADDRINUSE:
            advice = f"another program listens there; see which one with: ss -ltnp 'sport = :{port}'"
        elif exc.errno == errno.EACCES:
            advice = "ports below 1024 need a capability"
        raise ConfigurationError(f"listen tcp {address}: {exc.strerror or exc}; {advice}") from exc


def _url(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  # reported as it can be called from here
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config(limits: ServerLimits) -> Config:
    config = Config()
    config.h11_max_incomplete_size = MAX_HEAD
    config.keep_alive_max_requests = _NO_LIMIT
    config.keep_alive_timeout = limits.keep_alive_timeout
    config.include_server_header = False
    config.accesslog = None
    config.errorlog = None  # `respond` never raises, and logs what went wrong itself
    return config


class _Connections:
    """Accepts connections and hands each to Hypercorn."""

    def __init__(self, app: AsgiApp, config: Config, context: WorkerContext, limits: ServerLimits) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._limits = limits
        self._slots = trio.Semaphore(_connection_limit())
        self._open: set[_Connection] = set()

    def close_idle(self) -> None:
        """End the connections on which no request is being answered."""
        for connection in self._open:
            connection.close_if_idle()

    async def accept(self, listener: trio.SocketListener, nursery: trio.Nursery) -> None:
        async with listener:
            while True:
                await self._slots.acquire()
                try:
                    stream = await listener.accept()
                except OSError as exc:
                    self._slots.release()
                    if exc.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                        raise
                    await trio.sleep(0.1)  # the kernel lacks resources; connections wait in the backlog
                    continue
                except BaseException:
                    self._slots.release()
                    raise
                nursery.start_soon(self._serve, stream)

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = _Connection(stream, self._limits)
        self._open.add(connection)

        async def app(
            scope: Any,  # Hypercorn's own types go round in circles
            receive: Any,
            send: Any,
            _sync_spawn: Callable[..., Awaitable[Any]],
            _call_soon: Callable[..., Any],
        ) -> None:
            connection.head_complete()
            await self._app(scope, receive, send)

        state = ConnectionState(LifespanState({}))
        server = TCPServer(app, self._config, self._context, state, connection)  # type: ignore[arg-type]
        server.idle_task = _NoTask()  # type: ignore[assignment]  # `_Connection` keeps the time, without a task
        try:
            await server
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the peer is gone
        finally:
            self._slots.release()
            self._open.discard(connection)
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


class _NoTask:
    """In place of Hypercorn's task for the keep-alive time, which is started and cancelled for each request."""

    async def restart(self, _task_group: object, _action: object) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def stop(self) -> None:
        await trio.lowlevel.cancel_shielded_checkpoint()


class _Connection:
    """A socket stream with what Hypercorn lacks.

    - The head of a request must be complete within the header timeout of its first byte: whoever sends a byte now and
      then would otherwise hold a connection for the keep-alive time.
    - An idle connection ends after the keep-alive time, or when the server shuts down.
    - Head and body of a response leave in one segment.
    """

    def __init__(self, stream: trio.SocketStream, limits: ServerLimits) -> None:
        self._stream = stream
        self._limits = limits
        self._answering = False
        self._in_head = False  # between the first byte of a head and its end
        self._head_deadline = float("inf")
        self._held = bytearray()
        self._reading = trio.CancelScope()
        self.socket = stream.socket

    def close_if_idle(self) -> None:
        """End the connection unless a request is being answered."""
        if not self._answering:
            self._reading.cancel(reason="shutting down")

    def head_complete(self) -> None:
        """A request is being answered: what arrives is its body, and what is sent is held back."""
        self._answering, self._in_head = True, False
        self._reading.deadline = float("inf")

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        """What the peer sent; empty at its end, and when its time is up."""
        with trio.CancelScope(deadline=self._deadline()) as self._reading:
            data = await self._stream.receive_some(max_bytes)
            if not self._answering and not self._in_head:
                self._in_head = True
                self._head_deadline = trio.current_time() + self._limits.header_timeout
            return data
        return b""

    def _deadline(self) -> float:
        if self._answering:
            return float("inf")
        if not self._in_head:
            return trio.current_time() + self._limits.keep_alive_timeout
        return self._head_deadline

    async def send_all(self, data: bytes) -> None:
        """Hold the parts of a response back; h11 ends each with an empty part, which sends them."""
        self._held += data
        if data and self._answering:
            return
        if self._answering:  # from now on the connection is idle
            self._answering = False
            self._reading.deadline = trio.current_time() + self._limits.keep_alive_timeout
        held, self._held = self._held, bytearray()
        await self._stream.send_all(held)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _connection_limit() -> int:
    """Half of the descriptors that the process may have, so that vaults and store always find one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft // 2))
