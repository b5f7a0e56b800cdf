"""Whether the parent's role meets a condition on who calls: aws:PrincipalArn and its like. Pure.

IAM sets these keys in every signed request, so quantifiers and `...IfExists` change nothing. Where the text doesn't
tell, the reviewer takes the worse case: in an Allow that the role meets the condition, in a Deny that it does not.
"""

from signer.aws.kms_statements import Condition, Principal, matches, role_identity

_ON_ARN = ("arnequals", "arnlike")  # the two are the same
_ON_TEXT = ("stringequals", "stringequalsignorecase", "stringlike")
_COLONS = 5  # in an ARN, before the resource; wildcards don't reach across them


def met_by_role(condition: Condition, role: str) -> bool | None:
    """Whether a request of *role*, an ARN, meets *condition*; None where the text doesn't tell."""
    actual = _caller(condition.key.lower(), role)
    if not actual or any("${" in value for value in condition.values):  # a policy variable can be anything
        return None
    if condition.base == "null":  # "false": the key has to be there, and it is
        return "false" in {value.lower() for value in condition.values}
    operator = condition.base.replace("not", "", 1)
    if operator not in (*_ON_ARN, *_ON_TEXT):
        return None
    return any(_equals(operator, value, actual) for value in condition.values) is not condition.is_negated


def _caller(key: str, role: str) -> str:
    """What a request of *role* has under *key*; empty where that isn't known."""
    is_user = ":user/" in role
    if key == "aws:principalarn":  # a session has that of its role, whose path the session's own ARN doesn't tell
        return role if is_user or ":role/" in role else ""
    if key == "aws:principaltype":
        return "User" if is_user else "AssumedRole" if role_identity(role) else ""
    return Principal("AWS", role).account if key in ("aws:principalaccount", "kms:calleraccount") else ""


def _equals(operator: str, value: str, actual: str) -> bool:
    if operator in _ON_ARN:
        parts, others = value.split(":", _COLONS), actual.split(":", _COLONS)
        return len(parts) == len(others) and all(
            matches(one, other, ignore_case=False) for one, other in zip(parts, others, strict=True)
        )
    if operator == "stringlike":
        return matches(value, actual, ignore_case=False)
    return value == actual if operator == "stringequals" else value.lower() == actual.lower()
