"""The built-in proxy: the enclave's way to KMS, for each vault that wants it (section 4.9 of the specification).

`proxy.service` does the work; here it is kept running. Its place may be taken by a proxy that works, such as that of
another signer process on this host (weakness 17 of the reference): that is said, and accepted, and when that one ends,
ours steps in.
"""

import errno
from functools import partial

import structlog
import trio
from prometheus_client import CollectorRegistry

from proxy.bind import BindError, is_served
from proxy.metrics import Metrics
from proxy.service import Proxy, forward_without_list
from proxy.settings import Forward
from signer.config import NitroSettings, Settings
from signer.observe.tasks import Task, Tasks
from signer.supervise import FAULTS, open_nursery, supervise

logger = structlog.get_logger(__name__)

DRAIN = 2.0  # seconds; the vaults have ended before: nothing of use is under way
RETRY = 2.0  # seconds between two tries to step in for another proxy; after a failure it is the supervisor's pause
_IN_USE = "the built-in proxy's address is in use"


def _forward(nitro: NitroSettings) -> Forward:
    host, _, port = nitro.proxy_remote_address.rpartition(":")
    return Forward(
        listen=nitro.proxy_listen,
        remote_host=host.removeprefix("[").removesuffix("]"),
        remote_port=int(port),
    )


class KmsProxies:
    """The proxies of the vaults that have `proxy_remote_address`, as one service; their metrics go to *registry*."""

    def __init__(self, settings: Settings, registry: CollectorRegistry, tasks: Tasks) -> None:
        metrics = Metrics(registry)
        self._proxies = [
            _KmsProxy(name, _forward(vault.config), metrics, tasks.add(f"proxy {name}"))
            for name, vault in settings.vaults.items()
            if isinstance(vault.config, NitroSettings) and vault.config.proxy_remote_address
        ]

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep every proxy running until cancelled; started once each has listened, or failed to."""
        async with trio.open_nursery() as nursery:
            for proxy in self._proxies:
                await nursery.start(proxy.keep)
            task_status.started()


class _KmsProxy:
    """One of them; its state is that of *task*, and another proxy that works in its place is as good."""

    def __init__(self, name: str, forward: Forward, metrics: Metrics, task: Task) -> None:
        self._name = name
        self._forward = forward
        self._metrics = metrics
        self._task = task
        self._tried = trio.Event()
        self._said = ""

    async def keep(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled; started once it has listened, or failed to."""
        async with open_nursery() as nursery:
            nursery.start_soon(
                partial(supervise, self._task, self._serve, faults=(*FAULTS, BindError), must_start=False)
            )
            await self._tried.wait()
            task_status.started()

    async def _serve(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Proxy, as soon as nobody else does; started once anybody does. Raises `BindError` where nobody does."""
        announced = False

        def works(text: str) -> None:
            nonlocal announced
            self._say(text)
            if not announced:
                announced = True
                task_status.started()
            self._tried.set()

        target = f"{self._forward.remote_host}:{self._forward.remote_port}"
        while True:
            proxy = Proxy([forward_without_list(self._forward)], metrics=self._metrics, drain_timeout=DRAIN)
            try:
                async with open_nursery() as nursery:
                    await nursery.start(proxy.run)
                    works(f"Proxying connections to {target}...")
            except BindError as exc:
                other = await self._other(exc)
                if not other:
                    self._said = ""
                    self._tried.set()
                    raise
                works(other)
            await trio.sleep(RETRY)

    async def _other(self, exc: BindError) -> str:
        """What is known of the proxy that has our address; empty where that is not what is the matter."""
        served = await is_served(self._forward.listen) if exc.number == errno.EADDRINUSE else False
        match served:
            case True:
                return f"{_IN_USE} by a proxy that accepts connections, which is used"
            case None:
                return f"{_IN_USE}, presumably by another proxy, which is used ({exc})"
            case _:
                return ""

    def _say(self, text: str) -> None:
        if text != self._said:
            logger.info(text, vault_name=self._name, address=str(self._forward))
        self._said = text
