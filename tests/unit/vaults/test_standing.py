"""Whether the replies of a connection are those to its calls, and whether a key is worth waiting for."""

from typing import cast

import pytest

from signer import crypto
from signer.rpc.messages import PublicKeyOf, RemoteError, Result, RpcErrorChain
from signer.tezos.keys import Curve
from signer.vaults.nitro.session import Session, SessionLostError
from signer.vaults.nitro.standing import SessionLine, Standing, in_step
from signer.vaults.nitro.storage import StoredKey
from tests.unit.vaults.channels import LIFE, Channel

KEY, OTHER = (crypto.load_secret_key(Curve.ED25519, bytes(31) + bytes([number])).public_key for number in (1, 2))


def joined(standing: Standing, channel: Channel) -> SessionLine:
    return standing.epochs.join(standing.epochs.begin(LIFE), cast("Session", channel))


@pytest.mark.parametrize(
    ("outcome", "is_in_step", "closed_for"),
    [
        (KEY, True, ""),
        (OTHER, False, "it named another key"),
        (None, False, "it named another key"),
        (RemoteError(RpcErrorChain(("invalid handle",))), False, "it answered with an error (invalid handle)"),
        (SessionLostError("reset"), False, ""),
    ],
    ids=["its key", "another key", "nothing", "an error", "lost"],
)
async def test_a_connection_whose_replies_are_anothers_is_closed(
    outcome: Result | Exception, is_in_step: bool, closed_for: str
) -> None:
    channel = Channel(outcome)
    assert await in_step(joined(Standing(), channel), KEY.hash, 7) is is_in_step
    assert channel.asked == [PublicKeyOf(7)]
    assert channel.closed_for.endswith(closed_for)
    assert bool(channel.closed_for) == bool(closed_for)


def test_a_key_is_waited_for_until_its_blob_was_tried() -> None:
    standing, stored = Standing(), StoredKey(str(KEY.hash), b"blob")
    standing.epochs.list_blobs([stored])
    assert standing.may_come(stored.public_key_hash), "no enclave yet"
    line = joined(standing, Channel())
    taken = standing.epochs.take(line)
    assert taken == stored
    assert standing.may_come(stored.public_key_hash)
    standing.epochs.refuse(line, stored, "denied")
    assert not standing.may_come(stored.public_key_hash)
    standing.epochs.retry()
    assert standing.epochs.loaded
    assert standing.may_come(stored.public_key_hash), "its own blob is tried again"
    assert not standing.may_come(str(OTHER.hash))
