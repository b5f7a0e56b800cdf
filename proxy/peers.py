"""Which peers may connect, how many at once and how fast: P2.18 of the proxy specification. No I/O, no clock.

A peer is a CID. Transports that hide it (hybrid vsock, TCP) have one peer, None, so that the limits there hold for the
listener as a whole.
"""

from collections.abc import Collection
from dataclasses import dataclass

_MAX_FORGOTTEN = 1024  # peers without a connection whose rate is remembered


@dataclass(slots=True)
class _Peer:
    connections: int = 0
    tokens: float = 0.0  # connections that may be opened now
    at: float = 0.0  # when that was so


class Peers:
    """The peers of one listener.

    *allowed* lists the CIDs that may connect, None means any; *max_connections* counts those open at once, *rate* those
    opened in a second; 0 means no limit.
    """

    def __init__(self, *, allowed: Collection[int] | None = None, max_connections: int = 0, rate: float = 0.0) -> None:
        self._allowed = None if allowed is None else frozenset(allowed)
        self._max_connections = max_connections
        self._rate = rate
        self._burst = max(1.0, rate)  # a second's worth at once
        self._peers: dict[int | None, _Peer] = {}

    def admit(self, cid: int | None, now: float) -> str | None:
        """Count a new connection of *cid*, or return the reason why it is refused. *now* is in seconds."""
        if self._allowed is not None and cid not in self._allowed:
            return "peer"
        if not self._max_connections and not self._rate:
            return None
        peer = self._peers.get(cid)
        if peer is None:
            self._forget(now)
            peer = self._peers[cid] = _Peer(tokens=self._burst, at=now)
        if self._max_connections and peer.connections >= self._max_connections:
            return "peer-connections"
        if self._rate:
            peer.tokens, peer.at = self._refilled(peer, now), now
            if peer.tokens < 1:
                return "peer-rate"
            peer.tokens -= 1
        peer.connections += 1
        return None

    def release(self, cid: int | None) -> None:
        """An admitted connection of *cid* has ended."""
        peer = self._peers.get(cid)
        if peer is not None:
            peer.connections -= 1

    def _refilled(self, peer: _Peer, now: float) -> float:
        return min(self._burst, peer.tokens + (now - peer.at) * self._rate)

    def _forget(self, now: float) -> None:
        """Drop peers about whom nothing needs to be known: memory does not grow with the CIDs seen."""
        if len(self._peers) >= _MAX_FORGOTTEN:
            self._peers = {
                cid: peer
                for cid, peer in self._peers.items()
                if peer.connections or self._refilled(peer, now) < self._burst
            }
