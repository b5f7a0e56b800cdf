"""What the service manager is told while the signer runs: READY, STATUS and WATCHDOG of sd_notify(3).

READY=1 is sent once, when the signing API listens and at least one configured key can sign. Until then the API answers
already (502 for what it cannot sign yet), so nothing else waits for it. The status changes with the vaults, and is
computed when one of them says so: nothing is polled.

WATCHDOG=1 says that a restart of the signer would mend nothing. The event loop runs, or it would not be sent; and each
vault has shown a sign of life. WatchdogSec is twice the interval in which we send, so:

- a vault whose link is up must have had a reply within 1.5 intervals, though never less than `LEAST_SILENCE`: its
  probes are that far apart. A link that is stuck is what a restart mends. An enclave that does not answer loses its
  link after `exchange_timeout`; WatchdogSec should be at least twice that, or the signer is restarted for it.
- a vault that is known to be away shows life by finishing its attempts to reach it: no restart brings an enclave or
  credentials back. Those may be `LONGEST_ATTEMPT` apart; more, and whoever makes them is stuck.
"""

from collections.abc import Callable, Mapping

import structlog
import trio

from proxy.notify import Notifier
from signer.policy import KeyPolicy
from signer.tezos.keys import PublicKeyHash
from signer.vaults.interface import Vault

logger = structlog.get_logger(__name__)

LEAST_SILENCE = 6.0  # seconds; a probe follows after at most 4 s without a reply
LONGEST_ATTEMPT = 150.0  # seconds; 72 s of pause and 30 s of asking for credentials, and as much again as leeway
_REST = 0.2  # seconds between two looks at the state: one for many imports

Policies = Callable[[], Mapping[PublicKeyHash, KeyPolicy]]


class Announcer:
    """Follows *vaults* and tells *notifier*; *policies* are those in force when it is called.

    From *stopping* on only the watchdog is fed: whatever the vaults do, the signer won't be ready again.
    """

    def __init__(
        self, notifier: Notifier, vaults: Mapping[str, Vault], policies: Policies, *, stopping: trio.Event
    ) -> None:
        self._notifier = notifier
        self._vaults = vaults
        self._policies = policies
        self._stopping = stopping
        self._changed = trio.Event()
        self._listening = False
        self._began = float("inf")  # Trio's clock
        self._status = ""
        self.is_ready = False  # whether READY=1 was sent

    def listening(self) -> None:
        """The signing API accepts connections."""
        self._listening = True
        self._changed.set()

    def look_again(self) -> None:
        """The policies have changed."""
        self._changed.set()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Tell until cancelled."""
        self._began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for vault in self._vaults.values():
                nursery.start_soon(self._follow, vault)
            nursery.start_soon(self._tell_changes)
            if self._notifier.watchdog_interval:
                nursery.start_soon(self._feed_watchdog)
            task_status.started()

    async def _follow(self, vault: Vault) -> None:
        while True:
            self._changed.set()  # before the wait, with nothing between: no change is missed
            await vault.wait_change()

    async def _tell_changes(self) -> None:
        while True:
            await self._changed.wait()
            if self._stopping.is_set():
                return
            self._changed = trio.Event()
            self._tell()
            await trio.sleep(_REST)

    def _tell(self) -> None:
        usable, wanted = self._count()
        status = self._describe(usable, wanted)
        if self._listening and usable and not self.is_ready:
            self.is_ready = True
            logger.info(f"Ready: {status}")
            self._notifier.ready(status)
        elif status != self._status:
            self._notifier.status(status)
        self._status = status

    def _count(self) -> tuple[int, int]:
        """How many of the configured keys can sign, and how many there are."""
        policies = self._policies()
        return sum(self._can_sign(pkh, policy) for pkh, policy in policies.items()), len(policies)

    def _can_sign(self, pkh: PublicKeyHash, policy: KeyPolicy) -> bool:
        return any(vault.serves(pkh) for name, vault in self._vaults.items() if policy.vault in (None, name))

    def _describe(self, usable: int, wanted: int) -> str:
        parts = [f"vault {name}: {vault.health().detail}" for name, vault in self._vaults.items()]
        if not self._vaults:
            parts.append("no vault is configured")
        if usable:
            return "; ".join([f"signing with {usable} of {wanted} key(s)", *parts])
        return "waiting: " + "; ".join([f"none of {wanted} configured key(s) can sign", *parts])

    # -- the watchdog

    async def _feed_watchdog(self) -> None:
        interval, said = self._notifier.watchdog_interval, ""
        while True:
            silent = self._silent()
            if not silent:
                self._notifier.alive()
            elif silent != said:
                logger.error(f"the service manager's watchdog is not fed: {silent}")
            said = silent
            await trio.sleep(interval / 2)  # one that is late still finds the next in time

    def _silent(self) -> str:
        """The vaults without a sign of life, for a person; empty if all is well."""
        return "; ".join(
            f"vault {name} shows no sign of life" for name, vault in self._vaults.items() if not self._lives(vault)
        )

    def _lives(self, vault: Vault) -> bool:
        allowed = max(1.5 * self._notifier.watchdog_interval, LEAST_SILENCE) if vault.ready else LONGEST_ATTEMPT
        return trio.current_time() - max(vault.last_sign_of_life, self._began) < allowed
