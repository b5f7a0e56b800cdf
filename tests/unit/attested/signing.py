"""Requests to KMS signed by botocore, which is no part of what is tested."""

import json
from typing import Any

from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials

from tests.attested.account import CREDENTIALS
from tests.attested.certificates import HOST
from tests.attested.requests import Credentials, Request


class _Incomplete(SigV4Auth):  # type: ignore[misc] # botocore has no types
    """Leaves a header out of what it signs."""

    left_out = ""

    def headers_to_sign(self, request: AWSRequest) -> Any:
        headers = super().headers_to_sign(request)
        del headers[self.left_out]
        return headers


def signed(
    operation: str,
    body: bytes | dict[str, Any],
    credentials: Credentials = CREDENTIALS,
    *,
    region: str = "us-west-2",
    host: str = HOST,
    service: str = "TrentService",
    content_type: str = "application/x-amz-json-1.1",
    leave_out: str = "",
) -> Request:
    """A POST to KMS, signed now."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {
        "Content-Type": content_type,
        "Host": host,
        "X-Amz-Target": f"{service}.{operation}",
    }
    request = AWSRequest("POST", f"https://{host}/", headers=headers, data=data)
    kind: type[SigV4Auth] = SigV4Auth
    if leave_out:
        kind = type("Incomplete", (_Incomplete,), {"left_out": leave_out})
    whose = BotoCredentials(credentials.access_key_id, credentials.secret_access_key, credentials.session_token)
    kind(whose, "kms", region).add_auth(request)
    return Request({name.lower(): str(value) for name, value in request.headers.items()}, data)
