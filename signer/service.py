"""The nursery: what runs, in what order it starts and stops.

    service
    ├── watermark store        started first, closed last; one that is slow to open keeps nobody waiting
    ├── utility server         up early: health says what is still missing
    ├── built-in proxies       before the vaults: an enclave reaches KMS through them
    ├── vaults                 each connects, loads its keys, keeps its link up by itself
    ├── signing                the requests that are on their way
    └── signing API            last to start, first to stop

Ending the nurseries from the inside out is the shutdown order (section 2.10 of the signer specification): stop
accepting, finish what runs, close the vaults, close the store. What each part does is its own business.
"""

import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import structlog
import trio

from proxy.address import connect
from proxy.notify import Notifier
from signer import config
from signer.announce import Announcer
from signer.config import NitroSettings, Settings
from signer.config.models import KEY_FILE, AwsKmsSettings
from signer.errors import ConfigurationError, SignerError
from signer.http.api import SigningApi
from signer.http.connection import Api, Limits
from signer.http.server import serve_api
from signer.http.utility import Health, UtilityApi
from signer.observe.metrics import Metrics
from signer.observe.tasks import Tasks
from signer.policy import KeyPolicy, compile_policies
from signer.reload import Load, Reloader
from signer.signing import Signing
from signer.supervise import Service, leaves, open_nursery
from signer.tezos.keys import PublicKeyHash
from signer.vaults.interface import Vault, VaultKey
from signer.vaults.nitro import credentials
from signer.vaults.nitro.discovery import locator
from signer.vaults.nitro.judge import Judge, wanted_of
from signer.vaults.nitro.storage import KeyFile, KeyStorage
from signer.vaults.nitro.vault import NitroVault, Timeouts
from signer.watermark.database import FILE_NAME
from signer.watermark.interface import WatermarkStore
from signer.watermark.memory import MemoryWatermarks
from signer.watermark.migration import take_over
from signer.watermark.sqlite import SqliteWatermarks

logger = structlog.get_logger(__name__)

__all__ = ["ListedKey", "Serving", "listed_keys", "open_vaults", "serve"]

_UTILITY_BODY = 4096  # bytes; nothing there takes a body
_MARKS_INTERVAL = 1.0  # seconds between two looks at the watermark store's state
_START_PATIENCE = 2.5  # seconds, as long as a caller waits, for marks or a vault to start; then the next ones begin
_KMS_SIGNERS = 32  # signatures asked of KMS at once; each occupies a thread
_LISTENING = {"utility server": "Utility HTTP server", "signing API": "HTTP server"}  # the reference's log texts


@dataclass(frozen=True, slots=True)
class ListedKey:
    """One key as listings show it (section 7.4); *policy* is None for a key without an entry in `tezos`."""

    vault: Vault
    key: VaultKey
    policy: KeyPolicy | None

    @property
    def public_key_hash(self) -> PublicKeyHash:
        return self.key.public_key.hash


@dataclass(frozen=True, slots=True)
class Serving:
    """What runs now: handed to `on_ready` once the signing API accepts connections."""

    url: str
    utility_url: str
    keys: Sequence[ListedKey]


OnReady = Callable[[Serving], Awaitable[None]]


def listed_keys(settings: Settings, vaults: Mapping[str, Vault]) -> list[ListedKey]:
    """Every key of every vault, vault by vault in the order of the configuration."""
    policies = compile_policies(settings)
    return [ListedKey(vault, key, policies.get(pkh)) for vault in vaults.values() for pkh, key in vault.keys().items()]


@asynccontextmanager
async def open_vaults(settings: Settings) -> AsyncIterator[Mapping[str, Vault]]:
    """Connect every configured vault and load its keys; closes them on exit. For commands, not for `serve`.

    A vault that cannot be reached is left out with an error in the log (section 1.1, step 10).
    """
    _refuse_unsupported(settings)
    tasks = Tasks()
    metrics = Metrics()  # shown nowhere
    vaults = _build_vaults(settings, tasks, metrics, for_command=True)
    async with (
        _running(*_built_in_proxies(settings, metrics, tasks)),
        _running(*(vault.run for vault in vaults.values())),
    ):
        for name, vault in vaults.items():
            if not vault.ready:
                error = vault.health().detail
                logger.error("Error initializing vault, skipping...", vault_name=name, error=error)
        yield {name: vault for name, vault in vaults.items() if vault.ready}


async def serve(
    settings: Settings,
    *,
    no_list: bool = False,
    on_ready: OnReady | None = None,
    stop: trio.Event | None = None,
    reload: Load | None = None,
) -> None:
    """Run the signer until SIGINT, SIGTERM or *stop*; returns after the drain.

    Unless *no_list*, the keys are listed into the log at start. *on_ready* is called once the signing API accepts
    connections, and the signer serves while it runs. *reload* reads the settings anew for SIGHUP; without it SIGHUP,
    as of a terminal that is closed, ends the signer in good order, unless it is ignored (`nohup`). Raises
    `ConfigurationError` or the store's error where the signer cannot start.
    """
    _refuse_unsupported(settings)
    for warning in config.warnings(settings):
        logger.warning(warning)
    notifier = Notifier()
    stopping = trio.Event() if stop is None else stop

    async def follow_stopping(*, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        await stopping.wait()
        notifier.stopping()
        service.end_start()

    try:
        service = _Service(settings, stopping, notifier, reload)
        async with _running(_Signals(stopping, service.reloader).run, follow_stopping):
            with _traced_bugs():
                await service.run(no_list=no_list, on_ready=on_ready)
    except* _SecondSignalError:
        logger.warning("stopped without waiting for the drain")


@contextmanager
def _traced_bugs() -> Iterator[None]:
    """What is neither a fault nor told to the operator in words leaves its trace in the log before it ends all."""
    try:
        yield
    except Exception as exc:
        if any(not isinstance(one, (SignerError, OSError)) for one in leaves(exc)):
            logger.critical("internal error, the signer ends; please report it", exc_info=exc)
        raise


def _refuse_unsupported(settings: Settings) -> None:
    refused = config.unsupported(settings)
    if refused:
        raise ConfigurationError("\n".join(refused))


class _Service:
    """One signer; its parts are built here and run in `run`."""

    def __init__(self, settings: Settings, stopping: trio.Event, notifier: Notifier, load: Load | None) -> None:
        self._settings = settings
        self._stopping = stopping
        self._tasks = Tasks()
        self._metrics = Metrics()
        self._metrics.follow(self._tasks)
        self._metrics.know_addresses([str(pkh) for pkh in settings.tezos])
        self._marks = _build_store(settings, self._metrics)
        self._vaults = _build_vaults(settings, self._tasks, self._metrics)
        self._proxies = _built_in_proxies(settings, self._metrics, self._tasks)
        self._policies = compile_policies(settings)
        self._announcer = Announcer(notifier, self._vaults, lambda: self._policies, stopping=stopping)
        self._signing = Signing(
            policies=self._policies,
            vaults=list(self._vaults.values()),
            marks=self._marks,
            metrics=self._metrics,
        )
        self._serving = False
        self._marks_open = trio.Event()
        self._start = trio.CancelScope()
        self._started = False
        self.reloader = None if load is None else self._build_reloader(load, notifier)

    def _build_reloader(self, load: Load, notifier: Notifier) -> Reloader:
        return Reloader(
            load,
            running=self._settings,
            apply=self._take,
            applied=self._warn_of_missing,
            vaults=self._vaults,
            task=self._tasks.add("configuration", quiet=True),  # whoever sends SIGHUP gets an answer each time
            notifier=notifier,
            is_ready=lambda: self._announcer.is_ready,
        )

    def _take(self, settings: Settings) -> None:
        """Put the policies of *settings* in force."""
        self._policies = compile_policies(settings)
        self._signing.replace_policies(self._policies)
        self._metrics.know_addresses([str(pkh) for pkh in self._policies])
        self._announcer.look_again()

    def end_start(self) -> None:
        """Give the start up if it is not over: nothing was accepted that would have to be drained."""
        if not self._started:
            self._start.cancel(reason="told to stop while starting")

    async def run(self, *, no_list: bool, on_ready: OnReady | None) -> None:
        with self._start:
            await self._run(no_list=no_list, on_ready=on_ready)

    async def _run(self, *, no_list: bool, on_ready: OnReady | None) -> None:
        server = self._settings.server
        logger.info("Initializing watermark backend", backend=self._marks.backend)
        async with (
            _running(self._keep_marks),
            self._listening(
                UtilityApi(metrics=self._metrics, health=self._health),
                server.utility_address,
                self._limits(_UTILITY_BODY),
                "utility server",
            ) as utility_url,
            _running(*self._proxies),
        ):
            for name in self._vaults:
                logger.info("Initializing vault", vault=self._settings.vaults[name].driver, vault_name=name)
            async with (
                _running(self._announcer.run),
                _running(*(partial(self._run_vault, name, no_list=no_list) for name in self._vaults)),
                _running(self._signing.run),
            ):
                limits = self._limits(server.max_body_bytes)
                async with self._listening(self._signing_api(), server.address, limits, "signing API") as url:
                    self._serving = self._started = True
                    if on_ready is not None:
                        await on_ready(Serving(url, utility_url, listed_keys(self._settings, self._vaults)))
                    reloader = [] if self.reloader is None else [self.reloader.run]
                    async with _running(self._announce, *reloader):
                        await self._stopping.wait()
                    self._serving = False  # before the listener closes, so that a probe can see it
                with trio.move_on_after(server.shutdown_timeout):
                    await self._signing.drain()

    async def _announce(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The signing API listens; without marks nobody is told that it is ready."""
        task_status.started()
        await self._marks_open.wait()
        self._announcer.listening()

    async def _run_vault(
        self, name: str, *, no_list: bool, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """The vault *name*; what it lacks after a while must not keep callers from the keys that it has."""
        vault, began = self._vaults[name], trio.Event()

        async with open_nursery() as nursery:

            async def begin() -> None:
                await nursery.start(vault.run)
                self._report_keys(name, no_list=no_list)
                began.set()

            nursery.start_soon(begin)
            with trio.move_on_after(_START_PATIENCE) as patience:
                await began.wait()
            if patience.cancelled_caught:
                logger.warning(
                    f"vault {name} is slow to start; requests are answered without waiting for it, and each key signs "
                    "as soon as it is in",
                    vault_name=name,
                    detail=vault.health().detail,
                )
            task_status.started()

    def _report_keys(self, name: str, *, no_list: bool) -> None:
        """What the vault *name* has, once its first attempt to reach the enclave is over."""
        vault = self._vaults[name]
        if not vault.keys():
            logger.error(f"No valid keys found in the vault {name}", detail=vault.health().detail)
        self._warn_of_missing()
        for key in () if no_list else listed_keys(self._settings, {name: vault}):
            logger.info(
                "Key",
                pkh=str(key.public_key_hash),
                public_key=str(key.key.public_key),
                vault=key.vault.kind,
                active=key.policy is not None,
            )

    def _warn_of_missing(self) -> None:
        if self._vaults_away:
            return  # nobody knows yet
        present = {pkh for vault in self._vaults.values() for pkh in vault.keys()}
        skipped = {pkh: why for vault in self._vaults.values() for pkh, why in vault.health().skipped.items()}
        for pkh in sorted(str(pkh) for pkh in self._policies if pkh not in present):
            if pkh in skipped:  # it is there: whoever reads this must not look for its blob
                logger.warning("a key of the configuration cannot be used", pkh=pkh, error=skipped[pkh])
            else:
                logger.warning("a key of the configuration is in no vault", pkh=pkh)

    @property
    def _vaults_away(self) -> bool:
        return not all(vault.ready for vault in self._vaults.values())

    def _signing_api(self) -> SigningApi:
        server = self._settings.server
        return SigningApi(
            self._signing, metrics=self._metrics, known_keys=server.known_keys, path_prefix=server.path_prefix
        )

    def _limits(self, max_body_bytes: int) -> Limits:
        server = self._settings.server
        return Limits(
            max_body_bytes=max_body_bytes,
            header_timeout=server.header_timeout,
            body_timeout=server.body_timeout,
            keep_alive_timeout=server.keep_alive_timeout,
            shutdown_timeout=server.shutdown_timeout,
        )

    def _health(self) -> Health:
        states = {name: vault.health() for name, vault in self._vaults.items()}
        return Health(self._serving, states, self._marks.failure, self._tasks.all())

    @asynccontextmanager
    async def _listening(self, api: Api, address: str, limits: Limits, name: str) -> AsyncIterator[str]:
        """A server on *address*, kept up by itself; stopped and drained on exit."""
        stop, task = trio.Event(), self._tasks.add(name)
        async with open_nursery() as nursery:
            url: str = await nursery.start(partial(serve_api, api, address, limits, stop=stop, task=task))
            logger.info(f"{_LISTENING[name]} is listening for connections on {address}")
            try:
                yield url
            finally:
                stop.set()

    async def _keep_marks(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The watermark store; it meets its own faults, and what ends it ends the process (`signer.supervise`).

        One that is slow to open, as a table that doesn't answer, holds up no server: health says what is missing, and
        what needs a mark gets an error.
        """
        try:
            async with open_nursery() as nursery:

                async def begin() -> None:
                    await nursery.start(self._marks.run)
                    self._marks_open.set()

                nursery.start_soon(begin)
                with trio.move_on_after(_START_PATIENCE) as patience:
                    await self._marks_open.wait()
                if patience.cancelled_caught:
                    logger.warning(
                        "the watermark store is slow to open; no block or attestation is signed until it is",
                        detail=self._marks.failure,
                    )
                self._note_marks()
                task_status.started()
                while True:
                    await trio.sleep(_MARKS_INTERVAL)
                    self._note_marks()
        finally:
            self._tasks.add("watermarks").stopped()

    def _note_marks(self) -> None:
        task, failure = self._tasks.add("watermarks"), self._marks.failure
        if failure:
            task.failing(failure)
        else:
            task.running()


class _Signals:
    """SIGINT and SIGTERM: the first drains, the second cuts the drain short. SIGHUP: reload, or as SIGTERM without."""

    def __init__(self, stopping: trio.Event, reloader: Reloader | None) -> None:
        self._stopping = stopping
        self._reloader = reloader

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        heeded = [signal.SIGINT, signal.SIGTERM]
        if self._reloader is not None or signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            heeded.append(signal.SIGHUP)
        with trio.open_signal_receiver(*heeded) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, heeded)  # what came before is heard now
            task_status.started()
            async for number in signals:
                logger.info(f"Captured {signal.Signals(number).name}")
                if number == signal.SIGHUP and self._reloader is not None:
                    self._reloader.ask()  # in the drain nobody heeds it
                elif self._stopping.is_set():
                    raise _SecondSignalError
                else:
                    logger.info("Shutting down...")
                    self._stopping.set()


class _SecondSignalError(Exception):
    """The operator doesn't want to wait for the drain."""


@asynccontextmanager
async def _running(*services: Service) -> AsyncIterator[None]:
    """Start *services* side by side, wait until each has started; cancel them on exit."""
    async with open_nursery() as nursery:
        async with open_nursery() as starting:
            for service in services:
                starting.start_soon(nursery.start, service)
        try:
            yield
        finally:
            nursery.cancel_scope.cancel(reason="not needed any more")


def _build_store(settings: Settings, metrics: Metrics) -> WatermarkStore:
    if settings.watermark.driver == "mem":
        return MemoryWatermarks()
    table = settings.watermark.in_table
    if table is not None:
        from signer.watermark.dynamodb import DynamoWatermarks
        from signer.watermark.table_admin import client_for, name_of, take_over_files

        return DynamoWatermarks(
            client_for(table),
            name_of(table),
            write_timeout=table.write_timeout,
            prepare=partial(take_over_files, settings.base_dir),
            observer=metrics,
        )
    return SqliteWatermarks(
        settings.base_dir / FILE_NAME,
        prepare=lambda database: take_over(database, settings.base_dir),
        observer=metrics,
    )


def _built_in_proxies(settings: Settings, metrics: Metrics, tasks: Tasks) -> list[Service]:
    """The service that runs them; none, and none of its libraries, where no vault has `proxy_remote_address`."""
    if not any(isinstance(v.config, NitroSettings) and v.config.proxy_remote_address for v in settings.vaults.values()):
        return []
    from signer.kms_proxy import KmsProxies

    return [KmsProxies(settings, metrics.registry, tasks).run]


def _build_vaults(settings: Settings, tasks: Tasks, metrics: Metrics, *, for_command: bool = False) -> dict[str, Vault]:
    """The vaults of the configuration; *for_command*: with what people call their keys, without the enclave's log.

    The log is the signer's to tell: a command's few lines, and its error, would be lost among those of an enclave.
    """
    vaults: dict[str, Vault] = {}
    for name, vault in settings.vaults.items():
        if isinstance(vault.config, NitroSettings):
            log_port = 0 if for_command else vault.config.enclave_log_port
            vaults[name] = _build_nitro(name, vault.config, settings.base_dir, tasks, metrics, log_port=log_port)
        else:
            vaults[name] = _build_awskms(name, vault.config, tasks, describe=for_command)
    return vaults


def _build_awskms(name: str, kms: AwsKmsSettings, tasks: Tasks, *, describe: bool) -> Vault:
    from signer.aws.client import AwsClient
    from signer.vaults.awskms.account import READERS
    from signer.vaults.awskms.vault import AwsKmsVault

    client = AwsClient(
        "kms",
        kms,
        component=f"vault {name}",
        workers=_KMS_SIGNERS + READERS,  # a reading of many keys holds no signature up
        connect_timeout=kms.wait_timeout / 2,  # so that a second try can still be in time
        read_timeout=kms.wait_timeout / 2,
    )
    return AwsKmsVault(
        name=name,
        client=client,
        names=kms.keys or (),
        wait_timeout=kms.wait_timeout,
        refresh_interval=kms.refresh_interval,
        describe=describe,
        tasks=tasks,
    )


def _build_nitro(
    name: str, nitro: NitroSettings, base_dir: Path, tasks: Tasks, metrics: Metrics, *, log_port: int
) -> NitroVault:
    keys = nitro.credentials
    return NitroVault(
        name=name,
        locator=locator(nitro),
        sessions=nitro.sessions,
        storage=_build_storage(name, nitro, base_dir),
        credentials=credentials.provider(
            access_key_id=keys.access_key_id,
            secret_access_key=keys.secret_access_key.get_secret_value(),
            session_token=keys.session_token.get_secret_value(),
            region=keys.region,
            kms_region=nitro.kms_region,
        ),
        encryption_key_id=nitro.encryption_key_id,
        connect=connect,
        judge=Judge(name, nitro.judging, wanted_of(nitro), observer=metrics),
        seal=nitro.seal,
        log_port=log_port,
        observer=metrics,
        timeouts=Timeouts(connect=nitro.connect_timeout, exchange=nitro.exchange_timeout, wait=nitro.wait_timeout),
        tasks=tasks,
    )


def _build_storage(name: str, nitro: NitroSettings, base_dir: Path) -> KeyStorage:
    if nitro.storage is None:
        return KeyFile(base_dir / KEY_FILE)
    table = nitro.storage.in_table
    if table is not None:
        from signer.aws.client import AwsClient
        from signer.vaults.nitro.dynamodb import DEFAULT_TABLE, KeyTable

        client = AwsClient("dynamodb", table, component=f"storage of vault {name}")
        return KeyTable(client, table.table or DEFAULT_TABLE)
    path = nitro.storage.config
    return KeyFile(Path(path) if isinstance(path, str) else base_dir / KEY_FILE)
