"""The drills in short: every scenario, with another seed each time; `make drill` runs them long."""

from pathlib import Path

import pytest

from tests.drill import table
from tests.drill.client import BAD_GATEWAY
from tests.drill.runner import LeftOutError, Outcome
from tests.drill.scenarios import RUNS

# Faults of each scenario; those that pass their time in pauses get few. Killing the signer has a test of its own.
FAULTS = {
    "link": 250,
    "relay": 80,
    "slow": 80,
    "kill": 2,
    "stop": 2,
    "cid": 1,
    "lies": 2,
    "stranger": 1,
    "proxy": 100,
    "locked": 2,
    "full": 2,
    "vanish": 300,
}
LONGEST = 10.0  # seconds of faults, on a machine that is slow


def drill(name: str, directory: Path, seed: int) -> Outcome:
    """A short run, which held."""
    try:
        outcome = RUNS[name](directory, seed=seed, faults=FAULTS[name], duration=LONGEST, bakers=4)
    except LeftOutError as exc:
        pytest.skip(str(exc))
    except Exception as exc:
        exc.add_note(f"seed {seed}")
        raise
    assert not outcome.ledger.violations, table.render(outcome)
    assert outcome.faults, table.render(outcome)
    assert outcome.ledger.signed, table.render(outcome)
    return outcome


@pytest.mark.parametrize("name", sorted(set(FAULTS) - {"cid", "slow"}))
def test_what_must_hold(name: str, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    drill(name, tmp_path_factory.mktemp("d"), seed)


@pytest.mark.parametrize("name", ["cid", "slow"])
def test_what_costs_no_request(name: str, tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """An enclave that is 2 s away, and one that is only slow: every request gets its signature."""
    outcome = drill(name, tmp_path_factory.mktemp("d"), seed)
    assert outcome.counts.obtained == outcome.counts.asked, table.render(outcome)
    assert not outcome.ledger.reasons, table.render(outcome)
    if name == "slow":
        assert not outcome.ledger.statuses[BAD_GATEWAY], table.render(outcome)
