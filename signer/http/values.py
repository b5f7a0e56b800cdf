"""Requests and responses as values, so that what answers them knows no web framework."""

import json
from dataclasses import dataclass
from http import HTTPStatus

JSON = "application/json; charset=utf-8"
TEXT = "text/plain; charset=utf-8"
_REPEATED = 502  # the status that Octez clients repeat by themselves
_MAX_REPEATED = 240  # characters: its text goes to the user's log ten times

# Go's encoder escapes these three, so that JSON can stand inside HTML.
_GO_ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


@dataclass(frozen=True, slots=True)
class ApiRequest:
    """What was asked; *path* is percent-decoded once, *query* is raw."""

    method: str
    path: str
    query: str = ""
    body: bytes = b""
    peer: str = ""  # the TCP peer's address; forwarding headers are not believed
    host: str = ""  # the Host header


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """What is answered."""

    status: int
    body: bytes = b""
    content_type: str = TEXT
    headers: tuple[tuple[str, str], ...] = ()


def json_response(value: object, status: int = 200) -> ApiResponse:
    """Compact JSON and a newline, escaped as Go does it."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
    return ApiResponse(status, text.translate(_GO_ESCAPES).encode(errors="replace") + b"\n", JSON)


def error_response(status: int, text: str) -> ApiResponse:
    """The JSON list in which Octez clients look for an error (section 8 of the remote-signer specification).

    A 502 is cut short (section 7 there); all of it is in the signer's log.
    """
    if status == _REPEATED and len(text) > _MAX_REPEATED:
        text = f"{text[:_MAX_REPEATED]}... (see the signer's log)"
    return json_response([{"id": "failure", "kind": "temporary", "msg": text}], status)


def not_found() -> ApiResponse:
    return ApiResponse(404, b"404 page not found\n")


def method_not_allowed(allowed: str) -> ApiResponse:
    return ApiResponse(405, headers=(("allow", allowed),))


def status_text(status: int) -> str:
    """`OK`, `Not Found`: how the metrics name a status."""
    return HTTPStatus(status).phrase
