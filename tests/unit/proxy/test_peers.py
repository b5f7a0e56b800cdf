"""Point 18: which peers may connect, how many at once, how fast."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from proxy.peers import Peers


def test_p18_any_peer_by_default() -> None:
    peers = Peers()
    assert [peers.admit(cid, 0.0) for cid in (None, 0, 16, 2**32 - 1) * 1000] == [None] * 4000


def test_p18_allowed_peers() -> None:
    peers = Peers(allowed=[16, 17])
    assert [peers.admit(cid, 0.0) for cid in (16, 17, 18, None)] == [None, None, "peer", "peer"]
    assert Peers(allowed=[]).admit(16, 0.0) == "peer"


def test_p18_connections_at_once_are_counted_for_each_peer() -> None:
    peers = Peers(max_connections=2)
    assert [peers.admit(16, 0.0) for _ in range(3)] == [None, None, "peer-connections"]
    assert peers.admit(17, 0.0) is None
    peers.release(16)
    assert [peers.admit(16, 0.0) for _ in range(2)] == [None, "peer-connections"]


def test_p18_connections_per_second() -> None:
    peers = Peers(rate=2)
    assert [peers.admit(16, 10.0) for _ in range(3)] == [None, None, "peer-rate"]
    assert peers.admit(17, 10.0) is None
    assert peers.admit(16, 10.4) == "peer-rate"
    assert peers.admit(16, 10.5) is None
    assert [peers.admit(16, 60.0) for _ in range(3)] == [None, None, "peer-rate"]  # it doesn't add up for ever


def test_p18_less_than_one_in_a_second() -> None:
    peers = Peers(rate=0.1)
    assert [peers.admit(16, at) for at in (0.0, 9.9, 10.1)] == [None, "peer-rate", None]


def test_p18_a_refusal_for_too_many_connections_costs_no_rate() -> None:
    peers = Peers(max_connections=1, rate=2)
    assert [peers.admit(16, 0.0) for _ in range(5)] == [None, *["peer-connections"] * 4]
    peers.release(16)
    assert peers.admit(16, 0.0) is None


def test_p18_memory_does_not_grow_with_the_peers_seen() -> None:
    peers = Peers(max_connections=1, rate=1)
    for number in range(10_000):
        assert peers.admit(number, float(number)) is None
        peers.release(number)
    assert len(peers._peers) <= 1025


def test_p18_peers_with_connections_are_not_forgotten() -> None:
    peers = Peers(max_connections=1)
    for number in range(3000):
        peers.admit(number, 0.0)
    assert [peers.admit(number, 1e6) for number in range(3000)] == ["peer-connections"] * 3000


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans(), st.floats(0, 2)), max_size=60))
def test_p18_never_more_at_once_than_allowed(steps: list[tuple[int, bool, float]]) -> None:
    peers, open_, now = Peers(max_connections=2, rate=3), dict.fromkeys(range(4), 0), 0.0
    for cid, opens, pause in steps:
        now += pause
        if opens and peers.admit(cid, now) is None:
            open_[cid] += 1
        elif not opens and open_[cid]:
            peers.release(cid)
            open_[cid] -= 1
        assert open_[cid] <= 2
