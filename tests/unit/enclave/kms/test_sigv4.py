"""Signatures of requests: the vectors, and botocore's for anything else."""

import json
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials as BotoCredentials
from hypothesis import given
from hypothesis import strategies as st

from signer.enclave.kms.sigv4 import Credentials, canonical_request, signed_headers, signing_key, string_to_sign

VECTORS: dict[str, Any] = json.loads((Path(__file__).parents[3] / "vectors" / "attestation.json").read_text())
HOST = "kms.us-west-2.amazonaws.com"


@pytest.mark.parametrize("case", VECTORS["sigv4"], ids=lambda case: str(case["operation"]))
def test_vectors(case: dict[str, str]) -> None:
    body = case["body"].encode()
    headers = signed_headers(
        Credentials(
            access_key_id=case["access_key_id"],
            secret_access_key=case["secret_access_key"],
            session_token=case["session_token"],
        ),
        host=HOST,
        region=case["region"],
        target=f"TrentService.{case['operation']}",
        body=body,
        now=datetime.strptime(case["amz_date"], "%Y%m%dT%H%M%SZ").replace(tzinfo=UTC),
    )
    assert headers["authorization"] == case["authorization"]
    assert headers["x-amz-date"] == case["amz_date"]
    canonical = canonical_request({name: headers[name] for name in headers if name != "authorization"}, body)
    assert canonical == case["canonical_request"]
    scope = f"{case['amz_date'][:8]}/{case['region']}/kms/aws4_request"
    assert string_to_sign(case["amz_date"], scope, canonical) == case["string_to_sign"]
    key = signing_key(case["secret_access_key"], case["amz_date"][:8], case["region"], "kms")
    assert key.hex() == case["signing_key"]


TEXT = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=80)


@given(
    access_key_id=st.from_regex(r"[A-Z0-9]{16,32}", fullmatch=True),
    secret=TEXT,
    token=st.none() | TEXT,
    region=st.from_regex(r"[a-z]{2}-[a-z]{4,9}-[1-9]", fullmatch=True),
    operation=st.sampled_from(["Encrypt", "Decrypt", "GenerateDataKey", "DescribeKey"]),
    body=st.binary(max_size=200),
    now=st.datetimes(datetime(2020, 1, 1), datetime(2060, 1, 1)),  # noqa: DTZ001 - Hypothesis wants bounds without zone
)
def test_botocore_agrees(
    access_key_id: str, secret: str, token: str | None, region: str, operation: str, body: bytes, now: datetime
) -> None:
    host, target = f"kms.{region}.amazonaws.com", f"TrentService.{operation}"
    ours = signed_headers(
        Credentials(access_key_id=access_key_id, secret_access_key=secret, session_token=token),
        host=host,
        region=region,
        target=target,
        body=body,
        now=now.replace(tzinfo=UTC),
    )
    request = AWSRequest("POST", f"https://{host}/", data=body)
    request.headers["Content-Type"] = "application/x-amz-json-1.1"
    request.headers["X-Amz-Target"] = target
    with patch("botocore.auth.get_current_datetime", return_value=now):
        SigV4Auth(BotoCredentials(access_key_id, secret, token), "kms", region).add_auth(request)
    assert ours["authorization"] == request.headers["Authorization"]
    assert ours["x-amz-date"] == request.headers["X-Amz-Date"]
    assert ours.get("x-amz-security-token") == request.headers.get("X-Amz-Security-Token")


def test_the_date_is_of_utc() -> None:
    here = datetime(2026, 11, 21, 1, 0, 5, tzinfo=timezone(timedelta(hours=13)))
    headers = signed_headers(
        Credentials(access_key_id="AKIDEXAMPLE", secret_access_key="s"),
        host=HOST,
        region="us-west-2",
        target="TrentService.Decrypt",
        body=b"{}",
        now=here,
    )
    assert headers["x-amz-date"] == "20261120T120005Z"
    assert "Credential=AKIDEXAMPLE/20261120/us-west-2/kms/aws4_request" in headers["authorization"]


def test_secrets_stay_out_of_the_repr() -> None:
    shown = repr(Credentials(access_key_id="AKIDEXAMPLE", secret_access_key="hidden", session_token="hidden too"))
    assert "AKIDEXAMPLE" in shown
    assert "hidden" not in shown


def test_values_are_trimmed_as_the_other_side_trims_them() -> None:
    lines = canonical_request({"b": "  two   words ", "a": "\tone"}, b"").split("\n")
    assert lines[3:7] == ["a:one", "b:two words", "", "a;b"]
