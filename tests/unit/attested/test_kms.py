"""The server of the fake KMS, without sockets: TLS in all its variants, and each fault as a client meets it."""

import base64
import json
import ssl
import warnings
from collections import deque
from datetime import UTC, datetime
from typing import Any

import h11
import pytest
import trio
from trio.testing import MockClock

from tests.attested.account import Account, Spelling, Tamper
from tests.attested.certificates import HOST, Tls, authority
from tests.attested.documents import PCRS
from tests.attested.kms import Fault, Kms, Plan, command, in_memory
from tests.attested.requests import Credentials, Refusal
from tests.unit.attested.client import context, post, secure
from tests.unit.attested.opening import open_envelope
from tests.unit.attested.signing import signed
from tests.unit.attested.test_account import PUBLIC_KEY, RSA, recipient

RANDOM = {"NumberOfBytes": 8}


def random_bytes() -> Any:
    return signed("GenerateRandom", RANDOM)


# -- TLS


async def test_a_connection_is_used_again() -> None:
    kms = Kms()
    async with in_memory(kms) as connect:
        stream = await secure(await connect())
        assert stream.selected_alpn_protocol() == "http/1.1"
        for _ in range(3):
            reply = await post(stream, random_bytes())
            assert reply.status == 200
            assert len(base64.b64decode(json.loads(reply.body)["Plaintext"])) == 8
    assert (kms.connections, kms.handshakes, kms.requests, kms.names) == (1, 1, 3, [HOST])


async def test_the_date_of_an_answer_is_that_of_the_account() -> None:
    kms = Kms(Account(clock=lambda: datetime(2026, 11, 20, 12, 0, 5, tzinfo=UTC)))
    async with in_memory(kms) as connect:
        reply = await post(await secure(await connect()), random_bytes())
    assert reply.headers["date"] == "Fri, 20 Nov 2026 12:00:05 GMT"
    assert reply.headers["content-type"] == "application/x-amz-json-1.1"
    assert reply.headers["x-amzn-requestid"].endswith("-000000000001")


@pytest.mark.parametrize(
    ("tls", "text"),
    [
        (Tls.WRONG_NAME, "not valid for 'kms.us-west-2.amazonaws.com'"),
        (Tls.EXPIRED, "certificate has expired"),
        (Tls.NOT_YET_VALID, "certificate is not yet valid"),
        (Tls.UNKNOWN_CA, "unable to get local issuer certificate"),
        (Tls.SELF_SIGNED, "self-signed certificate"),
        (Tls.TLS_1_1, "alert protocol version"),
    ],
)
async def test_a_good_client_refuses_the_others(tls: Tls, text: str) -> None:
    async with in_memory(Kms(tls=tls)) as connect:
        stream = await connect()
        with pytest.raises(trio.BrokenResourceError) as caught:
            await secure(stream)
        await trio.aclose_forcefully(stream)
    assert text in str(caught.value.__cause__)


@pytest.mark.parametrize("tls", [Tls.WRONG_NAME, Tls.EXPIRED, Tls.NOT_YET_VALID, Tls.UNKNOWN_CA, Tls.SELF_SIGNED])
async def test_a_careless_client_is_served_by_the_others(tls: Tls) -> None:
    """So what a good client refuses is the certificate, and nothing else."""
    careless = context()
    careless.check_hostname = False
    careless.verify_mode = ssl.CERT_NONE
    async with in_memory(Kms(tls=tls)) as connect:
        assert (await post(await secure(await connect(), careless), random_bytes())).status == 200


async def test_a_client_of_another_ca_is_served_by_that_one() -> None:
    async with in_memory(Kms(tls=Tls.UNKNOWN_CA)) as connect:
        stream = await secure(await connect(), context(roots=authority("another CA").pem))
        assert (await post(stream, random_bytes())).status == 200


async def test_an_old_client_speaks_tls_1_1() -> None:
    old = context()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    old.set_ciphers("ALL:@SECLEVEL=0")
    async with in_memory(Kms(tls=Tls.TLS_1_1)) as connect:
        stream = await secure(await connect(), old)
        assert (await post(stream, random_bytes())).status == 200


async def test_in_clear() -> None:
    async with in_memory(Kms(tls=Tls.NONE)) as connect:
        assert (await post(await connect(), random_bytes())).status == 200


async def test_a_server_that_never_answers_the_hello(autojump_clock: MockClock) -> None:
    kms = Kms(tls=Tls.SILENT)
    async with in_memory(kms) as connect:
        stream = await connect()
        with trio.move_on_after(60) as scope:
            await secure(stream)
        assert scope.cancelled_caught
        await trio.aclose_forcefully(stream)
    assert (kms.connections, kms.handshakes) == (1, 0)


async def test_a_request_for_another_host_is_refused() -> None:
    async with in_memory(Kms()) as connect:
        request = signed("GenerateRandom", RANDOM, host="kms.us-east-1.amazonaws.com")
        reply = await post(await secure(await connect()), request)
        assert (reply.status, reply.body) == (400, b"")


# -- faults


async def ask(kms: Kms, operation: str = "GenerateRandom", fields: Any = RANDOM) -> Any:
    async with in_memory(kms) as connect:
        return await post(await secure(await connect()), signed(operation, fields))


@pytest.mark.parametrize(
    ("plan", "status", "body"),
    [
        (Fault.THROTTLED, 400, b'{"__type": "ThrottlingException", "message": "Rate exceeded"}'),
        (Fault.TOO_MANY, 429, b""),
        (Fault.INTERNAL, 500, b'{"__type": "KMSInternalException", "message": "internal failure"}'),
        (Fault.HTML, 503, b"<html><body><h1>503 Service Unavailable</h1></body></html>"),
        (Fault.RETRY_AFTER, 503, b""),
        (Fault.GARBAGE, 200, b"\x80\xff{"),
        (Fault.NO_OBJECT, 200, b"[1, 2]"),
        (Fault.EMPTY, 200, b"{}"),
        (Refusal("DisabledException", "x"), 400, b'{"__type": "DisabledException", "message": "x"}'),
    ],
)
async def test_a_planned_answer(plan: Plan, status: int, body: bytes) -> None:
    kms = Kms(script=deque([plan]))
    reply = await ask(kms)
    assert (reply.status, reply.body) == (status, body)
    assert reply.headers.get("retry-after") == ("1" if plan is Fault.RETRY_AFTER else None)
    assert (await ask(kms)).headers["content-type"] == "application/x-amz-json-1.1"
    assert len(kms.account.calls) == 1, "what was planned was not executed"


async def test_an_expired_token() -> None:
    reply = await ask(Kms(Account(spelling=Spelling.NO_TEXT), script=deque([Fault.EXPIRED_TOKEN])))
    assert reply.body == b'{"__type": "ExpiredTokenException"}'


@pytest.mark.parametrize(
    ("fault", "executed", "text"),
    [
        (Fault.CUT, 1, "peer unexpectedly closed|without sending complete message"),
        (Fault.LOST, 1, "ConnectionClosed"),
        (Fault.CLOSED, 0, "ConnectionClosed"),
        (Fault.NO_HTTP, 0, "illegal status line"),
    ],
)
async def test_no_whole_answer(fault: Fault, executed: int, text: str) -> None:
    kms = Kms(script=deque([fault]))
    async with in_memory(kms) as connect:
        stream = await secure(await connect())
        with pytest.raises(h11.RemoteProtocolError, match=text):
            await post(stream, random_bytes())
    assert len(kms.account.calls) == executed
    assert (await ask(kms)).status == 200


async def test_silence_lasts_until_the_client_goes(autojump_clock: MockClock) -> None:
    kms = Kms(script=deque([Fault.SILENT]))
    async with in_memory(kms) as connect:
        stream = await secure(await connect())
        with trio.move_on_after(60) as scope:
            await post(stream, random_bytes())
        assert scope.cancelled_caught
        assert kms.in_flight == 1
        await trio.aclose_forcefully(stream)
        await trio.testing.wait_all_tasks_blocked()
        assert kms.in_flight == 0


@pytest.mark.parametrize("fault", [Fault.ENDLESS, Fault.HUGE])
async def test_a_body_without_end(fault: Fault) -> None:
    kms = Kms(script=deque([fault]))
    async with in_memory(kms) as connect:
        stream = await secure(await connect())
        await stream.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 0\r\n\r\n")
        received = 0
        while received < 1_000_000:
            received += len(await stream.receive_some())
        await trio.aclose_forcefully(stream)
        await trio.testing.wait_all_tasks_blocked()
        assert kms.in_flight == 0


async def test_plans_by_operation_and_key() -> None:
    kms = Kms(choose=lambda operation, key: Fault.HTML if (operation, key) == ("DescribeKey", "alias/baker") else None)
    assert (await ask(kms, "DescribeKey", {"KeyId": "alias/baker"})).status == 503
    assert (await ask(kms, "DescribeKey", {"KeyId": kms.account.keys[0].arn})).status == 200
    assert (await ask(kms)).status == 200


async def test_tampering_reaches_the_account() -> None:
    kms = Kms(script=deque([None, Tamper.PLAINTEXT_TOO, None]))
    fields = {"KeyId": "alias/baker", "KeySpec": "AES_256", "Recipient": recipient()}
    answers = [json.loads((await ask(kms, "GenerateDataKey", fields)).body) for _ in range(3)]
    assert ["Plaintext" in answer for answer in answers] == [False, True, False]
    assert len(open_envelope(RSA, answers[0]["CiphertextForRecipient"])) == 32


async def test_calls_run_side_by_side_and_take_their_time(autojump_clock: MockClock) -> None:
    kms = Kms(delay=0.02)
    began = trio.current_time()
    async with in_memory(kms) as connect, trio.open_nursery() as nursery:

        async def one() -> None:
            assert (await post(await secure(await connect()), random_bytes())).status == 200

        for _ in range(10):
            nursery.start_soon(one)
    assert kms.peak == 10
    assert trio.current_time() - began == pytest.approx(0.02)


async def test_what_is_no_request_ends_its_connection_only() -> None:
    async with in_memory(Kms()) as connect:
        stream = await secure(await connect())
        await stream.send_all(b"\0\1\2 garbage\r\n\r\n")
        assert await stream.receive_some() == b""
        big = await secure(await connect())
        await big.send_all(b"POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2000000\r\n\r\n" + bytes(1_500_000))
        assert await big.receive_some() == b""
        assert (await post(await secure(await connect()), random_bytes())).status == 200


# -- the commands of a process of its own


def test_commands() -> None:
    kms = Kms()
    command(
        kms,
        {
            "key": "alias/second",
            "pcrs": {"0": [PCRS[0].hex()]},
            "context": {"a": "b"},
            "denied": ["Encrypt"],
            "state": "Disabled",
            "credentials": [
                {"id": "AKID", "secret": "s"},
                {"id": "AKID2", "secret": "t", "token": "u", "expired": True},
            ],
            "script": ["cut", "other-key", None, "DisabledException"],
            "always": "throttled",
            "delay": 0.5,
            "chunk_size": 7,
            "spelling": "prefix",
            "takes_emulated": True,
            "tls": "expired",
        },
    )
    key = kms.account.keys[1]
    assert (key.aliases, key.pcrs, key.context) == (["alias/second"], {0: [PCRS[0]]}, {"a": "b"})
    assert (key.denied, key.state) == (["Encrypt"], "Disabled")
    assert kms.account.credentials == [Credentials("AKID", "s"), Credentials("AKID2", "t", "u", True)]
    script = list(kms.script)
    assert script[:3] == [Fault.CUT, Tamper.OTHER_KEY, None]
    assert isinstance(script[3], Refusal)
    assert script[3].name == "DisabledException"
    assert kms.choose("", "") is Fault.THROTTLED
    assert (kms.delay, kms.tls) == (0.5, Tls.EXPIRED)
    assert (kms.account.chunk_size, kms.account.spelling, kms.account.takes_emulated) == (7, Spelling.PREFIX, True)
    command(kms, {"key": "alias/second", "state": "Enabled", "always": None})
    assert (key.state, key.pcrs, kms.choose("", "")) == ("Enabled", {0: [PCRS[0]]}, None)
    assert len(kms.account.keys) == 2


def test_calls_are_told_once() -> None:
    kms = Kms()
    kms.account.answer(signed("GenerateRandom", RANDOM | {"Recipient": recipient()}))
    kms.account.answer(signed("DescribeKey", {"KeyId": "alias/none"}))
    assert command(kms, {"calls": True})["calls"] == [
        {"operation": "GenerateRandom", "key": "", "context": {}, "pcr0": PCRS[0].hex(), "error": ""},
        {"operation": "DescribeKey", "key": "alias/none", "context": {}, "pcr0": None, "error": "NotFoundException"},
    ]
    assert command(kms, {"calls": True}) == {"requests": 0, "connections": 0, "peak": 0, "calls": []}
    assert "calls" not in command(kms, {})
    assert len(PUBLIC_KEY) == 294
