"""What a person gets to see: every violation, the seed that leads to it again, and the exit status."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.drill.__main__ import main
from tests.drill.ledger import Ledger
from tests.drill.load import Counts
from tests.drill.runner import LeftOutError, Outcome
from tests.drill.table import render


def outcome(*violations: str, seed: int = 7) -> Outcome:
    ledger = Ledger(statuses=Counter({200: 5, 502: 3, 404: 1}), wrong=list(violations), signed=5)
    return Outcome("kill", seed, 2.0, Counts(4, 3), ledger, Counter({"enclave killed": 2}), [0.1, 0.3, 0.2], (9, 8))


def test_all_figures_are_there() -> None:
    text = render(outcome())
    for part in ("9 in 2.0 s", "5; of 4 slots asked for once 75.00 %", "404: 1", "enclave killed", "1 a second"):
        assert part in text
    assert "p50 200 ms, max 300 ms (3 times)" in text
    assert "before 9, after 8" in text
    assert text.endswith("held")


def test_violations_come_with_the_seed() -> None:
    text = render(outcome("this is wrong"))
    assert "VIOLATED: this is wrong" in text
    assert text.endswith("--seed 7 --scenario kill")


def test_not_more_violations_than_a_person_reads() -> None:
    text = render(outcome(*(f"number {index}." for index in range(25))))
    assert "number 9." in text
    assert "number 10." not in text
    assert "and 15 more" in text


def run(*arguments: str, violations: tuple[str, ...] = ()) -> tuple[int | str | None, dict[str, Any]]:
    """Exit status, and what the scenario was called with."""
    called: dict[str, Any] = {}

    def scenario(directory: Path, **limits: Any) -> Outcome:
        called.update(limits)
        (directory / "signer.log").write_text("log")
        return outcome(*violations, seed=limits["seed"])

    def not_here(_directory: Path, **_limits: Any) -> Outcome:
        raise LeftOutError("not on this machine")

    with pytest.raises(SystemExit) as ended:
        main(arguments, {"kill": scenario, "full": not_here})
    return ended.value.code, called


def test_a_run_that_held(capsys: pytest.CaptureFixture[str]) -> None:
    status, called = run("--faults", "10", "--seed", "5")
    assert status == 0
    assert called == {"seed": 5, "faults": 10, "duration": 30, "bakers": 8, "keys": 1}
    assert "full: left out: not on this machine" in capsys.readouterr().out


def test_a_violation_is_the_status_and_keeps_the_logs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, called = run("--scenario", "kill", "--keep-logs", str(tmp_path / "logs"), violations=("this is wrong",))
    assert status == 1
    told = capsys.readouterr().out
    assert f"--seed {called['seed']} --scenario kill" in told
    assert told.startswith(f"seed {called['seed']}\n")
    assert (tmp_path / "logs" / "kill-signer.log").read_text() == "log"


def test_every_run_has_another_seed() -> None:
    assert run()[1]["seed"] != run()[1]["seed"]
