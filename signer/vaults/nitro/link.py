"""The link to the enclave, kept up for ever: finds it, opens sessions, and rebuilds them.

    link
    ├── credentials          `renewal`: fetched, and again before they expire
    ├── places               `discovery`: asked when the link breaks, and until it is back
    └── epoch (one life)     one cancel scope
        └── session × n      connect, `judge`, Initialize, `importing`, serve; rebuilt while the epoch is the newest

What these share is in `standing`, and every choice between lines in `epochs`. A request holds no reference to an epoch:
it asks through `asking`, which repeats what a lost session left unanswered, and asks a second session where the first
one is slow. Section 4 of the signer specification; weaknesses 1 to 9 and 34 of the reference.
"""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import structlog
import trio

from proxy.address import Address, VsockAddress
from signer.errors import SignerError
from signer.observe.tasks import Task, Tasks
from signer.rpc.frames import FrameError
from signer.rpc.messages import Initialize, PublicKeyOf, RemoteError
from signer.tezos.keys import PublicKey
from signer.vaults.nitro.asking import Asking
from signer.vaults.nitro.credentials import Credentials, CredentialsProvider
from signer.vaults.nitro.discovery import Locator, Place
from signer.vaults.nitro.importing import Importing
from signer.vaults.nitro.judge import Judge, NoProofError, NotAdmittedError
from signer.vaults.nitro.outage import Outage
from signer.vaults.nitro.pace import Pace
from signer.vaults.nitro.renewal import Renewal
from signer.vaults.nitro.session import Session, SessionLostError
from signer.vaults.nitro.standing import Life, SessionEpoch, SessionLine, Standing, in_step
from signer.vaults.nitro.storage import StoredKey

logger = structlog.get_logger(__name__)

CONNECTING = Pace(shortest=0.02, longest=2.0)  # below the 3.6 s in which the Octez client retries
LOCATING = Pace(shortest=0.1, longest=5.0)  # nitro-cli is a process to start
RETRY_REFUSED = Pace(shortest=5.0, longest=60.0)  # blobs that KMS would not open
IMPORTS_ON_THE_WIRE = 2  # a session: one being opened, and one on its way; a signature waits for no more than these
IMPORTS_SIDE_BY_SIDE = 16  # likewise, where the enclave has proved to be ours, which opens so many blobs at once
PROBE_INTERVAL = 2.0  # seconds of silence after which a session is asked for a sign of life
JUDGE_INTERVAL = 600.0  # seconds after which the enclave behind a session proves again what it is
PROOF = 1  # reply after the last import makes a session one that works: its end is no failure of the next one
PROOF_TIME = 2.0  # seconds after the last import do the same

Connect = Callable[[Address], Awaitable[trio.abc.Stream]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Limits in seconds, each from the configuration."""

    connect: float = 5.0
    exchange: float = 10.0
    wait: float = 2.5  # of one caller, in all


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
        self.standing = Standing()
        self.epochs = self.standing.epochs
        self.asking = Asking(self.standing, wait=timeouts.wait)
        self._name = name
        self._locator = locator
        self._credentials = Renewal(credentials)
        self._importing = Importing(self.standing, name, on_served=on_served, on_expired=self._credentials.expired)
        self._encryption_key_id = encryption_key_id
        self._connect = connect
        self._sessions = sessions
        self._timeouts = timeouts
        self._on_served = on_served
        self._gate = judge
        self._judging_again = trio.Lock()
        self._refused = ""  # why a session was refused while others served, as it was last said
        self._seal = seal
        self._tasks = tasks
        self._task = tasks.add(f"vault {name}")
        self._scopes: dict[SessionEpoch, trio.CancelScope] = {}
        self._draining: set[SessionEpoch] = set()
        self._nursery: trio.Nursery | None = None
        self._attempted = trio.Event()
        self._attempted_at = float("-inf")  # Trio's clock
        self._located = trio.Event()  # set, and replaced, each time the enclave was found
        self._look = trio.Event()  # wakes the search for the enclave
        self._outage = Outage()
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
        self.standing.notify()

    def kept_from_starting(self, why: str) -> None:
        """What comes before `run` has failed, and is tried again."""
        self._failed(why)

    async def wait_settled(self, deadline: float) -> None:
        """Wait until every blob was tried, or the link is down, no longer than *deadline*."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_at(deadline):
            while self.epochs.linked and not any(line.complete for line in self.epochs.lines()):
                await self.standing.changed.wait()

    def retry_refused(self) -> None:
        """Try the blobs that could not be opened once more, as somebody wants it."""
        self.epochs.retry(asked_for=True)
        self.standing.notify()

    def renew_credentials(self) -> None:
        """Look for other credentials now."""
        self._credentials.look_now()

    def adopt(self, line: SessionLine, key: PublicKey, handle: int) -> None:
        """A key that was made over *line* is stored: it serves there at once, and is imported over the others."""
        self.epochs.adopt(line, key.hash, handle)
        self._on_served(key)
        self.standing.notify()

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
        """What the SDK has renewed opens a new epoch beside the old."""
        await self._credentials.run(
            self._tasks.add(f"vault {self._name} credentials"),
            on_attempt=lambda: self._attempting("looking for credentials"),
            on_new=self._look_for_the_enclave,
            on_none=self._failed,
        )

    async def _keep_epoch(self) -> None:
        """Find the enclave, and begin an epoch for each life of it that differs from the one before."""
        task = None if self._locator.fixed else self._tasks.add(f"vault {self._name} discovery")
        lost = Outage()
        while True:
            pause = float("inf")
            if self._credentials.current is not None:
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
                    self._found(Life(place, self._credentials.current))
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
        self.standing.notify()

    def _look_for_the_enclave(self) -> None:
        self._look.set()

    async def _until_worth_a_look(self, pause: float) -> None:
        """Return when something broke or changed, but after *pause* at the latest, or while nothing answers sooner."""
        began, newest = trio.current_time(), self.epochs.newest
        pace = CONNECTING if self._locator.fixed else LOCATING
        if self._credentials.current is not None and (newest is None or newest.is_over() or not newest.lines):
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
        outage = Outage()
        while True:
            await trio.sleep(outage.pause(RETRY_REFUSED))
            if self.epochs.retry(alone=self._sessions == 1):
                self.standing.notify()
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
        self.standing.notify()

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
        task, outage = self._tasks.add(f"vault {self._name} session {index + 1}", quiet=True), Outage()
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
                await self.standing.changed.wait()  # it only serves until the newer ones have its keys
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
                    nursery.start_soon(self._importing.run, line, self._progress)
                nursery.start_soon(self._probe, line)
                if boot is not None:
                    nursery.start_soon(self._judge_again, session, boot)
                try:
                    await session.ended.wait()
                    self._importing.blame(line)
                finally:
                    self.epochs.leave(line)
                    del self._uses[line]
                proved = use.proved(session)
            nursery.cancel_scope.cancel(reason=session.failure)
        if proved:
            self._outage.over()
        if line is not None:
            logger.debug("an enclave session ended", vault_name=self._name, error=session.failure)
            self._look_for_the_enclave()
        if not self.epochs.linked:
            self._credentials.look_now()  # they may be what is wrong
        self._failed(session.failure)
        self._sweep()
        return session.failure, proved

    def _attempting(self, what: str) -> None:
        """*what* is what the first attempt waits for; it may hang there for long."""
        if not self._attempted.is_set():
            self.standing.failure = f"not connected yet: {what}"
            self.standing.notify()

    async def _admit(self, session: Session) -> bytes | None:
        """The boot id of the enclave behind *session*, if it proved one; closes what isn't admitted."""
        try:
            return await self._gate.admit(session.call)
        except NotAdmittedError as exc:
            self._tell_refused(exc)
            session.close(f"(Nitro): {exc}")
        except SessionLostError:
            pass
        return None

    def _tell_refused(self, refusal: NotAdmittedError) -> None:
        """Once for each reason in a row; where nothing else answers, that is what the link says of itself."""
        if self.epochs.linked and refusal.why != self._refused:
            logger.error("one session is refused, others serve", vault_name=self._name, error=str(refusal))
            self._refused = refusal.why

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
                    self._disown(session, f"the enclave is not admitted any more: {exc.why}")
                    return
                except SessionLostError:
                    return
            if found is not None and found != boot:
                self._disown(session, "another enclave answers than the one that the session was opened with")

    def _disown(self, session: Session, why: str) -> None:
        """End a session that was told credentials; said also where another one serves on, for it is no mere loss."""
        why = f"(Nitro): on a session that was told credentials, {why}"
        logger.error("an enclave session is not to be trusted any more", vault_name=self._name, error=why)
        session.close(why)

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
            self.standing.failure = why
            self._task.failing(why)
            self._attempted.set()
        self.standing.notify()

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
        self.standing.notify()

    async def _probe(self, line: SessionLine) -> None:
        """Ask for a sign of life when nobody else asks anything: a dead enclave is found before it is needed."""
        while True:
            await trio.sleep(PROBE_INTERVAL)
            if line.channel.load or trio.current_time() < line.channel.answered_at + PROBE_INTERVAL:
                continue
            key, handle = next(iter(line.handles.items()), (None, 0))
            if key is not None:
                await in_step(line, key, handle)
                continue
            with suppress(RemoteError, SessionLostError):  # the session's own limit ends it, an error is an answer
                await line.channel.call(PublicKeyOf(handle))


def _reason(exc: OSError) -> str:
    """What the system said; Trio puts the errors of a host's several addresses into a group behind its own."""
    cause: BaseException | None = exc.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[-1]
    told = cause if isinstance(cause, OSError) else exc
    return told.strerror or str(told)
