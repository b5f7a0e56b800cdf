"""The state of the link: any order of events against a model, and the rules one by one."""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from signer.tezos.keys import Curve, PublicKeyHash
from signer.vaults.nitro.epochs import Epoch, Epochs, Line
from signer.vaults.nitro.storage import StoredKey

KEYS = [PublicKeyHash(Curve.ED25519, bytes([number]) * 20) for number in range(3)]
BLOBS = [StoredKey(str(key), b"blob of %d" % number) for number, key in enumerate(KEYS)]
BLOBS += [StoredKey(str(KEYS[0]), b"another blob of 0"), StoredKey("no address", b"")]


@dataclass(eq=False)
class FakeChannel:
    alive: bool = True
    load: int = 0
    stalled: bool = False


FakeLine = Line[FakeChannel, str]
FakeEpoch = Epoch[FakeChannel, str]


def address_of(stored: StoredKey) -> PublicKeyHash | None:
    return next((key for key in KEYS if str(key) == stored.public_key_hash), None)


@dataclass(eq=False)
class Model:
    """What a line may be asked for, kept apart from the code under test."""

    channel: FakeChannel
    epoch: int
    handles: dict[PublicKeyHash, int] = field(default_factory=dict)
    trying: list[StoredKey] = field(default_factory=list)


class EpochsMachine(RuleBasedStateMachine):
    """Sessions come, import, fail and go; enclaves are exchanged; the key file changes. In any order.

    What must hold after each step: a request goes to a living line, by the handle that this very line gave for this
    very key; a key that some line serves can be asked for, unless it is to be avoided; the newest epoch serves what it
    can; nothing older is let go that has a key nobody newer has; each blob is imported once a line at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.epochs: Epochs[FakeChannel, str] = Epochs()
        self.models: dict[FakeLine, Model] = {}
        self.blobs: list[StoredKey] = []
        self.handles = 0
        self.lives = 0

    lines = Bundle("lines")

    @initialize(blobs=st.lists(st.sampled_from(BLOBS), unique=True, min_size=1))
    def start(self, blobs: list[StoredKey]) -> None:
        self.list_blobs(blobs)
        self.begin()

    @rule(blobs=st.lists(st.sampled_from(BLOBS), unique=True))
    def list_blobs(self, blobs: list[StoredKey]) -> None:
        self.blobs = blobs
        self.epochs.list_blobs(blobs)

    @rule()
    def begin(self) -> None:
        self.lives += 1
        epoch = self.epochs.begin(f"life {self.lives}")
        assert self.epochs.newest is epoch
        assert epoch.life == f"life {self.lives}"

    @rule(target=lines, loaded=st.booleans())
    def join(self, loaded: bool) -> FakeLine:
        assert self.epochs.newest is not None
        channel = FakeChannel()
        line = self.epochs.join(self.epochs.newest, channel)
        self.models[line] = Model(channel, line.epoch.number)
        if loaded:
            self._load(line)
        return line

    @rule(line=consumes(lines), told=st.booleans())
    def lose(self, line: FakeLine, told: bool) -> None:
        """The connection ends; the link may be told later than its channel knows."""
        line.channel.alive = False
        if told:
            self.epochs.leave(line)
            self.models.pop(line, None)

    @rule(line=consumes(lines), data=st.data())
    def hang(self, line: FakeLine, data: st.DataObject) -> None:
        """The connection ends since an import was not answered; its blob is no further line's first concern."""
        model = self.models.pop(line, None)
        if model is None:
            return
        line.channel.alive = False
        if model.trying:
            stored = data.draw(st.sampled_from(model.trying))
            self.epochs.suspect(line, stored.blob, "no answer")
            waiting = [other for other in self.models if stored in other._waiting]
            assert not (line.handles and stored in self.blobs and waiting)
        self.epochs.leave(line)

    @rule(line=lines, load=st.integers(0, 5), stalled=st.booleans())
    def burden(self, line: FakeLine, load: int, stalled: bool) -> None:
        line.channel.load, line.channel.stalled = load, stalled

    @rule(line=lines, wanted=st.sets(st.sampled_from([str(key) for key in KEYS]), max_size=2))
    def take(self, line: FakeLine, wanted: set[str]) -> None:
        model = self.models.get(line)
        stored = None if model is None else self.epochs.take(line, wanted)
        if model is None or stored is None:
            return
        assert stored not in model.trying, "one import of a blob at a time"
        assert stored in self.blobs, "the key file has it no more"
        assert not line.has(stored), "a key that the line has is not imported again"
        model.trying.append(stored)

    @rule(line=lines, outcome=st.sampled_from(["served", "refused"]), data=st.data())
    def finish(self, line: FakeLine, outcome: str, data: st.DataObject) -> None:
        model = self.models.get(line)
        if model is None or not model.trying:
            return
        stored = data.draw(st.sampled_from(model.trying))
        model.trying.remove(stored)
        key = address_of(stored)
        if outcome == "served" and key is not None:
            self.handles += 1
            if self.epochs.serve(line, stored, key, self.handles):
                model.handles[key] = self.handles
        else:
            self.epochs.refuse(line, stored, "no")

    @rule(line=lines)
    def load(self, line: FakeLine) -> None:
        self._load(line)

    def _load(self, line: FakeLine) -> None:
        """Everything is imported, as it mostly is."""
        model = self.models.get(line)
        while model is not None and (stored := self.epochs.take(line)) is not None:
            key = address_of(stored)
            if key is None:
                self.epochs.refuse(line, stored, "no address")
                continue
            self.handles += 1
            if self.epochs.serve(line, stored, key, self.handles):
                model.handles[key] = self.handles

    @rule(key=st.sampled_from(KEYS))
    def forget(self, key: PublicKeyHash) -> None:
        """A reload, when the key file has lost the key."""
        self.epochs.forget(key)
        self.blobs = [stored for stored in self.blobs if address_of(stored) != key]
        self.epochs.list_blobs(self.blobs)
        for model in self.models.values():
            model.handles.pop(key, None)

    @rule(asked_for=st.booleans(), alone=st.booleans())
    def retry(self, asked_for: bool, alone: bool) -> None:
        self.epochs.retry(asked_for=asked_for, alone=alone)

    @rule()
    def sweep(self) -> None:
        """Let go of what is superseded; no key may be lost by it."""
        before = {key for key in KEYS if self.epochs.route(key) is not None}
        for epoch in self.epochs.superseded():
            assert epoch is not self.epochs.newest
            self.epochs.retire(epoch)
            for line in [line for line in self.models if line.epoch is epoch]:
                line.channel.alive = False
                del self.models[line]
        assert before == {key for key in KEYS if self.epochs.route(key) is not None}

    @invariant()
    def routes_are_right(self) -> None:
        for key in KEYS:
            serving = {
                line: model
                for line, model in self.models.items()
                if model.channel.alive and key in model.handles and line.epoch in self.epochs.epochs
            }
            found = self.epochs.route(key)
            assert (found is not None) == bool(serving)
            if found is None:
                continue
            line, handle = found
            model = serving[line]
            assert model.handles[key] == handle, "the handle of another line or key"
            prompt = [other for other in serving.values() if not other.channel.stalled]
            rivals = prompt or list(serving.values())
            assert model in rivals, "a line that answers is there"
            assert model.epoch == max(other.epoch for other in rivals), "a newer epoch has the key"
            same = [other for other in rivals if other.epoch == model.epoch]
            assert model.channel.load == min(other.channel.load for other in same)
            assert line is not (self.epochs.route(key, avoid={line}) or (None,))[0]

    @invariant()
    def nothing_is_both_served_and_skipped(self) -> None:
        served = {str(key) for model in self.models.values() if model.channel.alive for key in model.handles}
        assert not served & self.epochs.skipped().keys()

    @invariant()
    def what_is_listed_is_accounted_for(self) -> None:
        """A key whose blob is listed is never one that nobody knows, however few lines are left."""
        if not self.epochs.loaded:
            return
        for stored in self.blobs:
            key = address_of(stored)
            served = key is not None and self.epochs.route(key) is not None
            address = stored.public_key_hash
            assert served or self.epochs.expects(address) or address in self.epochs.skipped()

    @invariant()
    def what_is_complete_is_known_to_be(self) -> None:
        assert all(line.was_complete for line in self.models if line.complete)

    @invariant()
    def one_late_import_at_a_time(self) -> None:
        """Of the lines that were complete, one imports; the others keep their wires free."""
        late = [
            line for line, model in self.models.items() if line.was_complete and model.trying and line.channel.alive
        ]
        assert len(late) <= 1


# A line is told lost later than its channel knows: then it is in no bundle any more, and must not be routed to.
TestEpochs = EpochsMachine.TestCase
TestEpochs.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def test_a_blob_that_was_not_answered_is_tried_last_and_by_one_line_at_a_time() -> None:
    epochs: Epochs[FakeChannel, str] = Epochs()
    epochs.list_blobs(BLOBS[:3])
    epoch = epochs.begin("life")
    lost, other = epochs.join(epoch, FakeChannel()), epochs.join(epoch, FakeChannel())
    tried = [epochs.take(lost), epochs.take(lost)]
    assert tried == BLOBS[:2]
    epochs.serve(lost, BLOBS[0], KEYS[0], 0)
    assert epochs.suspect(lost, BLOBS[1].blob, "no answer") == [BLOBS[1]]
    epochs.leave(lost)
    assert epochs.skipped() == {str(KEYS[1]): "no answer"}
    late = epochs.join(epoch, FakeChannel())
    for line in (other, late):
        while (stored := epochs.take(line)) is not None:
            assert stored != BLOBS[1]
            epochs.serve(line, stored, KEYS[BLOBS.index(stored)], 0)
        assert line.was_complete
    assert epochs.retry()
    assert epochs.take(other) == BLOBS[1]
    assert epochs.take(late) is None
    epochs.suspect(other, BLOBS[1].blob, "no answer")
    epochs.leave(other)
    assert epochs.take(late) is None, "nor does the next line run into it at once"
    epochs.retry(asked_for=True)
    assert epochs.take(late) == BLOBS[1]
    epochs.serve(late, BLOBS[1], KEYS[1], 0)
    assert not epochs.skipped()
    assert epochs.take(epochs.join(epoch, FakeChannel()), [str(KEYS[1])]) == BLOBS[1], "it is beyond suspicion"


def test_what_the_key_file_has_no_more_is_not_served() -> None:
    epochs: Epochs[FakeChannel, str] = Epochs()
    epochs.list_blobs(BLOBS[:2])
    line = epochs.join(epochs.begin("life"), FakeChannel())
    assert epochs.take(line) == BLOBS[0]
    epochs.list_blobs(BLOBS[1:2])
    assert not epochs.serve(line, BLOBS[0], KEYS[0], 0)
    assert epochs.route(KEYS[0]) is None


def test_two_lines_begin_at_two_places_of_the_file() -> None:
    epochs: Epochs[FakeChannel, str] = Epochs()
    epochs.list_blobs(BLOBS[:2])
    epoch = epochs.begin("life")
    lines = [epochs.join(epoch, FakeChannel()) for _ in range(2)]
    assert [epochs.take(line) for line in lines] == BLOBS[:2]


def test_the_turn_of_a_line_that_is_dead_passes_before_it_is_told() -> None:
    epochs: Epochs[FakeChannel, str] = Epochs()
    epoch = epochs.begin("life")
    first, second = (epochs.join(epoch, FakeChannel()) for _ in range(2))
    epochs.list_blobs(BLOBS[:2])
    assert epochs.take(first) == BLOBS[0]
    assert epochs.take(second) is None, "both were complete: one after the other"
    first.channel.alive = False
    assert epochs.take(second) == BLOBS[0]


def test_a_newer_epoch_that_has_just_died_supersedes_nothing() -> None:
    machine = EpochsMachine()
    machine.start(BLOBS[:1])
    old = machine.join(loaded=True)
    machine.begin()
    new = machine.join(loaded=True)
    machine.lose(new, told=False)
    machine.sweep()
    assert machine.epochs.route(KEYS[0]) == (old, 1)


def test_a_key_that_only_a_dead_line_had_is_not_unknown() -> None:
    """Its blob was refused elsewhere: who asks is told that, and to try again; never that there is no such key."""
    epochs: Epochs[FakeChannel, str] = Epochs()
    epochs.list_blobs(BLOBS[:1])
    epoch = epochs.begin("life")
    served, refused = (epochs.join(epoch, FakeChannel()) for _ in range(2))
    for line in (served, refused):
        assert epochs.take(line) == BLOBS[0]
    epochs.serve(served, BLOBS[0], KEYS[0], 1)
    epochs.refuse(refused, BLOBS[0], "no")
    assert epochs.skipped() == {}
    served.channel.alive = False
    assert epochs.loaded
    assert epochs.skipped() == {BLOBS[0].public_key_hash: "no"}
