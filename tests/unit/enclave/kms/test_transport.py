"""HTTPS from inside: who is believed, how long is waited, and what becomes of a connection."""

import contextlib
import hashlib
import ssl
from collections.abc import Callable
from datetime import timedelta

import h11
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from signer.enclave.kms.transport import (
    MAX_BODY,
    Answer,
    Connect,
    Transport,
    TransportError,
    TrustError,
    pinned_roots,
    tls_context,
)
from tests.unit.enclave.kms.peer import HOST, Far, Peer, authority

HEADERS = {"host": HOST, "x-amz-target": "TrentService.Decrypt"}
OK = b"HTTP/1.1 200 OK\r\n"


def over(connect: Connect, roots: str | None = None) -> Transport:
    return Transport(HOST, connect, tls_context(roots or authority().pem), place="vsock:3:8000")


async def echo(far: Far) -> None:
    """Answers each request with its body and the connection's number."""
    while True:
        headers, body = await far.request()
        await far.respond(body, headers={"X-Number": str(far.number), "X-Host": headers["host"]})


def test_the_pinned_roots_are_the_five_of_aws() -> None:
    blocks = pinned_roots().split("-----BEGIN CERTIFICATE-----")[1:]
    found = {
        hashlib.sha256(ssl.PEM_cert_to_DER_cert("-----BEGIN CERTIFICATE-----" + block.partition("#")[0])).hexdigest()
        for block in blocks
    }
    assert found == {
        "8ecde6884f3d87b1125ba31ac3fcb13d7016de7f57cc904fe1cb97c6ae98196e",  # Amazon Root CA 1
        "1ba5b2aa8c65401a82960118f80bec4f62304d83cec4713a19c39c011ea46db4",  # Amazon Root CA 2
        "18ce6cfe7bf14e60b2e347b8dfe868cb31d02ebb3ada271569f50343b46db3a4",  # Amazon Root CA 3
        "e35d28419ed02025cfa69038cd623962458da5c695fbdea3c22b0bfb25897092",  # Amazon Root CA 4
        "568d6905a2c88708a4b3025190edcfedb1974a606a13c6e5290fcb2ae63edab5",  # Starfield Services Root CA - G2
    }
    assert len(blocks) == 5
    assert len(tls_context(pinned_roots()).get_ca_certs()) == 5


def test_the_context_checks_and_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/ssl/certs/ca-certificates.crt")
    monkeypatch.setenv("SSLKEYLOGFILE", "/tmp/keys")
    context = tls_context(authority().pem)
    assert context.check_hostname
    assert context.verify_mode is ssl.CERT_REQUIRED
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert len(context.get_ca_certs()) == 1
    assert context.keylog_filename is None


async def test_a_connection_is_kept(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, echo)
        transport = over(peer.connect)
        for body in (b"one", b"two"):
            answer = await transport.post(HEADERS, body)
            assert (answer.status, answer.body) == (200, body)
            assert answer.headers["x-number"] == "1"
            assert answer.headers["x-host"] == HOST
        await transport.aclose()
    assert peer.connections == 1


async def test_calls_run_side_by_side(autojump_clock: MockClock) -> None:
    here, go = trio.Event(), trio.Event()

    async def script(far: Far) -> None:
        _, body = await far.request()
        if body == b"slow":
            here.set()
            await go.wait()
        await far.respond(body)

    async with trio.open_nursery() as nursery:
        transport = over(Peer(nursery, script).connect)
        answers: list[bytes] = []

        async def post(body: bytes) -> None:
            answers.append((await transport.post(HEADERS, body)).body)

        nursery.start_soon(post, b"slow")
        await here.wait()
        await post(b"fast")
        go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert answers == [b"fast", b"slow"]
        await transport.aclose()


async def test_a_connection_that_lay_idle_is_not_used(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, echo)
        transport = over(peer.connect)
        await transport.post(HEADERS, b"1")
        await trio.sleep(21)
        assert (await transport.post(HEADERS, b"2")).headers["x-number"] == "2"
        await transport.aclose()


async def test_idle_time_counts_from_the_last_use_and_all_that_lay_are_closed(autojump_clock: MockClock) -> None:
    ended: set[int] = set()

    async def script(far: Far) -> None:
        try:
            while True:
                await far.request()
                await trio.sleep(0.02)
                await far.respond(b"", headers={"X-Number": str(far.number)})
        finally:
            ended.add(far.number)

    async with trio.open_nursery() as nursery:
        transport = over(Peer(nursery, script).connect)
        async with trio.open_nursery() as together:
            for _ in range(3):
                together.start_soon(transport.post, HEADERS, b"x")
        used = set()
        for _ in range(2):
            await trio.sleep(15)
            used.add(int((await transport.post(HEADERS, b"x")).headers["x-number"]))
        await trio.testing.wait_all_tasks_blocked()
        assert len(used) == 1, "the one that was used last, each time"
        assert ended == {1, 2, 3} - used
        await transport.aclose()


async def test_the_name_and_the_protocol_are_said_in_the_handshake(autojump_clock: MockClock) -> None:
    names: list[str | None] = []
    protocols: list[str | None] = []
    context = authority().server()
    context.set_alpn_protocols(["h2", "http/1.1"])
    context.sni_callback = lambda _object, name, _context: names.append(name)

    async def script(far: Far) -> None:
        protocols.append(far.stream.selected_alpn_protocol())
        await echo(far)

    async with trio.open_nursery() as nursery:
        transport = over(Peer(nursery, script, context).connect)
        await transport.post(HEADERS, b"x")
        await transport.aclose()
    assert (names, protocols) == ([HOST], ["http/1.1"])


async def test_a_stale_connection_is_replaced_once(autojump_clock: MockClock) -> None:
    async def script(far: Far) -> None:
        _, body = await far.request()
        if far.number < 3:
            await far.respond(body)  # and close, without saying so

    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, script)
        transport = over(peer.connect)
        assert (await transport.post(HEADERS, b"1")).body == b"1"
        assert (await transport.post(HEADERS, b"2")).body == b"2"
        assert peer.connections == 2
        with pytest.raises(TransportError, match="closed the connection without an answer"):
            await transport.post(HEADERS, b"3")
        assert peer.connections == 3
        await transport.aclose()


@pytest.mark.parametrize(
    ("answer", "match"),
    [
        (b"", "closed the connection without an answer"),
        (OK + b"Content-Le", "lost in mid-answer"),
        (OK + b"Content-Length: 5\r\n\r\n1234", "lost in mid-answer"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\n123", "lost in mid-answer"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "not an answer in HTTP"),
        (OK + b"Content-Length: 99999999\r\n\r\n" + bytes(MAX_BODY + 1), "more than 65536 bytes"),
        (OK + b"\r\n" + bytes(MAX_BODY + 1), "more than 65536 bytes"),
        (OK + b"X: " + b"x" * 20000, "not an answer in HTTP"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n", "not an answer in HTTP"),
    ],
)
async def test_bad_answers(answer: bytes, match: str, autojump_clock: MockClock) -> None:
    async def script(far: Far) -> None:
        await far.request()
        await far.stream.send_all(answer)

    async with trio.open_nursery() as nursery:
        transport = over(Peer(nursery, script).connect)
        with pytest.raises(TransportError, match=match):
            await transport.post(HEADERS, b"{}")
        assert transport._kept == []


async def test_every_truncation_of_an_answer(autojump_clock: MockClock) -> None:
    answer = OK + b"Date: Fri, 20 Nov 2026 12:00:05 GMT\r\nContent-Length: 2\r\n\r\n{}"
    ends = iter(range(len(answer)))

    async def script(far: Far) -> None:
        await far.request()
        await far.stream.send_all(answer[: next(ends)])

    async with trio.open_nursery() as nursery:
        transport = over(Peer(nursery, script).connect)
        for _ in range(len(answer)):
            with pytest.raises(TransportError):
                await transport.post(HEADERS, b"{}")


ANSWER_PARTS = st.sampled_from(
    [OK, b"HTTP/1.1 ", b"\r\n", b"\r\n\r\n", b"Content-Length: 3", b"Transfer-Encoding: chunked", b"ffffffff\r\n", b"0"]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(ANSWER_PARTS | st.binary(max_size=20), max_size=8))
def test_any_answer(parts: list[bytes]) -> None:
    """An answer or a `TransportError`, whatever comes, and nothing else."""

    async def script(far: Far) -> None:
        await far.request()
        await far.stream.send_all(b"".join(parts))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            transport = over(Peer(nursery, script).connect)
            with contextlib.suppress(TransportError):
                await transport.post(HEADERS, b"{}")
            await transport.aclose()

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    "answer",
    [
        OK + b"\r\nuntil the end",
        b"HTTP/1.0 200 OK\r\n\r\nuntil the end",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 13\r\n\r\nuntil the end",
        OK + b"Transfer-Encoding: chunked\r\n\r\nd\r\nuntil the end\r\n0\r\n\r\n",
        OK + b"Connection: close\r\nContent-Length: 13\r\n\r\nuntil the end",
    ],
)
async def test_other_forms_of_an_answer(answer: bytes, autojump_clock: MockClock) -> None:
    async def script(far: Far) -> None:
        await far.request()
        for byte in answer:  # in any chunks
            await far.stream.send_all(bytes([byte]))

    async with trio.open_nursery() as nursery:
        transport = over(Peer(nursery, script).connect)
        assert (await transport.post(HEADERS, b"{}")).body == b"until the end"
        await transport.aclose()


async def test_what_comes_behind_an_answer_ends_the_connection(autojump_clock: MockClock) -> None:
    async def script(far: Far) -> None:
        await far.request()
        forged = OK + b"Content-Length: 1\r\n\r\n2"
        await far.stream.send_all((OK + b"Content-Length: 1\r\n\r\n1" + forged) if far.number == 1 else forged)

    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, script)
        transport = over(peer.connect)
        assert (await transport.post(HEADERS, b"")).body == b"1"
        assert transport._kept == []


@pytest.mark.parametrize("status", [301, 302, 307, 403, 500])
async def test_a_redirect_is_an_answer_like_any_other(status: int, autojump_clock: MockClock) -> None:
    async def script(far: Far) -> None:
        await far.request()
        await far.respond(b"", status=status, headers={"Location": "https://elsewhere.example/"})

    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, script)
        answer = await over(peer.connect).post(HEADERS, b"")
        assert isinstance(answer, Answer)
        assert answer.status == status
        assert peer.connections == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("context", "match"),
    [
        (lambda: authority().server("kms.us-east-1.amazonaws.com"), "the other side is not kms.us-west-2.*mismatch"),
        (lambda: authority().server(ends=-timedelta(days=1)), "the other side is not .*expired"),
        (lambda: authority("Another Root").server(), "the other side is not .*(unable to get|self.signed)"),
        (lambda: authority().server(version=ssl.TLSVersion.TLSv1_1), "no TLS with kms.us-west-2"),
    ],
    ids=["wrong name", "expired", "unknown authority", "TLS 1.1"],
)
async def test_who_is_not_believed(
    context: Callable[[], ssl.SSLContext], match: str, autojump_clock: MockClock
) -> None:
    async def script(far: Far) -> None:
        raise AssertionError("a request was sent")

    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, script, context())
        with pytest.raises(TrustError, match=match):
            await over(peer.connect).post(HEADERS, b"secret")
    assert len(peer.broken) == 1


async def test_tls_1_2_is_enough(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, echo, authority().server(version=ssl.TLSVersion.TLSv1_2))
        transport = over(peer.connect)
        assert (await transport.post(HEADERS, b"1")).body == b"1"
        await transport.aclose()


async def test_something_else_than_tls(autojump_clock: MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()

    async def connect() -> trio.abc.Stream:
        return near

    await far.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(TrustError, match="no TLS with kms.us-west-2"):
        await over(connect).post(HEADERS, b"")


@pytest.mark.parametrize("reads_first", [False, True])
async def test_a_proxy_that_closes(reads_first: bool, autojump_clock: MockClock) -> None:
    near, far = trio.testing.memory_stream_pair()

    async def connect() -> trio.abc.Stream:
        return near

    async def close() -> None:
        if reads_first:
            await far.receive_some()
        await far.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with pytest.raises(
            TransportError, match="during the TLS handshake; does the proxy at vsock:3:8000 allow"
        ) as at:
            await over(connect).post(HEADERS, b"")
        assert not isinstance(at.value, TrustError)


async def test_a_proxy_that_refuses(autojump_clock: MockClock) -> None:
    async def connect() -> trio.abc.Stream:
        raise ConnectionRefusedError(111, "Connection refused")

    with pytest.raises(TransportError, match="no connection to the proxy at vsock:3:8000: Connection refused"):
        await over(connect).post(HEADERS, b"")


async def test_each_step_has_its_time(autojump_clock: MockClock) -> None:
    async def never() -> trio.abc.Stream:
        await trio.sleep_forever()
        raise AssertionError

    async def silent() -> trio.abc.Stream:
        return trio.testing.memory_stream_pair()[0]

    async def script(far: Far) -> None:
        await far.request()
        await far.stream.send_all(OK)
        await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, script)
        for connect, seconds, match in (
            (never, 5, "did not accept a connection within 5 s"),
            (silent, 5, "did not answer in TLS within 5 s; the proxy at vsock:3:8000 accepts"),
            (peer.connect, 10, "did not answer within 10 s"),
        ):
            began = trio.current_time()
            with pytest.raises(TransportError, match=match):
                await over(connect).post(HEADERS, b"")
            assert trio.current_time() - began == pytest.approx(seconds)
        nursery.cancel_scope.cancel()


async def test_a_caller_that_goes_away_takes_its_connection_along(autojump_clock: MockClock) -> None:
    asked = trio.Event()

    async def script(far: Far) -> None:
        while True:
            _, body = await far.request()
            if body == b"wait":
                asked.set()
                await trio.sleep_forever()
            await far.respond(body)

    async with trio.open_nursery() as nursery:
        peer = Peer(nursery, script)
        transport = over(peer.connect)
        assert (await transport.post(HEADERS, b"1")).body == b"1"
        async with trio.open_nursery() as inner:
            inner.start_soon(transport.post, HEADERS, b"wait")
            await asked.wait()
            inner.cancel_scope.cancel()
        assert transport._kept == []
        assert (await transport.post(HEADERS, b"2")).body == b"2"
        assert peer.connections == 2
        nursery.cancel_scope.cancel()


async def test_a_header_cannot_be_smuggled(autojump_clock: MockClock) -> None:
    async with trio.open_nursery() as nursery:
        with pytest.raises(h11.LocalProtocolError):
            await over(Peer(nursery, echo).connect).post(HEADERS | {"x": "a\r\nb: c"}, b"")
        nursery.cancel_scope.cancel()
