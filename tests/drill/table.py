"""The result of a drill for a person: one block per scenario."""

from collections.abc import Sequence

from tests.drill.runner import Outcome

_REASONS = 5  # of 500s, the most frequent ones
_SHOWN = 10  # violations of one scenario


def render(outcome: Outcome) -> str:
    """All figures of *outcome*, and the violations with the seed that leads to them again."""
    ledger, counts = outcome.ledger, outcome.counts
    statuses = ledger.statuses
    others = {status: number for status, number in statuses.items() if status not in (200, 409, 500, 502)}
    rows = [
        ("requests", f"{statuses.total()} in {outcome.seconds:.1f} s"),
        ("signed", f"{ledger.signed}; of {counts.asked} slots asked for once {_share(counts.obtained, counts.asked)}"),
        ("refused 409", str(statuses[409])),
        ("502, then asked again", str(statuses[502])),
        ("500", str(statuses[500])),
        *((f"  {number}", reason) for reason, number in ledger.reasons.most_common(_REASONS)),
        ("other statuses", ", ".join(f"{status}: {number}" for status, number in sorted(others.items())) or "none"),
        ("faults", f"{outcome.faults.total()}, {outcome.faults.total() / max(outcome.seconds, 1e-9):.0f} a second"),
        *((f"  {kind}", str(number)) for kind, number in sorted(outcome.faults.items())),
        ("wrong signatures", str(len(ledger.wrong))),
        ("double slots", str(len(ledger.doubles))),
        ("recovery", _quantiles(outcome.recoveries)),
        (outcome.leaks, "before {}, after {}".format(*outcome.open)),
    ]
    lines = [f"== {outcome.scenario}, seed {outcome.seed}", *(f"  {name:36} {value}" for name, value in rows)]
    return "\n".join(lines + _violations(outcome))


def _violations(outcome: Outcome) -> list[str]:
    found = outcome.ledger.violations
    if not found:
        return ["  held"]
    lines = [f"  VIOLATED: {text}" for text in found[:_SHOWN]]
    if len(found) > _SHOWN:
        lines.append(f"  ... and {len(found) - _SHOWN} more")
    again = f"python -m tests.drill --seed {outcome.seed} --scenario {outcome.scenario}"
    return [*lines, f"  again: {again}"]


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:.2f} %" if whole else "none"


def _quantiles(seconds: Sequence[float]) -> str:
    if not seconds:
        return "none"
    ordered = sorted(seconds)
    return f"p50 {ordered[len(ordered) // 2] * 1000:.0f} ms, max {ordered[-1] * 1000:.0f} ms ({len(ordered)} times)"
