"""Which connection is asked what is not repeated, and what the caller is told where there is none."""

from typing import cast

import pytest
import trio
from trio.testing import MockClock

from signer import crypto
from signer.rpc.messages import Generate, PublicKeyOf, RemoteError, Result, RpcErrorChain
from signer.tezos.keys import Curve
from signer.vaults.interface import VaultError, VaultUnavailableError
from signer.vaults.nitro.asking import Asking
from signer.vaults.nitro.session import Session, SessionLostError
from signer.vaults.nitro.standing import SessionLine, Standing
from signer.vaults.nitro.storage import StoredKey
from tests.unit.vaults.channels import LIFE, Channel

CALL = Generate(Curve.ED25519)


def standing_with(*epochs: list[Channel]) -> Standing:
    """Lives that follow each other, each with its connections."""
    standing = Standing()
    for channels in epochs:
        epoch = standing.epochs.begin(LIFE)
        for channel in channels:
            standing.epochs.join(epoch, cast("Session", channel))
    return standing


async def once(standing: Standing, *, within: float = 1.0) -> tuple[SessionLine, Result]:
    return await Asking(standing, wait=within).call_once(CALL, trio.current_time() + within)


@pytest.mark.parametrize(
    ("others", "best"),
    [
        ([[Channel(alive=False)]], Channel(load=9)),
        ([[Channel(stalled=True, load=1)]], Channel(load=9)),
        ([[Channel()]], Channel(load=9)),  # of an older life
        ([[], [Channel(load=3)]], Channel(load=2)),
    ],
    ids=["dead", "overdue", "older", "busier"],
)
async def test_what_is_not_repeated_goes_where_it_is_answered_soonest(
    others: list[list[Channel]], best: Channel
) -> None:
    standing = standing_with(*others[:-1], others[-1], [])
    epoch = standing.epochs.epochs[1 if len(others) == 2 else -1]
    line = standing.epochs.join(epoch, cast("Session", best))
    assert (await once(standing))[0] is line
    assert best.asked == [CALL]


async def test_an_older_life_is_asked_where_the_newer_one_is_overdue() -> None:
    old, new = Channel(load=4), Channel(stalled=True)
    await once(standing_with([old], [new]))
    assert (old.asked, new.asked) == ([CALL], [])


async def test_where_nothing_answers_it_is_said_why(autojump_clock: MockClock) -> None:
    dead = Channel(alive=False)
    standing = standing_with([dead])
    standing.failure = "(Nitro): dial: refused"
    with pytest.raises(VaultUnavailableError, match=r"^\(Nitro\): the enclave cannot be asked now.*: dial: refused$"):
        await once(standing)
    assert trio.current_time() == pytest.approx(1, abs=0.01)
    assert not dead.asked


async def test_a_connection_that_comes_in_time_is_asked(autojump_clock: MockClock) -> None:
    standing, channel = standing_with(), Channel()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(once, standing)
        await trio.sleep(0.5)
        standing.notify()  # about something else
        await trio.sleep(0.2)
        standing.epochs.join(standing.epochs.begin(LIFE), cast("Session", channel))
        standing.notify()
    assert channel.asked == [CALL]


@pytest.mark.parametrize(
    ("fault", "error", "text"),
    [
        (SessionLostError("connection lost"), VaultUnavailableError, "try again: connection lost"),
        (RemoteError(RpcErrorChain(("encryption error", "denied"))), VaultError, "RPC Error: encryption error: denied"),
    ],
)
async def test_what_may_have_been_done_is_not_repeated(fault: Exception, error: type[VaultError], text: str) -> None:
    first, second = Channel(outcome=fault), Channel(load=1)
    with pytest.raises(error, match=text):
        await once(standing_with([first, second]))
    assert (first.asked, second.asked) == ([CALL], [])


@pytest.mark.parametrize(
    ("linked", "text"),
    [
        (True, "connection lost: reset"),  # what the link said last is over, and would mislead
        (False, "dial: refused"),
    ],
)
async def test_a_caller_in_vain_is_told_what_stands_in_the_way(
    autojump_clock: MockClock, linked: bool, text: str
) -> None:
    """The session with the key was lost; the other one, if it is there, has yet to import the key."""
    key = crypto.load_secret_key(Curve.ED25519, bytes(32)).public_key.hash
    standing = Standing()
    standing.failure = "dial: refused"
    standing.epochs.list_blobs([StoredKey(str(key), b"blob")])
    epoch = standing.epochs.begin(LIFE)
    standing.epochs.join(epoch, cast("Session", Channel())).handles[key] = 0
    standing.epochs.join(epoch, cast("Session", Channel(alive=linked)))

    async def accept(_result: Result) -> bool:
        raise AssertionError

    asking = Asking(standing, wait=2)
    with pytest.raises(VaultUnavailableError, match=f"try again: {text}$"):
        await asking.ask(key, PublicKeyOf, accept=accept, deadline=trio.current_time() + 2)
    assert trio.current_time() == pytest.approx(2, abs=0.01)
