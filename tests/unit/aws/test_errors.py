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
        ("LimitExceededException", 400),
        ("ProvisionedThroughputExceededException", 400),
        ("KMSInternalException", 500),
        ("KeyUnavailableException", 500),
        ("DependencyTimeoutException", 503),
        ("DependencyTimeoutException", 400),
        ("Whatever", 500),
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
    limits = ("ThrottlingException", "LimitExceededException", "ProvisionedThroughputExceededException")
    assert error.throttled is (code in limits)


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
        (CALL, "DisabledException", "x", f"aws kms enable-key --key-id {KEY}"),
        (CALL, "KMSInvalidStateException", "x", f"aws kms cancel-key-deletion --key-id {KEY}"),
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
    assert "client asks in" not in str(answered(Call("v", "kms", "Sign", KEY), refusal(code)))  # nobody knows where


def test_a_refusal_of_the_credentials_names_what_was_refused() -> None:
    error = answered(CALL, refusal("AccessDenied"), operation="AssumeRoleWithWebIdentity")
    assert "credentials: AssumeRoleWithWebIdentity: AccessDenied" in str(error)
    assert "the role needs kms:Sign" not in str(error)


def test_the_request_that_a_service_repeats_is_not_shown() -> None:
    """Some answer a wrong signature with all that they computed it from, the session token among it."""
    request = "The Canonical String for this request should have been 'POST\n/\n\nx-amz-security-token:TOKEN"
    for code, operation in (("InvalidSignatureException", ""), ("SignatureDoesNotMatch", "AssumeRole")):
        error = answered(CALL, refusal(code, f"It does not match.\n\n{request}"), operation=operation)
        assert "It does not match." in str(error)
        assert "TOKEN" not in str(error)
        assert "Canonical" not in str(error)


def test_stale_credentials_are_told_from_a_denial() -> None:
    stale = ("ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException")
    assert all(answered(CALL, refusal(code)).stale for code in stale)
    assert not answered(CALL, refusal("AccessDeniedException")).stale
    assert not answered(CALL, refusal("InvalidSignatureException", "Signature expired: it is late")).stale
    assert unanswered(CALL, exceptions.NoCredentialsError()).stale


def test_what_is_wrong_with_every_call_is_told_from_what_is_wrong_with_one_key() -> None:
    of_all = ("ExpiredTokenException", "UnrecognizedClientException", "InvalidSignatureException", "RequestExpired")
    assert all(answered(CALL, refusal(code)).of_all for code in of_all)
    assert answered(CALL, refusal("ValidationException"), operation="AssumeRole").of_all
    assert unanswered(CALL, exceptions.NoRegionError()).of_all
    assert answered(CALL, refusal("InvalidSignatureException", "Signature expired: it is late")).of_all
    assert unanswered(CALL, exceptions.NoCredentialsError()).of_all
    for code in ("AccessDeniedException", "ValidationException", "NobodyKnowsException"):
        assert not answered(CALL, refusal(code)).of_all


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
        FileNotFoundError(2, "No such file or directory", "/run/token"),
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


def test_a_file_that_is_missing_belongs_to_the_credentials() -> None:
    error = unanswered(CALL, FileNotFoundError(2, "No such file or directory", "/run/token"))
    assert "credentials: [Errno 2] No such file or directory: '/run/token'" in str(error)


def test_half_of_a_key_is_not_said_to_be_none() -> None:
    error = unanswered(CALL, exceptions.PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"))
    assert "missing: AWS_SECRET_ACCESS_KEY: give both parts" in str(error)
    assert "nor" not in str(error).partition("both")[0]


def test_no_text_shows_the_session_token() -> None:
    """AWS tells what it would have signed, all headers; Python's HTTP client tells what cannot be a header."""
    told = "It does not match.\n\nThe Canonical String for this request should have been\n'POST\n/\n\nx-amz-sec:TOKEN"
    for operation in ("Sign", "AssumeRole"):
        error = answered(CALL, refusal("SignatureDoesNotMatch", told), operation=operation)
        assert "It does not match." in str(error)
        assert "TOKEN" not in str(error)
    unfit = unanswered(CALL, exceptions.HTTPClientError(error="Invalid header value b'TOKEN\\n'"))
    assert "a line break" in str(unfit)
    assert "TOKEN" not in str(unfit)
    assert not isinstance(unfit, AwsUnavailableError)


def test_a_page_of_a_load_balancer_is_cut_short() -> None:
    text = str(answered(CALL, refusal("x", "<p>\n" * 2000)))
    assert len(text) < 700
    assert "\n" not in text


def test_an_error_can_be_made_by_hand() -> None:
    assert AwsError("m").response == {}
