"""The link to the enclave, kept up for ever: finds it, opens sessions, imports the keys, asks.

    link
    ├── credentials          fetched, and again before they expire
    ├── places               discovery: asked when the link breaks, and until it is back
    └── epoch (one life)     one cancel scope
        └── session × n      connect, Initialize, import, serve; rebuilt while the epoch is the newest

The state that these share, and every choice between lines, is in `signer.vaults.nitro.epochs`. A request holds no
reference to an epoch: it asks the link, which repeats what a lost session left unanswered, and asks a second session
where the first one is slow, within the caller's deadline. Repeating is safe: signing is deterministic, or guarded by
the digest stored with the mark. Section 4 of the signer specification; weaknesses 1 to 9 and 34 of the reference.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import structlog
import trio

from proxy.address import Address, VsockAddress
from signer import crypto
from signer.errors import KeyNotFoundError, SignerError
from signer.observe.tasks import Task, Tasks
from signer.rpc.frames import FrameError
from signer.rpc.messages import (
    Call,
    Import,
    Imported,
    Initialize,
    PublicKeyOf,
    RemoteError,
    Result,
)
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKey, PublicKeyHash
from signer.vaults.interface import SignatureMismatchError, VaultError, VaultUnavailableError
from signer.vaults.nitro.credentials import Credentials, CredentialsProvider
from signer.vaults.nitro.discovery import Locator, Place
from signer.vaults.nitro.epochs import Epoch, Epochs, Line
from signer.vaults.nitro.judge import Judge, NoProofError, NotAdmittedError
from signer.vaults.nitro.pace import Pace
from signer.vaults.nitro.session import STALLED_AFTER, Session, SessionLostError, Slot
from signer.vaults.nitro.storage import StoredKey

logger = structlog.get_logger(__name__)

CONNECTING = Pace(shortest=0.02, longest=2.0)  # below the 3.6 s in which the Octez client retries
LOCATING = Pace(shortest=0.1, longest=5.0)  # nitro-cli is a process to start
RESOLVING = Pace(shortest=1.0, longest=60.0)  # credentials
RESOLVE_TIMEOUT = 30.0  # seconds
REFRESH_INTERVAL = 300.0  # seconds; the SDK renews what expires within 15 minutes, when it is asked
RETRY_REFUSED = Pace(shortest=5.0, longest=60.0)  # blobs that KMS would not open
IMPORTS_ON_THE_WIRE = 2  # a session: one being opened, and one on its way; a signature waits for no more than these
LOOKUP_INTERVAL = 4.0  # seconds for which credentials just found are not doubted; below the first `RETRY_REFUSED`
_EXPIRED = "ExpiredToken"  # KMS's name for it, in the enclave's error
IMPORTS_SIDE_BY_SIDE = 16  # likewise, where the enclave has proved to be ours, which opens so many blobs at once
PROBE_INTERVAL = 2.0  # seconds of silence after which a session is asked for a sign of life
JUDGE_INTERVAL = 600.0  # seconds after which the enclave behind a session proves again what it is
PROOF = 1  # reply after the last import makes a session one that works: its end is no failure of the next one
PROOF_TIME = 2.0  # seconds after the last import do the same
MAX_DOUBTS = 3  # errors, or signatures that do not verify, before a request gives up

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]
Accept = Callable[[Result], Awaitable[bool]]
"""Whether a result is what was asked for: the caller's verification of a signature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Limits in seconds, each from the configuration."""

    connect: float = 5.0
    exchange: float = 10.0
    wait: float = 2.5  # of one caller, in all


class Life(NamedTuple):
    """What makes one epoch another than the one before."""

    place: Place
    credentials: Credentials


SessionLine = Line[Session, Life]
SessionEpoch = Epoch[Session, Life]


@dataclass(slots=True)
class _Use:
    """What a line's session has been good for."""

    task: Task
    boot: bytes | None  # of the enclave behind it, proved; None where it need not prove anything
    complete_at: int | None = None  # replies that it had given when it first had every key
    complete_since: float = 0.0  # Trio's clock

    def proved(self, session: Session) -> bool:
        """Whether it was of use: an enclave that dies right after its imports, again and again, is not."""
        if self.complete_at is None:
            return False
        return session.answers >= self.complete_at + PROOF or trio.current_time() >= self.complete_since + PROOF_TIME


class _Outage:
    """Since when something has been failing, on Trio's clock."""

    def __init__(self) -> None:
        self._since: float | None = None

    def pause(self, pace: Pace) -> float:
        now = trio.current_time()
        if self._since is None:
            self._since = now
        return pace.pause(now - self._since)

    @property
    def lasts(self) -> bool:
        return self._since is not None

    def over(self) -> None:
        self._since = None


class EnclaveLink:
    """Sessions with the enclave that *locator* finds, *sessions* of them at a time.

    *on_served* hears of each key that a session can sign with now. `run` must be running.
    """

    def __init__(
        self,
        *,
        name: str,
        locator: Locator,
        credentials: CredentialsProvider,
        encryption_key_id: str,
        connect: Connect,
        sessions: int,
        timeouts: Timeouts,
        tasks: Tasks,
        on_served: Callable[[PublicKey], None],
        judge: Judge,
        seal: str | None = None,
    ) -> None:
        self.epochs: Epochs[Session, Life] = Epochs()
        self.failure = "not connected yet"
        self.changed = trio.Event()  # set, and replaced, whenever something above or in `epochs` changes
        self._name = name
        self._locator = locator
        self._provider = credentials
        self._encryption_key_id = encryption_key_id
        self._connect = connect
        self._sessions = sessions
        self._timeouts = timeouts
        self._on_served = on_served
        self._gate = judge
        self._judging_again = trio.Lock()
        self._seal = seal
        self._tasks = tasks
        self._task = tasks.add(f"vault {name}")
        self._credentials: Credentials | None = None
        self._looked_up_at = float("-inf")  # Trio's clock: when these were found
        self._scopes: dict[SessionEpoch, trio.CancelScope] = {}
        self._draining: set[SessionEpoch] = set()
        self._nursery: trio.Nursery | None = None
        self._wanted: Counter[str] = Counter()  # addresses that callers wait for
        self._attempted = trio.Event()
        self._attempted_at = float("-inf")  # Trio's clock
        self._located = trio.Event()  # set, and replaced, each time the enclave was found
        self._look = trio.Event()  # wakes the search for the enclave
        self._renew = trio.Event()  # wakes the credentials
        self._told: dict[str, str] = {}  # address of each skipped key, and what was last said of it
        self._outage = _Outage()
        self._uses: dict[SessionLine, _Use] = {}

    # -- what others see

    @property
    def ready(self) -> bool:
        """Whether every blob was tried: a key that cannot be used now has nothing to wait for."""
        return self.epochs.loaded

    @property
    def last_sign_of_life(self) -> float:
        """Trio's clock: the enclave's last reply, or the end of the last try to reach it while it is away."""
        last = max((line.channel.answered_at for line in self.epochs.lines()), default=float("-inf"))
        return last if self.epochs.linked else max(last, self._attempted_at)

    @property
    def silent_for(self) -> float:
        """Seconds for which every session has owed a reply; 0 where one of them is up to date."""
        lines = [line for line in self.epochs.lines() if line.channel.alive]
        if not lines or not all(line.channel.stalled for line in lines):
            return 0.0
        return trio.current_time() - max(line.channel.answered_at for line in lines)

    def list_blobs(self, entries: Sequence[StoredKey]) -> None:
        """The key file holds *entries* now."""
        self.epochs.list_blobs(entries)
        for line in tuple(self._uses):
            self._progress(line)
        self.notify()

    def kept_from_starting(self, why: str) -> None:
        """What comes before `run` has failed, and is tried again."""
        self._failed(why)

    def notify(self) -> None:
        """Wake everybody who waits for a change."""
        self.changed.set()
        self.changed = trio.Event()

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        """Return when *key* can be asked for, or will not be, no later than *deadline* (Trio's clock)."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_at(deadline):
            while self.epochs.route(key) is None and self._may_come(str(key)):
                await self._next_change(str(key))

    async def wait_settled(self, deadline: float) -> None:
        """Wait until every blob was tried, or the link is down, no longer than *deadline*."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_at(deadline):
            while self.epochs.linked and not any(line.complete for line in self.epochs.lines()):
                await self.changed.wait()

    def retry_refused(self) -> None:
        """Try the blobs that could not be opened once more, as somebody wants it."""
        self.epochs.retry(asked_for=True)
        self.notify()

    def renew_credentials(self) -> None:
        """Look for other credentials now."""
        self._renew.set()

    # -- the tasks

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Keep the link up until cancelled; started when the first attempt has succeeded or failed."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._keep_credentials)
            nursery.start_soon(self._keep_epoch)
            nursery.start_soon(self._retry_refused)
            await self._attempted.wait()
            task_status.started()

    async def _keep_credentials(self) -> None:
        """Fetch the credentials, and again and again: what the SDK has renewed opens a new epoch beside the old."""
        task, outage = self._tasks.add(f"vault {self._name} credentials"), _Outage()
        while True:
            self._attempting("looking for credentials")
            try:
                with trio.fail_after(RESOLVE_TIMEOUT):
                    found = await self._provider()
                    self._looked_up_at = trio.current_time()
            except (SignerError, OSError, trio.TooSlowError) as exc:
                why = str(exc) or f"(Nitro): no credentials within {RESOLVE_TIMEOUT:g} s"
                task.failing(why if self._credentials is None else f"{why}; the old ones stay in use")
                if self._credentials is None:
                    self._failed(why)
                pause = outage.pause(RESOLVING)
            else:
                task.running()
                outage.over()
                if found != self._credentials:
                    self._credentials = found
                    self._look.set()
                pause = REFRESH_INTERVAL
            with trio.move_on_after(pause):
                await self._renew.wait()
            self._renew = trio.Event()

    async def _keep_epoch(self) -> None:
        """Find the enclave, and begin an epoch for each life of it that differs from the one before."""
        task = None if self._locator.fixed else self._tasks.add(f"vault {self._name} discovery")
        lost = _Outage()
        while True:
            pause = float("inf")
            if self._credentials is not None:
                self._attempting("looking for the enclave")
                try:
                    place = await self._locator.locate()
                except SignerError as exc:
                    if task is not None:
                        task.failing(str(exc))
                    self._failed(str(exc))
                    pause = lost.pause(LOCATING)
                else:
                    if task is not None:
                        task.running()
                    lost.over()
                    self._found(Life(place, self._credentials))
            await self._until_worth_a_look(pause)

    def _found(self, life: Life) -> None:
        """The enclave is there: the newest epoch may dial it, or a new one begins."""
        newest = self.epochs.newest
        if newest is None or newest.is_over() or newest.life != life:
            epoch = self.epochs.begin(life)
            log = logger.debug if self._outage.lasts and newest is None else logger.info  # once is enough
            log(
                f"(Nitro): connecting to the enclave signer on {life.place}...",
                vault_name=self._name,
                epoch=epoch.number,
            )
            assert self._nursery is not None
            self._nursery.start_soon(self._live, epoch)
            self._sweep()
        self._located.set()
        self._located = trio.Event()
        self.notify()

    async def _until_worth_a_look(self, pause: float) -> None:
        """Return when something broke or changed, but after *pause* at the latest, or while nothing answers sooner."""
        began, newest = trio.current_time(), self.epochs.newest
        pace = CONNECTING if self._locator.fixed else LOCATING
        if self._credentials is not None and (newest is None or newest.is_over() or not newest.lines):
            pause = min(pause, self._outage.pause(pace))
        elif not self._locator.fixed:
            await trio.sleep(LOCATING.shortest)  # while something answers, no more than ten questions a second
        with trio.move_on_after(pause):
            await self._look.wait()
        self._look = trio.Event()
        if self._outage.lasts:  # what broke was of no use yet: then it breaks again at once, and so on
            await trio.sleep_until(began + self._outage.pause(pace))

    async def _retry_refused(self) -> None:
        """Blobs that could not be opened are tried again: KMS may have been away."""
        outage = _Outage()
        while True:
            await trio.sleep(outage.pause(RETRY_REFUSED))
            if self.epochs.retry(alone=self._sessions == 1):
                self.notify()
            else:
                outage.over()

    async def _live(self, epoch: SessionEpoch) -> None:
        """One epoch, until it is over or superseded."""
        with trio.CancelScope() as scope:
            self._scopes[epoch] = scope
            async with trio.open_nursery() as nursery:
                for index in range(self._sessions):
                    nursery.start_soon(self._keep_session, epoch, index)
        del self._scopes[epoch]
        self._draining.discard(epoch)
        if epoch in self.epochs.epochs:
            self.epochs.retire(epoch)
        self.notify()

    def _sweep(self) -> None:
        """Let go of the epochs that nobody needs any more."""
        for epoch in self.epochs.superseded():
            if epoch in self._scopes and epoch not in self._draining:
                self._draining.add(epoch)
                assert self._nursery is not None
                self._nursery.start_soon(self._drain, epoch)

    async def _drain(self, epoch: SessionEpoch) -> None:
        """Let the exchanges of *epoch* finish, then end it; every further call goes to a newer one."""
        with trio.move_on_after(self._timeouts.exchange):
            for line in tuple(epoch.lines):
                await line.channel.wait_idle()
        if epoch not in self.epochs.superseded():  # over by now; or what took its place is gone, and it is needed again
            self._draining.discard(epoch)
        else:
            self.epochs.retire(epoch)
            self._scopes[epoch].cancel(reason="superseded")

    # -- one session

    async def _keep_session(self, epoch: SessionEpoch, index: int) -> None:
        """Keep one session of *epoch* up for as long as the epoch lasts."""
        task, outage = self._tasks.add(f"vault {self._name} session {index + 1}", quiet=True), _Outage()
        while True:
            failure, proved = await self._session(epoch, task)
            if proved:
                outage.over()
            if epoch is self.epochs.newest:
                task.failing(failure)
            if epoch.is_over():
                return
            if epoch.lines:
                await trio.sleep(outage.pause(CONNECTING))
            else:
                await self._located.wait()  # it is dialled only after it was found: it may have become another
            while self.epochs.newest is not epoch:
                await self.changed.wait()  # it only serves until the newer ones have its keys
            if epoch.is_over():
                return

    async def _session(self, epoch: SessionEpoch, task: Task) -> tuple[str, bool]:
        """One session from dialling to its end; returns why it ended, and whether it had been of use."""
        self._attempting(f"connecting to {epoch.life.place}")
        try:
            with trio.fail_after(self._timeouts.connect):
                stream = await self._connect(epoch.life.place.address)
        except trio.TooSlowError:
            failure = f"(Nitro): dial {epoch.life.place.address}: no answer within {self._timeouts.connect:g} s"
            failure += self._advice(epoch.life.place)
        except OSError as exc:
            failure = f"(Nitro): dial {epoch.life.place.address}: {_reason(exc)}{self._advice(epoch.life.place)}"
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:  # reset within a hybrid handshake
            failure = (
                f"(Nitro): dial {epoch.life.place.address}: connection lost: {exc.__cause__ or type(exc).__name__}"
            )
        else:
            session = Session(stream, timeout=self._timeouts.exchange, secrets=epoch.life.credentials.secrets)
            return await self._serve(epoch, session, task)
        self._failed(failure)
        return failure, False

    def _advice(self, place: Place) -> str:
        """What to do where nobody listens at *place*; one that nitro-cli told is asked for again anyway."""
        if not self._locator.fixed or not isinstance(place.address, VsockAddress):
            return ""
        return "; is the enclave RUNNING with this CID? A restart gives it another, which enclave_cid: auto finds"

    async def _serve(self, epoch: SessionEpoch, session: Session, task: Task) -> tuple[str, bool]:
        line, proved = None, False
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            boot = await self._admit(session)
            if session.alive and await self._initialize(session, epoch.life.credentials):
                line = self.epochs.join(epoch, session)
                use = self._uses[line] = _Use(task, boot)
                self._part(line)
                self._progress(line)
                for _ in range(IMPORTS_ON_THE_WIRE if boot is None else IMPORTS_SIDE_BY_SIDE):
                    nursery.start_soon(self._import, line)
                nursery.start_soon(self._probe, line)
                if boot is not None:
                    nursery.start_soon(self._judge_again, session, boot)
                try:
                    await session.ended.wait()
                    self._blame(line)
                finally:
                    self.epochs.leave(line)
                    del self._uses[line]
                proved = use.proved(session)
            nursery.cancel_scope.cancel(reason=session.failure)
        if proved:
            self._outage.over()
        if line is not None:
            logger.debug("an enclave session ended", vault_name=self._name, error=session.failure)
            self._look.set()
        if not self.epochs.linked:
            self._renew.set()  # they may be what is wrong
        self._failed(session.failure)
        self._sweep()
        return session.failure, proved

    def _attempting(self, what: str) -> None:
        """*what* is what the first attempt waits for; it may hang there for long."""
        if not self._attempted.is_set():
            self.failure = f"not connected yet: {what}"
            self.notify()

    async def _admit(self, session: Session) -> bytes | None:
        """The boot id of the enclave behind *session*, if it proved one; closes what isn't admitted."""
        try:
            return await self._gate.admit(session.call)
        except NotAdmittedError as exc:
            session.close(f"(Nitro): {exc}")
        except SessionLostError:
            pass
        return None

    async def _judge_again(self, session: Session, boot: bytes) -> None:
        """What a session was opened with may not be what answers on it later.

        One session at a time: signatures wait behind the question, and find another session free of it. A module that
        fails is no other enclave: the session has its keys, is told no further credentials, and goes on.
        """
        while True:
            await trio.sleep(JUDGE_INTERVAL)
            async with self._judging_again:
                try:
                    found = await self._gate.admit(session.call)
                except NoProofError as exc:
                    logger.warning(
                        "an enclave that was admitted proves nothing now; its session goes on",
                        vault_name=self._name,
                        error=exc.why,
                    )
                    continue
                except NotAdmittedError as exc:
                    session.close(f"(Nitro): {exc}")
                    return
                except SessionLostError:
                    return
            if found is not None and found != boot:
                session.close("another enclave answers on this session than the one that it was opened with")

    def _part(self, line: SessionLine) -> None:
        """*line* was admitted just now: sessions of its epoch with another boot lead to an enclave that is gone."""
        boot = self._uses[line].boot
        for other in line.epoch.lines:
            theirs = self._uses[other].boot
            if None not in (boot, theirs) and boot != theirs:
                other.channel.close("the enclave was started again, or another one took its place")

    async def _initialize(self, session: Session, credentials: Credentials) -> bool:
        try:
            await session.call(
                Initialize(
                    access_key_id=credentials.access_key_id,
                    secret_access_key=credentials.secret_access_key,
                    session_token=credentials.session_token,
                    encryption_key_id=self._encryption_key_id,
                    region=credentials.region,
                    seal=self._seal,
                )
            )
        except RemoteError as exc:
            session.close(f"(Nitro): RPC Error: {exc}")
        except FrameError as exc:
            session.close(f"(Nitro): Initialize: {exc}")
        except SessionLostError:
            pass
        return session.alive

    def _failed(self, why: str) -> None:
        """Something ended, or didn't begin; if nothing else answers, the link is down."""
        self._attempted_at = trio.current_time()
        if not self.epochs.linked:
            self.failure = why
            self._task.failing(why)
            self._attempted.set()
        self.notify()

    # -- imports

    async def _import(self, line: SessionLine) -> None:
        """Import one blob after the other over *line*; several of these keep the wire busy."""
        while True:
            stored = self.epochs.take(line, self._wanted)
            if stored is None:
                await self.changed.wait()
                continue
            if not await self._import_one(line, stored):
                return
            self._progress(line)

    async def _import_one(self, line: SessionLine, stored: StoredKey) -> bool:
        """Returns False if the session was lost over it."""
        try:
            pkh = PublicKeyHash.from_base58(stored.public_key_hash)
            if not stored.blob:
                raise VaultError("the entry has no encrypted_private_key in Base64")
            try:
                imported = await self._imported(line, stored, pkh)
            except (RemoteError, VaultError):  # it may be a reply that belongs to another blob
                imported = await self._imported(line, stored, pkh)
            crypto.check_public_key(imported.public_key)
        except SessionLostError:
            return False  # the next session tries again
        except (RemoteError, TezosError, VaultError, crypto.InvalidKeyError, FrameError) as exc:
            self._refuse(line, stored, str(exc))
            return True
        if self.epochs.serve(line, stored, pkh, imported.handle):
            if self._told.pop(stored.public_key_hash, None) is not None:
                logger.info("a key that was skipped can be used", vault_name=self._name, pkh=stored.public_key_hash)
            self._on_served(imported.public_key)
        return True

    async def _imported(self, line: SessionLine, stored: StoredKey, pkh: PublicKeyHash) -> Imported:
        result = await line.channel.call(Import(stored.blob))
        assert isinstance(result, Imported)
        if result.public_key.hash != pkh:
            if not await self._in_step(line, result.public_key.hash, result.handle):
                raise SessionLostError(line.channel.failure)
            raise VaultError(f"the blob holds the key of {result.public_key.hash}")
        return result

    def _refuse(self, line: SessionLine, stored: StoredKey, why: str) -> None:
        if _EXPIRED in why:
            self._credentials_expired(line.epoch.life.credentials)
        self.epochs.refuse(line, stored, why)
        self._tell_skipped(stored, why)

    def _credentials_expired(self, credentials: Credentials) -> None:
        """KMS takes *credentials* no more: look for others, but once for all the blobs that they did not open."""
        is_news = trio.current_time() >= self._looked_up_at + LOOKUP_INTERVAL
        if is_news and credentials == self._credentials:
            self.renew_credentials()

    def _blame(self, line: SessionLine) -> None:
        """*line* was lost: if a blob was what the enclave did not come back from, the other keys go first now."""
        overdue = line.channel.overdue
        if isinstance(overdue, Import):
            why = f"{line.channel.failure} when it was to open the blob"
            for stored in self.epochs.suspect(line, overdue.blob, why):
                self._tell_skipped(stored, why)

    def _tell_skipped(self, stored: StoredKey, why: str) -> None:
        if self.epochs.skipped().get(stored.public_key_hash) == why != self._told.get(stored.public_key_hash):
            self._told[stored.public_key_hash] = why
            logger.error(
                "key skipped: its blob cannot be used",
                vault_name=self._name,
                pkh=stored.public_key_hash,
                error=why,
            )

    def _progress(self, line: SessionLine) -> None:
        """*line* came one step further."""
        use = self._uses.get(line)
        if use is None:  # its session ended in the very moment in which the reply came
            return
        if line.was_complete and use.complete_at is None:
            use.complete_at, use.complete_since = line.channel.answers, trio.current_time()
            use.task.running()
            self._task.running()
            if all(other is line or self._uses[other].complete_at is None for other in line.epoch.lines):
                place, keys = str(line.epoch.life.place), len(line.handles)
                logger.info("the enclave link is up", vault_name=self._name, place=place, keys=keys)
            self._attempted.set()
        self._sweep()
        self.notify()

    async def _probe(self, line: SessionLine) -> None:
        """Ask for a sign of life when nobody else asks anything: a dead enclave is found before it is needed."""
        while True:
            await trio.sleep(PROBE_INTERVAL)
            if line.channel.load or trio.current_time() < line.channel.answered_at + PROBE_INTERVAL:
                continue
            key, handle = next(iter(line.handles.items()), (None, 0))
            if key is not None:
                await self._in_step(line, key, handle)
                continue
            with suppress(RemoteError, SessionLostError):  # the session's own limit ends it, an error is an answer
                await line.channel.call(PublicKeyOf(handle))

    async def _in_step(self, line: SessionLine, key: PublicKeyHash, handle: int) -> bool:
        """Whether the replies of *line* are those to its calls; if not, it is closed.

        The call is of another kind than any that could be in doubt, so a reply that belongs to another cannot pass.
        """
        why = "did not answer"
        try:
            result = await line.channel.call(PublicKeyOf(handle))
            if isinstance(result, PublicKey) and result.hash == key:
                return True
            why = "named another key"
        except RemoteError as exc:
            why = f"answered with an error ({exc})"
        except SessionLostError:
            return False
        line.channel.close(f"the enclave is out of step: asked for the key of {key}, it {why}")
        return False

    # -- one exchange

    async def ask(self, key: PublicKeyHash, make: Callable[[int], Call], *, accept: Accept, deadline: float) -> Result:
        """Have the enclave answer about *key*, over as many sessions as it takes before *deadline* (Trio's clock).

        Cancelling the caller disturbs nobody. Raises `VaultError`, `SignatureMismatchError` (*accept* said no, again
        and again), `VaultUnavailableError`, `KeyNotFoundError`.
        """
        question = _Question(key, make, accept, deadline)
        while True:
            self._put(question)
            if not question.pending:
                await self._wait_for(key, question.failure, deadline)
                continue
            await question.wait()
            for line, slot in question.take_finished():
                answer = await self._judge(question, line, slot)
                if answer is not None:
                    return answer
            if trio.current_time() >= deadline:
                raise self._unavailable(question.failure or self._silence())

    def _put(self, question: "_Question") -> None:
        """Ask one more session, if there is one that was not asked, or if nobody is being asked."""
        found = self.epochs.route(question.key, question.pending.keys() | question.doubted)
        if found is None and not question.pending:
            found = self.epochs.route(question.key)
        if found is None:
            return
        line, handle = found
        try:
            question.pending[line] = line.channel.submit(question.make(handle), question.wake)
        except FrameError as exc:
            raise VaultError(f"(Nitro): {exc}") from exc

    async def _judge(self, question: "_Question", line: SessionLine, slot: Slot) -> Result:
        """The result of *slot* if it is the answer, None if another session has to be asked."""
        try:
            result = slot.result()
        except SessionLostError as exc:
            question.failure = str(exc)
            await trio.lowlevel.checkpoint()  # the link notices the loss in its own task
            return None
        except RemoteError as exc:
            question.failure = f"RPC Error: {exc}"
            doubt: SignerError = VaultError(f"(Nitro): {question.failure}")
        else:
            if await question.accept(result):
                return result
            doubt = SignatureMismatchError("it does not verify")
        # It may be the reply to another call. A line that is in step after all said what it wanted to say, but even
        # then two replies may have changed places: only one that says it again is believed.
        question.doubted.add(line)
        in_step, handle = False, line.handles.get(question.key)
        if handle is not None:  # else the key was taken out meanwhile
            with trio.move_on_at(question.patience()):  # others may answer sooner
                in_step = await self._in_step(line, question.key, handle)
        if in_step:
            question.doubts += 1
            if question.doubts >= MAX_DOUBTS:
                raise doubt
        return None

    async def _wait_for(self, key: PublicKeyHash, failure: str, deadline: float) -> None:
        """Wait for a session that has *key*, if there is one to come; raises what the caller is told if not."""
        address = str(key)
        if not self._may_come(address):
            skipped = self.epochs.skipped().get(address)
            if skipped is not None:
                raise self._unavailable(skipped)
            raise KeyNotFoundError("this key not found in any vault")
        with trio.move_on_at(deadline) as limit:
            await self._next_change(address)
        if limit.cancelled_caught:
            raise self._unavailable(failure if failure and self.epochs.linked else self.failure)

    def _may_come(self, address: str) -> bool:
        """Whether waiting may bring the key of *address*: not every blob was tried, or its own is being tried."""
        return not self.epochs.loaded or self.epochs.expects(address)

    async def _next_change(self, address: str) -> None:
        """Wait for a change, and let the key of *address* be imported before the others meanwhile."""
        self._wanted[address] += 1
        try:
            await self.changed.wait()
        finally:
            self._wanted[address] -= 1
            if not self._wanted[address]:
                del self._wanted[address]

    async def call_once(self, call: Call, deadline: float) -> tuple[SessionLine, Result]:
        """Make *call* and tell over which line; it is not repeated, since the first may have been carried out."""
        with trio.move_on_at(deadline):
            while not self.epochs.linked:
                await self.changed.wait()
        lines = [line for line in self.epochs.lines() if line.channel.alive]
        if not lines:
            raise self._unavailable(self.failure)
        line = min(lines, key=lambda one: (one.channel.stalled, -one.epoch.number, one.channel.load))
        try:
            return line, await line.channel.call(call)
        except RemoteError as exc:
            why = f"RPC Error: {exc}"
            if exc.unknown_call:  # the decoder's text is of no use to anybody
                why = f"the enclave's program knows no {type(call).__name__}: it is tee-signer, or an older image"
            raise VaultError(f"(Nitro): {why}") from exc
        except SessionLostError as exc:
            raise self._unavailable(str(exc)) from exc

    def adopt(self, line: SessionLine, key: PublicKey, handle: int) -> None:
        """A key that was made over *line* is stored: it serves there at once, and is imported over the others."""
        self.epochs.adopt(line, key.hash, handle)
        self._on_served(key)
        self.notify()

    def _silence(self) -> str:
        return f"the enclave did not answer within {self._timeouts.wait:g} s"

    def _unavailable(self, reason: str) -> VaultUnavailableError:
        return VaultUnavailableError(
            f"(Nitro): the enclave cannot be asked now, try again: {reason.removeprefix('(Nitro): ')}"
        )


class _Question:
    """One call that is asked over one session or several."""

    __slots__ = ("accept", "deadline", "doubted", "doubts", "failure", "key", "make", "pending", "wake")

    def __init__(self, key: PublicKeyHash, make: Callable[[int], Call], accept: Accept, deadline: float) -> None:
        self.key = key
        self.make = make
        self.accept = accept
        self.deadline = deadline  # Trio's clock
        self.pending: dict[SessionLine, Slot] = {}
        self.doubted: set[SessionLine] = set()
        self.doubts = 0  # answers that were no good, over lines in step
        self.failure = ""  # of the last session that was lost over it
        self.wake = trio.Event()  # set when one of the pending is settled

    def patience(self) -> float:
        """Until when (Trio's clock) one session is waited for, before another may be asked as well."""
        return min(self.deadline, trio.current_time() + STALLED_AFTER)

    async def wait(self) -> None:
        """Return when a reply is there, or when it is time to ask another session."""
        with trio.move_on_at(self.patience()):
            await self.wake.wait()

    def take_finished(self) -> list[tuple[SessionLine, Slot]]:
        finished = [(line, slot) for line, slot in self.pending.items() if slot.done]
        if finished:
            self.wake = trio.Event()
            for line, _ in finished:
                del self.pending[line]
            for slot in self.pending.values():
                slot.settled = self.wake
        return finished


def _reason(exc: OSError) -> str:
    """What the system said; Trio puts the errors of a host's several addresses into a group behind its own."""
    cause: BaseException | None = exc.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    told = cause if isinstance(cause, OSError) else exc
    return told.strerror or str(told)
