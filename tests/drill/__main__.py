"""`make drill`: run the scenarios, print a table for each, exit 1 if anything did not hold."""

import argparse
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.drill import table
from tests.drill.runner import LeftOutError, Outcome
from tests.drill.scenarios import RUNS

FAULTS = 1_000_000  # in effect: until the time is over


Runs = Mapping[str, Callable[..., Outcome]]


def main(arguments: Sequence[str] | None = None, runs: Runs = RUNS) -> None:
    options = _parser(runs).parse_args(arguments)
    seed = random.randrange(2**32) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    held = True
    for name in options.scenario or runs:
        held &= _run(runs[name], name, seed, options)
    sys.exit(0 if held else 1)


def _run(run: Callable[..., Outcome], name: str, seed: int, options: argparse.Namespace) -> bool:
    """Run one scenario; whether all held, or it was left out."""
    with tempfile.TemporaryDirectory(prefix="drill-", dir=options.directory) as directory:
        outcome = _outcome(run, name, seed, options, Path(directory))
        if outcome is None:
            return True
        print(table.render(outcome), flush=True)
        held = not outcome.ledger.violations
        if not held and options.keep_logs:
            options.keep_logs.mkdir(exist_ok=True)
            for log in Path(directory).glob("*.log"):
                shutil.copy(log, options.keep_logs / f"{name}-{log.name}")
    return held


def _outcome(
    run: Callable[..., Outcome], name: str, seed: int, options: argparse.Namespace, directory: Path
) -> Outcome | None:
    """None for a scenario that this machine does not allow, which is said."""
    limits = {"faults": options.faults, "duration": options.duration, "bakers": options.bakers, "keys": options.keys}
    try:
        return run(directory, seed=seed, **limits)
    except LeftOutError as exc:
        print(f"== {name}: left out: {exc}", flush=True)
        return None


def _parser(runs: Runs) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.drill", description=__doc__)
    parser.add_argument("--seed", type=int, help="of the faults and the load; default: another one each time")
    parser.add_argument("--duration", type=float, default=30, help="seconds for each scenario; default %(default)s")
    parser.add_argument("--faults", type=int, default=FAULTS, help="end a scenario after so many")
    parser.add_argument("--scenario", action="append", choices=list(runs), help="only this; may be repeated")
    parser.add_argument("--bakers", type=int, default=8, help="clients side by side; default %(default)s")
    parser.add_argument("--keys", type=int, default=1, help="of each of the four curves; default %(default)s")
    parser.add_argument(
        "--directory", type=Path, help="where the processes keep their files; default: the temporary one"
    )
    parser.add_argument("--keep-logs", type=Path, help="where to move the logs of a scenario that did not hold")
    return parser


if __name__ == "__main__":
    main()
