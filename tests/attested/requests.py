"""Who signed a request: SigV4 from the side of KMS, sections 3.3 to 3.5 of the enclave specification.

Reads the request as it arrived and shares nothing with the enclave's signer of requests.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

WINDOW = timedelta(minutes=5)
SIGNED = ("content-type", "host", "x-amz-date", "x-amz-target")  # at least; and the token, if one is sent
_TOKEN = "x-amz-security-token"
_AUTHORIZATION = re.compile(
    r"AWS4-HMAC-SHA256 Credential=([^/, ]+)/(\d{8})/([a-z0-9-]+)/([a-z0-9]+)/aws4_request, ?"
    r"SignedHeaders=([a-z0-9;-]+), ?Signature=([0-9a-f]{64})"
)
_DATE = "%Y%m%dT%H%M%SZ"


class Refusal(Exception):
    """What KMS answers instead: the error's name, its text and the status."""

    def __init__(self, name: str, text: str | None = None, *, status: int = 400) -> None:
        super().__init__(f"{name}: {text}")
        self.name, self.text, self.status = name, text, status


@dataclass(frozen=True)
class Request:
    """One HTTP request; header names in lower case."""

    headers: Mapping[str, str]
    body: bytes = field(repr=False)
    method: str = "POST"
    target: str = "/"


@dataclass
class Credentials:
    """An access key that KMS knows."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)
    expired: bool = False


def authenticate(
    request: Request, known: Mapping[str, Credentials], *, region: str, now: datetime, service: str = "kms"
) -> Credentials:
    """Whose request it is; raises `Refusal` by the names of section 3.7."""
    headers = request.headers
    if "authorization" not in headers:
        raise Refusal("MissingAuthenticationToken", "Request is missing Authentication Token")
    found = _AUTHORIZATION.fullmatch(headers["authorization"])
    if found is None:
        raise Refusal("IncompleteSignature", "Authorization header requires existence of all its parameters.")
    access_key_id, day, scope_region, scope_service, names, signature = found.groups()
    credentials = _credentials(headers, known.get(access_key_id))
    if (scope_region, scope_service) != (region, service):
        raise Refusal(
            "InvalidSignatureException", f"Credential should be scoped to a valid region, not '{scope_region}'."
        )
    _check_date(headers.get("x-amz-date", ""), day, now)
    _check_signed_headers(headers, names.split(";"))
    scope = f"{day}/{region}/{service}/aws4_request"
    text = string_to_sign(canonical_request(request, names.split(";")), headers["x-amz-date"], scope)
    key = b"AWS4" + credentials.secret_access_key.encode()
    for part in (day, region, service, "aws4_request"):
        key = hmac.digest(key, part.encode(), "sha256")
    if not hmac.compare_digest(hmac.digest(key, text.encode(), "sha256").hex(), signature):
        raise Refusal(
            "InvalidSignatureException",
            "The request signature we calculated does not match the signature you provided. Check your AWS Secret "
            "Access Key and signing method. Consult the service documentation for details.",
        )
    return credentials


def canonical_request(request: Request, names: list[str]) -> str:
    lines = [f"{name}:{' '.join(request.headers[name].split())}" for name in names]
    digest = hashlib.sha256(request.body).hexdigest()
    return "\n".join([request.method, request.target, "", *lines, "", ";".join(names), digest])


def string_to_sign(canonical: str, date: str, scope: str) -> str:
    return "\n".join(["AWS4-HMAC-SHA256", date, scope, hashlib.sha256(canonical.encode()).hexdigest()])


def _credentials(headers: Mapping[str, str], found: Credentials | None) -> Credentials:
    if found is None or headers.get(_TOKEN) != found.session_token:
        raise Refusal("UnrecognizedClientException", "The security token included in the request is invalid.")
    if found.expired:
        raise Refusal("ExpiredTokenException", "The security token included in the request is expired")
    return found


def _check_date(text: str, day: str, now: datetime) -> None:
    try:
        made = datetime.strptime(text, _DATE).replace(tzinfo=UTC)
    except ValueError:
        raise Refusal("IncompleteSignature", "Date must be in ISO-8601 'basic format'.") from None
    if text[:8] != day:
        raise Refusal(
            "InvalidSignatureException", f"Date in Credential scope does not match YYYYMMDD from ISO-8601: {text}"
        )
    early, late = now - WINDOW, now + WINDOW
    if made < early:
        raise Refusal(
            "InvalidSignatureException",
            f"Signature expired: {text} is now earlier than {early:{_DATE}} ({now:{_DATE}} - 5 min.)",
        )
    if made > late:
        raise Refusal(
            "InvalidSignatureException",
            f"Signature not yet current: {text} is still later than {late:{_DATE}} ({now:{_DATE}} + 5 min.)",
        )


def _check_signed_headers(headers: Mapping[str, str], names: list[str]) -> None:
    needed = {*SIGNED, _TOKEN} if _TOKEN in headers else {*SIGNED}
    if names != sorted(names) or not needed <= set(names) or any(name not in headers for name in names):
        raise Refusal("IncompleteSignature", f"the headers {sorted(needed)} must be there and signed, in this order")
