"""Signature Version 4 of a call of KMS, section 3.4 of the enclave specification. Pure.

Only what KMS needs: one POST to `/`, no query, a body that is hashed whole.
"""

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

CONTENT_TYPE = "application/x-amz-json-1.1"
_ALGORITHM = "AWS4-HMAC-SHA256"
_TERMINATOR = "aws4_request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Credentials:
    """Who asks. *session_token* comes with temporary credentials only. Secrets stay out of the repr."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)

    @property
    def secrets(self) -> tuple[str, ...]:
        """What no text may show."""
        return (self.secret_access_key, *([self.session_token] if self.session_token else []))


def signed_headers(
    credentials: Credentials, *, host: str, region: str, target: str, body: bytes, now: datetime, service: str = "kms"
) -> dict[str, str]:
    """The headers of a call of *target* (`TrentService.Decrypt`), `Authorization` included; *now* is aware.

    The very bytes of *body* must be sent: its hash is signed.
    """
    amz_date = now.astimezone(UTC).strftime("%Y%m%dT%H%M%SZ")
    headers = {"content-type": CONTENT_TYPE, "host": host, "x-amz-date": amz_date, "x-amz-target": target}
    if credentials.session_token is not None:
        headers["x-amz-security-token"] = credentials.session_token
    scope = f"{amz_date[:8]}/{region}/{service}/{_TERMINATOR}"
    text = string_to_sign(amz_date, scope, canonical_request(headers, body))
    key = signing_key(credentials.secret_access_key, amz_date[:8], region, service)
    signature = hmac.new(key, text.encode(), hashlib.sha256).hexdigest()
    headers["authorization"] = (
        f"{_ALGORITHM} Credential={credentials.access_key_id}/{scope}, "
        f"SignedHeaders={';'.join(sorted(headers))}, Signature={signature}"
    )
    return headers


def canonical_request(headers: Mapping[str, str], body: bytes) -> str:
    """The request as both sides hash it; every one of *headers* (lower-case names) is signed."""
    names = sorted(headers)
    lines = [f"{name}:{' '.join(headers[name].split())}" for name in names]
    return "\n".join(["POST", "/", "", *lines, "", ";".join(names), hashlib.sha256(body).hexdigest()])


def string_to_sign(amz_date: str, scope: str, canonical: str) -> str:
    """Date, scope and the hash of the canonical request."""
    return "\n".join([_ALGORITHM, amz_date, scope, hashlib.sha256(canonical.encode()).hexdigest()])


def signing_key(secret: str, date: str, region: str, service: str) -> bytes:
    """The key of one day, region and service."""
    key = f"AWS4{secret}".encode()
    for part in (date, region, service, _TERMINATOR):
        key = hmac.new(key, part.encode(), hashlib.sha256).digest()
    return key
