"""What went wrong with a call of AWS, in words that name the action, the resource and, where it is known, the cure.

Pure: takes the errors of boto3 and the facts of the call. What may be repeated is a class of its own; which error is
of which class, and what each usually means, are tables below (section 3.7 of the enclave specification has those of
KMS).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from signer.errors import SignerError, UnavailableError

_MAX_SHOWN = 400  # characters of the other side's text: a load balancer may answer with a page

_THROTTLED = frozenset(
    (
        "BandwidthLimitExceeded",
        "EC2ThrottledException",
        "LimitExceededException",
        "PriorRequestNotComplete",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "RequestThrottled",
        "RequestThrottledException",
        "SlowDown",
        "ThrottledException",
        "Throttling",
        "ThrottlingException",
        "TooManyRequestsException",
    )
)
_BROKEN = frozenset(  # theirs, and over soon; most of them with a 5xx status, not all
    (
        "DependencyTimeoutException",
        "InternalError",
        "InternalFailure",
        "InternalServerError",
        "KMSInternalException",
        "KeyUnavailableException",
        "RequestTimeout",
        "RequestTimeoutException",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "TransactionInProgressException",
    )
)
_EXPIRED = frozenset(("ExpiredToken", "ExpiredTokenException"))
_UNKNOWN_ID = frozenset(("InvalidAccessKeyId", "InvalidClientTokenId", "UnrecognizedClientException"))
_SKEWED = frozenset(("RequestExpired", "RequestInTheFuture", "RequestTimeTooSkewed"))
_SIGNATURE = frozenset(("IncompleteSignature", "InvalidSignatureException", "SignatureDoesNotMatch"))
_OF_ALL = _EXPIRED | _UNKNOWN_ID | _SKEWED | _SIGNATURE | {"MissingAuthenticationToken"}
_DENIED = frozenset(("AccessDenied", "AccessDeniedException", "UnauthorizedOperation"))
_DENIED_ACTION = re.compile(r"not authorized to perform: ([a-z0-9-]+:[A-Za-z]+)")
_PERMISSIONS = {"dynamodb:TransactWriteItems": "dynamodb:PutItem"}  # no policy knows the former; ours are puts mostly
_ABSENT = frozenset(("NotFoundException", "ResourceNotFoundException"))

_CANONICAL = "The Canonical String"  # "for this request should have been": all headers follow
_BAD_HEADER = "Invalid header value"

_CLOCK = "this machine's clock is wrong by minutes (`timedatectl` tells), or a proxy holds requests back"
_HOP_LIMIT = (
    "in a container the instance's metadata takes a hop more than it allows by default: aws ec2 "
    "modify-instance-metadata-options --instance-id ... --http-tokens required --http-put-response-hop-limit 2"
)


class AwsError(SignerError):
    """AWS, or boto3 before it, refused a call: it was not executed. *response* is the answer as botocore parses it.

    *code* is the error's name, "" where there was no answer; *action* is "kms:Sign". *stale*: it is about the
    credentials, and those that are looked up anew may do better.
    """

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        action: str = "",
        resource: str = "",
        response: Mapping[str, Any] | None = None,
        stale: bool = False,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.action = action
        self.resource = resource
        self.response: Mapping[str, Any] = response or {}
        self.stale = stale

    @property
    def silent(self) -> bool:
        """Whether nothing was heard of AWS at all."""
        return not self.response

    @property
    def of_all(self) -> bool:
        """Whether any other call would be refused, too: it is about the credentials, the clock or the settings."""
        return self.silent or self.stale or self.code in _OF_ALL


class AwsUnavailableError(AwsError, UnavailableError):
    """Throttled, or no answer: the call may have been executed, and may be repeated."""

    status = 502

    @property
    def throttled(self) -> bool:
        """Whether AWS is there and answers, only not so often."""
        return self.code in _THROTTLED


@dataclass(frozen=True, slots=True)
class Call:
    """The facts of one call that errors tell. *region* is the client's, "" while it is unknown."""

    component: str
    service: str
    action: str
    resource: str = ""
    region: str = ""
    in_container: bool = False

    @property
    def name(self) -> str:
        """As policies call it: "kms:Sign"."""
        return f"{self.service}:{self.action}"

    def permission(self, message: str) -> str:
        """The one that a role lacks, where AWS refuses with *message*; it may be named otherwise than the call."""
        told = _DENIED_ACTION.search(message)
        return told[1] if told else _PERMISSIONS.get(self.name, self.name)

    def fails(
        self,
        text: str,
        *,
        repeat: bool,
        code: str = "",
        response: Mapping[str, Any] | None = None,
        stale: bool = False,
    ) -> AwsError:
        """The error with *text* behind what was called; *repeat*: it may be tried again."""
        where = f" on {self.resource}" if self.resource else ""
        kind = AwsUnavailableError if repeat else AwsError
        shown = f"{self.component}: {self.name}{where}: {text}"
        return kind(shown, code=code, action=self.name, resource=self.resource, response=response, stale=stale)


def answered(call: Call, response: Mapping[str, Any], *, operation: str = "") -> AwsError:
    """The error for an answer that is none; *operation* where it belongs to another call (of the credentials)."""
    error = response.get("Error") or {}
    code, message = str(error.get("Code") or ""), _one_line(_without_request(str(error.get("Message") or "")))
    status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode") or 0
    repeat = status >= 500 or status == 429 or code in _THROTTLED or code in _BROKEN
    if operation and operation != call.action:
        text = f"credentials: {operation}: {code}: {message}"
        return call.fails(text, repeat=repeat, code=code, response=response, stale=not repeat)
    text = ": ".join(part for part in (code or f"HTTP {status}", message) if part)
    cure = "" if repeat else _cure(call, code, message)
    stale = code in _EXPIRED | _UNKNOWN_ID | _SIGNATURE and cure != _CLOCK
    return call.fails(f"{text}; {cure}" if cure else text, repeat=repeat, code=code, response=response, stale=stale)


def unanswered(call: Call, error: Exception, *, made: bool = True) -> AwsError:
    """The error for what boto3 raises instead of an answer; *made*: there was a client, the call itself failed."""
    from botocore import exceptions
    from botocore.parsers import ResponseParserError

    text = _one_line(str(error)) or type(error).__name__
    if _BAD_HEADER in text:  # and behind that the session token
        return call.fails(
            "a line break or the like in the credentials: no request can be made", repeat=False, stale=True
        )
    match error:
        case exceptions.PartialCredentialsError():
            return call.fails(f"{text}: give both parts, or neither", repeat=False, stale=True)
        case exceptions.NoCredentialsError():
            return call.fails(_no_credentials(call, text), repeat=False, stale=True)
        case exceptions.NoRegionError():
            return call.fails(f"{text}; set region in the configuration, or AWS_REGION", repeat=False)
        case exceptions.EndpointConnectionError():
            return call.fails(f"{text}; {_unreachable(call)}", repeat=True)
        case exceptions.CredentialRetrievalError() | exceptions.MetadataRetrievalError():
            return call.fails(f"credentials: {text}", repeat=True)
        case (
            exceptions.HTTPClientError()
            | exceptions.ConnectionError()  # which is none of the former
            | exceptions.ChecksumError()  # this one and the next two: a reply that was cut or garbled
            | exceptions.IncompleteReadError()
            | ResponseParserError()
        ):
            return call.fails(f"no answer: {text}", repeat=True)
        case exceptions.BotoCoreError():
            return call.fails(f"{type(error).__name__}: {text}", repeat=False)
        case RuntimeError() if "redentials" in text:  # of those that are expired although they were just renewed
            return call.fails(f"credentials: {text}; {_CLOCK}", repeat=True)
        case OSError():  # of the network botocore has its own: this is the file of a token, or a program
            return call.fails(f"credentials: {text}", repeat=True)
    text = f"{type(error).__name__}: {text}"
    if not made:
        return call.fails(f"the SDK's settings or credentials cannot be used: {text}", repeat=False)
    return call.fails(f"no answer that can be read: {text}", repeat=True)


def _cure(call: Call, code: str, message: str) -> str:
    """What to do about a refusal; "" where its text has to be enough."""
    if code in _SKEWED or (code in _SIGNATURE and ("xpired" in message or "not yet current" in message)):
        return _CLOCK
    if code in _EXPIRED:
        return "the session token has expired: renew it, or leave the credentials to the instance's role"
    if code in _UNKNOWN_ID:
        return "AWS doesn't know the access key id (deleted, mistyped, or of another partition than the region)"
    if code in _SIGNATURE:
        return "the secret access key doesn't belong to the access key id"
    theirs = _region_of(call.resource)
    if theirs and call.region and theirs != call.region:
        return f"the resource is in {theirs}, and the client asks in {call.region}: set region: {theirs}"
    if code in _DENIED:
        what = f"on {call.resource}" if call.resource else "on *"
        return f"the role needs {call.permission(message)} {what}, by its own policy or by that of the resource"
    if code == "DisabledException":
        return f"somebody has disabled the key: aws kms enable-key --key-id {call.resource}"
    if code == "KMSInvalidStateException":
        return f"if the key is to be deleted: aws kms cancel-key-deletion --key-id {call.resource}, then enable-key"
    if code in _ABSENT:
        return f"nothing of that name in {call.region or 'the region'}: look at the name, the region and the account"
    return ""


def _no_credentials(call: Call, text: str) -> str:
    where = "neither the configuration, nor the environment, nor the shared files, nor the instance's role has any"
    return f"{text}: {where}" + (f"; {_HOP_LIMIT}" if call.in_container else "")


def _unreachable(call: Call) -> str:
    region = f"the region {call.region} is written right" if call.region else "the region is written right"
    return f"see whether {region}, and whether this host resolves and reaches that name"


def _region_of(resource: str) -> str:
    """The region in an ARN, "" in anything else."""
    parts = resource.split(":", 5)
    return parts[3] if len(parts) == 6 and parts[0] == "arn" else ""


def _without_request(message: str) -> str:
    """*message* less the request that some services repeat in it: its headers hold the session token."""
    return message.partition("The Canonical String")[0].strip()


def _one_line(text: str) -> str:
    """*text* without line breaks, bounded, and without what AWS tells of the request: the session token is in it."""
    line = " ".join(text.partition(_CANONICAL)[0].split())
    return line if len(line) <= _MAX_SHOWN else f"{line[:_MAX_SHOWN]}..."
