"""The check of SigV4: the vectors, requests signed by botocore, and everything that must not pass."""

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.attested.requests import Credentials, Refusal, Request, authenticate, canonical_request, string_to_sign
from tests.unit.attestation.vectors import VECTORS
from tests.unit.attested.signing import signed

_CASES = {case["operation"]: case for case in VECTORS["sigv4"]}
NOW = datetime(2026, 11, 20, 12, 0, 5, tzinfo=UTC)


def _request(name: str) -> Request:
    case = _CASES[name]
    headers = {
        "content-type": "application/x-amz-json-1.1",
        "host": f"kms.{case['region']}.amazonaws.com",
        "x-amz-date": case["amz_date"],
        "x-amz-target": f"TrentService.{name}",
        "authorization": case["authorization"],
    }
    if case["session_token"]:
        headers["x-amz-security-token"] = case["session_token"]
    return Request(headers, case["body"].encode())


def _credentials(name: str) -> Credentials:
    case = _CASES[name]
    return Credentials(case["access_key_id"], case["secret_access_key"], case["session_token"])


def _refusal(request: Request, credentials: Credentials, *, now: datetime = NOW, region: str = "us-west-2") -> str:
    try:
        authenticate(request, {credentials.access_key_id: credentials}, region=region, now=now)
    except Refusal as refusal:
        return refusal.name
    return ""


@pytest.mark.parametrize("name", _CASES)
def test_vector(name: str) -> None:
    case, request = _CASES[name], _request(name)
    names = case["authorization"].partition("SignedHeaders=")[2].partition(",")[0].split(";")
    canonical = canonical_request(request, names)
    assert canonical == case["canonical_request"]
    scope = f"20261120/{case['region']}/kms/aws4_request"
    assert string_to_sign(canonical, case["amz_date"], scope) == case["string_to_sign"]
    assert _refusal(request, _credentials(name)) == ""


@pytest.mark.parametrize("token", [None, "a/token=="])
def test_what_botocore_signs_is_accepted(token: str | None) -> None:
    credentials = Credentials("AKID", "a secret/+", token)
    request = signed("Decrypt", b'{"a": 1}', credentials)
    assert _refusal(request, credentials, now=datetime.now(UTC)) == ""
    assert _refusal(request, replace(credentials, secret_access_key="b"), now=datetime.now(UTC)) != ""


def _changed(**headers: str | None) -> Callable[[Request], Request]:
    def change(request: Request) -> Request:
        chosen = {**request.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        return replace(request, headers={name: value for name, value in chosen.items() if value is not None})

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda request: request, ""),
        (lambda request: replace(request, body=request.body + b" "), "InvalidSignatureException"),
        (lambda request: replace(request, target="/x"), "InvalidSignatureException"),
        (lambda request: replace(request, method="PUT"), "InvalidSignatureException"),
        (_changed(host="kms.us-west-1.amazonaws.com"), "InvalidSignatureException"),
        (_changed(x_amz_target="TrentService.Encrypt"), "InvalidSignatureException"),
        (_changed(content_type="text/plain"), "InvalidSignatureException"),
        (_changed(x_amz_date="20261120T120004Z"), "InvalidSignatureException"),
        (_changed(x_amz_date="20261121T120005Z"), "InvalidSignatureException"),
        (_changed(x_amz_date=None), "IncompleteSignature"),
        (_changed(x_amz_date="yesterday"), "IncompleteSignature"),
        (_changed(authorization=None), "MissingAuthenticationToken"),
        (_changed(authorization="AWS4-HMAC-SHA256 Credential=AKIDEXAMPLE"), "IncompleteSignature"),
        (_changed(x_amz_security_token=None), "UnrecognizedClientException"),
        (_changed(x_amz_security_token="another"), "UnrecognizedClientException"),
        (_changed(x_amz_target=None), "IncompleteSignature"),
        (_changed(x_other="not signed, and no matter"), ""),
    ],
)
def test_a_changed_request(change: Callable[[Request], Request], name: str) -> None:
    assert _refusal(change(_request("Decrypt")), _credentials("Decrypt")) == name


def test_the_signed_headers_are_in_order() -> None:
    request, credentials = _request("Encrypt"), _credentials("Encrypt")
    swapped = request.headers["authorization"].replace("content-type;host", "host;content-type")
    assert _refusal(_changed(authorization=swapped)(request), credentials) == "IncompleteSignature"


def test_day_and_region_must_be_those_of_the_scope() -> None:
    request, credentials = _request("Decrypt"), _credentials("Decrypt")
    known: dict[str, Any] = {credentials.access_key_id: credentials}
    with pytest.raises(Refusal, match="Date in Credential scope does not match"):
        authenticate(_changed(x_amz_date="20261121T120005Z")(request), known, region="us-west-2", now=NOW)
    with pytest.raises(Refusal, match="should be scoped to a valid region, not 'us-west-2'"):
        authenticate(request, known, region="eu-west-1", now=NOW)
    with pytest.raises(Refusal, match="should be scoped"):
        authenticate(request, known, region="us-west-2", service="dynamodb", now=NOW)


def test_every_digit_of_the_signature_counts() -> None:
    request, credentials = _request("Encrypt"), _credentials("Encrypt")
    authorization = request.headers["authorization"]
    for place in range(len(authorization) - 64, len(authorization)):
        digit = "0" if authorization[place] != "0" else "1"
        changed = authorization[:place] + digit + authorization[place + 1 :]
        assert _refusal(_changed(authorization=changed)(request), credentials) == "InvalidSignatureException"


def test_the_headers_that_count_must_be_signed() -> None:
    """Signed correctly, but with a header left out of the signature: a parent could change it."""
    credentials = Credentials("AKID", "secret", "token")
    for left_out in ("content-type", "host", "x-amz-target", "x-amz-security-token", "x-amz-date"):
        request = signed("Decrypt", b"{}", credentials, leave_out=left_out)
        assert _refusal(request, credentials, now=datetime.now(UTC)) == "IncompleteSignature", left_out


@pytest.mark.parametrize(
    ("off", "text"),
    [
        (-300, ""),
        (-301, "Signature not yet current: 20261120T120005Z is still later than "),
        (300, ""),
        (301, "Signature expired: 20261120T120005Z is now earlier than 20261120T120006Z (20261120T120506Z - 5 min.)"),
    ],
)
def test_the_window_of_time(off: int, text: str) -> None:
    request, credentials = _request("Encrypt"), _credentials("Encrypt")
    now = NOW + timedelta(seconds=off)
    known: dict[str, Any] = {credentials.access_key_id: credentials}
    if not text:
        assert authenticate(request, known, region="us-west-2", now=now) == credentials
        return
    with pytest.raises(Refusal) as caught:
        authenticate(request, known, region="us-west-2", now=now)
    assert caught.value.name == "InvalidSignatureException"
    assert str(caught.value.text).startswith(text)


def test_credentials_and_scope() -> None:
    request, credentials = _request("Encrypt"), _credentials("Encrypt")
    assert _refusal(request, replace(credentials, access_key_id="AKIDOTHER")) == "UnrecognizedClientException"
    assert _refusal(request, replace(credentials, session_token="token")) == "UnrecognizedClientException"
    assert _refusal(request, replace(credentials, secret_access_key="other")) == "InvalidSignatureException"
    assert _refusal(request, replace(credentials, expired=True)) == "ExpiredTokenException"
    assert _refusal(request, credentials, region="eu-west-1") == "InvalidSignatureException"
    assert "wJalr" not in repr(credentials)
