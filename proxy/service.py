"""The proxy as an object that runs in somebody's nursery: listeners, the pump, and the order of start and stop.

    Proxy.run
    ├── pump                   moves the bytes of all connections
    ├── targets                keep the addresses of the remote hosts fresh
    ├── connections            one task each, while it is connected to the target and until it has ended
    └── accept loops           last to start, first to stop

P2.24, P2.27 and P2.32 of the proxy specification. What concerns a whole process (signals, descriptors' limit, service
manager) is in `proxy.daemon`.
"""

import logging
import socket
from collections.abc import Callable, Sequence

import trio

from proxy.decision import Decision, without_list
from proxy.listener import TICK, Listener, Status
from proxy.metrics import Metrics
from proxy.resolver import Lookup, system_lookup
from proxy.settings import Forward
from proxy.splice import Pump

logger = logging.getLogger("vsock_proxy.proxy")

__all__ = ["Proxy", "Status", "forward_without_list"]


class Proxy:
    """Forwards what arrives at each listener to its target.

    *forwards* go with the decision that allows each of them. *inherited* are sockets that listen already: each is for
    the forward with its address, or for the only one. *on_turn* is called by the accept loops, at least every *turn*
    seconds.
    """

    def __init__(
        self,
        forwards: Sequence[tuple[Forward, Decision]],
        *,
        metrics: Metrics | None = None,
        drain_timeout: float = 10.0,
        lookup: Lookup = system_lookup,
        inherited: Sequence[socket.socket] = (),
        on_turn: Callable[[], None] | None = None,
        turn: float = TICK,
    ) -> None:
        self._metrics = metrics or Metrics()
        self._listeners = [Listener(forward, decision, self._metrics, lookup) for forward, decision in forwards]
        self._drain_timeout = drain_timeout  # seconds
        self._inherited = list(inherited)
        self._on_turn = on_turn or (lambda: None)
        self._turn = turn
        self._stop = trio.Event()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop`, then let connections finish within the drain time and reset the rest.

        Started once every listener listens. Raises `BindError`. Cancelled: every connection is reset.
        """
        try:
            await self._bind()
            pump = Pump()
            async with trio.open_nursery() as services:
                await services.start(pump.run)
                for listener in self._listeners:
                    services.start_soon(listener.forwarder.target.run)
                    services.start_soon(listener.account)
                    listener.forwarder.target.refresh()  # the first connection need not wait for a lookup
                await self._serve(pump, task_status)
                services.cancel_scope.cancel(reason="drained")
        finally:
            self._close()
            self.collect()  # nothing is active any more

    def stop(self) -> None:
        """Accept no more, and end `run` when the connections have ended or the drain time is over."""
        self._stop.set()

    def status(self) -> list[Status]:
        """The listeners, in the order given."""
        return [listener.status() for listener in self._listeners]

    def redecide(self, decisions: Sequence[Decision | None]) -> None:
        """Go on with new decisions, one for each forward, None for the one it has; connections stay.

        Names are looked up again.
        """
        for listener, decision in zip(self._listeners, decisions, strict=True):
            listener.forwarder.redecide(decision)

    def collect(self) -> None:
        """Bring the metrics up to date."""
        for listener in self._listeners:
            listener.collect()

    async def _bind(self) -> None:
        for listener in self._listeners:
            await listener.bind(self._inherited, only=len(self._listeners) == 1)
        for left in self._inherited:
            logger.warning("a socket of the service manager fits no listener, and is closed: %s", left.getsockname())
        self._close_inherited()

    def _close_inherited(self) -> None:
        while self._inherited:
            self._inherited.pop().close()

    async def _serve(self, pump: Pump, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for listener in self._listeners:
                    listener.accept_in(accepting, connections, pump, self._on_turn, self._turn)
                logger.info("Proxy is now in listening state")
                task_status.started()
                await self._stop.wait()
                accepting.cancel_scope.cancel(reason="stopping")
            self._close()
            connections.cancel_scope.deadline = trio.current_time() + self._drain_timeout

    def _close(self) -> None:
        self._close_inherited()
        for listener in self._listeners:
            listener.close()


def forward_without_list(forward: Forward) -> tuple[Forward, Decision]:
    """A forward to a target of our own configuration, which no list needs to allow."""
    return forward, without_list(forward.family)
