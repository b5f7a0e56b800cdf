"""Pauses and the breaker, as values."""

import pytest

from signer.enclave.kms.retries import Breaker, pause


@pytest.mark.parametrize(("attempt", "limit"), [(1, 0.05), (2, 0.1), (3, 0.2), (6, 1.6), (7, 2.0), (60, 2.0)])
def test_pauses_grow_and_are_random(attempt: int, limit: float) -> None:
    assert pause(attempt, 0.0) == 0.0
    assert pause(attempt, 1.0) == pytest.approx(limit)
    assert pause(attempt, 0.5) == pytest.approx(limit / 2)


def test_the_other_side_may_ask_for_more_never_for_less() -> None:
    assert pause(1, 1.0, at_least=3.0) == 3.0
    assert pause(7, 1.0, at_least=1.0) == 2.0


def failing(breaker: Breaker, times: int, now: float) -> None:
    for _ in range(times):
        breaker.failed(now, "no way")


def test_a_dead_way_gets_one_probe_a_second() -> None:
    breaker = Breaker()
    failing(breaker, 19, 100.0)
    assert breaker.admit(100.0)
    assert breaker.may_retry(100.0)
    failing(breaker, 1, 100.0)
    assert breaker.failures == 20
    assert not breaker.admit(100.0)
    assert not breaker.may_retry(104.9)
    assert [breaker.admit(now) for now in (100.9, 101.0, 101.5, 101.9, 102.0)] == [False, True, False, False, True]
    failing(breaker, 1, 102.0)
    assert not breaker.may_retry(104.9), "a failed probe does not end the quiet time early"
    assert breaker.may_retry(105.0), "nor does it make it longer"


def test_behind_the_quiet_time_one_failure_begins_the_next() -> None:
    breaker = Breaker()
    failing(breaker, 20, 100.0)
    assert breaker.admit(105.0)
    failing(breaker, 1, 105.0)
    assert not breaker.may_retry(109.9)


def test_an_answer_ends_it() -> None:
    breaker = Breaker()
    failing(breaker, 20, 100.0)
    breaker.worked()
    assert breaker.failures == 0
    assert breaker.may_retry(100.0)
    assert all(breaker.admit(100.0) for _ in range(3))
