"""What is missing in a KMS key policy, or too wide; section 3.9 of the enclave specification. Pure.

A policy protects the sealed keys when only an enclave of a known image decrypts, whatever IAM policies and grants say,
and when the parent's role has no way around that. An Allow that is too wide is an error, unless a Deny that holds stops
it: then a warning, since it takes a single further mistake.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
from signer.aws.kms_findings import Expected, Finding, Grant, Running, Severity, listed
from signer.aws.kms_images import PRINT_ONE, Images
from signer.aws.kms_policy import ATTESTED_ACTIONS, POWER_ACTIONS, SECRET_ACTIONS
from signer.aws.kms_statements import KEY_ACTIONS, Principal, Statement, role_identity

__all__ = ["Expected", "Finding", "Grant", "Running", "Severity", "review"]

# Those that take a Recipient (section 3.6); on every other one a condition on it never matches.
_TAKE_A_DOCUMENT = (*ATTESTED_ACTIONS, "kms:GenerateDataKeyPair", "kms:DeriveSharedSecret")
_SENSITIVE = {*SECRET_ACTIONS, *POWER_ACTIONS, "kms:Encrypt"}
_NEEDED = ("kms:Encrypt", "kms:PutKeyPolicy")  # without the one no new key, without the other no new image
_ONLY_ATTESTED = "allow it to the parent's role only, with StringEqualsIgnoreCase on kms:RecipientAttestation:PCR0"


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
        self._images = Images()
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
        yield from self._images.findings(self._expected)

    def of_grants(self, grants: Iterable[Grant]) -> Iterator[Finding]:
        """Grants: they ignore the conditions of Allow statements, not a Deny."""
        for grant in grants:
            secret = [one for one in SECRET_ACTIONS if one.removeprefix("kms:") in grant.operations]
            power = [one for one in POWER_ACTIONS if one.removeprefix("kms:") in grant.operations]
            if not secret and not power:
                continue
            what = listed(dict.fromkeys([*secret, *power]))
            text = f"lets {grant.grantee} call {what}, whatever the conditions of an Allow"
            text += self._held_note(secret)
            advice = "revoke it (kms:RevokeGrant) if nobody knows it"
            yield Finding(Severity.WARNING, f"grant {grant.grant_id}", text, advice)

    # -- what the statements say together

    def _learn_allow(self, statement: Statement) -> None:
        bound = binding_values(statement)
        if "kms:Decrypt" in statement.covered and pins_image(bound):
            self._bound.append(statement)
            self._images.allow(bound)

    def _learn_deny(self, statement: Statement) -> None:
        if not statement.covers_everyone or statement.resources != ("*",):
            return
        unless = denied_unless(statement)
        if unless is not None and "kms:Decrypt" in statement.covered:
            self._images.deny_all_but(*unless)
        if (unless is not None and unless[0] == "PCR0") or not statement.conditions:
            for action in set(SECRET_ACTIONS) & statement.covered:
                self._holding.setdefault(action, statement)

    def _unsealing(self) -> list[Statement]:
        """What lets a known image decrypt: bound to it by its own condition, or else by a Deny."""
        by_deny = [one for one in self._allows if "kms:Decrypt" in one.covered and "PCR0" in self._images.denied]
        return self._bound or by_deny

    def _inferred_roles(self) -> list[str]:
        named = [one for statement in self._unsealing() for one in statement.principals if one.kind == "AWS"]
        return list(dict.fromkeys(one.value for one in named if not one.is_everyone and not one.is_account))

    def _held_note(self, actions: Sequence[str]) -> str:
        """Says which Deny stops all of *actions*; empty if one of them isn't stopped."""
        if not actions or not self._holding.keys() >= set(actions):
            return ""
        names = dict.fromkeys(self._holding[action].name for action in actions)
        return f" (only the Deny of {listed(names)} stops it)"

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
        what = f"{listed(secret)} ({_written(statement, secret)})"
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
        what = f"{listed(power)} ({_written(statement, power)})"
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
            text = f"{listed(open_)} for the account: an IAM policy can give it to the parent's role"
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
        text = f"{listed(useless)} ({_written(statement, useless)}): no attestation document goes with it, so this "
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
            text = f"kms:Encrypt for {listed(map(str, others))}: it can make blobs that the enclave opens"
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
            text = f"{listed(needed)} is denied whatever the document: the enclave can't open its keys"
            yield Finding(Severity.ERROR, statement.name, text, f"take it out, or {_ONLY_UNATTESTED}")
        if statement.attestation:
            yield from self._of_attested_deny(statement)

    def _of_attested_deny(self, statement: Statement) -> Iterator[Finding]:
        always = [one for one in _NEEDED if one in statement.covered]
        if always and not needs_document(statement):
            text = f"{listed(always)} ({_written(statement, always)}): no attestation document goes with it, so it is "
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
            yield Finding(Severity.ERROR, "policy", text, f"{_ONLY_ATTESTED}; {PRINT_ONE}")
        elif self._expected.role and not any(self._lets(one, self._expected.role) for one in self._unsealing()):
            text = f"{self._expected.role} is not the one that may decrypt with an attestation"
            yield Finding(Severity.ERROR, "policy", text, "name the parent's role in the statement with PCR0")
        if missing := [one for one in SECRET_ACTIONS if one not in self._holding]:
            text = f"no Deny keeps {listed(missing)} from grants, administrators and IAM policies"
            yield Finding(Severity.WARNING, "policy", text, f"{_ONLY_UNATTESTED}; {PRINT_ONE}")
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
    what = "NotResource" if statement.not_resources else f"Resource {listed(statement.resources) or 'is missing'}"
    text = f"{what}: in a key policy, the key that it belongs to is *"
    text += "" if statement.is_allow else "; whether this Deny holds can't be said"
    yield Finding(Severity.WARNING, statement.name, text, 'write "Resource": "*"')


def _of_wildcards(statement: Statement) -> Iterator[Finding]:
    """Patterns that cover more than reading, where nothing else was said of them."""
    covered = _SENSITIVE & statement.covered
    patterns = [one for one in statement.patterns_for(covered) if one == "NotAction" or set("*?") & {*one}]
    if patterns or statement.not_actions:
        text = f"{listed(patterns) or 'NotAction'} covers {listed(sorted(covered)) or 'what AWS adds later'}"
        yield Finding(Severity.WARNING, statement.name, text, "name the actions")


def _who(statement: Statement) -> str:
    """Those that an Allow lets in, in words."""
    if statement.not_principals:
        return f"everybody but {listed(map(str, statement.not_principals))}"
    names = [
        f"{one} (so to whomever IAM policies of the account say)" if one.is_account else str(one)
        for one in statement.principals
    ]
    return listed(names) or "nobody"


def _written(statement: Statement, actions: Iterable[str]) -> str:
    """What is written in the statement that covers *actions*."""
    return f"by {listed(statement.patterns_for(actions))}"
