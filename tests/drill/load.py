"""Bakers who ask side by side: next levels, exact repeats, conflicts, and clients that vanish before the answer."""

import random
from dataclasses import dataclass, field

import trio

from tests.drill import client
from tests.drill.client import Answer, HttpError, Signer
from tests.drill.keys import Key
from tests.drill.ledger import Ledger
from tests.drill.messages import Kind, Slot, message

ANSWER_WITHIN = 30.0  # seconds; a request that is not answered by then hangs
_AWAY = 0.02  # seconds before a baker asks again where nobody listens
_REPEAT, _CONFLICT, _VANISH = 0.1, 0.15, 0.05  # shares of requests


@dataclass
class Counts:
    """What the bakers did; an asked-for signature is one request, however often it was tried."""

    asked: int = 0  # requests that wanted a signature and could have one
    obtained: int = 0  # of these, answered with a signature


@dataclass
class Load:
    """Bakers of *signer*, each with a chain of its own from *chains* on, on which its levels rise.

    *vanishing* says whether clients go away before the answer; *pause* is the time between two requests of a baker.
    """

    signer: Signer
    keys: list[Key]
    ledger: Ledger
    seed: int
    bakers: int = 8
    chains: int = 0x0BA4E000
    vanishing: bool = True
    pause: float = 0.0  # seconds
    counts: Counts = field(default_factory=Counts)
    lost_answers: bool = False  # whether the signer itself may die: then connections may end without an answer
    _stopping: bool = False
    _vanished: int = 0
    _signed: trio.Event = field(default_factory=trio.Event)

    async def run(self) -> None:
        """Ask until `stop`; every request that has begun is finished."""
        async with trio.open_nursery() as nursery:
            for number in range(self.bakers):
                nursery.start_soon(self._baker, number)

    def stop(self) -> None:
        self._stopping = True

    async def next_signature(self) -> float:
        """Trio's clock when the next new signature has come."""
        await self._signed.wait()
        return trio.current_time()

    async def _baker(self, number: int) -> None:
        chance = random.Random(f"{self.seed}/baker {number}")
        chain = self.chains + number
        level = 0
        while not self._stopping:
            level += 1
            key = self.keys[(number + level) % len(self.keys)]
            await self._one(
                Slot(chain, key.address, chance.choice(list(Kind)), level, chance.randrange(2)), key, chance
            )
            if self.pause:
                await trio.sleep(self.pause)

    async def _one(self, slot: Slot, key: Key, chance: random.Random) -> None:
        """One slot: somebody may vanish, then the message is asked for, perhaps again, perhaps beside a conflict."""
        payload = chance.randrange(2**32)
        text = message(slot, key.public_key.curve, payload)
        conflict = message(slot, key.public_key.curve, payload + 1)
        if self.vanishing and chance.random() < _VANISH:
            await self._vanish(chance.choice([text, conflict]), key, chance)
            await self._ask(slot, key, text)  # refused if the one who vanished got a mark for the other
        elif chance.random() < _CONFLICT:
            await self._side_by_side(slot, key, text, conflict)
        else:
            self.counts.asked += 1
            answer = await self._ask(slot, key, text)
            if answer is not None and answer.status == 200:
                self.counts.obtained += 1
                self._signed.set()
                self._signed = trio.Event()
        if chance.random() < _REPEAT:
            await self._ask(slot, key, text)
        if chance.random() < _CONFLICT:
            await self._ask(slot, key, conflict)

    async def _side_by_side(self, slot: Slot, key: Key, *texts: bytes) -> None:
        async with trio.open_nursery() as nursery:
            for text in texts:
                nursery.start_soon(self._ask, slot, key, text)

    async def _ask(self, slot: Slot, key: Key, text: bytes) -> Answer | None:
        """Ask by the Octez client's rule, and enter the answer into the ledger; None where there was none."""
        try:
            with trio.fail_after(ANSWER_WITHIN):
                answer, refused = await client.octez(lambda: self.signer.post(key.address, text))
        except trio.TooSlowError:
            self.ledger.failed(f"no answer within {ANSWER_WITHIN:g} s for {slot}")
            return None
        except (OSError, HttpError) as exc:
            if not self.lost_answers:
                self.ledger.failed(f"no answer for {slot}: {exc!r}, {exc.__cause__!r}")
            await trio.sleep(_AWAY)
            return None
        self.ledger.statuses[client.BAD_GATEWAY] += refused - (answer.status == client.BAD_GATEWAY)
        self.ledger.status(answer.status, slot, answer.body)
        if answer.status == 200:
            self.ledger.signature(slot, key.public_key, text, answer.signature)
        return answer

    async def vanish_once(self, chance: random.Random) -> None:
        """A client of its own, on a chain of its own, that goes away."""
        key = chance.choice(self.keys)
        self._vanished += 1
        slot = Slot(0x60E00000, key.address, chance.choice(list(Kind)), self._vanished, 0)
        await self._vanish(message(slot, key.public_key.curve, 0), key, chance)

    async def _vanish(self, text: bytes, key: Key, chance: random.Random) -> None:
        try:
            await self.signer.vanish(key.address, text, chance)
        except (OSError, HttpError) as exc:
            if not self.lost_answers:
                self.ledger.failed(f"a client could not even ask: {exc!r}, {exc.__cause__!r}")
            await trio.sleep(_AWAY)
