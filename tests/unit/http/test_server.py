"""The HTTP server over loopback sockets: limits, times, keep-alive, bad clients, the drain. No test waits real seconds.

Where time matters Trio's clock stands still until `until_closed` turns it on, in steps of a quarter of a second.
"""

import errno
import json
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import structlog.testing
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from signer.errors import ConfigurationError
from signer.http import server as server_module
from signer.http.connection import MAX_HEAD, Limits
from signer.http.server import serve_api
from signer.http.values import ApiRequest, ApiResponse, json_response
from signer.observe.tasks import Task

LIMITS = Limits(
    max_body_bytes=1000, header_timeout=5, body_timeout=10, keep_alive_timeout=75, shutdown_timeout=20
)  # each time differs from the others, so that it shows which of them ended a connection
STEP = 0.25  # seconds of the clock's steps
GUARD = 30.0  # real seconds after which a test without a fake clock has failed


class EchoApi:
    """Answers each request with what it was; `hold` keeps answers back until it is set."""

    def __init__(self) -> None:
        self.requests: list[ApiRequest] = []
        self.answered = 0
        self.hold = trio.Event()
        self.hold.set()
        self.entered = trio.Event()
        self.bug: Exception | None = None

    async def respond(self, request: ApiRequest, /) -> ApiResponse:
        self.requests.append(request)
        self.entered.set()
        await self.hold.wait()
        if self.bug is not None:
            raise self.bug
        self.answered += 1
        return json_response({"path": request.path, "body": request.body.decode("latin-1")})


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> str:
        """The text of an error, after a check of its form."""
        assert self.headers["content-type"] == "application/json; charset=utf-8"
        (entry,) = json.loads(self.body)
        assert (entry["id"], entry["kind"]) == ("failure", "temporary")
        return str(entry["msg"])


class Client:
    """A client that sends what it is told to, byte for byte."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def _until(self, complete: Callable[[], bool]) -> None:
        while not complete():
            data = await self.stream.receive_some()
            assert data, f"closed after {bytes(self._buffer)!r}"
            self._buffer += data

    def _take(self, length: int) -> bytes:
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    async def reply(self, *, head: bool = False) -> Reply:
        """The next response; *head*: of a HEAD request, so without a body."""
        await self._until(lambda: b"\r\n\r\n" in self._buffer)
        first, *lines = self._take(self._buffer.index(b"\r\n\r\n") + 4).decode().strip().split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = 0 if head else int(headers.get("content-length", 0))
        await self._until(lambda: len(self._buffer) >= length)
        return Reply(int(first.split()[1]), headers, self._take(length))

    async def ask(self, data: bytes) -> Reply:
        await self.send(data)
        return await self.reply()

    async def end(self) -> bytes:
        """What is left until the server closes."""
        while data := await self.stream.receive_some():
            self._buffer += data
        return self._take(len(self._buffer))


@dataclass
class Server:
    """A running server and its clients."""

    api: EchoApi
    port: int
    stop: trio.Event
    ended: trio.Event
    clients: list[Client]
    logged: list[MutableMapping[str, Any]]
    task: Task

    async def connect(self) -> Client:
        client = Client(await trio.open_tcp_stream("127.0.0.1", self.port))
        self.clients.append(client)
        return client

    async def still_serves(self) -> bool:
        return (await (await self.connect()).ask(get("/still"))).status == 200


@asynccontextmanager
async def serving(limits: Limits = LIMITS) -> AsyncIterator[Server]:
    """A server on a free port. It must have had no internal error, and have ended when all of its clients have."""
    api, stop, ended, task = EchoApi(), trio.Event(), trio.Event(), Task("server", quiet=True)

    async def run(*, task_status: trio.TaskStatus[str]) -> None:
        await serve_api(api, "127.0.0.1:0", limits, stop=stop, task=task, task_status=task_status)
        ended.set()

    with structlog.testing.capture_logs() as logged:
        server = Server(api, 0, stop, ended, [], logged, task)
        async with trio.open_nursery() as nursery:
            url: str = await nursery.start(run)
            server.port = int(url.rpartition(":")[2])
            try:
                yield server
            finally:
                stop.set()
                api.hold.set()
                for client in server.clients:
                    client.stream.socket.close()
    assert [line for line in logged if line["log_level"] not in ("debug", "warning")] == [], (
        "no refusal is an internal error"
    )


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """A server with `LIMITS`, for a test that takes real time."""
    with trio.fail_after(GUARD):
        async with serving() as running:
            yield running


async def until_closed(clock: MockClock, wait: Callable[[], Awaitable[Any]]) -> tuple[Any, float]:
    """Turn the clock on until *wait* returns; its result, and the seconds that passed by that clock, at most 2000."""
    began, result = trio.current_time(), None

    async with trio.open_nursery() as nursery:
        done = trio.Event()

        async def run() -> None:
            nonlocal result
            result = await wait()
            done.set()

        nursery.start_soon(run)
        await wait_all_tasks_blocked()
        while not done.is_set():
            clock.jump(STEP)
            assert trio.current_time() < began + 2000
            await wait_all_tasks_blocked()
    return result, trio.current_time() - began


def get(path: str = "/", *headers: str, method: str = "GET", version: str = "1.1") -> bytes:
    return "\r\n".join([f"{method} {path} HTTP/{version}", "Host: x", *headers, "", ""]).encode()


def post(body: bytes, *headers: str, path: str = "/keys") -> bytes:
    return get(path, f"Content-Length: {len(body)}", *headers, method="POST") + body


def chunked(body: bytes, size: int) -> bytes:
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    framed = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return get("/keys", "Transfer-Encoding: chunked", method="POST") + framed + b"0\r\n\r\n"


# -- requests and responses


async def test_a_request_is_handed_on_as_values(server: Server) -> None:
    client = await server.connect()
    reply = await client.ask(post(b'"03"', "X-Forwarded-For: 203.0.113.9", path="//keys/%41?version=1&a=%20"))
    assert server.api.requests == [ApiRequest("POST", "//keys/A", "version=1&a=%20", b'"03"', "127.0.0.1", "x")]
    assert (reply.status, json.loads(reply.body)) == (200, {"path": "//keys/A", "body": '"03"'})
    assert reply.headers["content-type"] == "application/json; charset=utf-8"
    assert "connection" not in reply.headers
    assert "server" not in reply.headers


@pytest.mark.parametrize(
    ("target", "path", "query"),
    [("http://signer:6732/keys/a?v=1", "/keys/a", "v=1"), ("http://signer", "/", ""), ("/a?b?c=%3f", "/a", "b?c=%3f")],
)
async def test_forms_of_the_target(server: Server, target: str, path: str, query: str) -> None:
    await (await server.connect()).ask(get(target))
    (request,) = server.api.requests
    assert (request.path, request.query) == (path, query)


async def test_the_answer_to_head_has_a_length_and_no_body(server: Server) -> None:
    client = await server.connect()
    await client.send(get("/a", method="HEAD"))
    assert int((await client.reply(head=True)).headers["content-length"]) > 0
    assert (await client.ask(get("/b"))).status == 200, "the connection is still in step"


@pytest.mark.parametrize("size", [1, 7, 1000])
async def test_a_chunked_body_is_put_together(server: Server, size: int) -> None:
    body = bytes(range(250)) * 4
    await (await server.connect()).ask(chunked(body, size))
    assert [request.body for request in server.api.requests] == [body]


async def test_a_request_may_arrive_byte_by_byte(server: Server) -> None:
    client = await server.connect()
    client.stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in post(b'"03"') + chunked(b'"13"', 3):
        await client.send(bytes([byte]))
    assert [(await client.reply()).status for _ in range(2)] == [200, 200]
    assert [request.body for request in server.api.requests] == [b'"03"', b'"13"']


# -- keep-alive


async def test_a_connection_serves_one_request_after_the_other(server: Server) -> None:
    client = await server.connect()
    for number in range(50):
        reply = await client.ask(post(b"%d" % number))
        assert json.loads(reply.body)["body"] == str(number)


async def test_pipelined_requests_are_answered_in_order(server: Server) -> None:
    client = await server.connect()
    await client.send(get("/1") + post(b"x", path="/2") + get("/3"))
    assert [json.loads((await client.reply()).body)["path"] for _ in range(3)] == ["/1", "/2", "/3"]


@pytest.mark.parametrize("request_", [get("/", "Connection: close"), get("/", version="1.0")], ids=["close", "1.0"])
async def test_the_client_may_want_no_more(server: Server, request_: bytes) -> None:
    client = await server.connect()
    assert (await client.ask(request_)).headers["connection"].lower() == "close"
    assert await client.end() == b""


async def test_an_answer_reaches_a_client_that_has_closed_its_half(server: Server) -> None:
    client = await server.connect()
    await client.send(post(b'"03"'))
    await client.stream.send_eof()
    assert (await client.reply()).status == 200
    assert await client.end() == b""


# -- limits of the body


@pytest.mark.parametrize("make", [post, partial(chunked, size=100)], ids=["length", "chunked"])
async def test_a_body_may_have_the_largest_size_and_no_byte_more(
    server: Server, make: Callable[[bytes], bytes]
) -> None:
    client = await server.connect()
    assert (await client.ask(make(b"x" * 1000))).status == 200
    reply = await client.ask(make(b"x" * 1001))
    assert (reply.status, reply.error) == (413, "the request's body is larger than 1000 bytes")
    assert reply.headers["connection"] == "close"
    assert await client.end() == b""
    assert len(server.api.requests) == 1


async def test_a_declared_length_is_refused_before_the_body_comes(server: Server) -> None:
    client = await server.connect()
    assert (await client.ask(get("/", "Content-Length: 99999999999", method="POST"))).status == 413


async def test_a_client_that_sends_first_and_reads_later_still_gets_its_413(server: Server) -> None:
    client = await server.connect()
    await client.send(post(b"x" * 4_000_000))
    assert (await client.reply()).status == 413


# -- expect: 100-continue


async def test_a_client_that_waits_for_permission_gets_it(server: Server) -> None:
    client = await server.connect()
    await client.send(get("/", "Content-Length: 4", "Expect: 100-continue", method="POST"))
    assert (await client.reply()).status == 100
    assert (await client.ask(b'"03"')).status == 200


async def test_permission_is_refused_to_a_body_that_is_too_large(server: Server) -> None:
    client = await server.connect()
    reply = await client.ask(get("/", "Content-Length: 1001", "Expect: 100-continue", method="POST"))
    assert reply.status == 413


async def test_no_permission_is_sent_to_a_client_that_did_not_wait(server: Server) -> None:
    client = await server.connect()
    assert (await client.ask(post(b'"03"', "Expect: 100-continue"))).status == 200


# -- bad clients


@pytest.mark.parametrize(
    "data",
    [
        b"GARBAGE\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n folded\x00: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        get("/", "Content-Length: -1", method="POST"),
        get("/", "Content-Length: 1", "Content-Length: 2", method="POST"),
        get("/", "Transfer-Encoding: chunked", method="POST") + b"zz\r\n\r\n",
        get("/", "Transfer-Encoding: chunked", method="POST") + b"1\r\nxyz\r\n",
    ],
    ids=range(10),
)
async def test_malformed_http_is_400_and_ends_that_connection_only(server: Server, data: bytes) -> None:
    client, other = await server.connect(), await server.connect()
    reply = await client.ask(data)
    assert reply.status == 400
    assert reply.error.startswith("bad HTTP request: ")
    assert await client.end() == b""
    assert not server.api.requests
    assert (await other.ask(get())).status == 200


@pytest.mark.parametrize(
    ("target", "path"), [("http://host:1/a/b?c", "/a/b"), ("http://[", "/"), ("*", "/"), ("x", "/")]
)
async def test_a_target_in_another_form(server: Server, target: str, path: str) -> None:
    """The absolute form is what proxies are sent; what is no URL at all names no route."""
    reply = await (await server.connect()).ask(get(target))
    assert (reply.status, json.loads(reply.body)["path"]) == (200, path)


@pytest.mark.parametrize("head", [b"GET /" + b"a" * 2 * MAX_HEAD, get()[:-2] + b"X: y\r\n" * MAX_HEAD])
async def test_a_head_that_does_not_end_is_refused_at_its_limit(server: Server, head: bytes) -> None:
    client = await server.connect()
    reply = await client.ask(head)
    assert (reply.status, reply.headers["connection"]) == (431, "close")
    assert reply.error == f"the request's head (request line and headers) is larger than {MAX_HEAD} bytes"


async def test_an_authentication_of_a_post_quantum_key_fits_into_the_head(server: Server) -> None:
    client = await server.connect()
    assert (await client.ask(get("/keys/x?authentication=mdsig" + "1" * 3400))).status == 200


@pytest.mark.parametrize("sent", [b"GET / HT", get("/", "Content-Length: 4", method="POST") + b'"0'])
async def test_a_client_that_ends_within_a_request_is_not_answered_by_the_api(server: Server, sent: bytes) -> None:
    client = await server.connect()
    await client.send(sent)
    await client.stream.send_eof()
    rest = await client.end()
    assert rest == b"" or rest.startswith(b"HTTP/1.1 400 ")
    assert not server.api.requests


@pytest.mark.parametrize("sent", [b"", b"GET / HT", get("/", "Content-Length: 4", method="POST") + b'"0'])
async def test_a_client_that_resets_disturbs_nobody(server: Server, sent: bytes) -> None:
    client = await server.connect()
    await client.send(sent)
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await trio.aclose_forcefully(client.stream)
    assert await server.still_serves()


async def test_an_answer_is_made_though_its_client_has_gone(server: Server) -> None:
    server.api.hold = trio.Event()
    client = await server.connect()
    await client.send(post(b'"03"'))
    await server.api.entered.wait()
    await trio.aclose_forcefully(client.stream)
    server.api.hold.set()
    assert await server.still_serves()
    assert server.api.answered == 2


async def test_a_bug_ends_its_connection_only(server: Server) -> None:
    client, other = await server.connect(), await server.connect()
    server.api.bug = RuntimeError("a bug")
    await client.send(get())
    assert await client.end() == b""
    server.api.bug = None
    assert (await other.ask(get())).status == 200
    assert [line["log_level"] for line in server.logged] == ["error"]
    server.logged.clear()


# -- times


async def test_a_head_that_comes_in_drops_ends_within_the_header_timeout(mock_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.connect()

        async def drip() -> None:
            for byte in get("/" + "a" * 200):
                await client.send(bytes([byte]))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            reply, seconds = await until_closed(mock_clock, client.reply)
            nursery.cancel_scope.cancel()
        assert (reply.status, reply.error) == (408, "the request's head did not arrive within 5 s")
        assert seconds == pytest.approx(5, abs=4 * STEP)
        assert not server.api.requests


async def test_a_body_that_stops_ends_after_the_body_timeout(mock_clock: MockClock) -> None:
    async with serving() as server:
        client = await server.connect()
        await client.send(get("/", "Content-Length: 4", method="POST") + b'"0')
        reply, seconds = await until_closed(mock_clock, client.reply)
        assert (reply.status, reply.error) == (408, "the request's body did not arrive within 10 s")
        assert seconds == pytest.approx(10, abs=4 * STEP)
        assert await client.end() == b""
        assert not server.api.requests


@pytest.mark.parametrize("requests", [0, 1])
async def test_an_idle_connection_ends_after_the_keep_alive_time_without_a_word(
    mock_clock: MockClock, requests: int
) -> None:
    async with serving() as server:
        client = await server.connect()
        for _ in range(requests):
            assert (await client.ask(get())).status == 200
        rest, seconds = await until_closed(mock_clock, client.end)
        assert rest == b""
        assert seconds == pytest.approx(75, abs=4 * STEP)


async def test_the_signer_may_take_its_time(mock_clock: MockClock) -> None:
    async with serving() as server:
        server.api.hold = trio.Event()
        client = await server.connect()
        await client.send(post(b'"03"'))
        await server.api.entered.wait()

        async def later() -> Reply:
            await trio.sleep(1000)
            server.api.hold.set()
            return await client.reply()

        reply, _ = await until_closed(mock_clock, later)
        assert reply.status == 200
        assert (await client.ask(get())).status == 200, "and the connection is as good as before"


async def test_a_client_that_does_not_read_is_given_up(mock_clock: MockClock) -> None:
    limits = Limits(max_body_bytes=64_000_000, body_timeout=10, keep_alive_timeout=75)
    async with serving(limits) as server:
        client = await server.connect()
        await client.send(post(b"x" * 32_000_000))  # echoed: more than the kernel's buffers take
        await server.api.entered.wait()

        async def given_up() -> None:
            while not closed_by_peer(server.port, client):
                await trio.sleep(STEP)

        _, seconds = await until_closed(mock_clock, given_up)
        assert seconds == pytest.approx(10, abs=8 * STEP)


def closed_by_peer(port: int, client: Client) -> bool:
    """Whether the server has let go of *client*'s connection: the kernel's table says so without reading from it."""
    ours = client.stream.socket.getsockname()[1]
    established = f":{port:04X} 0100007F:{ours:04X} 01 "
    return established not in Path("/proc/net/tcp").read_text()  # no thread: the clock would run meanwhile


# -- the cap on connections


@pytest.fixture
def sixteen_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "MAX_CONNECTIONS", 16)


@pytest.mark.usefixtures("sixteen_slots")
async def test_the_longest_idle_connections_make_room(server: Server) -> None:
    first = await server.connect()
    clients = []
    for _ in range(40):
        assert (await first.ask(get())).status == 200, "in use, so never idle longest"
        clients.append(await server.connect())
        assert (await clients[-1].ask(get())).status == 200
    for client in clients[:24]:
        assert await client.end() == b""
    for client in clients[-14:]:
        assert (await client.ask(get())).status == 200


@pytest.mark.usefixtures("sixteen_slots")
async def test_connections_that_become_idle_make_room_for_one_that_waits(mock_clock: MockClock) -> None:
    async with serving() as server:
        server.api.hold = trio.Event()
        busy = []
        for _ in range(16):
            busy.append(await server.connect())
            server.api.entered = trio.Event()
            await busy[-1].send(get())
            await server.api.entered.wait()
        waiting = await server.connect()  # in the backlog
        await waiting.send(get())
        server.api.hold.set()
        for client in busy:
            assert (await client.reply()).status == 200
        reply, seconds = await until_closed(mock_clock, waiting.reply)
        assert reply.status == 200
        assert seconds < 1


@pytest.mark.usefixtures("sixteen_slots")
async def test_clients_that_send_slowly_make_room(server: Server) -> None:
    """Whoever fills every place with requests that don't end shuts nobody out."""
    for number in range(40):
        part = get("/", "Content-Length: 9", method="POST") if number % 2 else b"GET /"
        await (await server.connect()).send(part)
    assert (await (await server.connect()).ask(get())).status == 200


# -- start and end


async def test_an_address_in_use_is_named_with_what_to_do(server: Server) -> None:
    with pytest.raises(
        ConfigurationError, match=f"listen tcp 127.0.0.1:{server.port}: .*another program listens there"
    ):
        await serve_api(EchoApi(), f"127.0.0.1:{server.port}", LIMITS, stop=trio.Event())


def break_listener(port: int) -> None:
    """Shut the listening socket of this process on *port* down, so that accepting fails."""
    for entry in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(entry.name))) as one:
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) and one.getsockname()[1] == port:
                    one.shutdown(socket.SHUT_RDWR)
                    return
        except OSError:
            continue  # no socket
    raise AssertionError(f"nobody listens on {port}")


async def test_a_listener_that_breaks_is_opened_anew_in_its_place(server: Server) -> None:
    client = await server.connect()
    assert (await client.ask(get())).status == 200
    break_listener(server.port)
    while server.task.fault == "":
        await trio.sleep(0.001)
    assert (await client.ask(get("/held"))).status == 200, "open connections stay open"
    while server.task.state != "running":
        await trio.sleep(0.001)
    assert await server.still_serves()
    assert server.task.restarts == 1


async def test_a_place_taken_meanwhile_is_tried_again_and_a_stop_is_heard(server: Server) -> None:
    break_listener(server.port)
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        while server.task.fault == "":
            await trio.sleep(0.001)
        thief.bind(("127.0.0.1", server.port))
        thief.listen()
        while "another program listens there" not in server.task.fault:
            await trio.sleep(0.001)
        server.stop.set()
        await server.ended.wait()
    assert server.task.state == "stopped"


async def test_connections_that_ended_before_their_turn_break_nothing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    accept, faults = trio.SocketListener.accept, [errno.ECONNABORTED, errno.EPROTO]

    async def unlucky(listener: trio.SocketListener) -> trio.SocketStream:
        stream = await accept(listener)
        if faults:
            await stream.aclose()
            raise OSError(faults.pop(0), "it ended")
        return stream

    monkeypatch.setattr(trio.SocketListener, "accept", unlucky)
    for _ in range(3):  # the first one is accepted by the call that waits already
        await server.connect()
    assert await server.still_serves()
    assert (faults, server.task.fault) == ([], "")


async def test_an_address_of_another_host_is_named(server: Server) -> None:
    with pytest.raises(ConfigurationError, match="listen tcp 192.0.2.1:0: .*set another address") as caught:
        await serve_api(EchoApi(), "192.0.2.1:0", LIMITS, stop=trio.Event())
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EADDRNOTAVAIL


async def test_the_drain_closes_idle_connections_at_once(mock_clock: MockClock) -> None:
    async with serving() as server:
        fresh, used = await server.connect(), await server.connect()
        assert (await used.ask(get())).status == 200
        server.stop.set()
        for client in (fresh, used):
            rest, seconds = await until_closed(mock_clock, client.end)
            assert rest == b""
            assert seconds <= STEP
        await server.ended.wait()
        with pytest.raises(OSError, match="all attempts to connect"):
            await server.connect()


async def test_the_drain_finishes_what_has_begun(server: Server) -> None:
    server.api.hold = trio.Event()
    answering, sending = await server.connect(), await server.connect()
    await answering.send(post(b'"03"'))
    await server.api.entered.wait()
    await sending.send(post(b'"13"')[:-2])
    await wait_all_tasks_blocked(0.01)
    server.stop.set()
    await wait_all_tasks_blocked()
    assert not server.ended.is_set()
    await sending.send(b'3"')
    server.api.hold.set()
    for client in (answering, sending):
        reply = await client.reply()
        assert (reply.status, reply.headers["connection"]) == (200, "close")
        assert await client.end() == b""
    await server.ended.wait()


async def test_the_drain_does_not_wait_for_ever(mock_clock: MockClock) -> None:
    async with serving() as server:
        server.api.hold = trio.Event()
        client = await server.connect()
        await client.send(post(b'"03"'))
        await server.api.entered.wait()
        server.stop.set()
        rest, seconds = await until_closed(mock_clock, client.end)
        assert rest == b""
        assert seconds == pytest.approx(20, abs=4 * STEP)
        await server.ended.wait()
        assert server.api.answered == 0


async def test_a_refused_head_request_has_no_body(server: Server) -> None:
    client = await server.connect()
    await client.send(get("/", "Content-Length: 99999999", method="HEAD"))
    assert (await client.reply(head=True)).status == 413
    assert await client.end() == b""


async def test_two_ways_to_tell_the_length_are_one_too_many(server: Server) -> None:
    client = await server.connect()
    head = get("/", "Content-Length: 5", "Transfer-Encoding: chunked", method="POST")
    reply = await client.ask(head + b"0\r\n\r\n" + get("/smuggled"))
    assert (reply.status, reply.error) == (400, "bad HTTP request: both Content-Length and Transfer-Encoding")
    assert await client.end() == b""
    assert not server.api.requests


async def test_a_refusal_is_logged_in_one_line(server: Server) -> None:
    client = await server.connect()
    await client.ask(get("/", "Content-Length: 99999999", method="POST"))
    (line,) = server.logged
    assert (line["event"], line["status"], line["peer"]) == ("HTTP request refused", 413, "127.0.0.1")
    assert "is larger than" in line["error"]


async def test_another_version_of_http(server: Server) -> None:
    assert (await (await server.connect()).ask(get().replace(b"HTTP/1.1", b"HTTP/2.0"))).status == 505
