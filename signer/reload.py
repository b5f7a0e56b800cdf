"""SIGHUP: the configuration is read again while requests go on.

A bad file, or one that asks for what this version doesn't do, leaves everything as it was and says why, as `signer
config check` would. A good one takes effect at once as far as it can: policies and keys. What is built at start
(addresses, vaults, the watermark store) stays, and the keys of the file that wait for a restart are named.
"""

from collections.abc import Callable, Mapping
from functools import partial

import structlog
import trio

from proxy.notify import Notifier
from signer import config
from signer.config import Settings
from signer.config.changes import restart_needed
from signer.errors import ConfigurationError, SignerError
from signer.observe.tasks import Task
from signer.vaults.interface import Vault

logger = structlog.get_logger(__name__)

__all__ = ["Load", "Reloader"]

Load = Callable[[], Settings]
"""Reads the settings as at start; blocks. Raises `ConfigurationError` with one fault a line."""


class Reloader:
    """Takes changed settings over when it is asked.

    *running* are the settings that the signer was started with; *apply* puts the policies of others in force, and
    *applied* is called when the vaults have read their keys anew, too; *task* fails for as long as the newest file is
    bad. *is_ready* says whether the service manager knows us to be ready: only then it hears of a reload.
    """

    def __init__(
        self,
        load: Load,
        *,
        running: Settings,
        apply: Callable[[Settings], None],
        applied: Callable[[], None],
        vaults: Mapping[str, Vault],
        task: Task,
        notifier: Notifier,
        is_ready: Callable[[], bool],
    ) -> None:
        self._load = load
        self._running = running
        self._apply = apply
        self._applied = applied
        self._vaults = vaults
        self._task = task
        self._notifier = notifier
        self._is_ready = is_ready
        self._wanted = trio.Event()
        task.running()

    def ask(self) -> None:
        """Reload as soon as `run` can; several that come before are one, and during a reload make one more."""
        self._wanted.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Reload whenever asked, one after the other, until cancelled."""
        task_status.started()
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            told = self._is_ready()
            if told:
                self._notifier.reloading()
            await self._reload()
            if told:
                self._notifier.ready()

    async def _reload(self) -> None:
        try:
            new = await trio.to_thread.run_sync(partial(_checked, self._load))
        except ConfigurationError as exc:
            self._refuse(str(exc))
            return
        except Exception as exc:  # a bug that nothing has come of yet: the old settings are untouched
            logger.exception("internal error while the configuration was read")
            self._refuse(f"internal error: {exc!r}")
            return
        self._take(new)
        for name, vault in self._vaults.items():
            try:
                await vault.reload()
            except SignerError as exc:
                logger.error(f"SIGHUP: the keys of the vault stay as they were: {exc}", vault_name=name)
        self._applied()

    def _refuse(self, faults: str) -> None:
        for fault in faults.splitlines():
            logger.error(f"SIGHUP: {fault}")
        logger.error("SIGHUP: the new configuration is bad; the old settings stay in force")
        self._task.failing(faults)

    def _take(self, new: Settings) -> None:
        for warning in config.warnings(new):
            logger.warning(warning)
        self._apply(new)
        logger.info("SIGHUP: the configuration was read again", keys=len(new.tezos))
        waiting = restart_needed(self._running, new)
        if waiting:
            logger.warning("SIGHUP: some changes need a restart of the signer", keys=", ".join(waiting))
        self._task.running()


def _checked(load: Load) -> Settings:
    new = load()
    refused = config.unsupported(new)
    if refused:
        raise ConfigurationError("\n".join(refused))
    return new
