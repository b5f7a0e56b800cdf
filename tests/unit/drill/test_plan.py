"""The plan of faults: seeded, counted, and each fault what its name says."""

import pytest

from signer.rpc.frames import LENGTH, MAX_FRAME, encode_frame
from tests.drill.plan import REPLY_FAULTS, REQUEST_FAULTS, ConnectionPlan, End, Fault, Plan, Rates, Script, Send, Wait

FRAME = encode_frame(b"a payload of some length")
OTHER = encode_frame(b"another payload")


def connection(*faults: Fault, seed: int = 1) -> tuple[Plan, ConnectionPlan]:
    """A connection on which every frame meets one of *faults*."""
    plan = Plan(seed, Rates(connection=1, request=1, reply=1, faults=frozenset(faults)))
    return plan, plan.connection()


def reply(fault: Fault, *, seed: int = 1) -> Script:
    plan, one = connection(fault, seed=seed)
    script = one.reply(FRAME)
    assert plan.faults == {fault: 1}
    return script


def sent(script: Script) -> bytes:
    return b"".join(step.data for step in script if isinstance(step, Send))


def test_without_faults_everything_passes() -> None:
    plan = Plan(1, Rates())
    one = plan.connection()
    assert not one.refused()
    assert one.request(FRAME) == one.reply(FRAME) == (Send(FRAME),)
    assert not plan.faults


def scripts(seed: int) -> list[Script]:
    plan = Plan(seed, Rates(request=0.5, reply=0.5))
    return [decide(FRAME) for one in (plan.connection(), plan.connection()) for decide in [one.request, one.reply] * 50]


def test_the_seed_decides() -> None:
    assert scripts(1) == scripts(1)
    assert scripts(1) != scripts(2)


def test_connections_differ_and_do_not_disturb_one_another() -> None:
    rates = Rates(request=0.5)
    alone, together = Plan(1, rates), Plan(1, rates)
    first = alone.connection()
    expected = [first.request(FRAME) for _ in range(50)]
    one, two = together.connection(), together.connection()
    mixed = [(one.request(FRAME), two.request(FRAME)) for _ in range(50)]
    assert [script for script, _ in mixed] == expected
    assert [script for _, script in mixed] != expected


def test_rates_are_kept() -> None:
    plan = Plan(1, Rates(request=0.2, reply=0.1))
    one = plan.connection()
    for _ in range(5000):
        one.request(FRAME)
    assert plan.faults.total() == pytest.approx(1000, rel=0.1)
    assert set(plan.faults) == set(REQUEST_FAULTS)


def test_every_fault_is_drawn() -> None:
    plan = Plan(1, Rates(connection=1, request=1, reply=1))
    for _ in range(1000):
        one = plan.connection()
        one.refused()
        one.request(FRAME)
        one.reply(FRAME)
    assert set(plan.faults) == set(Fault)


def test_grace_lets_the_handshake_pass() -> None:
    plan = Plan(1, Rates(request=1, reply=1, grace=3))
    graced = 0
    for _ in range(200):
        one = plan.connection()
        passed = [one.request(FRAME) == (Send(FRAME),) for _ in range(4)]
        assert not passed[3]
        graced += passed[0]
        assert passed[0] == passed[1] == passed[2]
    assert 120 < graced < 200


def test_calm_ends_all_faults() -> None:
    plan, one = connection(*Fault)
    plan.calm()
    assert not one.refused()
    assert one.request(FRAME) == one.reply(FRAME) == (Send(FRAME),)
    assert not plan.connection().refused()


@pytest.mark.parametrize("fault", [Fault.CUT_IN_REPLY, Fault.CUT_AFTER_REPLY])
@pytest.mark.parametrize("seed", range(20))
def test_cuts_of_replies(fault: Fault, seed: int) -> None:
    script = reply(fault, seed=seed)
    assert script[-1] is End.CUT
    assert FRAME.startswith(sent(script))
    assert (sent(script) == FRAME) is (fault is Fault.CUT_AFTER_REPLY)
    assert sent(script)


@pytest.mark.parametrize(("fault", "whole"), [(Fault.CUT_IN_REQUEST, False), (Fault.CUT_AFTER_REQUEST, True)])
def test_cuts_of_requests(fault: Fault, *, whole: bool) -> None:
    script = connection(fault)[1].request(FRAME)
    assert script[-1] is End.CUT
    assert (sent(script) == FRAME) is whole


def test_delay_and_single_bytes_lose_nothing() -> None:
    delayed, single = reply(Fault.DELAY), reply(Fault.BYTES)
    assert isinstance(delayed[0], Wait)
    assert sent(delayed) == sent(single) == FRAME
    assert len(single) == len(FRAME)


def test_garbage() -> None:
    before, instead, framed = reply(Fault.GARBAGE_BEFORE), reply(Fault.GARBAGE_INSTEAD), reply(Fault.FRAMED_GARBAGE)
    assert sent(before).endswith(FRAME)
    assert sent(before) != FRAME
    assert FRAME not in sent(instead)
    assert LENGTH.unpack_from(sent(framed))[0] == len(sent(framed)) - LENGTH.size
    assert sent(connection(Fault.GARBAGE_REQUEST)[1].request(FRAME)).endswith(FRAME)


@pytest.mark.parametrize("seed", range(20))
def test_one_bit_is_flipped_behind_the_length(seed: int) -> None:
    flipped = sent(reply(Fault.FLIPPED, seed=seed))
    assert flipped[: LENGTH.size] == FRAME[: LENGTH.size]
    assert sum((a ^ b).bit_count() for a, b in zip(flipped, FRAME, strict=True)) == 1


def test_a_flip_leaves_an_empty_payload_alone() -> None:
    assert connection(Fault.FLIPPED)[1].reply(encode_frame(b"")) == (Send(encode_frame(b"")),)


@pytest.mark.parametrize("seed", range(10))
def test_huge_lengths(seed: int) -> None:
    script = sent(reply(Fault.HUGE, seed=seed))
    assert LENGTH.unpack_from(script)[0] >= MAX_FRAME
    assert script.endswith(FRAME)


def test_lost_and_doubled_replies() -> None:
    assert reply(Fault.SWALLOWED) == ()
    assert reply(Fault.DUPLICATED) == (Send(FRAME), Send(FRAME))
    assert reply(Fault.SILENT) == (End.SILENCE,)


def test_half_close_comes_with_and_without_the_reply() -> None:
    both = {reply(Fault.HALF_CLOSED, seed=seed) for seed in range(20)}
    assert both == {(End.HALF_CLOSE,), (Send(FRAME), End.HALF_CLOSE)}


def test_swapped_replies() -> None:
    _, one = connection(Fault.SWAPPED)
    assert one.reply(FRAME) == ()
    assert one.reply(OTHER) == (Send(OTHER), Send(FRAME))
    assert one.reply(FRAME) == ()


def test_the_reply_of_another_connection() -> None:
    plan, one = connection(Fault.FOREIGN)
    assert one.reply(FRAME) == (Send(FRAME),), "there is no other yet"
    two = plan.connection()
    assert two.reply(OTHER) == (Send(FRAME),)
    assert one.reply(FRAME) == (Send(OTHER),)


def test_faults_of_each_way_are_known() -> None:
    assert {*REQUEST_FAULTS, *REPLY_FAULTS, Fault.REFUSED} == set(Fault)
