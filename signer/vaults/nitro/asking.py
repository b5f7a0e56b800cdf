"""Asks the enclave about a key: over as many sessions as it takes, within the caller's deadline.

Repeating is safe: signing is deterministic, or guarded by the digest stored with the mark. Section 4 of the signer
specification; weaknesses 1, 2 and 7 of the reference.
"""

from collections.abc import Awaitable, Callable

import trio

from signer.errors import KeyNotFoundError, SignerError
from signer.rpc.frames import FrameError
from signer.rpc.messages import Call, RemoteError, Result
from signer.tezos.keys import PublicKeyHash
from signer.vaults.interface import SignatureMismatchError, VaultError
from signer.vaults.nitro.session import STALLED_AFTER, SessionLostError, Slot
from signer.vaults.nitro.standing import SessionLine, Standing, in_step, unavailable

MAX_DOUBTS = 3  # errors, or signatures that do not verify, before a request gives up

Accept = Callable[[Result], Awaitable[bool]]
"""Whether a result is what was asked for: the caller's verification of a signature."""


class Asking:
    """Calls for everybody who wants something of the enclave; *wait* is how long (s) one caller waits, in all."""

    def __init__(self, standing: Standing, *, wait: float) -> None:
        self._standing = standing
        self._wait = wait

    async def wait_for(self, key: PublicKeyHash, deadline: float) -> None:
        """Return when *key* can be asked for, or will not be, no later than *deadline* (Trio's clock)."""
        await trio.lowlevel.checkpoint()
        with trio.move_on_at(deadline):
            while self._standing.epochs.route(key) is None and self._standing.may_come(str(key)):
                await self._standing.next_change(str(key))

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
                answer = await _judge(question, line, slot)
                if answer is not None:
                    return answer
            if trio.current_time() >= deadline:
                raise unavailable(question.failure or f"the enclave did not answer within {self._wait:g} s")

    async def call_once(self, call: Call, deadline: float) -> tuple[SessionLine, Result]:
        """Make *call* and tell over which line; it is not repeated, since the first may have been carried out."""
        epochs = self._standing.epochs
        with trio.move_on_at(deadline):
            while not epochs.linked:
                await self._standing.changed.wait()
        lines = [line for line in epochs.lines() if line.channel.alive]
        if not lines:
            raise unavailable(self._standing.failure)
        line = min(lines, key=lambda one: (one.channel.stalled, -one.epoch.number, one.channel.load))
        try:
            return line, await line.channel.call(call)
        except RemoteError as exc:
            if exc.unknown_call:
                name = type(call).__name__
                raise VaultError(
                    f"(Nitro): the enclave does not know {name}: it runs tee-signer, or an older image than this signer"
                ) from exc
            raise VaultError(f"(Nitro): RPC Error: {exc}") from exc
        except SessionLostError as exc:
            raise unavailable(str(exc)) from exc

    def _put(self, question: "_Question") -> None:
        """Ask one more session, if there is one that was not asked, or if nobody is being asked."""
        epochs = self._standing.epochs
        found = epochs.route(question.key, question.pending.keys() | question.doubted)
        if found is None and not question.pending:
            found = epochs.route(question.key)
        if found is None:
            return
        line, handle = found
        try:
            question.pending[line] = line.channel.submit(question.make(handle), question.wake)
        except FrameError as exc:
            raise VaultError(f"(Nitro): {exc}") from exc

    async def _wait_for(self, key: PublicKeyHash, failure: str, deadline: float) -> None:
        """Wait for a session that has *key*, if there is one to come; raises what the caller is told if not."""
        standing, address = self._standing, str(key)
        if not standing.may_come(address):
            skipped = standing.epochs.skipped().get(address)
            if skipped is not None:
                raise unavailable(skipped)
            raise KeyNotFoundError("this key not found in any vault")
        with trio.move_on_at(deadline) as limit:
            await standing.next_change(address)
        if limit.cancelled_caught:
            raise unavailable(failure if failure and standing.epochs.linked else standing.failure)


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


async def _judge(question: _Question, line: SessionLine, slot: Slot) -> Result:
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
    is_in_step, handle = False, line.handles.get(question.key)
    if handle is not None:  # else the key was taken out meanwhile
        with trio.move_on_at(question.patience()):  # others may answer sooner
            is_in_step = await in_step(line, question.key, handle)
    if is_in_step:
        question.doubts += 1
        if question.doubts >= MAX_DOUBTS:
            raise doubt
    return None
