"""The state of the link to the enclave, without I/O: which connection may be asked for which key.

An *epoch* is one life of the enclave as this host sees it: one place, one set of credentials. A *line* is one
initialized connection of an epoch; the enclave keeps all state per connection, so each line has handles of its own
for the keys that were imported over it. At most the newest epoch is built up; an older one that still answers serves
until the newer ones have every key it has (make before break), or until it is dead. Section 4 of the signer
specification; weaknesses 2, 8, 9 and 34 of the reference.

`link` does the connecting, `importing` the imports, `asking` the asking.
"""

from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from signer.tezos.keys import PublicKeyHash
from signer.vaults.nitro.storage import StoredKey


class Channel(Protocol):
    """What counts of a connection when one is chosen."""

    @property
    def alive(self) -> bool: ...

    @property
    def load(self) -> int:
        """Calls that wait for their replies."""

    @property
    def stalled(self) -> bool:
        """Whether a reply is overdue."""


C = TypeVar("C", bound=Channel)
L = TypeVar("L")


class Line(Generic[C, L]):
    """One initialized connection, the keys that it can sign with, and the blobs that it has yet to import."""

    def __init__(
        self, epoch: "Epoch[C, L]", channel: C, blobs: Sequence[StoredKey], suspects: Mapping[StoredKey, str]
    ) -> None:
        self.epoch = epoch
        self.channel = channel
        self.handles: dict[PublicKeyHash, int] = {}
        self._addresses: set[str] = set()  # of handles
        self._listed = set(blobs)
        self._waiting = deque(stored for stored in blobs if stored not in suspects)
        self._trying: set[StoredKey] = set()
        self.refused = {stored: why for stored, why in suspects.items() if stored in self._listed}
        self.was_complete = self.complete  # whether every blob was tried once

    @property
    def complete(self) -> bool:
        """Whether nothing is left to import."""
        return not self._waiting and not self._trying

    def has(self, stored: StoredKey) -> bool:
        """Whether an entry of this address serves, be it this one."""
        return stored.public_key_hash in self._addresses

    def _offer(self, blobs: Sequence[StoredKey]) -> None:
        """What the key file holds now: what is new waits for its import, what is gone doesn't any more."""
        self._listed = set(blobs)
        self.refused = {stored: why for stored, why in self.refused.items() if stored in self._listed}
        self._waiting = deque(
            stored
            for stored in blobs
            if stored not in self.refused and stored not in self._trying and not self.has(stored)
        )
        self._note_complete()

    def _take(self, wanted: Collection[str]) -> StoredKey | None:
        """The next blob to import; those of *wanted* addresses, for which callers wait, come first."""
        for stored in self._waiting if wanted else ():
            if stored.public_key_hash in wanted:
                self._waiting.remove(stored)
                break
        else:
            if not self._waiting:
                return None
            stored = self._waiting.popleft()
        self._trying.add(stored)
        return stored

    def _expects(self, address: str) -> bool:
        return any(stored.public_key_hash == address for stored in (*self._trying, *self._waiting))

    def _serve(self, key: PublicKeyHash, handle: int) -> None:
        address = str(key)
        self.handles[key] = handle
        self._addresses.add(address)
        self._waiting = deque(stored for stored in self._waiting if stored.public_key_hash != address)
        self.refused = {stored: why for stored, why in self.refused.items() if stored.public_key_hash != address}

    def _suspect(self, stored: StoredKey, why: str) -> None:
        if stored in self._waiting:
            self._waiting.remove(stored)
            self.refused[stored] = why
            self._note_complete()

    def _done(self, stored: StoredKey) -> None:
        self._trying.discard(stored)
        self._note_complete()

    def _note_complete(self) -> None:
        self.was_complete = self.was_complete or self.complete


class Epoch(Generic[C, L]):
    """One life: *life* is what tells it from others (where the enclave is, with which credentials)."""

    def __init__(self, number: int, life: L) -> None:
        self.number = number
        self.life = life
        self.lines: list[Line[C, L]] = []
        self._over = False

    def is_over(self) -> bool:
        """Whether it had lost all lines that it had: its sessions end then, and one that is late changes nothing."""
        return self._over

    @property
    def keys(self) -> set[PublicKeyHash]:
        """What it can sign with now."""
        return {key for line in self.lines if line.channel.alive for key in line.handles}


class Epochs(Generic[C, L]):
    """All epochs that matter now, the newest last."""

    def __init__(self) -> None:
        self._epochs: list[Epoch[C, L]] = []
        self._numbers = 0
        self._blobs: Sequence[StoredKey] = ()
        self._suspects: dict[StoredKey, str] = {}  # blobs over which a line was lost, and what is known of that
        self._turn: Line[C, L] | None = None

    # -- what happens

    def list_blobs(self, blobs: Sequence[StoredKey]) -> None:
        """The key file holds *blobs*."""
        self._blobs = tuple(blobs)
        listed = set(self._blobs)
        self._suspects = {stored: why for stored, why in self._suspects.items() if stored in listed}
        for line in self.lines():
            line._offer(self._blobs)

    def forget(self, key: PublicKeyHash) -> None:
        """No line serves *key* any more."""
        for line in self.lines():
            line.handles.pop(key, None)
            line._addresses.discard(str(key))

    def begin(self, life: L) -> Epoch[C, L]:
        """A new life was found; it is the one that is built up from now on."""
        self._numbers += 1
        epoch: Epoch[C, L] = Epoch(self._numbers, life)
        self._epochs.append(epoch)
        return epoch

    def join(self, epoch: Epoch[C, L], channel: C) -> Line[C, L]:
        """A connection of *epoch* is initialized.

        Each line starts its imports at another place of the key file, so that several of them have every key
        between them sooner than one alone.
        """
        start = len(self._blobs) // 2 if len(epoch.lines) % 2 else 0
        line = Line(epoch, channel, [*self._blobs[start:], *self._blobs[:start]], self._suspects)
        epoch.lines.append(line)
        return line

    def leave(self, line: Line[C, L]) -> None:
        """The connection of *line* has ended."""
        if line in line.epoch.lines:
            line.epoch.lines.remove(line)
            line.epoch._over = line.epoch._over or not line.epoch.lines
        if self._turn is line:
            self._turn = None

    def retire(self, epoch: Epoch[C, L]) -> None:
        """*epoch* is given up; what is under way on its lines is finished by whoever runs them."""
        self._epochs.remove(epoch)

    def take(self, line: Line[C, L], wanted: Collection[str] = ()) -> StoredKey | None:
        """The next blob for *line* to import, None for none now.

        A line that had every key once, and so serves, imports further ones only when it is its turn: an import that
        hangs in KMS holds up the signatures behind it, and must find other lines free of it.
        """
        if line.was_complete and not self._has_turn(line):
            return None
        return line._take(wanted)

    def serve(self, line: Line[C, L], stored: StoredKey, key: PublicKeyHash, handle: int) -> bool:
        """*stored* was imported: *line* signs with *key* by *handle*.

        False, and it doesn't, if the key file lists *stored* no more.
        """
        self._suspects.pop(stored, None)
        listed = stored in line._listed
        if listed:
            line._serve(key, handle)
        self._finish(line, stored)
        return listed

    def adopt(self, line: Line[C, L], key: PublicKeyHash, handle: int) -> None:
        """*key* was made over *line*, which signs with it by *handle*; the key file will list it."""
        line._serve(key, handle)

    def refuse(self, line: Line[C, L], stored: StoredKey, why: str) -> None:
        """*stored* cannot be used; a second entry of a key that serves is no matter."""
        self._suspects.pop(stored, None)
        if stored in line._listed and not line.has(stored):
            line.refused[stored] = why
        self._finish(line, stored)

    def suspect(self, line: Line[C, L], blob: bytes, why: str) -> Sequence[StoredKey]:
        """*line* is being lost since the import of *blob* had no answer in time; returns the entries concerned.

        They count as refused from now on: the next lines don't run into them before they have the other keys, and not
        all at once. A line that could open nothing at all says nothing of a single blob.
        """
        found = [stored for stored in line._trying if stored.blob == blob and stored in line._listed]
        for stored in found if line.handles else ():
            self._suspects[stored] = why
            for other in self.lines():
                other._suspect(stored, why)
                self._pass_turn(other)
        return found

    def retry(self, *, asked_for: bool = False, alone: bool = False) -> bool:
        """Let refused blobs be tried again; returns whether there are any to try.

        Unless somebody *asked for* it, only over a line that nobody would miss while its imports hang. Where there is
        one line by design, it is *alone*: what was answered with an error is tried over that one, for it would never
        be otherwise; what was not answered at all is not.
        """
        found = False
        if asked_for:
            self._suspects = {}
        for line in self.lines():
            if not line.complete:
                continue
            free = asked_for or not line.handles or self._others_serve(line)
            again = [stored for stored in line.refused if free or (alone and stored not in self._suspects)]
            line._waiting.extend(again)
            for stored in again:
                del line.refused[stored]
            found = found or bool(again)
        return found

    # -- what follows from it

    @property
    def newest(self) -> Epoch[C, L] | None:
        return self._epochs[-1] if self._epochs else None

    @property
    def epochs(self) -> Sequence[Epoch[C, L]]:
        return self._epochs

    def lines(self) -> Iterator[Line[C, L]]:
        """Every line, the newest epoch's first."""
        for epoch in reversed(self._epochs):
            yield from epoch.lines

    @property
    def linked(self) -> bool:
        """Whether anything answers."""
        return any(line.channel.alive for line in self.lines())

    @property
    def loaded(self) -> bool:
        """Whether every blob was tried over a line that is alive: a key without a handle has none to come."""
        return any(line.was_complete and line.channel.alive for line in self.lines())

    def route(self, key: PublicKeyHash, avoid: Collection[Line[C, L]] = ()) -> tuple[Line[C, L], int] | None:
        """The best line to ask for *key*, and its handle: the newest epoch that has it, there the least loaded.

        A line whose reply is overdue is taken only where no other has the key, in whatever epoch.
        """
        best: tuple[Line[C, L], int] | None = None
        for epoch in reversed(self._epochs):
            for line in epoch.lines:
                handle = line.handles.get(key)
                if handle is None or not line.channel.alive or line in avoid:
                    continue
                if best is None or _cost(line) < _cost(best[0]):
                    best = line, handle
            if best is not None and not best[0].channel.stalled:
                return best
        return best

    def superseded(self) -> list[Epoch[C, L]]:
        """Older epochs that nobody needs any more: dead, or with no key that a newer one lacks."""
        found: list[Epoch[C, L]] = []
        newer: set[PublicKeyHash] = set()
        for epoch in reversed(self._epochs):
            if epoch is not self.newest and epoch.keys <= newer:
                found.append(epoch)
            newer |= epoch.keys
        return found

    def skipped(self) -> dict[str, str]:
        """Address of each key that no line serves, though its blob was tried; and why."""
        served = {address for line in self.lines() if line.channel.alive for address in line._addresses}
        found: dict[str, str] = {}
        for refused in (*(line.refused for line in self.lines()), self._suspects):
            for stored, why in refused.items():
                if stored.public_key_hash not in served:
                    found.setdefault(stored.public_key_hash, why)
        return found

    def expects(self, address: str) -> bool:
        """Whether a blob of *address* is still to be imported over some line."""
        return any(line._expects(address) for line in self.lines() if line.channel.alive)

    def _finish(self, line: Line[C, L], stored: StoredKey) -> None:
        line._done(stored)
        self._pass_turn(line)

    def _pass_turn(self, line: Line[C, L]) -> None:
        if self._turn is line and line.complete:
            self._turn = None

    def _has_turn(self, line: Line[C, L]) -> bool:
        if line.complete:
            return False
        if self._turn is None or not self._turn.channel.alive:
            self._turn = line
        return self._turn is line

    def _others_serve(self, line: Line[C, L]) -> bool:
        """Whether other lines have every key of *line*."""
        others = [other for other in self.lines() if other is not line and other.channel.alive]
        return line.handles.keys() <= {key for other in others for key in other.handles}


def _cost(line: Line[C, L]) -> tuple[bool, int, int]:
    return line.channel.stalled, -line.epoch.number, line.channel.load
