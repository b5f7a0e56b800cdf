"""The key policy for the symmetric KMS key that seals an enclave's keys; enclave specification, 3.9. Pure.

Four ideas: only an attested enclave decrypts (Allow with a condition); nobody else ever does, whatever IAM, grants or a
later Allow say (Deny under a negated operator, which a request without a document meets, too); the account administers
the key without being able to use it; the parent's role, the first thing that an intruder gets, never administers it.
Encrypt stands apart: it takes no attestation document, so a condition on registers would refuse it always.

What is printed here is judged, like any other policy, by `signer.aws.kms_review`.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from signer.aws.kms_statements import role_identity
from signer.errors import ConfigurationError

REGISTERS = ("PCR0", "PCR1", "PCR2", "PCR3", "PCR8")  # what nitro-cli build-enclave and the parent's role determine
PARTITIONS = ("aws", "aws-cn", "aws-us-gov")
ATTESTATION = "kms:RecipientAttestation:"
# Of a role or user, as IAM takes them; wildcards and blanks, which a key policy can't name, are left out of paths.
NAME_WITH_PATH = r"(?:[\x21-\x29\x2b-\x2e\x30-\x3e\x40-\x7e]+/)*[\w+=,.@-]{1,64}"

SECRET_ACTIONS = ("kms:Decrypt", "kms:GenerateDataKey", "kms:ReEncryptFrom")  # each of them opens, or makes, a data key
ATTESTED_ACTIONS = (
    "kms:Decrypt",
    "kms:GenerateDataKey",
)  # those that an enclave calls, with a document
OWN_ACTIONS = ("kms:DescribeKey", "kms:Encrypt", "kms:GetKeyPolicy", "kms:ListGrants")  # the last ones: for --check
POWER_ACTIONS = (  # each of them gets at the keys by a detour, or destroys them
    "kms:CreateGrant",
    "kms:DeleteImportedKeyMaterial",
    "kms:DisableKey",
    "kms:PutKeyPolicy",
    "kms:ReEncryptFrom",
    "kms:ReEncryptTo",
    "kms:ReplicateKey",  # a replica has a policy of its own
    "kms:ScheduleKeyDeletion",
)
_ADMINISTRATION = (  # without use, grants and replicas
    "kms:CancelKeyDeletion",
    "kms:CreateAlias",
    "kms:DeleteAlias",
    "kms:DescribeKey",
    "kms:DisableKey",
    "kms:DisableKeyRotation",
    "kms:EnableKey",
    "kms:EnableKeyRotation",
    "kms:GetKeyPolicy",
    "kms:GetKeyRotationStatus",
    "kms:ListGrants",
    "kms:ListKeyPolicies",
    "kms:ListKeyRotations",
    "kms:ListResourceTags",
    "kms:PutKeyPolicy",
    "kms:RevokeGrant",
    "kms:ScheduleKeyDeletion",
    "kms:TagResource",
    "kms:UntagResource",
    "kms:UpdateAlias",
    "kms:UpdateKeyDescription",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """Who may do what with the key: *registers* are the values accepted, *role* is the parent's, an ARN of IAM."""

    account: str
    role: str
    registers: Mapping[str, Sequence[str]]  # lower-case hex
    administrators: Sequence[str] = field(default=())  # ARNs; none: who IAM policies of the account say
    partition: str = "aws"


def key_policy(key: Key) -> dict[str, object]:
    """The policy as an object, whose order is that of the text."""
    statements = [
        *_administration(key),
        _allow("SignerEncrypts", key.role, OWN_ACTIONS),
        _allow("EnclaveDecrypts", key.role, ATTESTED_ACTIONS)
        | {"Condition": {"StringEqualsIgnoreCase": {_condition_key(r): _values(v) for r, v in _registers(key)}}},
        # One statement for each register: under one operator they would have to differ all at once.
        *(_nobody_else(register, values) for register, values in _registers(key)),
        _statement("SignerNeverAdministers", "Deny", key.role, POWER_ACTIONS),
    ]
    return {"Version": "2012-10-17", "Statement": statements}


def as_text(policy: Mapping[str, object]) -> str:
    """The JSON that KMS takes."""
    return json.dumps(policy, indent=2) + "\n"


def measurement(register: str, text: str) -> str:
    """The value of a register, checked. Raises `ConfigurationError`."""
    value = text.strip().lower()
    if not re.fullmatch("[0-9a-f]{96}", value):
        raise ConfigurationError(f"{register}: expected 96 hexadecimal digits, as nitro-cli build-enclave prints them")
    if not value.strip("0"):
        why = "of a parent without a role" if register == "PCR3" else "of an image that isn't signed"
        known = why if register in ("PCR3", "PCR8") else "of debug mode"
        raise ConfigurationError(f"{register}: a register of zeros is that {known}: it protects nothing")
    return value


def role_arn(text: str, *, account: str, partition: str) -> str:
    """The role's ARN for an ARN, that of a session, or a name (with its path). Raises `ConfigurationError`."""
    if not text.startswith("arn:"):
        if not re.fullmatch(f"/?{NAME_WITH_PATH}", text, re.ASCII):
            raise ConfigurationError(f"role {text!r}: expected a role's ARN or name")
        return f"arn:{partition}:iam::{account}:role/{text.lstrip('/')}"
    named = role_identity(text)
    if named is None or not re.fullmatch(NAME_WITH_PATH, text.partition("/")[2], re.ASCII):
        raise ConfigurationError(f"role {text}: expected an ARN such as arn:{partition}:iam::{account}:role/NAME")
    if named[0] != account:
        raise ConfigurationError(f"role {text} is of account {named[0]}, the key of {account}: give that of the key")
    if text.split(":")[1] != partition:
        raise ConfigurationError(f"role {text} is of another partition than {partition}: see --partition, --region")
    return f"arn:{partition}:iam::{account}:role/{named[1]}" if ":assumed-role/" in text else text


def partition_of(*, arn: str = "", region: str = "") -> str:
    """The partition that an ARN or a region's name lies in."""
    if arn.startswith("arn:"):
        return arn.split(":")[1]
    return next((f"aws-{one}" for one in ("cn", "us-gov") if region.startswith(f"{one}-")), "aws")


def _administration(key: Key) -> Iterable[dict[str, object]]:
    root = f"arn:{key.partition}:iam::{key.account}:root"
    if not key.administrators:  # then IAM policies of the account say who
        return [_allow("AccountAdministers", root, _ADMINISTRATION)]
    only_the_root_user = {"ArnEquals": {"aws:PrincipalArn": root}}  # else IAM policies would count beside the list
    return [
        _allow("RootUserAdministers", root, _ADMINISTRATION) | {"Condition": only_the_root_user},
        _allow("AdministratorsAdminister", _values(key.administrators), _ADMINISTRATION),
    ]


def _nobody_else(register: str, values: Sequence[str]) -> dict[str, object]:
    sid = "OnlyTheEnclaveDecrypts" + ("" if register == "PCR0" else register)
    unless = {"StringNotEqualsIgnoreCase": {_condition_key(register): _values(values)}}
    return _statement(sid, "Deny", "*", SECRET_ACTIONS) | {"Condition": unless}


def _registers(key: Key) -> list[tuple[str, Sequence[str]]]:
    return [(register, key.registers[register]) for register in REGISTERS if key.registers.get(register)]


def _condition_key(register: str) -> str:
    return f"{ATTESTATION}{register}"


def _values(values: Sequence[str]) -> str | list[str]:
    """Sorted and without repeats, so that the same question gets the same text; one alone without a list."""
    unique = sorted(set(values))
    return unique[0] if len(unique) == 1 else unique


def _allow(sid: str, who: str | list[str], actions: Sequence[str]) -> dict[str, object]:
    return _statement(sid, "Allow", who, actions)


def _statement(sid: str, effect: str, who: str | list[str], actions: Sequence[str]) -> dict[str, object]:
    return {"Sid": sid, "Effect": effect, "Principal": {"AWS": who}, "Action": [*actions], "Resource": "*"}
