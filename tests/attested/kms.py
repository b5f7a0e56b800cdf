"""The fake KMS: an `Account` behind TLS on Trio, with the faults of networks and of AWS.

In the process of a test: `serving(kms)` on a TCP port of loopback, or `in_memory(kms)` without any socket, for tests in
virtual time. As a process of its own:

    python -m tests.attested.kms --port 0 --ca-file ca.pem --pcr0 HEX

Its first line says where it is; then each line of JSON on standard input changes something or asks, and is answered by
one (see `command`). It ends with its standard input.
"""

from __future__ import annotations

import argparse
import json
import os
import ssl
import sys
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any
from wsgiref.handlers import format_date_time

import h11
import trio
import trio.testing

from tests.attested.account import Account, Reply, Spelling, Tamper
from tests.attested.certificates import HOST, Tls, authority, server_context
from tests.attested.requests import Credentials, Refusal, Request

MAX_BODY = 1 << 20  # bytes
_HTML = b"<html><body><h1>503 Service Unavailable</h1></body></html>"
_ALERT_PROTOCOL_VERSION = bytes.fromhex("15030200020246")
_PIECES = 1024  # of 64 KiB that a body without end really has: no test may fill the memory
_JSON = {"Content-Type": "application/x-amz-json-1.1"}


class Fault(StrEnum):
    """What happens instead of an answer."""

    THROTTLED = "throttled"
    TOO_MANY = "too-many"  # HTTP 429 without a body
    INTERNAL = "internal"
    HTML = "html"  # 503 of a load balancer
    RETRY_AFTER = "retry-after"  # 503 that names a second to wait
    EXPIRED_TOKEN = "expired-token"
    CUT = "cut"  # executed; half the reply, then the end
    LOST = "lost"  # executed; no reply, the connection ends
    CLOSED = "closed"  # not executed; the connection ends
    SILENT = "silent"  # not executed; nothing, until the client goes
    GARBAGE = "garbage"  # 200 with bytes that are no JSON
    NO_OBJECT = "no-object"  # 200 with JSON that is no object
    EMPTY = "empty"  # 200 with {}
    NO_HTTP = "no-http"  # bytes that are no HTTP
    ENDLESS = "endless"  # 200 with a body that does not end
    HUGE = "huge"  # 200 that announces a gigabyte, and begins to send it


Plan = Fault | Tamper | Refusal | None
"""What becomes of one request; None: it is answered."""

_REPLIES: Mapping[Fault, Reply] = {
    Fault.TOO_MANY: Reply(429, b""),
    Fault.HTML: Reply(503, _HTML, {"Content-Type": "text/html"}),
    Fault.RETRY_AFTER: Reply(503, b"", {"Retry-After": "1"}),
    Fault.GARBAGE: Reply(200, b"\x80\xff{", _JSON),
    Fault.NO_OBJECT: Reply(200, b"[1, 2]", _JSON),
    Fault.EMPTY: Reply(200, b"{}", _JSON),
}
_REFUSALS: Mapping[Fault, Refusal] = {
    Fault.THROTTLED: Refusal("ThrottlingException", "Rate exceeded"),
    Fault.INTERNAL: Refusal("KMSInternalException", "internal failure", status=500),
    Fault.EXPIRED_TOKEN: Refusal("ExpiredTokenException", "The security token included in the request is expired"),
}


@dataclass
class Kms:
    """The server. Its settings may change at any time; `tls` counts for connections that come then."""

    account: Account = field(default_factory=Account)
    tls: Tls = Tls.GOOD
    delay: float = 0.0  # seconds of each call
    script: deque[Plan] = field(default_factory=deque)  # of the next requests, in order; then *choose* decides
    choose: Callable[[str, str], Plan] = lambda _operation, _key: None  # by operation and the key that is named
    connections: int = 0  # that were taken
    handshakes: int = 0  # that came to their end
    names: list[str | None] = field(default_factory=list)  # that clients asked for (SNI)
    requests: int = 0  # that arrived, answered or not
    in_flight: int = 0
    peak: int = 0  # the most that were in flight together

    def __post_init__(self) -> None:
        self._contexts: dict[Tls, ssl.SSLContext] = {}

    async def handle(self, stream: trio.abc.Stream) -> None:
        """One connection, which is closed at the end."""
        self.connections += 1
        async with stream:
            try:
                if self.tls is Tls.SILENT:
                    await _until_closed(stream)
                    return
                await self._converse(await self._secured(stream))
            except (trio.BrokenResourceError, trio.ClosedResourceError, h11.RemoteProtocolError):
                """The client went away, refused us, or speaks no HTTP."""

    async def _secured(self, stream: trio.abc.Stream) -> trio.abc.Stream:
        if self.tls is Tls.NONE:
            return stream
        secured: trio.SSLStream[trio.abc.Stream] = trio.SSLStream(
            stream, self._context(), server_side=True, https_compatible=True
        )
        try:
            await secured.do_handshake()
        except trio.BrokenResourceError:
            if self.tls is Tls.TLS_1_1:  # other servers say why they end it; Trio's stream keeps that to itself
                await stream.send_all(_ALERT_PROTOCOL_VERSION)
            raise
        self.handshakes += 1
        return secured

    def _context(self) -> ssl.SSLContext:
        context = self._contexts.get(self.tls)
        if context is None:
            context = self._contexts[self.tls] = server_context(self.tls)
            context.sni_callback = lambda _object, name, _context: self.names.append(name)
        return context

    async def _converse(self, stream: trio.abc.Stream) -> None:
        connection = h11.Connection(h11.SERVER)
        while (request := await _receive(connection, stream)) is not None:
            self.requests += 1
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            try:
                stays = await self._respond(connection, stream, request)
            finally:
                self.in_flight -= 1
            if not stays or connection.our_state is h11.MUST_CLOSE:
                await trio.aclose_forcefully(stream)
                return
            connection.start_next_cycle()

    async def _respond(self, connection: h11.Connection, stream: trio.abc.Stream, request: Request) -> bool:
        """Answer, or do what is planned; whether the connection can be used again."""
        await trio.sleep(self.delay)
        plan = self._plan(request)
        match plan:
            case Fault.CLOSED:
                return False
            case Fault.SILENT:
                await _until_closed(stream)
                return False
            case Fault.NO_HTTP:
                await stream.send_all(b"220 ready\r\n\r\n")
                return False
            case Fault.ENDLESS | Fault.HUGE:
                await _send_without_end(connection, stream, announced=plan is Fault.HUGE)
                return False
        data = self._serialise(connection, self._reply(request, plan))
        if plan is Fault.LOST:
            return False
        await stream.send_all(data[: len(data) // 2] if plan is Fault.CUT else data)
        return plan is not Fault.CUT

    def _plan(self, request: Request) -> Plan:
        if self.script:
            return self.script.popleft()
        operation = request.headers.get("x-amz-target", "").rpartition(".")[2]
        try:
            key = str(json.loads(request.body)["KeyId"])
        except (ValueError, KeyError, TypeError):
            key = ""
        return self.choose(operation, key)

    def _reply(self, request: Request, plan: Plan) -> Reply:
        if isinstance(plan, Refusal):
            return self.account.refuse(plan)
        if isinstance(plan, Fault) and plan in _REPLIES:
            return _REPLIES[plan]
        if isinstance(plan, Fault) and plan in _REFUSALS:
            return self.account.refuse(_REFUSALS[plan])
        if self.tls is not Tls.NONE and request.headers.get("host") != HOST:
            return Reply(400, b"")
        return self.account.answer(request, plan if isinstance(plan, Tamper) else None)

    def _serialise(self, connection: h11.Connection, reply: Reply) -> bytes:
        headers = _JSON | {
            "Date": format_date_time(self.account.clock().timestamp()),
            "x-amzn-RequestId": f"0e1f9f6e-0000-4000-8000-{self.requests:012d}",
            "Content-Length": str(len(reply.body)),
        }
        head = h11.Response(status_code=reply.status, headers=list((headers | dict(reply.headers)).items()), reason=b"")
        parts = [head, h11.Data(data=reply.body), h11.EndOfMessage()]
        return b"".join(connection.send(part) or b"" for part in parts)


async def _send_without_end(connection: h11.Connection, stream: trio.abc.Stream, *, announced: bool) -> None:
    """Send a body until the client has enough of it, which raises `trio.BrokenResourceError`, or for 64 MiB."""
    length = [("Content-Length", str(1 << 30))] if announced else []
    await stream.send_all(connection.send(h11.Response(status_code=200, headers=length, reason=b"OK")) or b"")
    for _ in range(_PIECES):
        await stream.send_all(connection.send(h11.Data(data=b" " * 65_536)) or b"")
    await _until_closed(stream)


async def _receive(connection: h11.Connection, stream: trio.abc.Stream) -> Request | None:
    """The next request, None when the client has no more."""
    head: h11.Request | None = None
    body = b""
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(bytes(await stream.receive_some()))
            case h11.Request() as head:
                pass
            case h11.Data(data=data):
                body += data
                if len(body) > MAX_BODY:
                    raise h11.RemoteProtocolError("body too long", error_status_hint=413)
            case h11.EndOfMessage():
                assert head is not None
                headers = {name.decode(): value.decode() for name, value in head.headers}
                return Request(headers, body, head.method.decode(), head.target.decode())
            case _:
                return None


async def _until_closed(stream: trio.abc.Stream) -> None:
    async for _ in stream:
        """Whatever it says."""


@asynccontextmanager
async def serving(kms: Kms, *, port: int = 0, host: str = "127.0.0.1") -> AsyncIterator[int]:
    """Serve on TCP; yields the port."""
    listeners = await trio.open_tcp_listeners(port, host=host)
    async with trio.open_nursery() as nursery:
        await nursery.start(trio.serve_listeners, kms.handle, listeners)
        yield int(listeners[0].socket.getsockname()[1])
        nursery.cancel_scope.cancel(reason="the test is over")


@asynccontextmanager
async def in_memory(kms: Kms) -> AsyncIterator[Callable[[], Awaitable[trio.abc.Stream]]]:
    """Serve without a socket; yields what opens a connection. The stream that it gives carries TLS, if any."""
    async with trio.open_nursery() as nursery:

        async def connect() -> trio.abc.Stream:
            client, server = trio.testing.memory_stream_pair()
            nursery.start_soon(kms.handle, server)
            return client

        yield connect
        nursery.cancel_scope.cancel(reason="the test is over")


# -- a process of its own


def command(kms: Kms, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Do what a line of standard input asks.

    | Member | Effect |
    | --- | --- |
    | `key`, with any of `state`, `pcrs`, `context`, `denied`, `aliases` | changes that key, or adds one of this alias |
    | `credentials`: a list of {id, secret, token, expired} | the only ones that are known |
    | `script`: a list of faults, tamperings, error names, null | plans of the next requests |
    | `always`: the same, one | plan of all others |
    | `tls`, `delay`, `chunk_size`, `spelling`, `takes_emulated` | as the attributes |
    | `calls`: true | the calls so far are in the answer, and forgotten |
    """
    if "key" in fields:
        _change_key(kms.account, fields)
    if "credentials" in fields:
        kms.account.credentials = [
            Credentials(each["id"], each["secret"], each.get("token"), each.get("expired", False))
            for each in fields["credentials"]
        ]
    if "script" in fields:
        kms.script.extend(_plan(name) for name in fields["script"])
    if "always" in fields:
        plan = _plan(fields["always"])
        kms.choose = lambda _operation, _key: plan
    kms.tls = Tls(fields.get("tls", kms.tls))
    kms.delay = float(fields.get("delay", kms.delay))
    kms.account.chunk_size = fields.get("chunk_size", kms.account.chunk_size)
    kms.account.spelling = Spelling(fields.get("spelling", kms.account.spelling))
    kms.account.takes_emulated = bool(fields.get("takes_emulated", kms.account.takes_emulated))
    answer: dict[str, Any] = {"requests": kms.requests, "connections": kms.connections, "peak": kms.peak}
    if fields.get("calls"):
        answer["calls"] = [
            {
                "operation": call.operation,
                "key": call.key,
                "context": dict(call.context),
                "pcr0": call.document.pcrs[0].hex() if call.document else None,
                "error": call.error,
            }
            for call in kms.account.calls
        ]
        kms.account.calls.clear()
    return answer


def _change_key(account: Account, fields: Mapping[str, Any]) -> None:
    name = fields["key"]
    key = next((each for each in account.keys if name in (each.key_id, each.arn, *each.aliases)), None)
    key = key or account.add(aliases=[name])
    key.state = fields.get("state", key.state)
    key.context = fields.get("context", key.context)
    key.denied = fields.get("denied", key.denied)
    key.aliases = fields.get("aliases", key.aliases)
    if "pcrs" in fields:
        key.pcrs = {int(index): [bytes.fromhex(each) for each in good] for index, good in fields["pcrs"].items()}


def _plan(name: str | None) -> Plan:
    if name is None:
        return None
    for kind in (Fault, Tamper):
        if name in set(kind):
            return kind(name)
    return Refusal(name, "as the test wants it")


async def _obey(kms: Kms) -> None:
    """Carry out standard input, line by line, until it ends."""
    buffer = b""
    async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stream:
        async for chunk in stream:
            *lines, buffer = (buffer + chunk).split(b"\n")
            for line in lines:
                print(json.dumps(command(kms, json.loads(line))), flush=True)


async def _run(arguments: argparse.Namespace) -> None:
    account = Account(takes_emulated=arguments.emulated)
    if arguments.pcr0:
        account.keys[0].pcrs = {0: [bytes.fromhex(value) for value in arguments.pcr0]}
    kms = Kms(account, tls=Tls(arguments.tls), delay=arguments.delay)
    if arguments.ca_file:
        arguments.ca_file.write_text(authority().pem)
    async with serving(kms, port=arguments.port, host=arguments.bind) as port:
        where = {"port": port, "host": HOST, "key": account.keys[0].arn, "root_sha256": account.root_sha256.hex()}
        print(json.dumps(where), flush=True)
        await _obey(kms)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.attested.kms", description="A fake KMS over TLS.")
    parser.add_argument("--bind", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ca-file", type=Path, help="write the certificate of the test CA there")
    parser.add_argument("--tls", choices=[str(each) for each in Tls], default=str(Tls.GOOD))
    parser.add_argument("--delay", type=float, default=0.0, help="seconds of each call")
    parser.add_argument(
        "--pcr0", action="append", metavar="HEX", help="a value that alias/baker's policy takes; repeatable"
    )
    parser.add_argument("--emulated", action="store_true", help="take unsigned documents of the emulated enclave")
    trio.run(_run, parser.parse_args())


if __name__ == "__main__":
    main()
