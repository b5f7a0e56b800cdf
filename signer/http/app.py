"""ASGI around a `respond` function: reads the body within its limits, hands values on, sends the answer.

Every request takes this way; what a path means is decided by `respond` alone, so that the server in front can be
exchanged.
"""

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import trio

from signer.http.values import ApiRequest, ApiResponse, error_response

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
AsgiApp = Callable[[Scope, Receive, Send], Awaitable[None]]


_MAX_DISCARDED = 8 * 1024 * 1024  # bytes


class Api(Protocol):
    """What answers the requests of a server."""

    async def respond(self, request: ApiRequest, /) -> ApiResponse: ...


class _DisconnectedError(Exception):
    """The client went away before its request was complete: nobody is there to be answered."""


def create_app(api: Api, *, max_body_bytes: int, body_timeout: float) -> AsgiApp:
    """An ASGI application that answers with *api*; *body_timeout* (seconds) is for the whole body."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no lifespan, no websockets
        try:
            with trio.fail_after(body_timeout):
                body = await _read_body(scope, receive, max_body_bytes)
        except _DisconnectedError:
            return
        except trio.TooSlowError:
            await _send(send, error_response(408, f"the request's body did not arrive within {body_timeout:g} s"))
        else:
            if body is None:
                await _send(send, error_response(413, f"the request's body is larger than {max_body_bytes} bytes"))
            else:
                await _send(send, await api.respond(_request(scope, body)))

    return app


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body; None where it is larger than *limit*, which is found out while counting.

    What is too much is read on for a while and thrown away: closing on a client that still sends would reset the
    connection before it has read the answer.
    """
    chunks: list[bytes] = []
    size = 0
    while size <= limit + _MAX_DISCARDED:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _DisconnectedError
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size <= limit:
            chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks) if size <= limit else None
    return None


def _request(scope: Scope, body: bytes) -> ApiRequest:
    client = scope.get("client")
    return ApiRequest(
        method=scope["method"],
        path=scope["path"],
        query=scope["query_string"].decode("latin-1"),
        body=body,
        peer=client[0] if client else "",
    )


async def _send(send: Send, response: ApiResponse) -> None:
    headers = [
        (b"content-type", response.content_type.encode()),
        (b"content-length", str(len(response.body)).encode()),
        *((name.encode(), value.encode()) for name, value in response.headers),
    ]
    if response.status in (408, 413):
        headers.append((b"connection", b"close"))  # the rest of the body is not read
    await send({"type": "http.response.start", "status": response.status, "headers": headers})
    await send({"type": "http.response.body", "body": response.body, "more_body": False})
