"""The proxy as a process: allow list, descriptors, signals, service manager, metrics endpoint.

P2.5 and P2.24 to P2.29 of the proxy specification; `proxy.service` does the work.
"""

import logging
import os
import resource
import signal
from collections.abc import AsyncIterator, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

import trio

from proxy.allowlist import AllowList, AllowListError, parse
from proxy.bind import BindError
from proxy.decision import Decision, UndecidedError, decide
from proxy.metrics import Endpoint, Metrics
from proxy.names import literal
from proxy.notify import Notifier, inherited_listeners
from proxy.resolver import Lookup, system_lookup
from proxy.service import Proxy
from proxy.settings import Forward, Settings

logger = logging.getLogger("vsock_proxy.proxy")

_MAX_ALLOW_LIST = 4 * 1024 * 1024  # bytes


class StartError(Exception):
    """The process cannot start; the text is what the original would print, and more."""


class _NotAllowedAnyMoreError(Exception):
    """By the new list."""


def run(settings: Settings, environ: MutableMapping[str, str] = os.environ) -> int:
    """Run until a signal; returns the exit status. Raises `StartError`."""
    try:
        return trio.run(_Daemon(settings, environ).run)
    except BaseExceptionGroup as group:
        _, others = group.split(StartError)
        if others is not None:
            raise
        raise _first(group) from None


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


class _Daemon:
    def __init__(self, settings: Settings, environ: MutableMapping[str, str], lookup: Lookup = system_lookup) -> None:
        self._settings = settings
        self._notifier = Notifier(environ)
        self._inherited = inherited_listeners(environ)
        self._lookup = lookup
        self._metrics = Metrics()
        self._alive_at = float("-inf")
        self._proxy: Proxy | None = None  # once it serves
        self._stopping = False
        self._told_to_stop = False  # by a signal
        self._status = 0
        self._reload_wanted = trio.Event()

    async def run(self) -> int:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._heed, signals, nursery.cancel_scope)
                await self._serve()
                nursery.cancel_scope.cancel(reason="drained")
        return self._status

    async def _serve(self) -> None:
        proxy = Proxy(
            list(zip(self._settings.forwards, await self._decide_first(), strict=True)),
            metrics=self._metrics,
            drain_timeout=self._settings.drain_timeout,
            lookup=self._lookup,
            inherited=self._inherited,
            on_turn=self._turn,
            turn=min(self._notifier.watchdog_interval or 1.0, 1.0),
        )
        raise_descriptor_limit()
        with self._endpoint():
            async with trio.open_nursery() as reloading:
                async with trio.open_nursery() as serving:
                    try:
                        await serving.start(proxy.run)
                    except BindError as exc:
                        raise StartError(f"Could not listen for connections: {exc}") from exc
                    self._proxy = proxy
                    self._notifier.ready()
                    reloading.start_soon(self._reload_when_wanted, proxy)
                reloading.cancel_scope.cancel(reason="drained")

    @contextmanager
    def _endpoint(self) -> Iterator[None]:
        if self._settings.metrics is None:
            yield
            return
        host, port = self._settings.metrics
        try:
            endpoint = Endpoint(self._metrics, host, port)
        except (OSError, ValueError) as exc:  # ValueError: a host name that can't be looked up at all
            reason = exc.strerror if isinstance(exc, OSError) else None
            raise StartError(f"Could not listen for metrics on {host}:{port}: {reason or exc}") from exc
        logger.info("Metrics are at http://%s:%d/metrics", f"[{host}]" if ":" in host else host, endpoint.port)
        try:
            yield
        finally:
            endpoint.close()

    def _turn(self) -> None:
        """The accept loops go round: the service manager may know."""
        interval, now = self._notifier.watchdog_interval, trio.current_time()
        if interval and now - self._alive_at >= interval / 2:
            self._alive_at = now
            self._notifier.alive()

    # -- signals

    async def _heed(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        async for number in signals:
            name = signal.Signals(number).name
            if number == signal.SIGHUP:
                self._reload_wanted.set()
            elif self._proxy is None:
                logger.info("%s: not started yet, stopping", name)
                everything.cancel(reason="stopped while starting")
            elif self._told_to_stop:
                logger.warning("%s again: connections are reset now", name)
                everything.cancel(reason="second signal")
            else:  # perhaps it stops already, because of a list: that is no reason to cut connections short
                logger.info("%s: no new connections; up to %g s for the others", name, self._settings.drain_timeout)
                self._told_to_stop = True
                self._stop(self._proxy)

    def _stop(self, proxy: Proxy) -> None:
        self._stopping = True
        self._notifier.stopping()
        proxy.stop()

    async def _reload_when_wanted(self, proxy: Proxy) -> None:
        """Heed SIGHUP, until cancelled or stopping; several that come during one reload make one more."""
        while not self._stopping:
            await self._reload_wanted.wait()
            self._reload_wanted = trio.Event()
            if not self._stopping:
                await self._reload(proxy)

    # -- the allow list

    async def _decide_first(self) -> list[Decision]:
        logger.info("Checking allowlist configuration")
        try:
            return await self._decide(read_allow_list(self._settings.allowlist))
        except AllowListError as exc:
            raise StartError(f"Error at checking the allowlist: {exc}") from exc

    async def _decide(self, allow: AllowList) -> list[Decision]:
        return [await self._decide_for(forward, allow) for forward in self._settings.forwards]

    async def _decide_for(self, forward: Forward, allow: AllowList) -> Decision:
        host = forward.remote_host
        decision = await decide(allow, host, forward.remote_port, forward.family, self._lookup)
        if forward.check_tls_name and decision.name is None and literal(host) is not None:
            raise AllowListError(f"the TLS name check needs a name, and {host} is listed by its address")
        return decision

    async def _reload(self, proxy: Proxy) -> None:
        """Read the list again and follow it, as far as it can be read."""
        self._notifier.reloading()
        try:
            allow = read_allow_list(self._settings.allowlist)
            decisions = [await self._decide_again(forward, allow) for forward in self._settings.forwards]
        except _NotAllowedAnyMoreError as exc:
            logger.error("SIGHUP: the target is not allowed any more, stopping: %s", exc)
            if not self._stopping:
                self._status = 1
                self._stop(proxy)
            return
        except AllowListError as exc:
            logger.error("SIGHUP: the new allow list is bad, the old one stays: %s", exc)
        else:
            proxy.redecide(decisions)
            logger.info("SIGHUP: allow list read again, %d entries", len(allow.entries))
        if not self._stopping:
            self._notifier.ready()

    async def _decide_again(self, forward: Forward, allow: AllowList) -> Decision | None:
        """The new decision, None where the old one stays for want of an answer; raises `_NotAllowedAnyMoreError`."""
        try:
            return await self._decide_for(forward, allow)
        except UndecidedError as exc:
            logger.error("SIGHUP: for %s the decision stays as it was: %s", forward, exc)
            return None
        except AllowListError as exc:
            raise _NotAllowedAnyMoreError(str(exc)) from exc


def read_allow_list(path: Path) -> AllowList:
    """The list at *path*; raises `AllowListError` with the original's reason first."""
    try:
        with path.open("rb") as file:
            try:
                data = file.read(_MAX_ALLOW_LIST + 1)
            except OSError as exc:
                raise AllowListError(f"Could not read the file {path}: {exc.strerror}") from exc
    except (OSError, ValueError) as exc:  # ValueError: a path with a NUL
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise AllowListError(f"Could not open the file {path}: {reason}") from exc
    if len(data) > _MAX_ALLOW_LIST:
        raise AllowListError(f"Could not read the file {path}: larger than {_MAX_ALLOW_LIST} bytes")
    try:
        return parse(data)
    except AllowListError as exc:
        raise AllowListError(f"{exc} [{path}]") from exc


def raise_descriptor_limit() -> None:
    """As many descriptors as this user may have: a connection takes two, and four more while it is bulk (P2.5)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as exc:
        logger.warning("descriptor limit: %d of %d, it could not be raised: %s", soft, hard, exc)
        return
    logger.info("descriptor limit: raised from %d to %d", soft, hard)
