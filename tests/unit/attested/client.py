"""The least client that there is: one request over one stream, by h11. It checks nothing of what it is told."""

import ssl

import h11
import trio

from tests.attested.account import Reply
from tests.attested.certificates import HOST, authority
from tests.attested.requests import Request


def context(*, roots: str | None = None) -> ssl.SSLContext:
    """That of a client as it should be: TLS 1.2 at least, the name checked, the test CA alone."""
    chosen = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    chosen.minimum_version = ssl.TLSVersion.TLSv1_2
    chosen.set_alpn_protocols(["http/1.1"])
    chosen.load_verify_locations(cadata=roots or authority().pem)
    return chosen


async def secure(
    stream: trio.abc.Stream, tls: ssl.SSLContext | None = None, *, name: str = HOST
) -> trio.SSLStream[trio.abc.Stream]:
    """TLS over *stream*; raises `trio.BrokenResourceError` when the server is refused."""
    secured = trio.SSLStream(stream, tls or context(), server_hostname=name, https_compatible=True)
    await secured.do_handshake()
    return secured


async def post(stream: trio.abc.Stream, request: Request) -> Reply:
    """The answer; raises `h11.RemoteProtocolError` for one that is cut short or none at all."""
    connection = h11.Connection(h11.CLIENT)
    head = h11.Request(
        method=request.method,
        target=request.target,
        headers=[*request.headers.items(), ("Content-Length", str(len(request.body)))],
    )
    for event in (head, h11.Data(data=request.body), h11.EndOfMessage()):
        await stream.send_all(connection.send(event) or b"")
    status, headers, body = 0, {}, b""
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some()))
            case h11.Response(status_code=status, headers=found):
                headers = {name.decode(): value.decode() for name, value in found}
            case h11.Data(data=data):
                body += data
            case h11.EndOfMessage():
                return Reply(status, body, headers)
