"""The built-in proxy: the enclave's way to KMS, for each vault that wants it (section 4.9 of the specification).

`proxy.service` does the work; here it is kept running. Its place may be taken by a proxy that works, such as that of
another signer process on this host (weakness 17 of the reference): that is said, and accepted, and when that one ends,
ours steps in.
"""

import errno

import structlog
import trio
from prometheus_client import CollectorRegistry

from proxy.bind import BindError, is_served
from proxy.metrics import Metrics
from proxy.service import Proxy, forward_without_list
from proxy.settings import Forward
from signer.config import NitroSettings, Settings

logger = structlog.get_logger(__name__)

DRAIN = 2.0  # seconds; the vaults have ended before: nothing of use is under way
RETRY = 2.0  # seconds between two tries to listen
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

    def __init__(self, settings: Settings, registry: CollectorRegistry) -> None:
        self._forwards = [
            (name, _forward(vault.config))
            for name, vault in settings.vaults.items()
            if isinstance(vault.config, NitroSettings) and vault.config.proxy_remote_address
        ]
        self._metrics = Metrics(registry)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep every proxy running until cancelled; started once each has listened, or failed to."""
        async with trio.open_nursery() as nursery:
            for name, forward in self._forwards:
                await nursery.start(self._keep, name, forward)
            task_status.started()

    async def _keep(
        self, name: str, forward: Forward, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        announced, said = False, ""
        while True:
            proxy = Proxy([forward_without_list(forward)], metrics=self._metrics, drain_timeout=DRAIN)
            async with trio.open_nursery() as nursery:
                try:
                    await nursery.start(proxy.run)
                    said = ""
                    target = f"{forward.remote_host}:{forward.remote_port}"
                    logger.info(f"Proxying connections to {target}...", vault_name=name, address=str(forward))
                except BindError as exc:
                    said = await self._explain(name, forward, exc, said)
                if not announced:
                    announced = True
                    task_status.started()
            await trio.sleep(RETRY)

    async def _explain(self, name: str, forward: Forward, exc: BindError, said: str) -> str:
        """Say once what is the matter; returns what was said."""
        text = str(exc)
        if exc.number == errno.EADDRINUSE:
            served = await is_served(forward.listen)
            if served:
                text = f"{_IN_USE} by a proxy that accepts connections, which is used"
            elif served is None:
                text = f"{_IN_USE}, presumably by another proxy, which is used ({exc})"
        if text != said:
            log = logger.info if text.startswith(_IN_USE) else logger.error
            log(text, vault_name=name, address=str(forward))
        return text
