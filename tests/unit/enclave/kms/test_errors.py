"""KMS's refusals: read from whatever form they come in, explained, and repeated only where that can help."""

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.enclave.kms.errors import (
    Call,
    Fault,
    Repeat,
    cause_of,
    is_about_credentials,
    is_expired,
    parse_fault,
    repeat_of,
)

NOW = datetime(2026, 11, 20, 12, 0, 5, tzinfo=UTC)
PCR0 = bytes(range(48))
DECRYPT = Call("Decrypt", "alias/baker", attested=True, region="us-west-2", pcr0=PCR0)
ENCRYPT = Call("Encrypt", "alias/baker", attested=False, region="us-west-2", pcr0=PCR0)


@pytest.mark.parametrize(
    ("headers", "body", "name", "message"),
    [
        ({}, '{"__type":"AccessDeniedException","Message":"no"}', "AccessDeniedException", "no"),
        ({}, '{"__type":"NotFoundException","message":"no"}', "NotFoundException", "no"),
        ({}, '{"__type":"X","message":"","Message":"spelled so"}', "X", "spelled so"),
        ({}, '{"__type":"X","message":7}', "X", ""),
        ({}, '{"__type":"InvalidCiphertextException"}', "InvalidCiphertextException", ""),
        ({}, '{"__type":"com.amazonaws.kms#DisabledException"}', "DisabledException", ""),
        ({}, '{"__type":"DisabledException:http://internal/"}', "DisabledException", ""),
        ({"x-amzn-errortype": "ThrottlingException:http://x/"}, "", "ThrottlingException", ""),
        ({"x-amzn-errortype": "Other"}, '{"__type":"First"}', "First", ""),
        ({"x-amzn-errortype": "Other"}, '{"__type":17}', "Other", ""),
        ({}, '{"__type":"not a name\\n"}', "", ""),
        ({}, "<html>502 Bad Gateway</html>", "", ""),
        ({}, "[]", "", ""),
        ({}, "", "", ""),
        ({}, '{"__type":"X","message":"two\\nlines \\u0007 \\u202e"}', "X", "two lines"),
        ({}, '{"__type":"X","message":"' + "m" * 500 + '"}', "X", "m" * 400 + "..."),
    ],
)
def test_bodies(headers: dict[str, str], body: str, name: str, message: str) -> None:
    fault = parse_fault(400, headers, body.encode())
    assert (fault.name, fault.message) == (name, message)


def test_headers() -> None:
    headers = {"x-amzn-requestid": "0d1e", "date": "Fri, 20 Nov 2026 12:00:05 GMT", "retry-after": "3"}
    fault = parse_fault(503, headers, b"")
    assert fault == Fault(503, request_id="0d1e", date=NOW, retry_after=3.0)
    assert str(fault) == "HTTP 503 (request 0d1e)"
    for bad in ("-1", "1.5", "²", "999999", "soon", "Fri, 20 Nov 2026 12:00:05 GMT"):
        assert parse_fault(503, {"retry-after": bad, "date": bad[:9]}, b"").retry_after is None
    assert parse_fault(503, {"date": "yesterday"}, b"").date is None


HEADERS = st.sampled_from(["date", "retry-after", "x-amzn-errortype", "x-amzn-requestid"])


@given(st.integers(100, 599), st.dictionaries(HEADERS, st.text()), st.binary(max_size=300))
def test_any_answer(status: int, headers: dict[str, str], body: bytes) -> None:
    fault = parse_fault(status, headers, body)
    repeat_of(fault, attested=True, now=NOW)
    cause_of(fault, DECRYPT)
    assert str(fault).isprintable()


def test_deep_and_long_bodies() -> None:
    assert parse_fault(400, {}, b"[" * 65536).name == ""
    assert parse_fault(400, {}, b'{"__type":' + b"9" * 60000 + b"}").name == ""
    json_text = json.dumps({"__type": "A" * 60000, "message": "m" * 60000})
    assert parse_fault(400, {}, json_text.encode()).name == ""


NAMES_OF_NO_REPEAT = [
    ("AccessDeniedException", "PCR0 000102"),
    ("InvalidCiphertextException", "another address"),
    ("IncorrectKeyException", "another KMS key"),
    ("NotFoundException", "no KMS key alias/baker in us-west-2"),
    ("DisabledException", "custody key disabled"),
    ("KMSInvalidStateException", "destroys every sealed key"),
    ("InvalidKeyUsageException", "ENCRYPT_DECRYPT"),
    ("ExpiredTokenException", "new credentials"),
    ("UnrecognizedClientException", "access key id"),
    ("InvalidClientTokenId", "access key id"),
    ("IncompleteSignature", "access key id"),
    ("MissingAuthenticationToken", "access key id"),
    ("InvalidSignatureException", "secret access key"),
]


@pytest.mark.parametrize(("name", "cause"), NAMES_OF_NO_REPEAT)
def test_what_no_repeat_mends(name: str, cause: str) -> None:
    fault = Fault(400, name, "text")
    assert repeat_of(fault, attested=True, now=NOW) is Repeat.NEVER
    assert cause in cause_of(fault, DECRYPT)
    assert is_expired(fault) is (name == "ExpiredTokenException")


@pytest.mark.parametrize(
    ("status", "name"),
    [
        (400, "ThrottlingException"),
        (400, "TooManyRequestsException"),
        (400, "LimitExceededException"),
        (429, ""),
        (500, "DependencyTimeoutException"),
        (400, "KeyUnavailableException"),
        (500, "KMSInternalException"),
        (400, "InternalFailure"),
        (503, "ServiceUnavailable"),
        (502, ""),
        (599, "Unheard"),
    ],
)
def test_what_passes(status: int, name: str) -> None:
    fault = Fault(status, name)
    assert repeat_of(fault, attested=False, now=NOW) is Repeat.LATER
    assert cause_of(fault, ENCRYPT) != ""


def test_an_unknown_refusal_is_final_and_shown_as_it_is() -> None:
    fault = Fault(400, "NewException", "its text", "1f")
    assert repeat_of(fault, attested=True, now=NOW) is Repeat.NEVER
    assert cause_of(fault, DECRYPT) == ""
    assert str(fault) == "NewException: its text (request 1f)"


def test_a_refused_document_is_made_anew() -> None:
    fault = Fault(400, "ValidationException", "text")
    assert repeat_of(fault, attested=True, now=NOW) is Repeat.NEW_DOCUMENT
    assert repeat_of(fault, attested=False, now=NOW) is Repeat.NEVER
    assert "attestation document" in cause_of(fault, DECRYPT)
    assert "attestation document" not in cause_of(fault, ENCRYPT)


def test_who_is_denied() -> None:
    fault = Fault(400, "AccessDeniedException")
    assert PCR0.hex() in cause_of(fault, DECRYPT)
    debug = Call("Decrypt", "k", attested=True, pcr0=bytes(48))
    assert "debug mode" in cause_of(fault, debug)
    assert "never matches kms:Encrypt" in cause_of(fault, ENCRYPT)
    assert "PCR0 " not in cause_of(fault, Call("Decrypt", "k", attested=True)).replace("PCR0 (", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("InvalidSignatureException", "Signature expired: 2026 is now earlier than"),
        ("InvalidSignatureException", "Signature not yet current: 2026 is still later than"),
        ("RequestExpired", ""),
        ("RequestTimeTooSkewed", ""),
        ("RequestInTheFuture", ""),
    ],
)
def test_a_wrong_clock(name: str, message: str) -> None:
    for minutes, repeat in ((5, Repeat.NEW_TIME), (-5, Repeat.NEW_TIME), (3.9, Repeat.NEVER), (-3.9, Repeat.NEVER)):
        fault = Fault(400, name, message, date=NOW + timedelta(minutes=minutes))
        assert repeat_of(fault, attested=True, now=NOW) is repeat
        cause = cause_of(fault, replace(DECRYPT, signed_at=NOW))
        assert ("credentials are at fault" in cause) is (repeat is Repeat.NEVER)
        assert ("clock is wrong" in cause) is (repeat is Repeat.NEW_TIME)
        assert "clock is wrong" in cause_of(fault, DECRYPT), "nobody knows when it was signed"
    assert repeat_of(Fault(400, name, message), attested=True, now=NOW) is Repeat.NEVER
    assert "clock is wrong" in cause_of(Fault(400, name, message), replace(DECRYPT, signed_at=NOW))


def test_a_wrong_secret_is_no_wrong_clock() -> None:
    fault = Fault(
        400, "InvalidSignatureException", "The request signature we calculated", date=NOW + timedelta(hours=1)
    )
    assert repeat_of(fault, attested=True, now=NOW) is Repeat.NEVER


@pytest.mark.parametrize(
    ("name", "message", "about"),
    [
        ("ExpiredToken", "", True),
        ("MissingAuthenticationToken", "", True),
        ("IncompleteSignature", "", True),
        ("InvalidSignatureException", "The request signature we calculated does not match", True),
        ("InvalidSignatureException", "Signature expired: x", False),
        ("RequestExpired", "", False),
        ("AccessDeniedException", "", False),
        ("", "", False),
    ],
)
def test_who_asks_may_be_what_is_refused(name: str, message: str, about: bool) -> None:
    assert is_about_credentials(Fault(400, name, message)) is about
