"""Listening: accepts connections, keeps their number within bounds, drains them at the end."""

import errno
import resource
from contextlib import AsyncExitStack
from functools import partial

import structlog
import trio

from signer.errors import ConfigurationError
from signer.http.connection import Api, Connection, Limits
from signer.observe.tasks import Task
from signer.supervise import FAULTS, open_nursery, supervise

logger = structlog.get_logger(__name__)

BACKLOG = 1024  # connections that the kernel completes for us meanwhile; bakers open two for each signature
MAX_CONNECTIONS = 4096
_OF_ONE_CONNECTION = (  # accept(2): what befell one that waited is reported in place of it
    errno.ECONNABORTED,
    errno.EPERM,
    errno.EPROTO,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENONET,
)
_RESOURCES_LACK = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class ListenError(ConfigurationError):
    """An address cannot be listened on; at start the program ends with it, later it is tried again."""


async def serve_api(
    api: Api,
    address: str,
    limits: Limits,
    *,
    stop: trio.Event,
    task: Task | None = None,
    task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve *api* on *address* (`host:port`) until *stop*, then finish what runs within the shutdown time.

    Started with the URL once connections are accepted; raises `ListenError` where it cannot listen then. A listener
    that breaks later is opened anew in the same place, as *task* reports; connections that are open stay open.
    """
    server = _Server(api, address, limits, task or Task(address, quiet=True))
    async with open_nursery() as connections:
        listen = partial(server.listen, connections, stop)
        faults = (*FAULTS, trio.ClosedResourceError, ListenError)
        await supervise(server.task, listen, faults=faults, stop=stop, task_status=task_status)
        server.finish()
        connections.cancel_scope.deadline = trio.current_time() + limits.shutdown_timeout


async def _listen(host: str, port: int) -> list[trio.SocketListener]:
    try:
        return await trio.open_tcp_listeners(port, host=host or None, backlog=BACKLOG)
    except OSError as exc:
        advice = "set another address"
        if exc.errno == errno.EADDRINUSE:
            advice = f"another program listens there; see which one with: ss -ltnp 'sport = :{port}'"
        elif exc.errno == errno.EACCES:
            advice = "ports below 1024 need a capability"
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise ListenError(f"listen tcp {place}: {exc.strerror or exc}; {advice}") from exc


def _url(listener: trio.SocketListener) -> str:
    host, port = listener.socket.getsockname()[:2]
    if host in ("0.0.0.0", "::"):  # noqa: S104  # reported as it can be called from here
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server:
    """The open connections of one server."""

    def __init__(self, api: Api, address: str, limits: Limits, task: Task) -> None:
        self.task = task
        host, _, port = address.rpartition(":")
        self._places = [(host.strip("[]"), int(port))]
        self._api = api
        self._limits = limits
        self._slots = trio.Semaphore(_connection_limit())
        self._open: set[Connection] = set()

    async def listen(self, connections: trio.Nursery, stop: trio.Event, *, task_status: trio.TaskStatus[str]) -> None:
        """Accept into *connections* until *stop*; raises when a listener breaks, which closes all of them."""
        async with AsyncExitStack() as stack:
            listeners: list[trio.SocketListener] = []
            for host, port in self._places:
                for listener in await _listen(host, port):
                    listeners.append(await stack.enter_async_context(listener))
            # What the name resolved to and the port that the kernel chose: the URL that was given out stays true.
            self._places = [listener.socket.getsockname()[:2] for listener in listeners]
            async with trio.open_nursery() as accepting:
                for listener in listeners:
                    accepting.start_soon(self._accept, listener, connections)
                task_status.started(_url(listeners[0]))
                await stop.wait()
                accepting.cancel_scope.cancel(reason="shutting down")

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        """Accept until cancelled."""
        while True:
            try:
                stream = await listener.accept()
            except OSError as exc:
                if exc.errno in _OF_ONE_CONNECTION:
                    continue
                fault = f"cannot accept connections: {exc.strerror or exc}"
                if exc.errno not in _RESOURCES_LACK:
                    raise ListenError(fault) from exc
                self.task.failing(fault)
                await trio.sleep(0.1)  # connections wait in the backlog
                continue
            self.task.running()
            try:
                await self._take_slot()
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
            connections.start_soon(self._serve, stream)

    async def _take_slot(self) -> None:
        """A place for one more connection: whoever lets us wait longest makes room, or the next to be answered.

        First those that have no request at all, then those that send theirs slowly.
        """
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            waiting = [c for c in self._open if c.waiting_since is not None]
            if waiting:
                min(waiting, key=lambda c: (c.idle_since is None, c.waiting_since)).give_way()
            await self._slots.acquire()

    def _crowded(self) -> bool:
        return self._slots.statistics().tasks_waiting > 0

    def finish(self) -> None:
        """Let every connection end after the request that has begun."""
        for connection in self._open:
            connection.finish()

    async def _serve(self, stream: trio.SocketStream) -> None:
        connection = Connection(stream, self._api, self._limits, crowded=self._crowded)
        self._open.add(connection)
        try:
            await connection.serve()
        except Exception:
            logger.exception("internal error: a connection ended")  # and no other with it
        finally:
            self._open.discard(connection)
            self._slots.release()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(stream)


def _connection_limit() -> int:
    """Half of the descriptors that the process may have, so that vaults and store always find one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(MAX_CONNECTIONS, soft // 2))
