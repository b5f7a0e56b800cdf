"""What KMS's refusals mean, and whether they may be repeated; section 3.7 of the enclave specification. Pure.

Reading is liberal: the name may stand in the body or in a header, with a prefix or a suffix, the text under either
spelling or nowhere, and a load balancer's answer need not be JSON at all.
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum

_MAX_SHOWN = 400  # characters of KMS's own text
_MAX_RETRY_AFTER = 99999  # seconds; more digits are not a number of seconds
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9._]{0,99}")
_HTTP_DATE = "%a, %d %b %Y %H:%M:%S GMT"
_CLOCK_TOLERANCE = timedelta(minutes=4)  # KMS refuses from five minutes on, so less is no reason for a refusal


@dataclass(frozen=True, slots=True)
class Fault:
    """An answer other than 200; *name* and *message* are "" where KMS gave none."""

    status: int
    name: str = ""
    message: str = ""
    request_id: str = ""
    date: datetime | None = None  # KMS's own clock; believed, for it came over TLS that was checked
    retry_after: float | None = None  # seconds

    def __str__(self) -> str:
        shown = ": ".join(part for part in (self.name or f"HTTP {self.status}", self.message) if part)
        return f"{shown} (request {self.request_id})" if self.request_id else shown


class Repeat(Enum):
    """What a repeat of the call needs."""

    NEVER = "never"
    LATER = "later"  # as it is, after a pause
    NEW_DOCUMENT = "new document"  # once, with a fresh attestation document
    NEW_TIME = "new time"  # once, after the clock was set by the answer


@dataclass(frozen=True, slots=True)
class Call:
    """The facts of one call that a refusal is explained with. *pcr0* is this image's own, where it is known, and
    *signed_at* the time that the refused request was signed with."""

    operation: str
    key_id: str
    attested: bool
    region: str = ""
    pcr0: bytes | None = None
    signed_at: datetime | None = None


def known_name(fault: Fault) -> str:
    """The name to count it under: one that stands here, or its HTTP status."""
    named = fault.name in _CAUSES or fault.name in _DENIED | _EXPIRED | _TIME | _LATER
    return fault.name if named else f"HTTP {fault.status}"


def parse_fault(status: int, headers: Mapping[str, str], body: bytes, *, secrets: Collection[str] = ()) -> Fault:
    """The fault in an answer; *headers* have lower-case names. Never raises.

    AWS may quote the request in its text: *secrets* are taken out before the text is cut, where a part could remain.
    """
    fields = _object(body)
    name = _name(fields.get("__type")) or _name(headers.get("x-amzn-errortype"))
    text = fields.get("message")
    if not isinstance(text, str) or not text:
        text = fields.get("Message")
    return Fault(
        status=status,
        name=name,
        message=_one_line(_without(secrets, text)) if isinstance(text, str) else "",
        request_id=request_id_of(headers),
        date=_date(headers.get("date", "")),
        retry_after=_seconds(headers.get("retry-after", "")),
    )


def request_id_of(headers: Mapping[str, str]) -> str:
    """What AWS calls the request, for those who ask AWS about it; "" where it does not say."""
    return _one_line(headers.get("x-amzn-requestid", ""))[:64]


def _without(secrets: Collection[str], text: str) -> str:
    for secret in secrets:
        text = text.replace(secret, "(secret)")
    return text


def _object(body: bytes) -> dict[str, object]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _name(value: object) -> str:
    if not isinstance(value, str):
        return ""
    name = value.rpartition("#")[2].partition(":")[0].strip()
    return name if _NAME.fullmatch(name) else ""


def _one_line(text: str) -> str:
    line = "".join(character if character.isprintable() else " " for character in text[: 4 * _MAX_SHOWN])
    line = " ".join(line.split())
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."


def _date(text: str) -> datetime | None:
    try:
        return datetime.strptime(text, _HTTP_DATE).replace(tzinfo=UTC)
    except ValueError:
        return None


def _seconds(text: str) -> float | None:
    if text.isascii() and text.isdigit() and len(text) <= len(str(_MAX_RETRY_AFTER)):
        return float(text)
    return None


# -- meanings

_DENIED = frozenset(("AccessDeniedException", "AccessDenied"))
_EXPIRED = frozenset(("ExpiredTokenException", "ExpiredToken"))
_TIME = frozenset(("RequestExpired", "RequestTimeTooSkewed", "RequestInTheFuture"))
_TIME_TEXTS = ("Signature expired:", "Signature not yet current:")
_LATER = frozenset(
    (
        "ThrottlingException",
        "TooManyRequestsException",
        "LimitExceededException",
        "DependencyTimeoutException",
        "KeyUnavailableException",
        "KMSInternalException",
        "InternalFailure",
        "InternalError",
        "ServiceUnavailable",
        "ServiceUnavailableException",
    )
)
_BAD_CREDENTIALS = "AWS does not accept the credentials of Initialize: the access key id is unknown there, or mistyped"

_CAUSES: dict[str, str] = {
    "InvalidCiphertextException": "the blob is damaged, was made under another KMS key, or belongs to another address",
    "IncorrectKeyException": "the blob was made under another KMS key than encryption_key_id",
    "NotFoundException": "there is no KMS key {key_id} in {region}: look at encryption_key_id, alias and region",
    "DisabledException": "custody key disabled: an operator must enable the KMS key {key_id}",
    "KMSInvalidStateException": (
        "the KMS key {key_id} cannot be used: pending deletion, pending import, or its key store is away; "
        "cancel a pending deletion at once, it destroys every sealed key"
    ),
    "InvalidKeyUsageException": "the KMS key {key_id} is not symmetric with the usage ENCRYPT_DECRYPT",
    "UnrecognizedClientException": _BAD_CREDENTIALS,
    "InvalidClientTokenId": _BAD_CREDENTIALS,
    "IncompleteSignature": _BAD_CREDENTIALS,
    "IncompleteSignatureException": _BAD_CREDENTIALS,
    "MissingAuthenticationToken": _BAD_CREDENTIALS,
    "MissingAuthenticationTokenException": _BAD_CREDENTIALS,
    "InvalidSignatureException": "the secret access key does not belong to the access key id",
}
_EXPIRED_CAUSE = "the session token has expired: the host must send new credentials"
_CLOCK_CAUSE = "the enclave's clock is wrong by minutes, or the proxy holds requests back"
_NOT_THE_CLOCK_CAUSE = (
    "the clocks of the enclave and of AWS agree: the proxy holds requests back, or the credentials are at fault"
)
_THROTTLED_CAUSE = "too many requests to AWS KMS in this account and region"
_BROKEN_CAUSE = "AWS KMS is in trouble: this passes"


def is_about_time(fault: Fault) -> bool:
    """Whether KMS says that the request's date is wrong."""
    if fault.name == "InvalidSignatureException":
        return fault.message.startswith(_TIME_TEXTS)
    return fault.name in _TIME


def is_expired(fault: Fault) -> bool:
    """Whether the session credentials are over, and only the host can mend it."""
    return fault.name in _EXPIRED


def is_about_credentials(fault: Fault) -> bool:
    """Whether KMS refuses who asks, and would perhaps not refuse somebody else."""
    if fault.name == "InvalidSignatureException":
        return not is_about_time(fault)
    return is_expired(fault) or _CAUSES.get(fault.name) == _BAD_CREDENTIALS


def repeat_of(fault: Fault, *, attested: bool, now: datetime) -> Repeat:
    """What a repeat needs; *now* is the time that the request was signed with."""
    if is_about_time(fault):
        # A refusal for time although the clocks agree is a fault of the credentials, section 3.5.
        return Repeat.NEVER if fault.date is None or _agree(fault.date, now) else Repeat.NEW_TIME
    if fault.status >= 500 or fault.status == 429 or fault.name in _LATER:
        return Repeat.LATER
    if fault.name == "ValidationException" and attested:
        return Repeat.NEW_DOCUMENT
    return Repeat.NEVER


def _agree(theirs: datetime | None, ours: datetime | None) -> bool:
    return theirs is not None and ours is not None and abs(theirs - ours) <= _CLOCK_TOLERANCE


def cause_of(fault: Fault, call: Call) -> str:
    """The likely cause in words that say what to do; "" where KMS's own text has to be enough."""
    if is_expired(fault):
        return _EXPIRED_CAUSE
    if is_about_time(fault):
        return _NOT_THE_CLOCK_CAUSE if _agree(fault.date, call.signed_at) else _CLOCK_CAUSE
    if fault.name in _DENIED:
        return _denied(call)
    if fault.name == "ValidationException":
        return _invalid(call)
    if fault.name in ("ThrottlingException", "TooManyRequestsException", "LimitExceededException"):
        return _THROTTLED_CAUSE
    if fault.status == 429:
        return _THROTTLED_CAUSE
    if fault.status >= 500 or fault.name in _LATER:
        return _BROKEN_CAUSE
    return _CAUSES.get(fault.name, "").format(key_id=call.key_id, region=call.region or "this region")


def _denied(call: Call) -> str:
    action = f"kms:{call.operation}"
    if not call.attested:
        return (
            f"neither the key policy nor the role allows {action} on {call.key_id}; "
            f"a condition on PCRs never matches {action}, which carries no attestation document"
        )
    if call.pcr0 is not None and not any(call.pcr0):
        return (
            f"this enclave runs in debug mode, its PCR0 is zero, and a key policy that checks PCR0 refuses {action}; "
            "start it without debug mode"
        )
    image = "this image" if call.pcr0 is None else f"this image, PCR0 {call.pcr0.hex()},"
    return (
        f"the key policy does not allow {action} for {image} or not for this role; compare its condition "
        "kms:RecipientAttestation:PCR0 (or ImageSha384), PCR3 (role) and PCR8 (signing certificate)"
    )


def _invalid(call: Call) -> str:
    if not call.attested:
        return "a parameter is malformed: look at encryption_key_id"
    return (
        "a parameter is malformed, or AWS KMS does not accept the attestation document (too old, or not signed by "
        "the Nitro root, as in an emulator)"
    )
