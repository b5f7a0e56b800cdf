"""Key policies as KMS reads them: statements, who and what they cover, and what their conditions ask. Pure.

Of the policy language only as much as it takes to judge the policy of one KMS key. Element names, Effect and values
are case-sensitive there; actions, operators and condition keys are not.
"""

import fnmatch
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from signer.errors import SignerError

_NAMES = """
    CancelKeyDeletion ConnectCustomKeyStore CreateAlias CreateGrant Decrypt DeleteAlias DeleteImportedKeyMaterial
    DeriveSharedSecret DescribeKey DisableKey DisableKeyRotation EnableKey EnableKeyRotation Encrypt
    GenerateDataKey GenerateDataKeyPair GenerateDataKeyPairWithoutPlaintext GenerateDataKeyWithoutPlaintext
    GenerateMac GetKeyPolicy GetKeyRotationStatus GetParametersForImport GetPublicKey ImportKeyMaterial
    ListGrants ListKeyPolicies ListKeyRotations ListResourceTags PutKeyPolicy ReEncryptFrom ReEncryptTo
    ReplicateKey RetireGrant RevokeGrant RotateKeyOnDemand ScheduleKeyDeletion Sign SynchronizeMultiRegionKey
    TagResource UntagResource UpdateAlias UpdateKeyDescription UpdatePrimaryRegion Verify VerifyMac
"""
# What can be done to one key; the actions without a key (CreateKey, ListKeys) are left out.
KEY_ACTIONS = tuple(f"kms:{name}" for name in _NAMES.split())
_ATTESTATION = "kms:recipientattestation:"  # lower case: condition keys ignore it
_TWO_WAYS = ("Action", "Principal", "Resource")  # each of them has a Not... beside it
_ELEMENTS = ("Sid", "Effect", "Condition", *_TWO_WAYS, *(f"Not{name}" for name in _TWO_WAYS))
_DOCUMENT = ("Version", "Id", "Statement")
_VERSIONS = ("2008-10-17", "2012-10-17")  # without one it is the first
_KINDS = ("AWS", "CanonicalUser", "Federated", "Service")
_ROOT_ARN = re.compile(r"arn:[a-z-]+:iam::(\d{12}):root")
_SESSION_ARN = re.compile(r"arn:([a-z-]+):sts::(\d{12}):assumed-role/([^/]+)/.+")
_ROLE_ARN = re.compile(r"arn:([a-z-]+):iam::(\d{12}):role/(?:.+/)?([^/]+)")


class PolicyFormatError(SignerError):
    """The text is no key policy, so nothing can be said of it."""


@dataclass(frozen=True, slots=True)
class Principal:
    """One entry of Principal: *kind* is AWS, Service, Federated, CanonicalUser."""

    kind: str
    value: str

    @property
    def is_everyone(self) -> bool:
        return self.kind == "AWS" and self.value == "*"

    @property
    def account(self) -> str:
        """The account that it belongs to; empty where the text doesn't tell."""
        found = re.fullmatch(r"(\d{12})|arn:[a-z-]+:(?:iam|sts)::(\d{12}):.+", self.value)
        return "" if self.kind != "AWS" or found is None else found[1] or found[2]

    @property
    def is_account(self) -> bool:
        """Whether it is an account as such, whose IAM policies then count: its root ARN, or its number."""
        return self.kind == "AWS" and bool(_ROOT_ARN.fullmatch(self.value) or re.fullmatch(r"\d{12}", self.value))

    @property
    def is_session(self) -> bool:
        return self.kind == "AWS" and _SESSION_ARN.fullmatch(self.value) is not None

    @property
    def is_deleted(self) -> bool:
        """Whether it is the id that IAM leaves where a user or role was deleted."""
        return self.kind == "AWS" and re.fullmatch(r"A(RO|ID)A[A-Z0-9]{12,}", self.value) is not None

    def is_role(self, role: str) -> bool:
        """Whether it stands for *role*: the ARN itself, or that of one of its sessions."""
        mine, other = role_identity(self.value), role_identity(role)
        return self.kind == "AWS" and (self.value == role or (mine is not None and mine == other))

    def __str__(self) -> str:
        if self.is_everyone:
            return "everyone (*)"
        return self.value if self.kind == "AWS" else f"{self.kind} {self.value}"


def role_identity(arn: str) -> tuple[str, str] | None:
    """Account and name of the role that an ARN of IAM or STS speaks of; names are unique, whatever the path."""
    found = _ROLE_ARN.fullmatch(arn) or _SESSION_ARN.fullmatch(arn)
    return None if found is None else (found[2], found[3])


@dataclass(frozen=True, slots=True)
class Condition:
    """One key under one operator; *values* are alternatives, under a negated operator none of which may be met."""

    operator: str  # as written
    key: str  # as written
    values: tuple[str, ...]

    @property
    def quantifier(self) -> str:
        """`forallvalues`, `foranyvalue` or empty."""
        return self.operator.lower().rpartition(":")[0]

    @property
    def base(self) -> str:
        """The operator in lower case, without quantifier and IfExists."""
        return self.operator.lower().rpartition(":")[2].removesuffix("ifexists")

    @property
    def if_exists(self) -> bool:
        return self.operator.lower().endswith("ifexists")

    @property
    def is_negated(self) -> bool:
        return "not" in self.base

    @property
    def is_attestation(self) -> bool:
        return self.key.lower().startswith(_ATTESTATION)

    @property
    def register(self) -> str:
        """`PCR0` ... `PCR31` for what an enclave's document is asked for; empty for anything else."""
        name = self.key.lower().removeprefix(_ATTESTATION) if self.is_attestation else ""
        if name == "imagesha384":
            return "PCR0"  # the same register
        found = re.fullmatch(r"pcr(0|[12]?[1-9]|[123]0|31)", name)
        return "" if found is None else name.upper()

    def __str__(self) -> str:
        return f"{self.operator} on {self.key}"


@dataclass(frozen=True)
class Statement:
    """One statement; *index* counts from 1."""

    index: int
    sid: str
    effect: str
    principals: tuple[Principal, ...]
    not_principals: tuple[Principal, ...]
    actions: tuple[str, ...]
    not_actions: tuple[str, ...]
    resources: tuple[str, ...]
    not_resources: tuple[str, ...]
    conditions: tuple[Condition, ...]

    @property
    def name(self) -> str:
        return f"statement {self.index}" + (f" ({self.sid})" if self.sid else "")

    @property
    def is_allow(self) -> bool:
        return self.effect == "Allow"

    @cached_property
    def covered(self) -> frozenset[str]:
        """The actions on a key that it speaks of."""
        if self.not_actions:
            return frozenset(one for one in KEY_ACTIONS if not _any_matches(self.not_actions, one))
        return frozenset(one for one in KEY_ACTIONS if _any_matches(self.actions, one))

    @property
    def covers_everyone(self) -> bool:
        return any(one.is_everyone for one in self.principals)

    @property
    def attestation(self) -> tuple[Condition, ...]:
        return tuple(one for one in self.conditions if one.is_attestation)

    def patterns_for(self, actions: Iterable[str]) -> list[str]:
        """What is written that covers some of *actions*."""
        if self.not_actions:
            return ["NotAction"]
        wanted = list(actions)
        return [pattern for pattern in self.actions if any(matches(pattern, one) for one in wanted)]


def parse_policy(text: str) -> list[Statement]:
    """The statements of a policy's JSON. Raises `PolicyFormatError`."""
    try:
        document = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as exc:
        raise PolicyFormatError(f"the policy is no JSON: {exc}") from exc
    if isinstance(document, dict) and isinstance(document.get("Policy"), str):  # what GetKeyPolicy answers
        return parse_policy(document["Policy"])
    if not isinstance(document, dict) or "Statement" not in document:
        raise PolicyFormatError("the policy has no Statement: give the document itself, not what is around it")
    unknown = [name for name in document if name not in _DOCUMENT]
    if unknown:
        raise PolicyFormatError(f"the policy has {unknown[0]}, which is no element of a policy (case counts)")
    if document.get("Version", _VERSIONS[0]) not in _VERSIONS:
        raise PolicyFormatError(f"Version has to be {_VERSIONS[-1]}: it names the language, not this policy")
    statements = document["Statement"]
    if isinstance(statements, dict):
        statements = [statements]
    if not isinstance(statements, list) or not statements:
        raise PolicyFormatError("Statement has to be a list of statements")
    return [_statement(index, entry) for index, entry in enumerate(statements, 1)]


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A name that is there twice would hide one of its values from us, and perhaps the other one from KMS."""
    found: dict[str, object] = {}
    for name, value in pairs:
        if not name.isprintable():
            raise ValueError(f"{name!r} is no name of anything")
        if name in found:
            raise ValueError(f"{name} is there twice in one object")
        found[name] = value
    return found


def _statement(index: int, entry: object) -> Statement:
    where = f"statement {index}"
    if not isinstance(entry, Mapping):
        raise PolicyFormatError(f"{where} is no object")
    unknown = [name for name in entry if name not in _ELEMENTS]
    if unknown:
        raise PolicyFormatError(f"{where} has {unknown[0]}, which is no element of a statement (case counts)")
    if entry.get("Effect") not in ("Allow", "Deny"):
        raise PolicyFormatError(f"{where}: Effect has to be Allow or Deny")
    for name in _TWO_WAYS:
        if name in entry and f"Not{name}" in entry:
            raise PolicyFormatError(f"{where} has both {name} and Not{name}")
    found = _read_statement(index, where, entry)
    # An element that names nobody or nothing counts as none: an empty Not... would mean everybody, everything.
    if not found.principals and not found.not_principals:
        raise PolicyFormatError(f"{where} has no Principal")
    if not found.actions and not found.not_actions:
        raise PolicyFormatError(f"{where} has no Action")
    return found


def _read_statement(index: int, where: str, entry: Mapping[str, object]) -> Statement:
    return Statement(
        index=index,
        sid=str(entry.get("Sid", "")),
        effect=str(entry["Effect"]),
        principals=_principals(where, entry.get("Principal")),
        not_principals=_principals(where, entry.get("NotPrincipal")),
        actions=_texts(where, "Action", entry.get("Action", [])),
        not_actions=_texts(where, "NotAction", entry.get("NotAction", [])),
        resources=_texts(where, "Resource", entry.get("Resource", [])),
        not_resources=_texts(where, "NotResource", entry.get("NotResource", [])),
        conditions=tuple(_conditions(where, entry.get("Condition", {}))),
    )


def _principals(where: str, value: object) -> tuple[Principal, ...]:
    if value is None:
        return ()
    if isinstance(value, str | list):  # "*", or what IAM's own documents have as a bare ARN
        return tuple(Principal("AWS", one) for one in _texts(where, "Principal", value))
    if not isinstance(value, Mapping):
        raise PolicyFormatError(f'{where}: Principal has to be "*", or an object such as {{"AWS": "arn:..."}}')
    unknown = [kind for kind in value if kind not in _KINDS]
    if unknown:
        raise PolicyFormatError(f"{where}: Principal has {unknown[0]}, it takes {', '.join(_KINDS)} (case counts)")
    return tuple(Principal(kind, one) for kind, some in value.items() for one in _texts(where, "Principal", some))


def _conditions(where: str, value: object) -> Iterator[Condition]:
    if not isinstance(value, Mapping) or not all(isinstance(keys, Mapping) for keys in value.values()):
        raise PolicyFormatError(f"{where}: Condition has to be an object of operators, each with an object of keys")
    for operator, keys in value.items():
        for key, values in keys.items():
            yield Condition(str(operator), str(key), _texts(where, f"Condition {operator} {key}", values))


def _texts(where: str, element: str, value: object) -> tuple[str, ...]:
    """One scalar, or a list of them, as texts."""
    values = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str | bool | int | float) for one in values):
        raise PolicyFormatError(f"{where}: {element} has to be a text, or a list of texts")
    return tuple(str(one).lower() if isinstance(one, bool) else str(one) for one in values)


def _any_matches(patterns: Iterable[str], action: str) -> bool:
    return any(matches(pattern, action) for pattern in patterns)


def matches(pattern: str, text: str, *, ignore_case: bool = True) -> bool:
    """Whether *pattern*, in which * and ? are wildcards, is met by *text*."""
    return _expression(pattern, ignore_case).match(text) is not None


@lru_cache(maxsize=1024)  # a pattern is asked for each action on a key
def _expression(pattern: str, ignore_case: bool) -> re.Pattern[str]:
    # fnmatch has no backtracking of many ".*"; its [ is no wildcard here.
    return re.compile(fnmatch.translate(pattern.replace("[", "[[]")), re.IGNORECASE if ignore_case else 0)
