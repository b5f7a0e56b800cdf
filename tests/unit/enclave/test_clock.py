"""The time comes from the module; the system's clock follows it where it may."""

import errno
import os
import time
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
import trio
from trio.testing import MockClock

from signer.enclave import clock as clock_module
from signer.enclave.clock import INTERVAL, Clock, keep, timestamp_of
from signer.enclave.nsm.interface import NsmError
from signer.rpc._cbor import dumps
from tests.attested.nsm import FakeNsm

AT = datetime(2026, 11, 20, 12, tzinfo=UTC)


class System:
    """A system's clock that stands still, and may refuse to be set."""

    def __init__(self, behind: float, *, error: int = 0) -> None:
        self.time = AT.timestamp() - behind
        self.error = error
        self.set_to: list[float] = []

    def read(self) -> float:
        return self.time

    def step(self, which: int, to: float) -> None:
        assert which == time.CLOCK_REALTIME
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        self.set_to.append(to)
        self.time = to


def clock_of(system: System) -> Clock:
    return Clock(read=system.read, step=system.step)


@pytest.mark.parametrize("behind", [3.0, -3.0, 86400.0 * 365, 1.5])
async def test_beyond_a_second_the_system_is_set(behind: float, capsys: pytest.CaptureFixture[str]) -> None:
    system = System(behind)
    clock = clock_of(system)
    await clock.look(FakeNsm(at=AT))
    assert system.set_to == [pytest.approx(AT.timestamp(), abs=0.5)]
    assert (clock.offset, clock.steps) == (0.0, 1)
    assert abs(clock.now() - AT) < timedelta(seconds=0.5)
    assert f"clock: stepped by {'+' if behind > 0 else '-'}" in capsys.readouterr().err


@pytest.mark.parametrize("behind", [0.0, 0.4, -0.4])
async def test_within_a_second_an_offset_is_kept(behind: float) -> None:
    system = System(behind)
    clock = clock_of(system)
    await clock.look(FakeNsm(at=AT))
    assert (system.set_to, clock.steps) == ([], 0)
    assert clock.offset == pytest.approx(behind, abs=0.3)
    assert abs(clock.now() - AT) < timedelta(seconds=0.3)


async def test_a_slow_module_is_reckoned_with(monkeypatch: pytest.MonkeyPatch) -> None:
    """The document was made at some moment of the four seconds: in the middle is the best guess, give or take two."""
    ticks = iter([10.0, 14.0, 20.0, 24.0])
    stopwatch = SimpleNamespace(monotonic=lambda: next(ticks), CLOCK_REALTIME=time.CLOCK_REALTIME)
    monkeypatch.setattr(clock_module, "time", stopwatch)
    for behind, offset, steps in ((0.0, -2.0, 0), (6.0, 0.0, 1)):
        system = System(behind)
        clock = clock_of(system)
        await clock.look(FakeNsm(at=AT))
        assert clock.offset == pytest.approx(offset)
        assert clock.steps == steps
    assert system.set_to == [pytest.approx(AT.timestamp() - 2)]


async def test_where_setting_is_refused_the_offset_serves(capsys: pytest.CaptureFixture[str]) -> None:
    system = System(90, error=errno.EPERM)
    clock = clock_of(system)
    for _ in range(3):
        await clock.look(FakeNsm(at=AT))
    assert clock.offset == pytest.approx(90, abs=0.5)
    assert abs(clock.now() - AT) < timedelta(seconds=0.5)
    assert capsys.readouterr().err.count("cannot be set (Operation not permitted") == 1


def test_a_correction_from_another_source() -> None:
    """KMS's own Date, when a signature was refused for its time."""
    system = System(0)
    clock = clock_of(system)
    clock.correct(300.0)
    assert system.set_to == [AT.timestamp() + 300]
    clock.correct(4.0, uncertainty=3.5)
    assert len(system.set_to) == 1
    assert clock.offset == 4.0


async def test_a_module_that_fails_changes_nothing() -> None:
    system = System(90)
    clock = clock_of(system)
    clock.offset = 0.25
    with pytest.raises(NsmError):
        await clock.look(FakeNsm(failures={1: "InternalError"}))
    assert (clock.offset, system.set_to) == (0.25, [])


def test_every_ten_minutes_also_after_a_failure(capsys: pytest.CaptureFixture[str]) -> None:
    system = System(0)
    clock = clock_of(system)
    nsm = FakeNsm(at=AT, failures={2: "InternalError"})

    async def main() -> None:
        with trio.move_on_after(3.5 * INTERVAL):
            await keep(clock, nsm)

    trio.run(main, clock=MockClock(autojump_threshold=0))
    assert INTERVAL == 600
    assert nsm.calls == ["Attestation"] * 3
    assert capsys.readouterr().err.count("the security module gave no time: InternalError") == 1


async def test_the_time_in_a_document() -> None:
    document = await FakeNsm(at=AT).attest()
    assert timestamp_of(document) == AT.timestamp() * 1000
    assert timestamp_of(b"\xd2" + document) == AT.timestamp() * 1000
    for end in range(len(document)):
        with pytest.raises(NsmError, match="InvalidResponse"):
            timestamp_of(document[:end])


@pytest.mark.parametrize(
    "payload", [{}, [], {"timestamp": 0}, {"timestamp": -1}, {"timestamp": True}, {"timestamp": 2**60}]
)
def test_documents_without_a_time(payload: object) -> None:
    with pytest.raises(NsmError, match="holds no time"):
        timestamp_of(dumps([b"", {}, dumps(payload), b""]))


@pytest.mark.parametrize("document", [[], [b"", {}, "text", b""], {"timestamp": 1}, None])
def test_what_is_no_document(document: object) -> None:
    with pytest.raises(NsmError, match="holds no time"):
        timestamp_of(dumps(document))
