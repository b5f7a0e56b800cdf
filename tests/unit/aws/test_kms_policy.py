"""The key policy that is printed, and what is found in others: bad policies from practice, and our own made worse."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from signer.aws.kms_policy import (
    ATTESTED_ACTIONS,
    POWER_ACTIONS,
    REGISTERS,
    SECRET_ACTIONS,
    Key,
    as_text,
    key_policy,
    measurement,
    partition_of,
    role_arn,
)
from signer.aws.kms_review import Expected, Finding, Grant, Running, Severity, review
from signer.aws.kms_statements import Condition, PolicyFormatError, Principal, parse_policy
from signer.errors import ConfigurationError

ACCOUNT = "111122223333"
ROOT = f"arn:aws:iam::{ACCOUNT}:root"
ROLE = f"arn:aws:iam::{ACCOUNT}:role/signatory-nitro-role"
ADMIN = f"arn:aws:iam::{ACCOUNT}:role/key-admin"
OLD, NEW, OTHER, ZEROS = "a1" * 48, "b2" * 48, "c3" * 48, "0" * 96
PCR0 = "kms:RecipientAttestation:PCR0"
Json = dict[str, Any]


def ours(*, administrators: tuple[str, ...] = (), **registers: list[str]) -> Json:
    """What `signer kms-policy` prints."""
    key = Key(account=ACCOUNT, role=ROLE, registers=registers or {"PCR0": [NEW]}, administrators=administrators)
    policy: Json = json.loads(as_text(key_policy(key)))
    return policy


def statement(policy: Json, sid: str) -> Json:
    (found,) = [one for one in policy["Statement"] if one["Sid"] == sid]
    return dict(found)


def findings(policy: Json | list[Json], expected: Expected | None = None) -> list[Finding]:
    document = {"Statement": policy} if isinstance(policy, list) else policy
    return review(parse_policy(json.dumps(document)), expected or Expected(account=ACCOUNT))


def allow(actions: str | list[str], who: object = ROLE, **more: object) -> Json:
    principal = {"AWS": who} if isinstance(who, str | list) and who != "*" else who
    return {"Effect": "Allow", "Principal": principal, "Action": actions, "Resource": "*", **more}


def deny(actions: str | list[str], who: object = "*", **more: object) -> Json:
    return allow(actions, who, **more) | {"Effect": "Deny"}


def all_but(actions: str | list[str], who: str) -> Json:
    return {name: value for name, value in allow([], who).items() if name != "Action"} | {"NotAction": actions}


def when(operator: str, value: object = NEW, key: str = PCR0) -> Json:
    return {operator: {key: value}}


ENCRYPT = allow(["kms:Encrypt", "kms:DescribeKey"])
DECRYPT = allow("kms:Decrypt", Condition=when("StringEqualsIgnoreCase"))
ADMINISTER = allow("kms:PutKeyPolicy", ADMIN)
HOLD = deny([*SECRET_ACTIONS], Condition=when("StringNotEqualsIgnoreCase"))
GOOD = [ADMINISTER, ENCRYPT, DECRYPT, HOLD]
E, W = Severity.ERROR, Severity.WARNING


def test_a_small_good_policy() -> None:
    assert findings(GOOD) == []


# Severity, part of the text, and a policy. The first ones are as the documentation of products shows them.
BAD: dict[str, tuple[Severity, str, list[Json]]] = {
    "the default of AWS": (E, "the default of AWS", [allow("kms:*", ROOT)]),
    "Signatory's example, root": (
        E,
        "statement 1: kms:Decrypt, kms:GenerateDataKey, kms:ReEncryptFrom (by kms:*) is open",
        [allow("kms:*", ROOT), allow(["kms:Encrypt", "kms:GenerateDataKey"]), DECRYPT],
    ),
    "Signatory's example, data keys": (
        E,
        "statement 2: kms:GenerateDataKey (by kms:GenerateDataKey) is open",
        [allow("kms:*", ROOT), allow(["kms:Encrypt", "kms:GenerateDataKey"]), DECRYPT],
    ),
    "the console's key users": (
        E,
        "statement 2: kms:Decrypt, kms:GenerateDataKey, kms:ReEncryptFrom",
        [
            ADMINISTER,
            allow(["kms:Encrypt", "kms:Decrypt", "kms:ReEncrypt*", "kms:GenerateDataKey*", "kms:DescribeKey"]),
        ],
    ),
    "the console's grants for services": (
        W,
        "kms:CreateGrant (by kms:CreateGrant) for the parent's role",
        [*GOOD, allow(["kms:CreateGrant"], Condition={"Bool": {"kms:GrantIsForAWSResource": "true"}})],
    ),
    "AWS's NotAction": (E, "(by NotAction) is open", [all_but("kms:Decrypt", ROOT), DECRYPT]),
    "NotAction of all that is secret": (
        W,
        "NotAction covers",
        [*GOOD, all_but([*SECRET_ACTIONS, *POWER_ACTIONS], ADMIN)],
    ),
    "debug mode's zeros": (
        E,
        "zeros are what an enclave in debug mode shows",
        [ADMINISTER, allow("kms:Decrypt", Condition=when("StringEqualsIgnoreCase", ZEROS))],
    ),
    "zeros beside a release": (
        E,
        "debug mode",
        [ADMINISTER, allow("kms:Decrypt", Condition=when("StringEqualsIgnoreCase", [NEW, ZEROS]))],
    ),
    "a placeholder": (
        E,
        "'ENCLAVE_PCR0_VALUE' is the value of no register",
        [allow("kms:Decrypt", Condition=when("StringEqualsIgnoreCase", "ENCLAVE_PCR0_VALUE"))],
    ),
    "open to the role": (E, f"kms:Decrypt (by kms:Decrypt) is open to {ROLE}", [allow("kms:Decrypt")]),
    "an assumed role": (
        W,
        "is one session of a role",
        [*GOOD, allow("kms:Encrypt", f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-0123456789abcdef0")],
    ),
    "an assumed role, open": (
        E,
        "is open to arn:aws:sts::",
        [allow("kms:Decrypt", f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-0123456789abcdef0")],
    ),
    "power for a session of the role": (
        E,
        "kms:PutKeyPolicy (by kms:PutKeyPolicy) for the parent's role",
        [*GOOD, allow("kms:PutKeyPolicy", f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-0123")],
    ),
    "the account by number": (E, f"is open to {ACCOUNT} (so to whomever IAM", [allow("kms:Decrypt", ACCOUNT)]),
    "principals as a list": (E, f"is open to {ADMIN}, {ROLE}", [allow("kms:Decrypt", [ADMIN, ROLE])]),
    "a principal without AWS": (E, f"is open to {ROLE}", [{**allow("kms:Decrypt"), "Principal": ROLE}]),
    "everyone": (E, "is open to everyone (*)", [allow("kms:Decrypt", "*")]),
    "everyone of AWS": (E, "is open to everyone (*)", [allow("kms:Decrypt", {"AWS": ["*"]})]),
    "everyone through a service": (
        E,
        "is open to everyone (*)",
        [allow("kms:Decrypt", "*", Condition={"StringEquals": {"kms:ViaService": "ec2.eu-west-1.amazonaws.com"}})],
    ),
    "everyone with the image": (
        W,
        "an enclave of that image decrypts in any account",
        [*GOOD, allow("kms:Decrypt", "*", Condition=when("StringEqualsIgnoreCase"))],
    ),
    "power for everyone": (E, "for everyone", [*GOOD, allow("kms:CreateGrant", "*")]),
    "a service": (E, "Service ec2.amazonaws.com", [allow("kms:Decrypt", {"Service": "ec2.amazonaws.com"})]),
    "an identity provider": (
        E,
        "Federated cognito-identity.amazonaws.com",
        [allow("kms:Decrypt", {"Federated": "cognito-identity.amazonaws.com"})],
    ),
    "a deleted role": (W, "was deleted", [*GOOD, allow("kms:DescribeKey", "AROAIOSFODNN7EXAMPLE")]),
    "another account": (W, "another account", [*GOOD, allow("kms:DescribeKey", "arn:aws:iam::444455556666:root")]),
    "NotPrincipal": (
        E,
        "NotPrincipal allows everybody",
        [{"Effect": "Allow", "NotPrincipal": {"AWS": ADMIN}, "Action": "kms:DescribeKey", "Resource": "*"}],
    ),
    "every action": (E, "(by *) is open", [allow("*")]),
    "a start of a name": (E, "(by kms:D*) is open", [allow("kms:D*")]),
    "a name with a question mark": (E, "(by kms:Decryp?) is open", [allow("kms:Decryp?")]),
    "capital letters": (E, "kms:Decrypt (by KMS:DECRYPT) is open", [allow("KMS:DECRYPT")]),
    "a question mark for administrators": (
        W,
        "kms:PutKeyPolic? covers kms:PutKeyPolicy",
        [*GOOD, allow("kms:PutKeyPolic?", ADMIN)],
    ),
    "a resource beside the key": (W, "in a key policy", [*GOOD, ENCRYPT | {"Resource": ["*", "arn:aws:s3:::a"]}]),
    "a key pair for any image": (
        E,
        "has a wildcard",
        [*GOOD, allow("kms:GenerateDataKeyPair", Condition=when("StringLike", "*"))],
    ),
    "power for everyone but the role": (
        E,
        "for everyone",
        [*GOOD, allow("kms:CreateGrant", "*"), deny("kms:CreateGrant", ROLE)],
    ),
    "a wildcard for administrators": (W, "kms:P* covers kms:PutKeyPolicy", [*GOOD, allow("kms:P*", ADMIN)]),
    "any image": (
        E,
        "has a wildcard",
        [allow("kms:Decrypt", Condition=when("StringLike", "*"))],
    ),
    "part of a value": (E, "has a wildcard", [allow("kms:Decrypt", Condition=when("StringLike", f"{NEW[:90]}*"))]),
    "part of a value, with a question mark": (
        E,
        "has a wildcard",
        [allow("kms:Decrypt", Condition=when("StringLike", f"{NEW[:-1]}?"))],
    ),
    "only a part of the image": (
        E,
        "PCR1 says nothing of the whole image",
        [allow("kms:Decrypt", Condition=when("StringEquals", NEW, "kms:RecipientAttestation:PCR1"))],
    ),
    "IfExists": (
        E,
        "is met by a request without a document",
        [allow("kms:Decrypt", Condition=when("StringEqualsIgnoreCaseIfExists"))],
    ),
    "IfExists in small letters": (
        E,
        "is met by a request without a document",
        [allow("kms:Decrypt", Condition=when("stringequalsifexists"))],
    ),
    "ForAllValues": (
        E,
        "is met by an empty set",
        [allow("kms:Decrypt", Condition=when("ForAllValues:StringEqualsIgnoreCase"))],
    ),
    "negated": (
        E,
        "everything but the image named",
        [allow("kms:Decrypt", Condition=when("StringNotEqualsIgnoreCase", ZEROS))],
    ),
    "any document": (E, "any enclave", [allow("kms:Decrypt", Condition=when("Null", "false"))]),
    "an operator for numbers": (E, "never matches", [allow("kms:Decrypt", Condition=when("NumericEquals", "1"))]),
    "capital letters compared": (
        E,
        "capital letters",
        [allow("kms:Decrypt", Condition=when("StringEquals", NEW.upper()))],
    ),
    "a condition on something else": (
        E,
        "is open",
        [allow("kms:Decrypt", Condition=when("StringEquals", "1", "kms:EncryptionContext:tezos-signer:format"))],
    ),
    "an image only on Encrypt": (
        E,
        "kms:Encrypt (by kms:Encrypt): no attestation document",
        [
            allow(
                "kms:Encrypt",
                Condition=when("StringEqualsIgnoreCase", NEW, "kms:RecipientAttestation:ImageSha384"),
            )
        ],
    ),
    "an image on Encrypt, too": (
        W,
        "kms:Encrypt (by kms:Encrypt): no attestation document",
        [*GOOD, allow(["kms:Encrypt", "kms:Decrypt"], Condition=when("StringEqualsIgnoreCase"))],
    ),
    "NitroTPM": (
        E,
        "is of NitroTPM",
        [
            allow(
                "kms:Decrypt",
                Condition=when("StringEqualsIgnoreCase", NEW, "kms:RecipientAttestation:NitroTPMPCR0"),
            )
        ],
    ),
    "a policy variable": (
        E,
        "StringEquals on kms:RecipientAttestation:PCR0: ${aws:PrincipalTag/pcr0} is a policy variable",
        [*GOOD[:3], allow("kms:Decrypt", Condition=when("StringEquals", [NEW, "${aws:PrincipalTag/pcr0}"]))],
    ),
    "a Deny with a policy variable": (
        E,
        "is a policy variable",
        [*GOOD[:3], HOLD | {"Condition": when("StringNotEquals", "${aws:PrincipalTag/pcr0}")}],
    ),
    "no register, negated": (
        E,
        "StringNotEquals on kms:RecipientAttestation:PCRO is met by a request without a document",
        [*GOOD[:3], allow("kms:Decrypt", Condition=when("StringNotEquals", NEW, "kms:RecipientAttestation:PCRO"))],
    ),
    "no register": (
        E,
        "is no register",
        [allow("kms:Decrypt", Condition=when("StringEquals", NEW, "kms:RecipientAttestation:PCRO"))],
    ),
    "register 32": (
        E,
        "is no register",
        [allow("kms:Decrypt", Condition=when("StringEquals", NEW, "kms:RecipientAttestation:PCR32"))],
    ),
    "only the role's register": (
        E,
        "PCR3 says nothing of the whole image",
        [allow("kms:Decrypt", Condition=when("StringEquals", NEW, "kms:RecipientAttestation:PCR3"))],
    ),
    "only the signing certificate": (
        W,
        "ever signed with that certificate",
        [allow("kms:Decrypt", Condition=when("StringEquals", NEW, "kms:RecipientAttestation:PCR8"))],
    ),
    "no PCR condition at all": (E, "no statement lets an enclave decrypt by the PCR0", [ADMINISTER, ENCRYPT]),
    "an image only for data keys": (
        E,
        "no statement lets an enclave decrypt by the PCR0",
        [ADMINISTER, ENCRYPT, allow("kms:GenerateDataKey", Condition=when("StringEquals")), HOLD],
    ),
    "nobody administers": (W, "nobody may change the policy", [ENCRYPT, DECRYPT, HOLD]),
    "nobody seals": (W, "nobody may call kms:Encrypt", [ADMINISTER, DECRYPT, HOLD]),
    "no Deny": (W, "no Deny keeps kms:Decrypt, kms:GenerateDataKey, kms:ReEncryptFrom", GOOD[:3]),
    "a Deny of one action": (
        W,
        "no Deny keeps kms:GenerateDataKey, kms:ReEncryptFrom",
        [*GOOD[:3], HOLD | {"Action": "kms:Decrypt"}],
    ),
    "a Deny the wrong way round": (
        E,
        "the wrong way round",
        [*GOOD[:3], HOLD | {"Condition": when("StringEqualsIgnoreCase")}],
    ),
    "a Deny for any value": (
        E,
        "does not deny a request without a document",
        [*GOOD[:3], HOLD | {"Condition": when("ForAnyValue:StringNotEquals")}],
    ),
    "a Deny of no document": (E, "any enclave pass", [*GOOD[:3], HOLD | {"Condition": when("Null", "true")}]),
    "a Deny of any document": (E, "whoever shows a document", [*GOOD, HOLD | {"Condition": when("Null", "False")}]),
    "a Deny with a pattern": (
        E,
        "lets images pass that nobody has named",
        [*GOOD[:3], HOLD | {"Condition": when("StringNotLike", "*")}],
    ),
    "a Deny of what no document goes with": (
        E,
        "kms:Encrypt, kms:PutKeyPolicy (by kms:*): no attestation document goes with it, so it is denied always",
        [*GOOD[:3], HOLD | {"Action": "kms:*"}],
    ),
    "a Deny of every change": (W, "nobody may change the policy", [*GOOD, deny("kms:PutKeyPolicy")]),
    "no value": (E, "names no value", [allow("kms:Decrypt", Condition=when("StringEquals", []))]),
    "a Deny of no value": (E, "names no value", [*GOOD[:3], HOLD | {"Condition": when("StringNotEquals", [])}]),
    "a Deny with ArnNotLike": (E, "never compares it", [*GOOD[:3], HOLD | {"Condition": when("ArnNotLike")}]),
    "a Deny that lets debug mode pass": (
        E,
        "debug mode",
        [*GOOD[:3], HOLD | {"Condition": when("StringNotEquals", [NEW, ZEROS])}],
    ),
    "a Deny with an exception": (
        E,
        "it denies only under StringNotEquals on aws:PrincipalArn",
        [
            *GOOD[:3],
            HOLD | {"Condition": {"StringNotEquals": {PCR0: NEW, "aws:PrincipalArn": ADMIN}}},
        ],
    ),
    "a Deny of two registers at once": (
        E,
        "have to differ all at once",
        [
            *GOOD[:3],
            HOLD | {"Condition": {"StringNotEquals": {PCR0: NEW, "kms:RecipientAttestation:PCR3": OTHER}}},
        ],
    ),
    "a Deny for NitroTPM": (
        E,
        "is of NitroTPM",
        [
            *GOOD[:3],
            HOLD | {"Condition": when("StringNotEquals", NEW, "kms:RecipientAttestation:NitroTPMPCR0")},
        ],
    ),
    "a Deny for the role": (W, "everybody else passes it", [*GOOD[:3], HOLD | {"Principal": {"AWS": ROLE}}]),
    "a Deny with NotPrincipal": (
        W,
        "NotPrincipal in a Deny",
        [*GOOD[:3], {"NotPrincipal": {"AWS": ROLE}, **{k: v for k, v in HOLD.items() if k != "Principal"}}],
    ),
    "a Deny of everything": (E, "denied whatever the document", [*GOOD, deny("kms:Decrypt")]),
    "a Deny of the enclave's role": (E, "denied whatever the document", [*GOOD, deny("kms:*", ROLE)]),
    "a Deny of the account": (E, "kms:Decrypt is denied whatever the document", [*GOOD, deny("kms:Decrypt", ROOT)]),
    "a Deny of the account's number": (E, "denied whatever the document", [*GOOD, deny("kms:Decrypt", ACCOUNT)]),
    "a Deny of the account, whoever decrypts": (
        E,
        "denied whatever the document",
        [ADMINISTER, ENCRYPT, DECRYPT | {"Principal": {"AWS": ROOT}}, HOLD, deny("kms:Decrypt", ROOT)],
    ),
    "a Deny of the enclave's role, by its ARN": (
        E,
        "denied whatever the document",
        [*GOOD, deny("kms:Decrypt", Condition={"ArnEquals": {"aws:PrincipalArn": ROLE}})],
    ),
    "a Deny of one session of the role": (
        E,
        "denied whatever the document",
        [*GOOD, deny("kms:Decrypt", f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-1")],
    ),
    "a Deny of data keys that are made": (
        E,
        "kms:GenerateDataKey is denied whatever the document",
        [*GOOD[:2], DECRYPT | {"Action": [*ATTESTED_ACTIONS]}, HOLD, deny("kms:GenerateDataKey")],
    ),
    "a Deny of Encrypt without a document": (
        E,
        "kms:Encrypt (by kms:Encrypt): no attestation document goes with it, so it is denied always",
        [*GOOD, deny("kms:Encrypt", Condition=when("StringNotEquals"))],
    ),
    "a Deny of another policy without a document": (
        E,
        "kms:PutKeyPolicy (by kms:Put*): no attestation document goes with it, so it is denied always",
        [*GOOD, deny("kms:Put*", Condition=when("Null", "true"))],
    ),
    "a Deny of another image": (
        W,
        f"PCR0 {NEW} is allowed, and denied",
        [*GOOD[:3], HOLD | {"Condition": when("StringNotEquals", OTHER)}],
    ),
    "a Deny with a forgotten image": (
        W,
        f"PCR0 {OLD} passes the Deny",
        [*GOOD[:3], HOLD | {"Condition": when("StringNotEquals", [OLD, NEW])}],
    ),
    "NotResource": (
        W,
        "NotResource",
        [*GOOD, {k: v for k, v in ENCRYPT.items() if k != "Resource"} | {"NotResource": "arn:aws:s3:::a"}],
    ),
    "a resource": (W, "in a key policy", [*GOOD, ENCRYPT | {"Resource": "arn:aws:kms:eu-west-1:1:key/1"}]),
    "a Deny of another resource": (W, "can't be said", [*GOOD, HOLD | {"Resource": "arn:aws:kms:eu-west-1:1:key/1"}]),
    "Encrypt for others": (W, f"kms:Encrypt for {ADMIN}", [*GOOD, allow("kms:Encrypt", [ADMIN, ROLE])]),
    "IAM policies for the role": (
        W,
        "kms:PutKeyPolicy for the account",
        [allow("kms:PutKeyPolicy", ROOT), *GOOD[1:]],
    ),
    **{
        f"{action} for the role": (E, f"{action} (by {action}) for the parent's role", [*GOOD, allow(action)])
        for action in POWER_ACTIONS
        if action != "kms:ReEncryptFrom"
    },
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_policy_is_found(name: str) -> None:
    severity, text, policy = BAD[name]
    found = findings(policy)
    matching = [one for one in found if text in str(one)]
    assert matching, "\n".join(map(str, found))
    assert {one.severity for one in matching} == {severity}
    assert all(one.advice for one in found)
    assert found == sorted(found, key=lambda one: one.severity is W)


def test_what_is_open_is_a_warning_where_a_deny_holds() -> None:
    for more in (allow("kms:Decrypt"), allow("kms:*", ROOT), allow("kms:Decrypt", Condition=when("StringLike", "*"))):
        assert any(one.severity is E for one in findings([*GOOD[:3], more]))
        (first, *_) = found = findings([*GOOD, more])
        assert {one.severity for one in found} == {W}
        assert "(only the Deny of statement 4 stops it)" in first.text


@pytest.mark.parametrize(
    ("condition", "severity"),
    [
        (when("StringNotEqualsIgnoreCase"), W),
        (when("StringEqualsIfExists"), W),
        (when("ForAllValues:StringEquals"), W),
        (when("StringLike", "*"), W),
        (when("Null", "false"), W),
        (when("StringEquals", [NEW, ZEROS]), W),
        (when("StringEquals", NEW, "kms:RecipientAttestation:PCR3"), W),
        (when("NumericEquals"), E),
        (when("StringEquals", "PLACEHOLDER"), E),
        (when("StringEquals", []), E),
        (when("StringEquals", "B2" * 48), E),
        (when("StringEquals", NEW, "kms:RecipientAttestation:NitroTPMPCR0"), E),
        (when("StringEquals", NEW, "kms:RecipientAttestation:PCRO"), E),
    ],
)
def test_a_deny_holds_what_lets_in_and_not_what_keeps_out(condition: Json, severity: Severity) -> None:
    """What keeps the enclave out stays an error: no other statement mends it."""
    assert findings([*GOOD, allow("kms:Decrypt", Condition=condition)])[0].severity is severity


@pytest.mark.parametrize(
    ("operator", "value", "met"),
    [
        ("StringEqualsIgnoreCase", NEW, False),
        ("ForAnyValue:StringEquals", NEW, False),
        ("ForAnyValue:StringNotEquals", NEW, False),
        ("Null", "false", False),
        ("Null", "true", True),
        ("Null", "False", False),
        ("Null", ["true", "false"], True),
        ("StringEqualsIfExists", NEW, True),
        ("ForAllValues:StringEquals", NEW, True),
        ("StringNotEquals", NEW, True),
    ],
)
def test_power_under_a_condition_that_a_missing_document_meets(operator: str, value: object, met: bool) -> None:
    found = findings([*GOOD, allow("kms:PutKeyPolicy", Condition=when(operator, value))])
    assert [one.severity for one in found if "for the parent's role" in one.text] == [E] * met
    assert any("no attestation document goes with it" in one.text for one in found) is not met
    found = findings([*GOOD[1:], allow("kms:PutKeyPolicy", ADMIN, Condition=when(operator, value))])
    assert any("nobody may change the policy" in one.text for one in found) is not met
    found = findings([*GOOD, deny(["kms:Decrypt", "kms:Encrypt"], Condition=when(operator, value))])
    assert any("denied always" in one.text for one in found) is met


@pytest.mark.parametrize(
    "condition",
    [
        when("Null", "true"),
        when("ForAnyValue:StringNotEquals"),
        when("StringNotLike", "*"),
        when("StringNotEquals", [NEW, ZEROS]),
        when("StringNotEquals", NEW, "kms:RecipientAttestation:PCR3"),
        when("StringEquals"),
    ],
)
def test_a_deny_that_does_not_hold_is_no_deny(condition: Json) -> None:
    found = findings([*GOOD[:3], HOLD | {"Condition": condition}, allow("kms:Decrypt")])
    assert any("no Deny keeps kms:Decrypt" in one.text for one in found)
    assert any(one.severity is E and "is open" in one.text and "only the Deny" not in one.text for one in found)


def test_a_deny_of_another_resource_holds_nothing() -> None:
    elsewhere = {"Resource": "arn:aws:kms:eu-west-1:111122223333:key/1"}
    found = findings([*GOOD[:3], HOLD | elsewhere])
    assert any("no Deny keeps kms:Decrypt" in one.text for one in found)
    assert findings([*GOOD, allow("kms:DisableKey"), deny("kms:DisableKey", ROLE, **elsewhere)])[0].severity is E


def test_a_deny_without_a_condition_holds_too() -> None:
    some = HOLD | {"Action": ["kms:Decrypt", "kms:GenerateDataKey"]}
    assert findings([*GOOD[:3], some, deny("kms:ReEncryptFrom")]) == []


@pytest.mark.parametrize(
    ("text", "policy", "expected"),
    [
        ("the default of AWS", [allow("kms:*", ROOT, Condition={"Bool": {"a:B": "true"}})], Expected()),
        ("for the parent's role", [*GOOD, allow("kms:ReEncryptFrom")], Expected()),
        ("for the parent's role", [*GOOD, allow("kms:Decrypt", ADMIN)], Expected()),  # ADMIN is none
        ("kms:Encrypt for", [*GOOD, allow("kms:*", ADMIN)], Expected()),  # the worse is said
        ("kms:* covers", [*GOOD, allow("kms:*", ADMIN)], Expected()),
        ("kms:Encrypt for", [*GOOD, allow("kms:Encrypt", ADMIN, Condition=when("StringEquals"))], Expected()),
        ("is not the one", [*GOOD[:2], DECRYPT | {"Principal": "*"}, HOLD], Expected(role=ROLE)),
        ("is not asked for", [ADMINISTER, ENCRYPT], Expected(required=["PCR0"])),
        (
            "is met by a request without",
            [allow("kms:Decrypt", Condition=when("StringEquals", NEW, "kms:RecipientAttestation:PCRO"))],
            Expected(),
        ),
    ],
)
def test_what_is_not_said(text: str, policy: list[Json], expected: Expected) -> None:
    """What isn't so, or is said already in a worse word."""
    found = findings(policy, expected)
    assert found
    assert not [one for one in found if text in one.text]


def test_two_denies_let_pass_what_both_do() -> None:
    found = findings([*GOOD[:3], *(HOLD | {"Condition": when("StringNotEquals", [NEW, one])} for one in (OLD, OTHER))])
    assert found == []
    found = findings([*GOOD, HOLD | {"Condition": when("StringNotEquals", OTHER)}])
    assert [one.text for one in found] == [f"PCR0 {NEW} is allowed, and denied: that image can't open its keys"]


def test_two_operators_on_one_register_are_both_met() -> None:
    both = when("StringEquals", [NEW, OLD]) | when("StringEqualsIgnoreCase", [NEW, OTHER])
    assert findings([ADMINISTER, ENCRYPT, allow("kms:Decrypt", Condition=both), HOLD]) == []


@pytest.mark.parametrize(
    "condition",
    [
        when("StringEqualsIgnoreCaseIfExists"),
        when("ForAllValues:StringEquals"),
        when("StringLike", f"{NEW[:-1]}?"),
        when("StringNotEquals", OLD),
    ],
)
def test_what_binds_to_no_image(condition: Json) -> None:
    found = findings(
        [*GOOD[:2], DECRYPT | {"Condition": condition}], Expected(running=[Running(measurements={"PCR0": OLD})])
    )
    assert any("no statement lets an enclave decrypt by the PCR0" in one.text for one in found)
    assert not any("is not accepted" in one.text for one in found)


def test_a_condition_that_is_worth_nothing_beside_a_good_one() -> None:
    both = when("StringEqualsIgnoreCase") | when("Null", "false")
    assert [one.severity for one in findings([*GOOD[:3], allow("kms:Decrypt", Condition=both)])] == [W, W]


def test_power_of_the_role_is_not_held_by_a_deny_for_another() -> None:
    power = allow("kms:PutKeyPolicy")
    assert findings([*GOOD, power, deny("kms:PutKeyPolicy", ADMIN)])[0].severity is E
    for refusal in (
        deny("kms:PutKeyPolicy", ROLE),
        deny("kms:P*", "*", Condition={"ArnEquals": {"aws:PrincipalArn": ROLE}}),
        deny("kms:P*", "*", Condition={"ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:role/signatory-*"}}),
        deny("kms:P*", "*", Condition={"ArnNotEquals": {"aws:PrincipalArn": ADMIN}}),
        deny("kms:P*", ROLE, Condition={"ArnNotEquals": {"aws:PrincipalArn": ADMIN}}),
        deny("kms:P*", Condition={"Null": {"aws:PrincipalArn": ["true", "False"]}}),
        deny("kms:P*", "*", Condition={"StringEquals": {"aws:PrincipalArn": ROLE, "kms:CallerAccount": ACCOUNT}}),
    ):
        (found,) = findings([*GOOD, power, refusal])
        assert found.severity is W
        assert "only a Deny stops it" in found.text
    session = f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-1"
    assert findings([*GOOD, power, deny("kms:PutKeyPolicy", session)])[0].severity is E, "one session is not the role"


def test_the_account_is_no_role() -> None:
    through_iam = [ADMINISTER, ENCRYPT, DECRYPT | {"Principal": {"AWS": ROOT}}, HOLD]
    assert findings(through_iam) == []


@pytest.mark.parametrize(
    ("account", "condition", "handed"),
    [
        (ROOT, {}, True),
        (ACCOUNT, {}, True),
        (ROOT, {"ArnLike": {"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/*"}}, True),
        (ACCOUNT, {"ArnEquals": {"aws:PrincipalArn": ROOT}}, True),  # of which partition the text doesn't tell
        (ROOT, {"ArnEquals": {"aws:PrincipalArn": ROOT}}, False),
    ],
)
def test_power_through_iam_where_nobody_knows_the_role(account: str, condition: Json, handed: bool) -> None:
    power = allow("kms:PutKeyPolicy", account, Condition=condition)
    for who in (ROOT, "*"):
        found = findings([power, ENCRYPT, DECRYPT | {"Principal": {"AWS": who}}, HOLD])
        assert any("kms:PutKeyPolicy for the account" in one.text for one in found) is handed


def test_power_through_iam_is_denied_to_each_role() -> None:
    both = allow("kms:Decrypt", [ROLE, ADMIN], Condition=when("StringEquals"))
    policy = [allow("kms:PutKeyPolicy", ROOT), ENCRYPT, both, HOLD]
    one_role, other = deny("kms:PutKeyPolicy", ROLE), deny("kms:PutKeyPolicy", ADMIN)
    (found,) = findings([*policy, one_role])
    assert "kms:PutKeyPolicy for the account" in found.text
    assert findings([*policy, one_role, other]) == []


@pytest.mark.parametrize(
    ("condition", "limited"),
    [
        ({"ArnEquals": {"aws:PrincipalArn": ROOT}}, True),
        ({"ArnLike": {"aws:principalarn": [ROOT, ADMIN]}}, True),
        ({"StringEquals": {"aws:PrincipalType": "Account"}}, True),
        ({"ArnNotEquals": {"aws:PrincipalArn": ADMIN}}, False),
        ({"ArnEqualsIfExists": {"aws:PrincipalArn": ADMIN}}, True),  # the key always exists
        ({"ArnLike": {"aws:PrincipalArn": [ADMIN, f"arn:aws:iam::{ACCOUNT}:role/*"]}}, False),
        ({"ArnEquals": {"aws:PrincipalArn": [ADMIN, ROLE]}}, False),
        ({"Bool": {"aws:MultiFactorAuthPresent": "true"}}, False),
        ({"StringEquals": {"aws:PrincipalType": "AssumedRole"}}, False),
        ({"StringEquals": {"aws:PrincipalType": ["User", "Account"]}}, True),
        ({"StringNotEquals": {"aws:PrincipalType": "AssumedRole"}}, True),
        ({"StringLike": {"aws:PrincipalArn": f"{ROLE[:-1]}?"}}, False),
        ({"StringEquals": {"aws:PrincipalArn": f"{ROLE[:-1]}?"}}, True),
        ({"StringEqualsIgnoreCase": {"aws:PrincipalArn": ROLE.upper()}}, False),
        ({"StringEquals": {"aws:PrincipalArn": ROLE.upper()}}, True),
        ({"StringLike": {"aws:PrincipalArn": ROLE.upper()}}, True),
        ({"ArnLike": {"aws:PrincipalArn": ROLE.upper()}}, True),
        ({"ArnNotLike": {"aws:PrincipalArn": f"arn:aws:iam::{ACCOUNT}:role/signatory-*"}}, True),
        ({"ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*:role/signatory-*"}}, False),
        ({"ArnLike": {"aws:PrincipalArn": "arn:aws:iam::*signatory-nitro-role"}}, True),  # of six parts each by itself
        ({"StringLike": {"aws:PrincipalArn": "arn:aws:iam::*signatory-nitro-role"}}, False),
        ({"Null": {"aws:PrincipalArn": "false"}}, False),
        ({"Null": {"aws:PrincipalArn": "true"}}, True),
        ({"Null": {"aws:PrincipalArn": ["true", "false"]}}, False),
        ({"StringEquals": {"aws:PrincipalArn": "${aws:PrincipalTag/arn}"}}, False),
        ({"NumericEquals": {"aws:PrincipalAccount": ACCOUNT}}, False),
        ({"StringEquals": {"aws:PrincipalAccount": ACCOUNT}}, False),
        ({"StringEquals": {"kms:CallerAccount": "444455556666"}}, True),
        ({"ArnLike": {"aws:PrincipalArn": "*"}, "StringEquals": {"aws:PrincipalType": "User"}}, True),
    ],
)
def test_whether_iam_policies_count_for_the_role(condition: Json, limited: bool) -> None:
    found = findings([allow("kms:PutKeyPolicy", [ADMIN, ROOT], Condition=condition), *GOOD[1:]])
    assert ["for the account: an IAM policy" in one.text for one in found] == [True] * (not limited)


@pytest.mark.parametrize(
    ("who", "condition"),
    [
        ("*", {"ArnNotEquals": {"aws:PrincipalArn": ROLE}}),
        ("*", {"ArnEquals": {"aws:SourceArn": ROLE}}),
        ("*", {"ArnEquals": {"aws:PrincipalArn": ADMIN}}),
        ("*", {"ArnLike": {"aws:PrincipalArn": "*"}}),
        ("*", {"StringEquals": {"aws:PrincipalArn": "*"}}),
        ("*", {"StringNotEquals": {"aws:PrincipalArn": "${aws:PrincipalTag/admin}"}}),
        ("*", {"ArnEquals": {"aws:PrincipalArn": ROLE}, "Bool": {"aws:MultiFactorAuthPresent": "false"}}),
        (ADMIN, {"ArnEquals": {"aws:PrincipalArn": ROLE}}),
        (ROLE, {"Bool": {"aws:MultiFactorAuthPresent": "false"}}),
    ],
)
def test_a_deny_that_the_role_can_pass(who: str, condition: Json) -> None:
    refusal = deny("kms:PutKeyPolicy", who, Condition=condition)
    assert [one.severity for one in findings([*GOOD, allow("kms:PutKeyPolicy"), refusal])] == [E]


@pytest.mark.parametrize(
    ("who", "condition", "limited"),
    [
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/x/i-1", {"StringEquals": {"aws:PrincipalType": "AssumedRole"}}, False),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/x/i-1", {"StringEquals": {"aws:PrincipalArn": ADMIN}}, False),
        (f"arn:aws:iam::{ACCOUNT}:user/x", {"StringEquals": {"aws:PrincipalType": "AssumedRole"}}, True),
        (f"arn:aws:iam::{ACCOUNT}:user/x", {"StringEquals": {"aws:PrincipalArn": ADMIN}}, True),
        ("AROAIOSFODNN7EXAMPLE", {"StringEquals": {"aws:PrincipalType": "AssumedRole"}}, False),
        ("AIDAIOSFODNN7EXAMPLE", {"StringEquals": {"aws:PrincipalType": "User"}}, False),
    ],
)
def test_whether_iam_policies_count_for_who_is_no_role(who: str, condition: Json, limited: bool) -> None:
    decrypt = allow("kms:Decrypt", who, Condition=when("StringEquals"))
    found = findings([allow("kms:PutKeyPolicy", ROOT, Condition=condition), decrypt, HOLD])
    assert any("for the account: an IAM policy" in one.text for one in found) is not limited


def test_one_of_several() -> None:
    """Roles, principals, statements: what is true of one of them counts, wherever it stands."""
    two = allow("kms:Decrypt", [ROLE, ADMIN], Condition=when("StringEquals"))
    policy = [allow("kms:PutKeyPolicy", f"{ADMIN}-2"), ENCRYPT, two, HOLD]
    assert findings(policy) == []
    assert "for the parent's role" in findings([*policy, allow("kms:DisableKey", ADMIN)])[0].text
    assert "denied whatever the document" in findings([*policy, deny("kms:Decrypt", ADMIN)])[0].text
    assert findings([*policy, allow("kms:Encrypt", [ADMIN, ROLE])]) == []
    both_denied = [allow(["kms:PutKeyPolicy", "kms:DisableKey"]), deny("kms:DisableKey", ROLE)]
    assert findings([*GOOD, *both_denied])[0].severity is E
    another = allow("kms:Decrypt", f"{ROLE}-2", Condition=when("StringEquals"))
    assert findings([*GOOD, another], Expected(role=ROLE)) == []
    through_iam = DECRYPT | {"Principal": {"AWS": [ROOT, f"{ROLE}-2"]}}
    assert findings([ADMINISTER, ENCRYPT, through_iam, HOLD], Expected(role=ROLE)) == []
    assert "the default of AWS" not in findings([allow("kms:*", [ROOT, ROLE])])[0].text


def test_capital_letters_count_nowhere_under_ignore_case() -> None:
    capitals = HOLD | {"Condition": when("StringNotEqualsIgnoreCase", NEW.upper())}
    assert findings([*GOOD[:3], capitals]) == []


@pytest.mark.parametrize("register", ["PCR3", "PCR8"])
def test_zeros_of_what_an_enclave_lacks(register: str) -> None:
    zeros = allow("kms:Decrypt", Condition=when("StringEquals", ZEROS, f"kms:RecipientAttestation:{register}"))
    assert "that has no such thing" in findings([*GOOD, zeros])[0].text


def test_a_long_placeholder_is_cut() -> None:
    found = findings([allow("kms:Decrypt", Condition=when("StringEquals", "P" * 200))])
    assert f"'{'P' * 24}...' is the value of no register" in found[0].text


def test_registers_asked_for_by_one_side_only() -> None:
    pcr3 = when("StringNotEquals", OTHER, "kms:RecipientAttestation:PCR3")
    (found,) = findings([*GOOD, HOLD | {"Condition": pcr3}])
    assert (found.severity, found.text) == (W, "PCR3 is asked for by a Deny, by no Allow")


def test_a_condition_on_the_registers_counts_under_any_spelling() -> None:
    both = when("stringequalsignorecase", NEW.upper(), "KMS:recipientattestation:IMAGESHA384")
    assert findings([ADMINISTER, ENCRYPT, allow("kms:Decrypt", Condition=both), HOLD]) == []
    parts = {"StringEquals": {f"kms:RecipientAttestation:{one}": NEW for one in ("PCR1", "PCR2")}}
    found = findings([ADMINISTER, ENCRYPT, allow("kms:Decrypt", Condition=parts)])
    assert ["no Deny keeps" in one.text for one in found] == [True]


@pytest.mark.parametrize(
    ("value", "kinds", "account"),
    [
        ("*", {"everyone"}, ""),
        (ROOT, {"account"}, ACCOUNT),
        (ACCOUNT, {"account"}, ACCOUNT),
        (ROLE, {"role"}, ACCOUNT),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-1", {"role", "session"}, ACCOUNT),
        (f"arn:aws:iam::{ACCOUNT}:user/x", set(), ACCOUNT),
        ("AROAIOSFODNN7EXAMPLE", {"deleted"}, ""),
        ("AIDAIOSFODNN7EXAMPLE", {"deleted"}, ""),
    ],
)
def test_principals(value: str, kinds: set[str], account: str) -> None:
    def found(kind: str) -> tuple[set[str], str]:
        one = Principal(kind, value)
        answers = {
            "everyone": one.is_everyone,
            "account": one.is_account,
            "role": one.is_role(ROLE),
            "session": one.is_session,
            "deleted": one.is_deleted,
        }
        return {name for name, answer in answers.items() if answer}, one.account

    assert found("AWS") == (kinds, account)
    assert found("Federated") == (set(), ""), "only AWS names those"


@pytest.mark.parametrize(
    ("key", "register"),
    [*((f"PCR{n}", f"PCR{n}") for n in range(32)), ("ImageSha384", "PCR0"), ("PCR32", ""), ("PCR00", ""), ("PCR", "")],
)
def test_registers(key: str, register: str) -> None:
    assert Condition("StringEquals", f"kms:RecipientAttestation:{key}", ()).register == register
    assert Condition("StringEquals", key, ()).register == ""


# -- against what is known of the enclave


def seen(expected: Expected, *values: str) -> list[str]:
    return [f"{one.severity} {one.where}: {one.text}" for one in findings(ours(PCR0=[*values]), expected)]


def test_the_running_enclave() -> None:
    running = Running(measurements={"PCR0": NEW, "PCR1": OTHER})
    assert seen(Expected(running=[running]), NEW) == []
    assert seen(Expected(running=[running]), OLD, NEW) == [
        f"warning policy: PCR0 {OLD} is of no release known here: an old image can still open the keys"
    ]
    assert seen(Expected(running=[running]), OLD) == [
        f"error running enclave: its PCR0 {NEW} is not accepted: it can't open its keys",
        f"warning policy: PCR0 {OLD} is of no release known here: an old image can still open the keys",
    ]
    assert seen(Expected(running=[Running(measurements={"PCR0": OLD}, is_debug=True)]), NEW) == [
        "error running enclave: runs in debug mode: KMS sees zeros, and refuses it. It can't open its keys"
    ]


def test_what_passes_only_one_of_allow_and_deny_is_not_accepted() -> None:
    running = Expected(running=[Running(measurements={"PCR0": OLD})])
    text = f"its PCR0 {OLD} is not accepted: it can't open its keys"
    both, one = when("StringEquals", [OLD, NEW]), when("StringEquals", NEW)
    for allowed, denied in ((both, NEW), (one, [OLD, NEW]), ({}, NEW)):
        hold = HOLD | {"Condition": when("StringNotEquals", denied)}
        found = findings([*GOOD[:2], DECRYPT | {"Condition": allowed}, hold], running)
        assert [one.severity for one in found if one.text == text] == [E]
    found = findings([*GOOD[:2], DECRYPT | {"Condition": both}, HOLD], Expected(releases={"x": {"PCR0": [OLD, NEW]}}))
    assert (W, "x", f"PCR0 {OLD} is not accepted by the policy") in [
        (one.severity, one.where, one.text) for one in found
    ]
    found = findings([*GOOD[:2], DECRYPT | {"Condition": both}, HOLD], Expected(releases={"x": {"PCR0": [NEW]}}))
    assert not any("an old image can still open" in one.text for one in found), "the Deny keeps it"
    assert findings([*GOOD[:3]], Expected(running=[Running(measurements={"PCR1": OLD, "PCR0": NEW})]))[1:] == []


def test_the_releases() -> None:
    releases = {"expected_pcrs": {"PCR0": (OLD, NEW), "PCR2": (OTHER,)}}
    assert seen(Expected(releases=releases, running=[Running(measurements={"PCR0": NEW})]), OLD, NEW) == []
    assert seen(Expected(releases=releases), NEW) == [
        f"warning expected_pcrs: PCR0 {OLD} is not accepted by the policy"
    ]
    assert seen(Expected(releases={"--pcr0": {"PCR0": (OTHER,)}}), NEW) == [
        f"error --pcr0: PCR0 {OTHER} is not accepted by the policy",
        f"warning policy: PCR0 {NEW} is of no release known here: an old image can still open the keys",
    ]


def test_the_role_expected() -> None:
    (found,) = findings(ours(), Expected(role=f"arn:aws:iam::{ACCOUNT}:role/another"))[:1]
    assert found.severity is E
    assert "is not the one that may decrypt" in found.text
    assert findings(ours(), Expected(role=f"arn:aws:iam::{ACCOUNT}:role/signatory-nitro-role")) == []
    through_iam = [ADMINISTER, ENCRYPT, DECRYPT | {"Principal": {"AWS": ROOT}}, HOLD]
    assert findings(through_iam, Expected(role=ROLE)) == []
    assert findings(through_iam, Expected(role="arn:aws:iam::444455556666:role/x"))[0].severity is E


def test_encrypt_may_be_refused_on_purpose() -> None:
    """Where every image seals with data keys (section 5.3)."""
    assert findings([ADMINISTER, DECRYPT, HOLD, deny("kms:Encrypt")]) == []


@pytest.mark.parametrize(
    "more",
    [
        HOLD | {"Condition": when("Null", "true")},
        HOLD | {"Condition": when("ForAnyValue:StringNotEquals")},
        HOLD | {"Condition": when("StringNotEquals") | {"ArnNotEquals": {"aws:PrincipalArn": ROLE}}},
        HOLD | {"Principal": {"AWS": ROLE}},
    ],
)
def test_a_deny_too_weak_beside_one_that_holds(more: Json) -> None:
    """It does no harm, and nothing hangs on it; without the other one it is reported."""
    assert findings([*GOOD, more]) == []
    assert any(one.where == "statement 4" for one in findings([*GOOD[:3], more]))
    assert any(one.where == "statement 5" for one in findings([*GOOD[:3], HOLD | {"Action": "kms:Decrypt"}, more]))


@pytest.mark.parametrize("condition", [{}, when("StringEquals", OTHER, "kms:RecipientAttestation:PCR8")])
def test_a_deny_alone_binds_to_the_image(condition: Json) -> None:
    """Then one more mistake opens the keys: a warning. The enclave opens them, so nothing is missing."""
    policy = [ADMINISTER, ENCRYPT, allow("kms:Decrypt", Condition=condition), HOLD]
    found = findings(policy)
    assert {one.severity for one in found} == {W}
    assert "only the Deny of statement 4 stops it" in found[0].text
    assert {one.severity for one in findings(policy, Expected(role=ROLE))} == {W}
    assert f"{ROLE}-2 is not the one that may decrypt" in findings(policy, Expected(role=f"{ROLE}-2"))[0].text
    assert "for the parent's role" in findings([*policy, allow("kms:DisableKey")])[0].text
    assert "no statement lets an enclave decrypt" in str(findings([*policy[:2], HOLD])[0])


@pytest.mark.parametrize(
    "refusal",
    [
        deny("kms:GenerateDataKey"),  # no Allow lets the enclave make data keys
        deny("kms:Decrypt", ADMIN),
        deny("kms:Decrypt", "arn:aws:iam::444455556666:root"),
        deny("kms:Decrypt", Condition={"ArnNotEquals": {"aws:PrincipalArn": ROLE}}),
        deny("kms:Decrypt", ROOT, Condition={"StringNotEquals": {"kms:CallerAccount": ACCOUNT}}),
        deny("kms:DescribeKey", Condition=when("StringNotEquals")),
    ],
)
def test_a_deny_that_keeps_no_enclave_out(refusal: Json) -> None:
    assert findings([*GOOD, refusal], Expected()) == []


def test_a_deny_of_an_account_where_nobody_knows_that_of_the_key() -> None:
    policy = [ADMINISTER, ENCRYPT, DECRYPT | {"Principal": "*"}, HOLD, deny("kms:Decrypt", ROOT)]
    shut = [findings(policy, Expected(account=one))[0].severity for one in ("", ACCOUNT, "444455556666")]
    assert shut == [E, E, W]


def test_the_registers_required() -> None:
    assert findings(ours(PCR0=[NEW], PCR8=[OLD]), Expected(required=["PCR0", "PCR8"])) == []
    (found,) = findings(ours(PCR0=[NEW]), Expected(required=["PCR0", "PCR8"]))
    assert (found.severity, found.text) == (W, "PCR8 is not asked for")


def test_grants() -> None:
    def with_grant(policy: list[Json], *operations: str) -> list[Finding]:
        grant = Grant(grant_id="0c23", grantee="arn:aws:iam::1:role/x", operations=operations)
        found = review(parse_policy(json.dumps({"Statement": policy})), Expected(), [grant])
        return [one for one in found if one.where == "grant 0c23"]

    assert with_grant(GOOD, "DescribeKey", "Encrypt") == []
    (found,) = with_grant(GOOD, "Decrypt", "CreateGrant")
    assert (found.severity, "kms:Decrypt, kms:CreateGrant" in found.text) == (W, True)
    assert "only the Deny of statement 4" in found.text
    assert "x call kms:Decrypt, whatever" in with_grant(GOOD, "Decrypt")[0].text
    assert "x call kms:CreateGrant, whatever" in with_grant(GOOD, "CreateGrant")[0].text
    (found,) = with_grant(GOOD[:3], "ReEncryptFrom")
    assert "only" not in found.text


# -- our own


hexes = st.text("0123456789abcdef", min_size=96, max_size=96).filter(lambda text: bool(text.strip("0")))
names = st.from_regex(r"[A-Za-z0-9+=,.@_-]{1,64}", fullmatch=True)
keys = st.builds(
    lambda names, registers, pcr0, partition: Key(
        account=ACCOUNT,
        role=f"arn:{partition}:iam::{ACCOUNT}:role/path/{names[0]}",
        registers={**registers, "PCR0": pcr0},
        administrators=[f"arn:{partition}:iam::{ACCOUNT}:role/{one}" for one in names[1:]],
        partition=partition,
    ),
    st.lists(names, min_size=1, max_size=3, unique=True),
    st.dictionaries(st.sampled_from(REGISTERS), st.lists(hexes, min_size=1, max_size=3)),
    st.lists(hexes, min_size=1, max_size=3),
    st.sampled_from(["aws", "aws-cn", "aws-us-gov"]),
)


@settings(deadline=None)  # a busy machine is no fault
@given(keys)
def test_nothing_is_found_in_what_is_printed(key: Key) -> None:
    policy = json.loads(as_text(key_policy(key)))
    assert findings(policy, Expected(account=ACCOUNT)) == []
    assert findings(policy, Expected(role=key.role, releases={"--pcr0": key.registers})) == []


def weaker(policy: Json) -> Iterator[tuple[str, Json]]:
    """Everything by which one change makes the policy weaker."""
    for index, one in enumerate(policy["Statement"]):
        sid = one["Sid"]
        for what, changed in _weaker_statements(one):
            copied = copy.deepcopy(policy)
            copied["Statement"][index] = changed
            yield f"{sid}: {what}", copied
        if sid.startswith(("OnlyTheEnclave", "EnclaveDecrypts", "SignerEncrypts", "AccountAdministers")):
            yield f"without {sid}", {"Statement": [other for other in policy["Statement"] if other is not one]}
    if any(one["Sid"] == "AccountAdministers" for one in policy["Statement"]):
        kept = [one for one in policy["Statement"] if one["Sid"] != "SignerNeverAdministers"]
        yield "without SignerNeverAdministers", {"Statement": kept}


def _weaker_statements(one: Json) -> Iterator[tuple[str, Json]]:
    yield "Resource", one | {"Resource": "arn:aws:kms:eu-west-1:111122223333:key/1"}
    without = {name: value for name, value in one.items() if name != "Principal"}
    yield "NotPrincipal", without | {"NotPrincipal": one["Principal"]}
    if one["Effect"] == "Allow":
        yield "everyone", one | {"Principal": "*"}
        yield "everything", one | {"Action": "kms:*"}
        yield "NotAction", {k: v for k, v in one.items() if k != "Action"} | {"NotAction": "kms:Sign"}
        for action in (*SECRET_ACTIONS, *POWER_ACTIONS):
            fits = one["Sid"] == "SignerEncrypts" or action in SECRET_ACTIONS
            never_met = "Condition" in one and action == "kms:ReEncryptFrom"
            if fits and not never_met and action not in one["Action"]:
                yield f"with {action}", one | {"Action": [*one["Action"], action]}
    if not any("RecipientAttestation" in key for keys in one.get("Condition", {}).values() for key in keys):
        return
    yield "no condition", {name: value for name, value in one.items() if name != "Condition"}
    ((operator, asked),) = one["Condition"].items()
    for worse in (f"{operator}IfExists", f"ForAllValues:{operator}", _inverted(operator)):
        # In a Deny a missing key should be met, and these two are.
        if one["Effect"] == "Allow" or worse == _inverted(operator):
            yield worse, one | {"Condition": {worse: asked}}
    for key, values in asked.items():
        listed = values if isinstance(values, list) else [values]
        for more in (ZEROS, OTHER, "PLACEHOLDER"):
            yield f"{more} for {key}", one | {"Condition": {operator: asked | {key: [*listed, more]}}}
        like = operator.replace("EqualsIgnoreCase", "Like")
        yield f"* for {key}", one | {"Condition": {like: asked | {key: "*"}}}
        if len(asked) > 1:
            yield f"without {key}", one | {"Condition": {operator: {k: v for k, v in asked.items() if k != key}}}
    if one["Effect"] == "Deny":
        yield "ForAnyValue", one | {"Condition": {f"ForAnyValue:{operator}": asked}}
        yield "an exception", one | {"Condition": {operator: asked | {"aws:PrincipalArn": ADMIN}}}
        yield "one principal", one | {"Principal": {"AWS": ADMIN}}
        for action in one["Action"] if one["Sid"] == "OnlyTheEnclaveDecrypts" else ():
            yield f"without {action}", one | {"Action": [other for other in one["Action"] if other != action]}


def _inverted(operator: str) -> str:
    return operator.replace("Not", "") if "Not" in operator else operator.replace("Equals", "NotEquals")


WEAKER = {
    f"{name}, {what}": policy
    for name, whole in (
        ("IAM", ours(PCR0=[OLD, NEW], PCR3=[OLD])),
        ("named", ours(PCR0=[NEW], PCR1=[OLD], administrators=(ADMIN,))),
    )
    for what, policy in weaker(whole)
}


@pytest.mark.parametrize("what", WEAKER)
def test_each_weakening_of_what_is_printed_is_found(what: str) -> None:
    assert findings(WEAKER[what])


def test_the_policy_printed() -> None:
    policy = ours(PCR0=[NEW, OLD, NEW], PCR3=[OTHER], administrators=(ADMIN,))
    assert [(one["Effect"], one["Sid"]) for one in policy["Statement"]] == [
        ("Allow", "RootUserAdministers"),
        ("Allow", "AdministratorsAdminister"),
        ("Allow", "SignerEncrypts"),
        ("Allow", "EnclaveDecrypts"),
        ("Deny", "OnlyTheEnclaveDecrypts"),
        ("Deny", "OnlyTheEnclaveDecryptsPCR3"),
        ("Deny", "SignerNeverAdministers"),
    ]
    asked = statement(policy, "EnclaveDecrypts")["Condition"]["StringEqualsIgnoreCase"]
    assert asked == {PCR0: [OLD, NEW], "kms:RecipientAttestation:PCR3": OTHER}, "sorted, each once"
    held = statement(policy, "OnlyTheEnclaveDecrypts")
    assert held["Principal"] == {"AWS": "*"}
    assert held["Action"] == [*SECRET_ACTIONS]
    assert held["Condition"] == {"StringNotEqualsIgnoreCase": {PCR0: [OLD, NEW]}}
    for sid in ("RootUserAdministers", "AdministratorsAdminister"):
        using = {"kms:Decrypt", "kms:Encrypt", "kms:GenerateDataKey", "kms:CreateGrant", "kms:ReplicateKey"}
        assert not using & set(statement(policy, sid)["Action"])
    assert statement(policy, "RootUserAdministers")["Condition"] == {"ArnEquals": {"aws:PrincipalArn": ROOT}}
    assert "Condition" not in statement(ours(), "AccountAdministers")


# -- what is given


@pytest.mark.parametrize(
    ("text", "arn"),
    [
        ("signer", f"arn:aws:iam::{ACCOUNT}:role/signer"),
        ("/a/b/signer", f"arn:aws:iam::{ACCOUNT}:role/a/b/signer"),
        (ROLE, ROLE),
        (f"arn:aws:iam::{ACCOUNT}:role/a/signer", f"arn:aws:iam::{ACCOUNT}:role/a/signer"),
        (f"arn:aws:iam::{ACCOUNT}:role/a:b/(c)/signer", f"arn:aws:iam::{ACCOUNT}:role/a:b/(c)/signer"),
        (f"arn:aws:sts::{ACCOUNT}:assumed-role/signer/i-0123", f"arn:aws:iam::{ACCOUNT}:role/signer"),
    ],
)
def test_roles(text: str, arn: str) -> None:
    assert role_arn(text, account=ACCOUNT, partition="aws") == arn


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected a role's ARN or name"),
        ("a b", "expected a role's ARN or name"),
        ("a*/signer", "expected a role's ARN or name"),
        (f"arn:aws:iam::{ACCOUNT}:user/signer", "expected an ARN such as"),
        (f"arn:aws:iam::{ACCOUNT}:role/*", "expected an ARN such as"),
        (f"arn:aws:iam::{ACCOUNT}:role/sign?r", "expected an ARN such as"),
        (f"arn:aws:iam::{ACCOUNT}:role/*/signer", "expected an ARN such as"),
        (f"arn:aws:iam::{ACCOUNT}:role/the signer", "expected an ARN such as"),
        (f"arn:aws:iam::{ACCOUNT}:instance-profile/signer", "expected an ARN such as"),
        ("arn:aws:iam::444455556666:role/signer", "is of account 444455556666"),
        (f"arn:aws-cn:iam::{ACCOUNT}:role/signer", "another partition"),
    ],
)
def test_roles_refused(text: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        role_arn(text, account=ACCOUNT, partition="aws")


def test_measurements() -> None:
    assert measurement("PCR0", f" {NEW.upper()}\n") == NEW
    for register, text, reason in (
        ("PCR0", ZEROS, "debug mode"),
        ("PCR3", ZEROS, "without a role"),
        ("PCR8", ZEROS, "isn't signed"),
        ("PCR0", NEW[1:], "expected 96"),
        ("PCR0", "g" * 96, "expected 96"),
    ):
        with pytest.raises(ConfigurationError, match=reason):
            measurement(register, text)


def test_partitions() -> None:
    assert [partition_of(region=one) for one in ("", "eu-west-1", "cn-north-1", "us-gov-west-1")] == [
        "aws",
        "aws",
        "aws-cn",
        "aws-us-gov",
    ]
    assert partition_of(arn="arn:aws-cn:iam::1:role/x", region="eu-west-1") == "aws-cn"
    assert partition_of(arn="name", region="us-gov-east-1") == "aws-us-gov"


@pytest.mark.parametrize(
    ("pattern", "covered"),
    [
        ("*", True),
        ("kms:*", True),
        ("KMS:decrypt", True),
        ("kms:?ecrypt", True),
        ("kms:D*t", True),
        ("kms:Decryp", False),
        ("kms:Decrypt?", False),
        ("kms:[D]ecrypt", False),
        ("kms:.*", False),
        ("s3:*", False),
        ("*a" * 1_000, False),
    ],
)
def test_patterns(pattern: str, covered: bool) -> None:
    (found,) = parse_policy(json.dumps({"Statement": allow(pattern)}))
    assert ("kms:Decrypt" in found.covered) is covered


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no Statement"),
        ("{}", "no Statement"),
        ('{"Statement": []}', "a list of statements"),
        ('{"Statement": [1]}', "statement 1 is no object"),
        ('{"Statement": {"Effect": "allow", "Principal": "*", "Action": "*"}}', "Effect has to be Allow or Deny"),
        ('{"Statement": {"Effect": "Allow", "Effect": "Deny"}}', "Effect is there twice"),
        ('{"Statement": {"Effect": "Allow", "principal": "*"}}', "principal, which is no element"),
        ('{"Statement": {"Effect": "Allow", "Action": "*"}}', "no Principal"),
        ('{"Statement": {"Effect": "Allow", "Principal": "*"}}', "no Action"),
        ('{"Statement": {"Effect": "Allow", "Principal": "*", "Action": "*", "NotAction": "*"}}', "both Action and"),
        ('{"Statement": {"Effect": "Allow", "Principal": 1, "Action": "*"}}', "Principal has to be"),
        ('{"Statement": {"Effect": "Allow", "Principal": {"AWS": {}}, "Action": "*"}}', "has to be a text"),
        ('{"Statement": {"Effect": "Allow", "Principal": "*", "Action": [null]}}', "Action has to be a text"),
        ('{"Statement": {"Effect": "Allow", "Principal": "*", "Action": "*", "Condition": []}}', "Condition has to be"),
        ('{"Statement": {"Effect": "Allow", "Principal": "*", "Action": "*", "Condition": {"Bool": 1}}}', "Condition"),
        ('{"Version": "2025-01-01", "Statement": {}}', "Version has to be 2012-10-17"),
        ('{"Statement": {"\\u001b[2K": 1}}', r"no JSON: '\\x1b\[2K' is no name of anything"),
        ('{"Version": 2012, "Statement": {}}', "Version has to be 2012-10-17"),
        ('{"version": "2012-10-17", "Statement": {}}', "version, which is no element of a policy"),
        ('{"Statement": {"Effect": "Allow", "Principal": {"aws": "*"}, "Action": "*"}}', "Principal has aws, it takes"),
        # What names nothing: KMS refuses it, and an empty Not... would be everything.
        *(
            (
                f'{{"Statement": {{"Effect": "Allow", "{name}": {nobody}, "Action": "*"}}}}',
                "statement 1 has no Principal",
            )
            for name in ("Principal", "NotPrincipal")
            for nobody in ("null", "[]", "{}", '{"AWS": []}')
        ),
        ('{"Statement": {"Effect": "Allow", "Principal": "*", "Action": []}}', "statement 1 has no Action"),
        ('{"Statement": {"Effect": "Allow", "Principal": "*", "NotAction": []}}', "statement 1 has no Action"),
    ],
)
def test_what_is_no_policy(text: str, reason: str) -> None:
    with pytest.raises(PolicyFormatError, match=reason):
        parse_policy(text)


@pytest.mark.parametrize("more", [{}, {"Version": "2008-10-17", "Id": "default"}, {"Version": "2012-10-17"}])
def test_what_stands_around_the_statements(more: Json) -> None:
    assert len(parse_policy(json.dumps({**more, "Statement": GOOD}))) == len(GOOD)


def test_one_statement_needs_no_list() -> None:
    (found,) = parse_policy(json.dumps({"Statement": allow("kms:Decrypt", Condition={"Bool": {"a:B": True}})}))
    assert found.conditions == (Condition("Bool", "a:B", ("true",)),)
    assert found.name == "statement 1"
