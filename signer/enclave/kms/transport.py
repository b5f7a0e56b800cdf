"""HTTPS from inside the enclave: TLS of our own over whatever stream the parent's proxy gives; sections 3.1 and 3.2.

The name check is what makes an answer of KMS trustworthy, so the certificates it may rest on are pinned: the roots of
`roots.pem`, nothing of the system's and nothing of the environment's. HTTP is h11 and no client library: one POST and
one answer need no redirects, cookies, proxies or decompression, and all that is in the image is measured.

An answer is bounded in size and in time, and a connection that did not end its exchange cleanly is thrown away.
"""

import ssl
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from typing import NoReturn

import h11
import trio

CONNECT_TIMEOUT = 5.0  # seconds
TLS_TIMEOUT = 5.0  # seconds; a proxy that accepts and cannot dial looks like a handshake that never ends
ANSWER_TIMEOUT = 10.0  # seconds for the request and its whole answer
MAX_BODY = 64 * 1024  # bytes; the longest honest answer, an envelope and a blob, has some 12,000
_MAX_HEAD = 16 * 1024  # bytes of status line and headers
_CHUNK = 16 * 1024  # bytes of one read
_MAX_IDLE = 20.0  # seconds; below the idle time of AWS and of the usual proxies
MAX_CONNECTIONS = 16  # at a time: 200 keys at 20 ms take a quarter of a second, and more would mostly do handshakes

Connect = Callable[[], Awaitable[trio.abc.Stream]]
"""Opens the stream to the proxy, which joins it to KMS; vsock:3:8000 in an enclave, TCP in the tests."""


class TransportError(Exception):
    """There is no answer. The request may have been executed. The text says where it ended, and what to look at."""


class TrustError(TransportError):
    """TLS failed for what the other side is or speaks: an attack or a misconfiguration. Nothing was sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer of KMS, whatever it says; header names in lower case."""

    status: int
    headers: Mapping[str, str]
    body: bytes = field(repr=False)


def pinned_roots() -> str:
    """The root certificates that KMS's certificate may rest on, PEM."""
    return resources.files("signer.enclave.kms").joinpath("roots.pem").read_text("ascii")


def tls_context(roots: str) -> ssl.SSLContext:
    """TLS 1.2 or 1.3, with the name checked and these *roots* (PEM) alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificates and names; reads no environment
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    context.load_verify_locations(cadata="\n".join(line for line in roots.splitlines() if not line.startswith("#")))
    return context


class Transport:
    """Connections to one *host*, kept between requests and shared by the sessions: each request is signed by itself.

    *place* is how error texts name the proxy: `vsock:3:8000`.
    """

    def __init__(self, host: str, connect: Connect, tls: ssl.SSLContext, *, place: str) -> None:
        self.host = host
        self._connect = connect
        self._tls = tls
        self._place = place
        self._kept: list[_Connection] = []
        self._slots = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        """POST *body* to `/`; raises `TransportError`. Cancelled, it closes its connection."""
        async with self._slots:
            return await self._post(headers, body)

    async def _post(self, headers: Mapping[str, str], body: bytes) -> Answer:
        kept = await self._take()
        if kept is not None:
            try:
                return await self._exchange(kept, headers, body)
            except _StaleError:
                pass  # closed while it lay idle, before anything of an answer: once more, over a new one
        try:
            return await self._exchange(await self._open(), headers, body)
        except _StaleError as exc:
            raise TransportError(f"{self.host} closed the connection without an answer") from exc

    async def aclose(self) -> None:
        """Close what is kept; exchanges that run are not waited for."""
        while self._kept:
            await trio.aclose_forcefully(self._kept.pop().stream)

    async def _take(self) -> "_Connection | None":
        """The connection used last, of those that are fresh enough; the others are closed."""
        oldest = trio.current_time() - _MAX_IDLE
        while self._kept and self._kept[0].used_at < oldest:
            await trio.aclose_forcefully(self._kept.pop(0).stream)
        return self._kept.pop() if self._kept else None

    async def _exchange(self, connection: "_Connection", headers: Mapping[str, str], body: bytes) -> Answer:
        reusable = False
        try:
            with trio.fail_after(ANSWER_TIMEOUT):
                answer, reusable = await connection.exchange(headers, body)
        except trio.TooSlowError:
            raise TransportError(f"{self.host} did not answer within {ANSWER_TIMEOUT:g} s") from None
        except h11.RemoteProtocolError as exc:
            raise TransportError(f"{self.host} sent something that is not an answer in HTTP: {exc}") from exc
        except _CutError as exc:
            raise TransportError(f"the connection to {self.host} was lost in mid-answer") from exc
        finally:
            if reusable:
                self._kept.append(connection)
            else:
                await trio.aclose_forcefully(connection.stream)
        return answer

    async def _open(self) -> "_Connection":
        stream = await self._dial()
        tls = trio.SSLStream(stream, self._tls, server_hostname=self.host, https_compatible=True)
        try:
            with trio.fail_after(TLS_TIMEOUT):
                await tls.do_handshake()
        except BaseException as exc:
            await trio.aclose_forcefully(tls)
            self._explain_handshake(exc)
        return _Connection(tls)

    async def _dial(self) -> trio.abc.Stream:
        try:
            with trio.fail_after(CONNECT_TIMEOUT):
                return await self._connect()
        except trio.TooSlowError:
            raise TransportError(
                f"the proxy at {self._place} did not accept a connection within {CONNECT_TIMEOUT:g} s; is it running?"
            ) from None
        except OSError as exc:
            raise TransportError(
                f"no connection to the proxy at {self._place}: {exc.strerror or exc}; is it running on the parent?"
            ) from exc

    def _explain_handshake(self, exc: BaseException) -> NoReturn:
        """Raise what a failed handshake means; other exceptions go on as they are."""
        if isinstance(exc, trio.TooSlowError):
            raise TransportError(
                f"{self.host} did not answer in TLS within {TLS_TIMEOUT:g} s; the proxy at {self._place} accepts, "
                "but perhaps cannot reach it"
            ) from None
        if not isinstance(exc, trio.BrokenResourceError):
            raise exc
        cause = exc.__cause__
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise TrustError(
                f"the other side is not {self.host}: {cause.verify_message}; somebody answers in its name, or the "
                "proxy leads elsewhere"
            ) from exc
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError):
            raise TrustError(f"no TLS with {self.host}: {cause.reason or 'it speaks something else'}") from exc
        raise TransportError(
            f"the connection to {self.host} was closed during the TLS handshake; does the proxy at {self._place} "
            "allow that name, and reach it?"
        ) from exc


class _StaleError(Exception):
    """The connection ended before the first byte of an answer."""


class _CutError(Exception):
    """The connection ended within an answer."""


class _Connection:
    """One TLS connection with its HTTP state."""

    def __init__(self, stream: trio.SSLStream[trio.abc.Stream]) -> None:
        self.stream = stream
        self.used_at = trio.current_time()
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        self._answering = False

    async def exchange(self, headers: Mapping[str, str], body: bytes) -> tuple[Answer, bool]:
        """The answer, and whether another request may follow."""
        self._answering = False
        try:
            await self._send(headers, body)
            head = await self._head()
            content = await self._body()
        except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
            raise (_CutError if self._answering else _StaleError) from exc
        self.used_at = trio.current_time()
        names = {name.decode("ascii").lower(): value.decode("latin-1") for name, value in head.headers}
        return Answer(head.status_code, names, content), self._next_cycle()

    async def _send(self, headers: Mapping[str, str], body: bytes) -> None:
        request = h11.Request(
            method="POST", target="/", headers=[*headers.items(), ("content-length", str(len(body)))]
        )  # fmt: skip
        data = [self._http.send(event) or b"" for event in (request, h11.Data(data=body), h11.EndOfMessage())]
        await self.stream.send_all(b"".join(data))

    async def _head(self) -> h11.Response:
        while not isinstance(event := await self._event(), h11.Response):
            if not isinstance(event, h11.InformationalResponse):
                raise h11.RemoteProtocolError("no answer")
        return event

    async def _body(self) -> bytes:
        content = bytearray()
        while isinstance(event := await self._event(), h11.Data):
            content += event.data
            if len(content) > MAX_BODY:
                raise h11.RemoteProtocolError(f"an answer of more than {MAX_BODY} bytes")
        if not isinstance(event, h11.EndOfMessage):
            raise h11.RemoteProtocolError("an answer without an end")
        return bytes(content)

    async def _event(self) -> object:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            chunk = await self.stream.receive_some(_CHUNK)
            if not chunk:
                return self._event_at_end()
            self._answering = True
            self._http.receive_data(bytes(chunk))
        return event

    def _event_at_end(self) -> object:
        """The end of the stream ends an answer that came without a length, and cuts any other."""
        if not self._answering:
            raise _StaleError
        self._http.receive_data(b"")
        try:
            return self._http.next_event()
        except h11.RemoteProtocolError as exc:
            raise _CutError from exc

    def _next_cycle(self) -> bool:
        """Whether both sides are done and nothing came behind the answer."""
        if self._http.our_state is not h11.DONE or self._http.their_state is not h11.DONE:
            return False
        if self._http.trailing_data[0]:
            return False
        self._http.start_next_cycle()
        return True
