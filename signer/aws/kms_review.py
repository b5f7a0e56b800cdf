"""What is missing in a KMS key policy, or too wide; section 3.9 of the enclave specification. Pure.

A policy protects the sealed keys when only an enclave of a known image decrypts, whatever IAM policies and grants say,
and when the parent's role has no way around that. An Allow that is too wide is an error, unless a Deny that holds stops
it: then a warning, since it takes a single further mistake.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from signer.aws.kms_callers import met_by_role
from signer.aws.kms_conditions import (
    Harm,
    allow_faults,
    binding_values,
    denied_unless,
    deny_faults,
    needs_document,
    pins_image,
    restricts,
)
from signer.aws.kms_policy import ATTESTED_ACTIONS, POWER_ACTIONS, SECRET_ACTIONS
from signer.aws.kms_statements import KEY_ACTIONS, Principal, Statement, role_identity

# Those that take a Recipient (section 3.6); on every other one a condition on it never matches.
_TAKE_A_DOCUMENT = (*ATTESTED_ACTIONS, "kms:GenerateDataKeyPair", "kms:DeriveSharedSecret")
_SENSITIVE = {*SECRET_ACTIONS, *POWER_ACTIONS, "kms:Encrypt"}
_PRINT_ONE = "signer kms-policy prints a policy that has it"
_NEEDED = ("kms:Encrypt", "kms:PutKeyPolicy")  # without the one no new key, without the other no new image
_ONLY_ATTESTED = "allow it to the parent's role only, with StringEqualsIgnoreCase on kms:RecipientAttestation:PCR0"


class Severity(StrEnum):
    """Error: a key can get out, or the enclave can't get at it. Warning: one more mistake, and it is so."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing to change: where, what, and what to do about it."""

    severity: Severity
    where: str
    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.text}; {self.advice}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An enclave that runs, as nitro-cli tells."""

    name: str = ""
    measurements: Mapping[str, str]  # register to lower-case hex
    is_debug: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """What is known beside the policy. Nothing of it has to be."""

    role: str = ""  # ARN of the parent's role; empty: whom the policy lets decrypt with an attestation
    account: str = ""
    running: Sequence[Running] = ()
    required: Collection[str] = ()  # registers that the policy has to ask for
    # by its source ("--pcr0", "expected_pcrs"): register to values
    releases: Mapping[str, Mapping[str, Collection[str]]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """One grant on the key."""

    grant_id: str
    grantee: str
    operations: tuple[str, ...]  # "Decrypt"


def review(statements: Sequence[Statement], expected: Expected, grants: Iterable[Grant] = ()) -> list[Finding]:
    """Everything found: errors first, else in the order of the policy."""
    judge = _Judge(statements, expected)
    found = [*judge.findings(), *judge.of_grants(grants)]
    return sorted(found, key=lambda one: one.severity is Severity.WARNING)


class _Judge:
    """The policy as a whole, which each statement is judged by."""

    def __init__(self, statements: Sequence[Statement], expected: Expected) -> None:
        self._statements = statements
        self._allows = [one for one in statements if one.is_allow]
        self._denies = [one for one in statements if not one.is_allow]
        self._expected = expected
        self._allowed: dict[str, set[str]] = {}  # register to the values with which somebody may decrypt
        self._denied: dict[str, set[str]] = {}  # register to the values that every Deny lets pass
        self._bound: list[Statement] = []  # what lets a known image decrypt, and no other
        self._holding: dict[str, Statement] = {}  # secret action to the Deny that keeps it for known images
        for one in self._allows:
            self._learn_allow(one)
        for one in self._denies:
            self._learn_deny(one)
        self._roles = [expected.role] if expected.role else self._inferred_roles()

    def findings(self) -> Iterator[Finding]:
        for statement in self._statements:
            yield from self._of_allow(statement) if statement.is_allow else self._of_deny(statement)
            yield from _of_resources(statement)
        yield from self._of_missing()
        yield from self._of_agreement()
        yield from self._of_releases()

    def of_grants(self, grants: Iterable[Grant]) -> Iterator[Finding]:
        """Grants: they ignore the conditions of Allow statements, not a Deny."""
        for grant in grants:
            secret = [one for one in SECRET_ACTIONS if one.removeprefix("kms:") in grant.operations]
            power = [one for one in POWER_ACTIONS if one.removeprefix("kms:") in grant.operations]
            if not secret and not power:
                continue
            what = _listed(dict.fromkeys([*secret, *power]))
            text = f"lets {grant.grantee} call {what}, whatever the conditions of an Allow"
            text += self._held_note(secret)
            advice = "revoke it (kms:RevokeGrant) if nobody knows it"
            yield Finding(Severity.WARNING, f"grant {grant.grant_id}", text, advice)

    # -- what the statements say together

    def _learn_allow(self, statement: Statement) -> None:
        bound = binding_values(statement)
        if "kms:Decrypt" in statement.covered and pins_image(bound):
            self._bound.append(statement)
            for register, values in bound.items():
                self._allowed.setdefault(register, set()).update(values)

    def _learn_deny(self, statement: Statement) -> None:
        if not statement.covers_everyone or statement.resources != ("*",):
            return
        unless = denied_unless(statement)
        if unless is not None and "kms:Decrypt" in statement.covered:
            register, values = unless
            self._denied[register] = self._denied[register] & values if register in self._denied else values
        if (unless is not None and unless[0] == "PCR0") or not statement.conditions:
            for action in set(SECRET_ACTIONS) & statement.covered:
                self._holding.setdefault(action, statement)

    def _unsealing(self) -> list[Statement]:
        """What lets a known image decrypt: bound to it by its own condition, or else by a Deny."""
        by_deny = [one for one in self._allows if "kms:Decrypt" in one.covered and "PCR0" in self._denied]
        return self._bound or by_deny

    def _inferred_roles(self) -> list[str]:
        named = [one for statement in self._unsealing() for one in statement.principals if one.kind == "AWS"]
        return list(dict.fromkeys(one.value for one in named if not one.is_everyone and not one.is_account))

    def _held_note(self, actions: Sequence[str]) -> str:
        """Says which Deny stops all of *actions*; empty if one of them isn't stopped."""
        if not actions or not self._holding.keys() >= set(actions):
            return ""
        names = dict.fromkeys(self._holding[action].name for action in actions)
        return f" (only the Deny of {_listed(names)} stops it)"

    def _refused_to_role(self, action: str) -> bool:
        """Whether every role concerned is denied *action*, whatever allows it."""
        return bool(self._roles) and all(
            any(action in one.covered and _denies_outright(one, role) for one in self._denies) for role in self._roles
        )

    # -- Allow

    def _of_allow(self, statement: Statement) -> Iterator[Finding]:
        found = [*self._of_secrets(statement), *self._of_power(statement)]
        yield from found
        if statement.not_principals:
            text = "NotPrincipal allows everybody who isn't named, of any account"
            yield Finding(Severity.ERROR, statement.name, text, "name those who may, as Principal")
        yield from self._of_useless_conditions(statement)
        if not found:
            yield from self._of_encrypt(statement)
            yield from _of_wildcards(statement)
        yield from self._of_principals(statement)

    def _of_secrets(self, statement: Statement) -> Iterator[Finding]:
        """Decrypt and its like, without a condition that only a known image meets."""
        secret = [one for one in SECRET_ACTIONS if one in statement.covered]
        if not secret and not set(_TAKE_A_DOCUMENT) & statement.covered:
            return
        held = self._held_note(secret)
        opens = Severity.WARNING if held else Severity.ERROR
        bound = binding_values(statement)
        faults = [(one, fault) for one in statement.attestation for fault in allow_faults(one)]
        for condition, fault in faults:
            if fault.harm is Harm.CLOSES:
                yield Finding(Severity.ERROR, statement.name, fault.text, fault.advice)
                continue
            # Conditions are met together: one that is worth nothing leaves what another one pins.
            is_extra = pins_image(bound) and not restricts(condition)
            severity = Severity.WARNING if is_extra else opens
            yield Finding(severity, statement.name, fault.text + held, fault.advice)
        if not secret or pins_image(bound) or faults:
            return
        what = f"{_listed(secret)} ({_written(statement, secret)})"
        if bound:
            kind, severity = _weak_binding(bound)
            text = f"{what}: {kind}{held}"
            yield Finding(Severity.WARNING if held else severity, statement.name, text, _ONLY_ATTESTED)
        else:
            text = f"{what} is open to {_who(statement)} without an attestation{held}"
            yield Finding(opens, statement.name, self._root_only(statement) or text, _ONLY_ATTESTED)

    def _root_only(self, statement: Statement) -> str:
        """The text for the policy that AWS makes where none is given, and its like."""
        is_default = len(self._statements) == 1 and statement.covered == set(KEY_ACTIONS) and not statement.conditions
        if not is_default or not all(one.is_account for one in statement.principals):
            return ""
        return (
            "the whole policy is kms:* for the account's root, the default of AWS: IAM policies decide, and whoever "
            "has kms:Decrypt there opens the sealed keys"
        )

    def _of_power(self, statement: Statement) -> Iterator[Finding]:
        """Ways around the policy, for the parent's role."""
        power = [one for one in POWER_ACTIONS if one in statement.covered and one not in SECRET_ACTIONS]
        if not power or needs_document(statement):  # none of them takes a document, so such a condition never matches
            return
        what = f"{_listed(power)} ({_written(statement, power)})"
        direct = statement.covers_everyone or any(_is_role(statement.principals, role) for role in self._roles)
        refused = all(self._refused_to_role(one) for one in power)
        if direct:
            narrowed = any(not one.is_attestation for one in statement.conditions)
            mild = narrowed or (refused and not statement.covers_everyone)
            whom = "everyone" if statement.covers_everyone else "the parent's role"
            text = f"{what} for {whom}: whoever has it can change or get round this policy, or destroy the keys"
            text += " (only a Deny stops it)" if refused else ""
            yield Finding(
                Severity.WARNING if mild else Severity.ERROR,
                statement.name,
                text,
                "leave that to administrators, and deny it to the parent's role",
            )
        elif not refused and self._hands_over(statement):
            open_ = [one for one in power if not self._refused_to_role(one)]
            text = f"{_listed(open_)} for the account: an IAM policy can give it to the parent's role"
            advice = "deny it to the parent's role in this policy, or name administrators"
            yield Finding(Severity.WARNING, statement.name, text, advice)

    def _hands_over(self, statement: Statement) -> bool:
        """Whether an Allow names the account, so that IAM policies count, and no condition keeps them from the role."""
        for account in (one for one in statement.principals if one.is_account):
            roles = self._roles or [f"{account.value.removesuffix('root')}role/?"]  # any, where none is known
            if any(all(met_by_role(one, role) is not False for one in statement.conditions) for role in roles):
                return True
        return False

    def _of_useless_conditions(self, statement: Statement) -> Iterator[Finding]:
        """A condition on the attestation, for actions that take no document."""
        useless = [one for one in KEY_ACTIONS if one in statement.covered and one not in _TAKE_A_DOCUMENT]
        if not needs_document(statement) or not useless:
            return
        closes = "kms:Encrypt" in useless and not self._allows_anybody("kms:Encrypt")
        text = f"{_listed(useless)} ({_written(statement, useless)}): no attestation document goes with it, so this "
        text += "condition never matches" + (", and nobody can seal new keys with kms:Encrypt" if closes else "")
        yield Finding(
            Severity.ERROR if closes else Severity.WARNING,
            statement.name,
            text,
            "put it into a statement without a condition on the attestation, or leave it out",
        )

    def _unattested(self) -> list[Statement]:
        return [one for one in self._allows if not needs_document(one)]

    def _of_encrypt(self, statement: Statement) -> Iterator[Finding]:
        """Whoever encrypts under the key makes blobs that the enclave takes for its own."""
        if "kms:Encrypt" not in statement.covered or needs_document(statement) or not self._roles:
            return
        others = [one for one in statement.principals if not any(one.is_role(role) for role in self._roles)]
        if others:
            text = f"kms:Encrypt for {_listed(map(str, others))}: it can make blobs that the enclave opens"
            yield Finding(Severity.WARNING, statement.name, text, "leave kms:Encrypt to the parent's role")

    def _of_principals(self, statement: Statement) -> Iterator[Finding]:
        account = self._expected.account
        for one in statement.principals:
            if one.is_everyone and pins_image(binding_values(statement)):
                text = "Principal is everyone (*): an enclave of that image decrypts in any account"
                yield Finding(Severity.WARNING, statement.name, text, "name the parent's role")
            elif one.is_session:
                text = f"{one} is one session of a role: the next one (another instance, another name) is refused"
                yield Finding(Severity.WARNING, statement.name, text, "name the role: arn:aws:iam::ACCOUNT:role/NAME")
            elif one.is_deleted:
                text = f"{one} is what is left of a user or role that was deleted: a new one of that name isn't meant"
                yield Finding(Severity.WARNING, statement.name, text, "name the role again, or remove it")
            elif account and one.account and one.account != account:
                text = f"{one} is of another account than the key ({account})"
                yield Finding(Severity.WARNING, statement.name, text, "remove it, unless it is meant")

    # -- Deny

    def _of_deny(self, statement: Statement) -> Iterator[Finding]:
        if statement.not_principals:
            text = "NotPrincipal in a Deny: those named pass it, and the sessions of a role are hard to name"
            yield Finding(Severity.WARNING, statement.name, text, 'write "Principal": "*" with conditions')
        needed = [one for one in ATTESTED_ACTIONS if one in statement.covered and self._is_needed(one)]
        if needed and self._shuts_out(statement):
            text = f"{_listed(needed)} is denied whatever the document: the enclave can't open its keys"
            yield Finding(Severity.ERROR, statement.name, text, f"take it out, or {_ONLY_UNATTESTED}")
        if statement.attestation:
            yield from self._of_attested_deny(statement)

    def _of_attested_deny(self, statement: Statement) -> Iterator[Finding]:
        always = [one for one in _NEEDED if one in statement.covered]
        if always and not needs_document(statement):
            text = f"{_listed(always)} ({_written(statement, always)}): no attestation document goes with it, so it is "
            text += "denied always"
            yield Finding(Severity.ERROR, statement.name, text, f"name {', '.join(SECRET_ACTIONS)} only")
        secret = [one for one in SECRET_ACTIONS if one in statement.covered]
        if not secret:
            return
        held = self._held_note(secret)  # by another one: with a fault it isn't among those that hold
        for fault in deny_faults(statement):
            if not held or fault.harm is Harm.CLOSES:
                yield Finding(Severity.ERROR, statement.name, fault.text, fault.advice)
        if not held and not statement.covers_everyone and not statement.not_principals:
            text = f"the Deny speaks of {_who(statement)} only: everybody else passes it"
            yield Finding(Severity.WARNING, statement.name, text, 'write "Principal": "*"')

    def _is_needed(self, action: str) -> bool:
        """Whether an enclave calls it: Decrypt each one does, data keys are made where an Allow lets it."""
        return action == "kms:Decrypt" or any(action in one.covered for one in self._bound)

    def _shuts_out(self, statement: Statement) -> bool:
        """Whether a Deny meets every request of the enclave, with a document or without."""
        if statement.conditions:
            return any(_denies_outright(statement, role) for role in self._roles)
        accounts = {Principal("AWS", role).account for role in self._roles} or {self._expected.account} - {""}
        named = {one.account for one in statement.principals if one.is_account}
        of_account = bool(named & accounts if accounts else named)
        of_role = any(_is_role(statement.principals, role) for role in self._roles)
        return statement.covers_everyone or of_account or of_role

    # -- the policy as a whole

    def _of_missing(self) -> Iterator[Finding]:
        if not self._unsealing():
            text = "no statement lets an enclave decrypt by the PCR0 of its image"
            yield Finding(Severity.ERROR, "policy", text, f"{_ONLY_ATTESTED}; {_PRINT_ONE}")
        elif self._expected.role and not any(self._lets(one, self._expected.role) for one in self._unsealing()):
            text = f"{self._expected.role} is not the one that may decrypt with an attestation"
            yield Finding(Severity.ERROR, "policy", text, "name the parent's role in the statement with PCR0")
        if missing := [one for one in SECRET_ACTIONS if one not in self._holding]:
            text = f"no Deny keeps {_listed(missing)} from grants, administrators and IAM policies"
            yield Finding(Severity.WARNING, "policy", text, f"{_ONLY_UNATTESTED}; {_PRINT_ONE}")
        if not self._allows_anybody("kms:Encrypt") and not self._refused_to_all("kms:Encrypt"):
            text = "nobody may call kms:Encrypt, with which tee-signer's image seals new keys"
            advice = "allow it to the parent's role, or, where every image seals with data keys, deny it to everyone"
            yield Finding(Severity.WARNING, "policy", text, advice)
        if not self._allows_anybody("kms:PutKeyPolicy") or self._refused_to_all("kms:PutKeyPolicy"):
            text = "nobody may change the policy (kms:PutKeyPolicy): the next image can't be let in"
            yield Finding(Severity.WARNING, "policy", text, "allow it to administrators or to the account's root")

    def _allows_anybody(self, action: str) -> bool:
        return any(action in one.covered for one in self._unattested())

    def _refused_to_all(self, action: str) -> bool:
        return any(action in one.covered and one.covers_everyone and not one.conditions for one in self._denies)

    @staticmethod
    def _lets(statement: Statement, role: str) -> bool:
        account = next(iter(role_identity(role) or ()), "")
        through_iam = any(one.is_account and one.account == account for one in statement.principals)
        return statement.covers_everyone or through_iam or _is_role(statement.principals, role)

    def _of_agreement(self) -> Iterator[Finding]:
        """Allow and Deny have to name the same values."""
        if "PCR0" not in self._denied:  # said already: the Deny is missing
            return
        for register in sorted(self._allowed.keys() | self._denied.keys()):
            allowed, denied = self._allowed.get(register), self._denied.get(register)
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
        asked = [one[register] for one in (self._allowed, self._denied) if register in one]
        return set.intersection(*asked) if asked else None

    def _of_releases(self) -> Iterator[Finding]:
        """The values accepted against those of the enclaves that run, and of the releases that are known."""
        for one in self._expected.running:
            yield from self._of_running(one)
        for register in self._expected.required:
            if self._bound and register not in self._allowed:
                text = f"{register} is not asked for"
                yield Finding(Severity.WARNING, "policy", text, f"add it to the condition, and a Deny; {_PRINT_ONE}")
        for source, registers in self._expected.releases.items():
            for register, values in registers.items():
                yield from self._of_release(source, register, set(values))
        for register in sorted(self._allowed):
            yield from self._of_old_values(register)

    def _of_old_values(self, register: str) -> Iterator[Finding]:
        known = {value for one in self._expected.releases.values() for value in one.get(register, ())}
        running = [one for one in self._expected.running if not one.is_debug]
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


_ONLY_UNATTESTED = (
    f"add a Deny for everyone on {', '.join(SECRET_ACTIONS)} with StringNotEqualsIgnoreCase on "
    "kms:RecipientAttestation:PCR0"
)


def _weak_binding(bound: Mapping[str, set[str]]) -> tuple[str, Severity]:
    names = " and ".join(sorted(bound))
    if "PCR8" in bound:
        text = f"{names} is asked for, not PCR0: every image that is ever signed with that certificate decrypts"
        return text, Severity.WARNING
    return f"{names} says nothing of the whole image: others pass that share it", Severity.ERROR


def _denies_outright(statement: Statement, role: str) -> bool:
    """Whether a Deny meets every request of *role*."""
    named = statement.covers_everyone or _is_role(statement.principals, role, sessions=False)
    return named and statement.resources == ("*",) and all(met_by_role(one, role) for one in statement.conditions)


def _is_role(principals: Iterable[Principal], role: str, *, sessions: bool = True) -> bool:
    return any(one.is_role(role) and (sessions or not one.is_session) for one in principals)


def _of_resources(statement: Statement) -> Iterator[Finding]:
    if statement.resources == ("*",):
        return
    what = "NotResource" if statement.not_resources else f"Resource {_listed(statement.resources) or 'is missing'}"
    text = f"{what}: in a key policy, the key that it belongs to is *"
    text += "" if statement.is_allow else "; whether this Deny holds can't be said"
    yield Finding(Severity.WARNING, statement.name, text, 'write "Resource": "*"')


def _of_wildcards(statement: Statement) -> Iterator[Finding]:
    """Patterns that cover more than reading, where nothing else was said of them."""
    covered = _SENSITIVE & statement.covered
    patterns = [one for one in statement.patterns_for(covered) if one == "NotAction" or set("*?") & {*one}]
    if patterns or statement.not_actions:
        text = f"{_listed(patterns) or 'NotAction'} covers {_listed(sorted(covered)) or 'what AWS adds later'}"
        yield Finding(Severity.WARNING, statement.name, text, "name the actions")


def _who(statement: Statement) -> str:
    """Those that an Allow lets in, in words."""
    if statement.not_principals:
        return f"everybody but {_listed(map(str, statement.not_principals))}"
    names = [
        f"{one} (so to whomever IAM policies of the account say)" if one.is_account else str(one)
        for one in statement.principals
    ]
    return _listed(names) or "nobody"


def _written(statement: Statement, actions: Iterable[str]) -> str:
    """What is written in the statement that covers *actions*."""
    return f"by {_listed(statement.patterns_for(actions))}"


def _listed(names: Iterable[str], most: int = 6) -> str:
    found = list(names)
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more
