"""The images that a key policy accepts, against those that run and the releases that are known. Pure.

Rule 12 of section 10 of the enclave specification: a value of no current release is an old image that still unseals.
"""

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass, field

from signer.aws.kms_findings import Expected, Finding, Running, Severity

PRINT_ONE = "signer kms-policy prints a policy that has it"


@dataclass(frozen=True, slots=True)
class Images:
    """What the statements ask of a document: register to values (lower case)."""

    allowed: dict[str, set[str]] = field(default_factory=dict)  # with one of which somebody may decrypt
    denied: dict[str, set[str]] = field(default_factory=dict)  # that every Deny lets pass

    def allow(self, bound: Mapping[str, Set[str]]) -> None:
        """Another Allow: each one adds values."""
        for register, values in bound.items():
            self.allowed[register] = self.allowed.get(register, set()) | values

    def deny_all_but(self, register: str, values: Set[str]) -> None:
        """Another Deny: each one takes values away."""
        self.denied[register] = self.denied.get(register, {*values}) & values

    def findings(self, expected: Expected) -> Iterator[Finding]:
        yield from self._of_agreement()
        for enclave in expected.running:
            yield from self._of_running(enclave)
        yield from self._of_required(expected)
        for source, registers in expected.releases.items():
            for register, values in registers.items():
                yield from self._of_release(source, register, set(values))
        for register in sorted(self.allowed):
            yield from self._of_old_values(register, expected)

    def _of_agreement(self) -> Iterator[Finding]:
        """Allow and Deny have to name the same values."""
        if "PCR0" not in self.denied:  # said already: the Deny is missing
            return
        for register in sorted(self.allowed.keys() | self.denied.keys()):
            allowed, denied = self.allowed.get(register), self.denied.get(register)
            if allowed is None or denied is None:
                one, other = ("an Allow", "Deny") if denied is None else ("a Deny", "Allow")
                text = f"{register} is asked for by {one}, by no {other}"
                yield Finding(Severity.WARNING, "policy", text, "ask for the same registers in both")
                continue
            for value in sorted(allowed - denied):
                text = f"{register} {value} is allowed, and denied: that image can't open its keys"
                yield Finding(Severity.WARNING, "policy", text, "name it in the Deny, or remove it from the Allow")
            for value in sorted(denied - allowed):
                text = f"{register} {value} passes the Deny, and no Allow names it"
                yield Finding(Severity.WARNING, "policy", text, "remove it from the Deny")

    def _accepted(self, register: str) -> set[str] | None:
        """The values that pass both Allow and Deny; None where neither asks."""
        asked = [one[register] for one in (self.allowed, self.denied) if register in one]
        return set.intersection(*asked) if asked else None

    def _of_required(self, expected: Expected) -> Iterator[Finding]:
        for register in expected.required:
            if self.allowed and register not in self.allowed:
                text = f"{register} is not asked for"
                yield Finding(Severity.WARNING, "policy", text, f"add it to the condition, and a Deny; {PRINT_ONE}")

    def _of_old_values(self, register: str, expected: Expected) -> Iterator[Finding]:
        known = {value for one in expected.releases.values() for value in one.get(register, ())}
        running = [one for one in expected.running if not one.is_debug]
        known |= {one.measurements[register] for one in running if register in one.measurements}
        for value in sorted((self._accepted(register) or set()) - known) if known else ():
            text = f"{register} {value} is of no release known here: an old image can still open the keys"
            yield Finding(Severity.WARNING, "policy", text, "remove it once nothing of that image runs")

    def _of_running(self, enclave: Running) -> Iterator[Finding]:
        where = "running enclave" + (f" {enclave.name}" if enclave.name else "")
        if enclave.is_debug:
            text = "runs in debug mode: KMS sees zeros, and refuses it. It can't open its keys"
            yield Finding(Severity.ERROR, where, text, "run it without --debug-mode")
            return
        for register, value in sorted(enclave.measurements.items()):
            accepted = self._accepted(register)
            if accepted is not None and value not in accepted:
                text = f"its {register} {value} is not accepted: it can't open its keys"
                advice = "add it to the policy, in Allow and Deny, or run the released image"
                yield Finding(Severity.ERROR, where, text, advice)

    def _of_release(self, source: str, register: str, values: set[str]) -> Iterator[Finding]:
        accepted = self._accepted(register)
        if accepted is None:  # not asked for, so not refused either
            return
        severity = Severity.WARNING if values & accepted else Severity.ERROR
        for value in sorted(values - accepted):
            text = f"{register} {value} is not accepted by the policy"
            yield Finding(severity, source, text, "add it to the policy, in Allow and Deny, if it is to run")
