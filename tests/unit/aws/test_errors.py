"""What an error of AWS is: whether it may be repeated, and what it tells whom it wakes."""

from __future__ import annotations

from typing import Any

import pytest
from botocore import exceptions
from botocore.parsers import ResponseParserError

from signer.aws.errors import AwsError, AwsUnavailableError, Call, answered, unanswered
from signer.errors import UnavailableError

KEY = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd"
CALL = Call("vault kms", "kms", "Sign", KEY, "eu-west-1")
WRITE = Call("watermark", "dynamodb", "TransactWriteItems", "table/watermark", "eu-west-1")


def refusal(code: str, message: str = "m", status: int = 400) -> dict[str, Any]:
    return {"Error": {"Code": code, "Message": message}, "ResponseMetadata": {"HTTPStatusCode": status}}


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("ThrottlingException", 400),
        ("ProvisionedThroughputExceededException", 400),
        ("KMSInternalException", 500),
        ("KeyUnavailableException", 500),
        ("DependencyTimeoutException", 503),
        ("DependencyTimeoutException", 400),
        ("Whatever", 503),
        ("", 502),
        ("Whatever", 429),
    ],
)
def test_what_may_be_repeated_is_502(code: str, status: int) -> None:
    error = answered(CALL, refusal(code, status=status))
    assert isinstance(error, AwsUnavailableError)
    assert isinstance(error, UnavailableError)
    assert error.status == 502
    assert error.throttled is (code in ("ThrottlingException", "ProvisionedThroughputExceededException"))


@pytest.mark.parametrize(
    "code", ["AccessDeniedException", "NotFoundException", "DisabledException", "ValidationException", "Unheard"]
)
def test_a_refusal_is_not_repeated(code: str) -> None:
    error = answered(CALL, refusal(code))
    assert not isinstance(error, AwsUnavailableError)
    assert (error.code, error.action, error.resource) == (code, "kms:Sign", KEY)
    assert error.response["Error"]["Code"] == code


@pytest.mark.parametrize(
    ("call", "code", "message", "cure"),
    [
        (CALL, "AccessDeniedException", "no", f"the role needs kms:Sign on {KEY}"),
        (Call("v", "kms", "ListKeys"), "AccessDeniedException", "no", "the role needs kms:ListKeys on *"),
        (WRITE, "AccessDeniedException", "no", "the role needs dynamodb:PutItem on table/watermark"),
        (
            WRITE,
            "AccessDeniedException",
            "User: arn:aws:sts::1:assumed-role/r/i is not authorized to perform: dynamodb:DeleteItem on resource: x",
            "the role needs dynamodb:DeleteItem on table/watermark",
        ),
        (CALL, "ExpiredTokenException", "is expired", "the session token has expired"),
        (CALL, "ExpiredToken", "is expired", "the session token has expired"),
        (CALL, "InvalidSignatureException", "Signature expired: a is now earlier than b", "clock is wrong"),
        (CALL, "InvalidSignatureException", "Signature not yet current: a is still later", "clock is wrong"),
        (CALL, "RequestTimeTooSkewed", "x", "clock is wrong"),
        (CALL, "InvalidSignatureException", "does not match", "the secret access key doesn't belong"),
        (CALL, "UnrecognizedClientException", "x", "AWS doesn't know the access key id"),
        (CALL, "InvalidClientTokenId", "x", "AWS doesn't know the access key id"),
        (CALL, "NotFoundException", "x", "nothing of that name in eu-west-1"),
    ],
)
def test_a_known_cause_says_what_to_do(call: Call, code: str, message: str, cure: str) -> None:
    text = str(answered(call, refusal(code, message)))
    assert text.startswith(f"{call.component}: {call.name}")
    assert f"{code}: {message}; " in text
    assert cure in text


@pytest.mark.parametrize("code", ["NotFoundException", "AccessDeniedException"])
def test_another_region_is_named(code: str) -> None:
    elsewhere = Call("v", "kms", "Sign", KEY, "us-east-1")
    assert "is in eu-west-1, and the client asks in us-east-1" in str(answered(elsewhere, refusal(code)))
    assert "client asks in" not in str(answered(CALL, refusal(code)))


def test_a_refusal_of_the_credentials_names_what_was_refused() -> None:
    error = answered(CALL, refusal("AccessDenied"), operation="AssumeRoleWithWebIdentity")
    assert "credentials: AssumeRoleWithWebIdentity: AccessDenied" in str(error)
    assert "the role needs kms:Sign" not in str(error)


def test_stale_credentials_are_told_from_a_denial() -> None:
    stale = ("ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException")
    assert all(answered(CALL, refusal(code)).stale for code in stale)
    assert not answered(CALL, refusal("AccessDeniedException")).stale
    assert unanswered(CALL, exceptions.NoCredentialsError()).stale


@pytest.mark.parametrize(
    "error",
    [
        exceptions.EndpointConnectionError(endpoint_url="https://kms.eu-wset-1.amazonaws.com", error="x"),
        exceptions.ConnectTimeoutError(endpoint_url="u"),
        exceptions.ReadTimeoutError(endpoint_url="u"),
        exceptions.ConnectionClosedError(endpoint_url="u"),
        exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
        exceptions.ChecksumError(checksum_type="crc32", expected_checksum="1", actual_checksum="2"),
        exceptions.CredentialRetrievalError(provider="iam-role", error_msg="x"),
        ResponseParserError("no JSON"),
        RuntimeError("Credentials were refreshed, but the refreshed credentials are still expired."),
    ],
)
def test_no_answer_may_be_repeated(error: Exception) -> None:
    told = unanswered(CALL, error)
    assert isinstance(told, AwsUnavailableError)
    assert not told.throttled


def test_an_endpoint_out_of_reach_is_said_to_be_one() -> None:
    error = exceptions.EndpointConnectionError(endpoint_url="https://kms.eu-wset-1.amazonaws.com", error="x")
    assert "kms.eu-wset-1.amazonaws.com" in str(unanswered(CALL, error))
    assert "see whether the region eu-west-1 is written right" in str(unanswered(CALL, error))


@pytest.mark.parametrize(
    "error",
    [
        exceptions.NoCredentialsError(),
        exceptions.NoRegionError(),
        exceptions.ParamValidationError(report="x"),
        exceptions.ProfileNotFound(profile="p"),
    ],
)
def test_what_never_left_this_host_is_not_repeated(error: Exception) -> None:
    assert not isinstance(unanswered(CALL, error), AwsUnavailableError)


def test_missing_credentials_name_the_hop_limit_in_a_container_only() -> None:
    inside = Call("v", "kms", "Sign", in_container=True)
    assert "--http-put-response-hop-limit 2" in str(unanswered(inside, exceptions.NoCredentialsError()))
    assert "hop" not in str(unanswered(CALL, exceptions.NoCredentialsError()))


def test_a_page_of_a_load_balancer_is_cut_short() -> None:
    text = str(answered(CALL, refusal("x", "<p>\n" * 2000)))
    assert len(text) < 700
    assert "\n" not in text


def test_an_error_can_be_made_by_hand() -> None:
    assert AwsError("m").response == {}
