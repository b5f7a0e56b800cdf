"""A session with the enclave, as far as those who choose one and ask it are concerned."""

from dataclasses import dataclass, field

import trio

from proxy.address import parse
from signer.rpc.messages import Call, Result
from signer.vaults.nitro.credentials import Credentials
from signer.vaults.nitro.discovery import Place
from signer.vaults.nitro.session import SessionLostError, Slot
from signer.vaults.nitro.standing import Life

LIFE = Life(Place(parse("unix:/e:2000")), Credentials("a", "b", None, "r"))


@dataclass
class Channel:
    """Answers with *outcome*, or fails with it, if it is an error."""

    outcome: Result | Exception = None
    alive: bool = True
    stalled: bool = False
    load: int = 0
    asked: list[Call] = field(default_factory=list)
    closed_for: str = ""

    def submit(self, call: Call, settled: trio.Event) -> Slot:
        """The connection is lost over it."""
        slot = Slot(call, settled)
        slot.settle(error=SessionLostError("connection lost: reset"))
        self.alive = False
        return slot

    async def call(self, call: Call) -> Result:
        await trio.lowlevel.checkpoint()
        self.asked.append(call)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome

    def close(self, why: str) -> None:
        self.closed_for = why
