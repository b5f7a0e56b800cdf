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
    connections = _Connections(app, config, context, limits.header_timeout)
    async with trio.open_nursery() as open_connections:
        async with trio.open_nursery() as accepting:
            for listener in listeners:
                accepting.start_soon(connections.accept, listener, open_connections)
            task_status.started(_url(listeners[0]))
            await stop.wait()
            accepting.cancel_scope.cancel(reason="shutting down")
        await context.terminated.set()  # idle connections close now, the others after their request
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

    def __init__(self, app: AsgiApp, config: Config, context: WorkerContext, header_timeout: float) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._header_timeout = header_timeout
        self._slots = trio.Semaphore(_connection_limit())

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
        guarded = _HeadTimeoutStream(stream, self._header_timeout)

        async def app(
            scope: Any,  # Hypercorn's own types go round in circles
            receive: Any,
            send: Any,
            _sync_spawn: Callable[..., Awaitable[Any]],
            _call_soon: Callable[..., Any],
        ) -> None:
            guarded.head_complete()
            try:
                await self._app(scope, receive, send)
            finally:
                guarded.request_done()

        state = ConnectionState(LifespanState({}))
        try:
            await TCPServer(app, self._config, self._context, state, guarded)  # type: ignore[arg-type]
        except* (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass  # the peer is gone
        finally:
            self._slots.release()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


class _HeadTimeoutStream:
    """A socket stream on which the head of a request must be complete within *timeout* seconds of its first byte.

    Whoever sends a byte now and then would otherwise hold a connection for the keep-alive time. Raises
    `trio.TooSlowError`, which Hypercorn takes for a closed connection.
    """

    def __init__(self, stream: trio.SocketStream, timeout: float) -> None:
        self._stream = stream
        self._timeout = timeout
        self._deadline = float("inf")
        self._in_request = False
        self.socket = stream.socket

    def head_complete(self) -> None:
        self._in_request = True
        self._deadline = float("inf")

    def request_done(self) -> None:
        self._in_request = False

    async def receive_some(self, max_bytes: int) -> bytes | bytearray:
        with trio.fail_at(self._deadline):
            data = await self._stream.receive_some(max_bytes)
        if not self._in_request and self._deadline == float("inf"):
            self._deadline = trio.current_time() + self._timeout
        return data

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _connection_limit() -> int:
    """Half of the descriptors that the process may have, so that vaults and store always find one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft // 2))
