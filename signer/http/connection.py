"""One HTTP/1.1 connection: h11 keeps the protocol, Trio moves the bytes, an `Api` answers.

Whoever speaks badly is told so with the status that h11 suggests, and the connection ends. Each step has its time: the
wait for a request, its head from the first byte on (whoever sends a byte now and then would otherwise hold the
connection for ever), its body, and the sending of the answer.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import formatdate
from typing import Protocol
from urllib.parse import unquote

import h11
import structlog
import trio

from signer.http.values import ApiRequest, ApiResponse, error_response

logger = structlog.get_logger(__name__)

MAX_HEAD = 32 * 1024  # bytes of request line and headers; an authentication parameter alone can have 3.3 kB
_HEAD_TOO_LARGE = f"the request's head (request line and headers) is larger than {MAX_HEAD} bytes"
_QUOTED = re.compile(r"bytearray\(b(.*)\)")  # how h11 shows what it can't read
_CHUNK = 65536  # bytes of one read
_BREATH = 100  # events of one request's body between two looks at what else is to do
_MAX_DISCARDED = 8 * 1024 * 1024  # bytes read from a client that was refused, so that it comes to read the answer
_DISCARD_TIME = 2.0  # seconds for that


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Times in seconds, sizes in bytes; from the configuration."""

    max_body_bytes: int = 256 * 1024
    header_timeout: float = 5.0
    body_timeout: float = 10.0  # for the body of a request, and for the client to take the answer
    keep_alive_timeout: float = 75.0
    shutdown_timeout: float = 10.0


class Api(Protocol):
    """What answers the requests of a server."""

    async def respond(self, request: ApiRequest, /) -> ApiResponse: ...


class _RefusedError(Exception):
    """The request is not read on; answered with *status* and the text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Connection:
    """Serves *stream* with *api* in `serve`; the caller closes the stream afterwards.

    *crowded* says whether others wait for this connection's place: then it ends after the next answer.
    """

    def __init__(self, stream: trio.SocketStream, api: Api, limits: Limits, *, crowded: Callable[[], bool]) -> None:
        self._stream = stream
        self._api = api
        self._limits = limits
        self._crowded = crowded
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self._idle = trio.CancelScope()  # around the wait for a request
        self._step = trio.CancelScope()  # around everything else; its deadline is that of the step being taken
        self._late = ""  # what a client hears whose time is up
        self._method = b""  # of the request that is read or answered
        self._is_last = False
        self._peer = _peer(stream)
        self.idle_since: float | None = trio.current_time()  # None from the first byte of a request to its answer
        self.waiting_since: float | None = self.idle_since  # for the client; None while it is answered

    def finish(self) -> None:
        """End after the request that has begun, at once if none has."""
        self._is_last = True
        if self.idle_since is not None:
            self._idle.cancel(reason="the connection is not needed any more")

    def give_way(self) -> None:
        """End now, unless a request is being answered: another client needs the place."""
        self.finish()
        if self.waiting_since is not None:
            self._late = ""
            self._step.cancel(reason="another client needs the place")

    async def serve(self) -> None:
        """Answer one request after the other until one side ends; an orderly end and a vanished peer just return."""
        refusal = None
        try:
            with self._step:
                await self._converse()
            if self._step.cancelled_caught and self._late:
                refusal = _RefusedError(408, self._late)
        except _RefusedError as exc:
            refusal = exc
        except h11.RemoteProtocolError as exc:
            refusal = _bad_request(exc)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return
        if refusal is not None:
            logger.warning("HTTP request refused", peer=self._peer, status=refusal.status, error=str(refusal))
            await self._refuse(error_response(refusal.status, str(refusal)))

    async def _converse(self) -> None:
        while (head := await self._read_head()) is not None:
            body = await self._read_body(head)
            self._step.deadline = float("inf")  # whoever answers keeps time
            self.waiting_since = None
            response = await self._api.respond(self._request(head, body))
            await self._send(response)
            if self._http.our_state is not h11.DONE:
                return  # the client, or `finish`, wanted this to be the last
            self.idle_since = self.waiting_since = trio.current_time()
            self._http.start_next_cycle()

    # -- reading

    async def _read_head(self) -> h11.Request | None:
        """The next request; None at the end of the connection."""
        while (event := self._http.next_event()) is h11.NEED_DATA:
            if self.idle_since is None:
                data = await self._stream.receive_some(_CHUNK)
            elif (first := await self._wait()) is not None:
                data, self.idle_since = first, None
                self._allow(self._limits.header_timeout, "head")
            else:
                return None
            self._http.receive_data(data)
        self.idle_since = None
        if not isinstance(event, h11.Request):
            return None
        if sum(len(name) + len(value) for name, value in event.headers) + len(event.target) > MAX_HEAD:
            raise _RefusedError(431, _HEAD_TOO_LARGE)  # it came in one piece, which h11 lets pass
        if event.http_version not in (b"1.0", b"1.1"):
            raise _RefusedError(505, "this server speaks HTTP/1.1")
        names = {name for name, _ in event.headers}
        if (
            b"content-length" in names and b"transfer-encoding" in names
        ):  # RFC 9112, 6.1: somebody may read it otherwise
            raise _RefusedError(400, "bad HTTP request: both Content-Length and Transfer-Encoding")
        self._method = event.method
        return event

    async def _wait(self) -> bytes | None:
        """The first bytes of a request; None when there will be none."""
        if not self._is_last:
            self._step.deadline = float("inf")
            with trio.CancelScope(deadline=trio.current_time() + self._limits.keep_alive_timeout) as self._idle:
                return await self._stream.receive_some(_CHUNK)
        return None

    async def _read_body(self, head: h11.Request) -> bytes:
        limit, body, events = self._limits.max_body_bytes, bytearray(), 0
        declared = next((int(value) for name, value in head.headers if name == b"content-length"), 0)
        self._allow(self._limits.body_timeout, "body")
        while declared <= limit and len(body) <= limit:
            event = self._http.next_event()
            if isinstance(event, h11.Data):
                body += event.data
                events += 1
                if events % _BREATH == 0:  # chunks of a byte each
                    await trio.lowlevel.checkpoint()
            elif event is h11.NEED_DATA:
                if self._http.they_are_waiting_for_100_continue:
                    await self._stream.send_all(self._encode(h11.InformationalResponse(status_code=100, headers=[])))
                self._http.receive_data(await self._stream.receive_some(_CHUNK))
            else:  # the end of the message
                return bytes(body)
        raise _RefusedError(413, f"the request's body is larger than {limit} bytes")

    def _allow(self, seconds: float, part: str = "") -> None:
        """Give the client so long for the next step; *part* of a request is what is waited for."""
        self._step.deadline = trio.current_time() + seconds
        self._late = part and f"the request's {part} did not arrive within {seconds:g} s"

    def _request(self, head: h11.Request, body: bytes) -> ApiRequest:
        path, _, query = head.target.decode("latin-1").partition("?")
        if not path.startswith("/"):  # the absolute form, as sent to proxies; or `*`
            path = "/" + path.partition("://")[2].partition("/")[2]
        host = next((value.decode("latin-1") for name, value in head.headers if name == b"host"), "")
        return ApiRequest(head.method.decode(), unquote(path) if "%" in path else path, query, body, self._peer, host)

    # -- answering

    async def _send(self, response: ApiResponse) -> None:
        headers = [
            ("content-type", response.content_type),
            ("content-length", str(len(response.body))),
            ("date", _date()),
            *response.headers,
        ]
        self._is_last = self._is_last or self._crowded()
        if self._is_last:
            headers.append(("connection", "close"))
        data = self._encode(h11.Response(status_code=response.status, headers=headers))
        if response.body and self._method != b"HEAD":
            data += self._encode(h11.Data(data=response.body))
        data += self._encode(h11.EndOfMessage())
        self._allow(self._limits.body_timeout)
        await self._stream.send_all(data)

    def _encode(self, event: h11.InformationalResponse | h11.Response | h11.Data | h11.EndOfMessage) -> bytes:
        return self._http.send(event) or b""

    async def _refuse(self, response: ApiResponse) -> None:
        """Answer, then read on for a while: closing on a client that still sends would destroy the answer."""
        self._is_last = True
        try:
            with trio.move_on_after(_DISCARD_TIME):
                if self._http.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                    await self._send(response)
                await self._stream.send_eof()
                discarded = 0
                while discarded < _MAX_DISCARDED and (data := await self._stream.receive_some(_CHUNK)):
                    discarded += len(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return


def _bad_request(exc: h11.RemoteProtocolError) -> _RefusedError:
    if exc.error_status_hint == 431:
        return _RefusedError(431, _HEAD_TOO_LARGE)
    reason = _QUOTED.sub(lambda match: match[1], str(exc))
    return _RefusedError(exc.error_status_hint, f"bad HTTP request: {reason}")


def _peer(stream: trio.SocketStream) -> str:
    try:
        return str(stream.socket.getpeername()[0])
    except OSError:
        return ""  # gone already


_last_date = (0, "")


def _date() -> str:
    """The time as RFC 9110 wants it in a response; made once a second."""
    global _last_date  # noqa: PLW0603  # a cache of one value
    now = int(time.time())
    if now != _last_date[0]:
        _last_date = (now, formatdate(now, usegmt=True))
    return _last_date[1]
