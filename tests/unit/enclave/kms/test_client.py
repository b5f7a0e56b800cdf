"""The calls of KMS: what is asked, what is believed of the answers, and what is asked again."""

import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from trio.testing import MockClock

from signer.enclave.kms.client import Access, KmsClient, KmsError
from signer.enclave.kms.retries import Breaker
from signer.enclave.kms.sigv4 import Credentials, signed_headers
from signer.enclave.kms.transport import Transport, tls_context
from signer.enclave.recipient import Recipient
from tests.unit.enclave.kms.custody import ARN, NOW, PCR0, Custody, FixedClock, Module, Reply, fault
from tests.unit.enclave.kms.peer import HOST, Peer, authority

CREDENTIALS = Credentials(access_key_id="AKIDEXAMPLE", secret_access_key="secret", session_token="token")
ACCESS = Access(credentials=CREDENTIALS, region="us-west-2", key_id="alias/baker")
CONTEXT = {"tezos-signer:format": "1", "tezos-signer:pkh": "tz1"}


class World:
    """A client and all that stands around it."""

    def __init__(self, nursery: trio.Nursery, key: RSAPrivateKey, access: Access = ACCESS) -> None:
        self.custody = Custody()
        self.module = Module()
        self.clock = FixedClock()
        self.breaker = Breaker()
        self.peer = Peer(nursery, self.custody.script)
        self.key = key
        self.transport = Transport(HOST, self.connect, tls_context(authority().pem), place="vsock:3:8000")
        self.refusals = 0  # connections that are refused next
        self.client = KmsClient(
            access,
            transport=lambda region: self.transport,
            recipient=Recipient(self.module, make_key=self.make_key),
            clock=self.clock,
            breaker=self.breaker,
            chance=lambda: 1.0,
        )

    async def make_key(self) -> RSAPrivateKey:
        await trio.lowlevel.checkpoint()
        return self.key

    async def connect(self) -> trio.abc.Stream:
        if self.refusals:
            self.refusals -= 1
            self.peer.connections += 1
            raise ConnectionRefusedError(111, "Connection refused")
        return await self.peer.connect()

    async def chain(self, blob: bytes = b"blob") -> tuple[str, ...]:
        """The messages of a Decrypt that fails."""
        with pytest.raises(KmsError) as caught:
            await self.client.decrypt(blob)
        return caught.value.chain


@asynccontextmanager
async def world(rsa_keys: list[RSAPrivateKey], access: Access = ACCESS) -> AsyncIterator[World]:
    async with trio.open_nursery() as nursery:
        yield World(nursery, rsa_keys[0], access)
        nursery.cancel_scope.cancel()


async def test_encrypt_and_decrypt(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        blob = await here.client.encrypt(b"secret")
        plaintext = await here.client.decrypt(blob)
        assert isinstance(plaintext, bytearray)
        assert plaintext == b"secret"
        encrypt, decrypt = here.custody.requests
        assert encrypt.members == {"KeyId": "alias/baker", "Plaintext": "c2VjcmV0"}
        assert decrypt.members.keys() == {"KeyId", "CiphertextBlob", "Recipient"}
        assert decrypt.members["KeyId"] == "alias/baker"
        assert base64.b64decode(decrypt.members["Recipient"]["AttestationDocument"]) == here.module.documents[0]


async def test_data_keys(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        made = await here.client.generate_data_key(CONTEXT)
        assert len(made.plain) == 32
        assert await here.client.decrypt(made.wrapped, context=CONTEXT) == made.plain
        assert here.custody.requests[0].members["EncryptionContext"] == CONTEXT
        with pytest.raises(KmsError, match="InvalidCiphertextException"):
            await here.client.decrypt(made.wrapped, context=CONTEXT | {"tezos-signer:pkh": "tz2"})
        with pytest.raises(KmsError, match="InvalidCiphertextException"):
            await here.client.decrypt(made.wrapped)
        assert len(here.module.documents) == len(set(here.module.documents)) == 4, "a fresh document for each call"


async def test_requests_are_signed(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.clock.offset = 90.0
        await here.client.encrypt(b"secret")
        (request,) = here.custody.requests
        body = json.dumps(request.members, separators=(",", ":")).encode()
        expected = signed_headers(
            CREDENTIALS,
            host=HOST,
            region="us-west-2",
            target="TrentService.Encrypt",
            body=body,
            now=NOW + timedelta(seconds=90),
        )
        assert {name: request.headers[name] for name in expected} == expected
        assert request.headers.keys() - expected.keys() == {"content-length"}


# -- answers that are not believed


def member(name: str, value: object) -> Any:
    """The ordinary answer with a member exchanged."""

    def reply(operation: str, members: dict[str, Any]) -> dict[str, Any]:
        status, _, body = Custody.answer(CUSTODY, operation, members)
        assert status == 200
        return {**json.loads(body), name: value}

    return reply


CUSTODY = Custody()
CUSTODY.blobs[b"blob"] = (b"secret", None)


@pytest.mark.parametrize(
    ("name", "value", "chain"),
    [
        ("Plaintext", "c2VjcmV0", "SDK error: AWS KMS answered Decrypt in clear although"),
        ("Plaintext", 7, "SDK error: AWS KMS answered Decrypt in clear although"),
        ("CiphertextForRecipient", None, "zero output: AWS KMS answered Decrypt without CiphertextForRecipient"),
        ("CiphertextForRecipient", "", "zero output: AWS KMS answered Decrypt without CiphertextForRecipient"),
        (
            "CiphertextForRecipient",
            "!",
            "SDK error: AWS KMS answered Decrypt with a CiphertextForRecipient that is not",
        ),
        (
            "CiphertextForRecipient",
            "é",
            "SDK error: AWS KMS answered Decrypt with a CiphertextForRecipient that is not",
        ),
        ("CiphertextForRecipient", "MIA=", "envelope error: the envelope of AWS KMS is refused .ber."),
        ("KeyId", None, "zero output: AWS KMS answered Decrypt without KeyId"),
        ("KeyId", 7, "zero output: AWS KMS answered Decrypt without KeyId"),
    ],
)
async def test_answers_that_are_refused(
    name: str, value: object, chain: str, autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        here.custody.replies = [member(name, value)]
        with pytest.raises(KmsError, match=f"^{chain}") as caught:
            await here.client.decrypt(b"blob")
        assert "c2VjcmV0" not in str(caught.value)
        assert "secret" not in str(caught.value)
        assert len(here.custody.requests) == 1


@pytest.mark.parametrize(
    "members",
    [
        None,
        {"KeyId": None},
        {"KeyId": ARN + "0"},
        {"Plaintext": "c2VjcmV0"},
        {"CiphertextForRecipient": None},
        {"CiphertextForRecipient": "!"},
        {"CiphertextForRecipient": "MIA="},
    ],
)
async def test_a_refused_answer_names_the_request(
    members: dict[str, object] | None, autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys, replace(ACCESS, key_id=ARN)) as here:
        answer = None if members is None else {"KeyId": ARN, "CiphertextForRecipient": "AA=="} | members
        here.custody.replies = [(200, {"x-amzn-RequestId": "0e1f-9f6e"}, json.dumps(answer).encode())]
        assert (await here.chain())[-1].endswith(" (request 0e1f-9f6e)")


@pytest.mark.parametrize("absent", [None, ""])
async def test_an_empty_plaintext_is_none(
    absent: object, autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        here.custody.replies = [member("Plaintext", absent)]
        assert await here.client.decrypt(b"blob") == b"secret"


@pytest.mark.parametrize("body", [b"", b"[]", b"<html>", b"{", b"\xff", b"[" * 60000, b"9" * 60000])
async def test_answers_that_are_none(body: bytes, autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.custody.replies = [(200, {}, body)]
        assert await here.chain() == (
            "SDK error",
            "AWS KMS answered Decrypt with something that is no JSON object",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("key_id", "others"),
    [
        (ARN, [ARN + "0", ARN.replace("west", "east")]),
        (ARN.rpartition("/")[2], [ARN + "0", ARN.replace("/0d99", "/1d99")]),
    ],
)
async def test_the_answered_key_is_compared(
    key_id: str, others: list[str], autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys, Access(credentials=CREDENTIALS, region="us-west-2", key_id=key_id)) as here:
        for other in others:
            here.custody.replies = [member("KeyId", other)]
            with pytest.raises(KmsError, match=f"for another key: '{other}' instead of {key_id}"):
                await here.client.decrypt(b"blob")
        assert await here.client.decrypt(await here.client.encrypt(b"x")) == b"x"


async def test_an_alias_stays_with_its_first_key(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        blob = await here.client.encrypt(b"x")
        here.custody.replies = [member("KeyId", ARN + "0")]
        with pytest.raises(KmsError, match=f"for another key: '{ARN}0' instead of {ARN}"):
            await here.client.decrypt(b"blob")
        assert await here.client.decrypt(blob) == b"x"


async def test_an_alias_is_another_key_in_another_region(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        await here.client.encrypt(b"x")
        here.client.access = replace(ACCESS, region="eu-west-1")
        here.custody.replies = [member("KeyId", ARN.replace("us-west-2", "eu-west-1"))]
        await here.client.encrypt(b"x")
        with pytest.raises(KmsError, match="for another key"):  # and stays with that one there
            await here.client.encrypt(b"x")


# -- refusals


async def test_a_denial_names_this_image(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        text = "because no resource-based policy allows the kms:Decrypt action"
        body = json.dumps({"__type": "AccessDeniedException", "Message": text}).encode()
        here.custody.replies = [(400, {"x-amzn-RequestId": "0d1e"}, body)]
        outer, name, cause = await here.chain()
        assert outer == "SDK error"
        assert name == f"AccessDeniedException: {text} (request 0d1e)"
        assert PCR0.hex() in cause
        assert len(here.custody.requests) == 1


async def test_a_denied_encrypt_is_not_about_the_image(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        here.custody.replies = [fault("AccessDeniedException")]
        with pytest.raises(KmsError, match="never matches kms:Encrypt") as caught:
            await here.client.encrypt(b"x")
        assert caught.value.fault is not None
        assert caught.value.fault.name == "AccessDeniedException"


async def test_a_refused_document_is_tried_once_more(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        blob = await here.client.encrypt(b"x")
        here.custody.replies = [fault("ValidationException")]
        assert await here.client.decrypt(blob) == b"x"
        assert len(set(here.module.documents)) == 2
        here.custody.replies = [fault("ValidationException"), fault("ValidationException"), None]
        assert "ValidationException" in await here.chain()
        assert len(here.module.documents) == 4


async def test_throttling_is_waited_out(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        throttled = fault("ThrottlingException", "Rate exceeded")
        here.custody.replies = [throttled] * 3
        began = trio.current_time()
        await here.client.encrypt(b"x")
        assert trio.current_time() - began == pytest.approx(0.05 + 0.1 + 0.2)
        here.custody.requests.clear()
        here.custody.replies = [throttled] * 4
        outer, name, cause = await here.chain()
        assert (outer, name) == ("SDK error", "ThrottlingException: Rate exceeded")
        assert "too many requests" in cause
        assert len(here.custody.requests) == 4


async def test_a_load_balancer_s_page_is_waited_out(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        page: Reply = (503, {"Retry-After": "2"}, b"<html>Service Unavailable</html>")
        here.custody.replies = [page]
        began = trio.current_time()
        await here.client.encrypt(b"x")
        assert trio.current_time() - began == pytest.approx(2.0)
        here.custody.replies = [(503, {"Retry-After": "60"}, b"")]
        assert (await here.chain())[1] == "HTTP 503"
        assert trio.current_time() - began == pytest.approx(2.0), "longer than a call may take: not waited for"


async def test_the_clock_is_set_by_kms_once(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        late = fault("InvalidSignatureException", "Signature expired: x", date="Fri, 20 Nov 2026 12:10:05 GMT")
        here.clock.offset = 1.0
        here.custody.replies = [late]
        await here.client.encrypt(b"x")
        assert here.clock.corrections == [600.0]
        assert [request.headers["x-amz-date"] for request in here.custody.requests] == [
            "20261120T120006Z",
            "20261120T121005Z",
        ]
        early = fault("RequestInTheFuture", date="Fri, 20 Nov 2026 12:00:05 GMT")
        later = fault("RequestExpired", date="Fri, 20 Nov 2026 12:20:05 GMT")
        here.custody.replies = [early, later, None]
        with pytest.raises(KmsError, match="clock"):
            await here.client.encrypt(b"x")
        assert here.clock.corrections == [600.0, 0.0]
        here.custody.replies = [fault("RequestExpired", date="Fri, 20 Nov 2026 12:01:05 GMT")]
        assert "clocks of the enclave and of AWS agree" in (await here.chain())[-1]
        assert here.clock.corrections == [600.0, 0.0]


async def test_a_clock_that_was_set_meanwhile_is_no_fault_of_the_credentials(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    """Calls that run side by side were all signed with the wrong time, and the first refusal sets it."""
    async with world(rsa_keys) as here:
        here.custody.delay = 0.02
        late = fault("InvalidSignatureException", "Signature expired: x", date="Fri, 20 Nov 2026 12:10:05 GMT")
        here.custody.replies = [late, late]
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(here.client.encrypt, b"x")
        assert here.clock.corrections == [600.0, 600.0]
        assert len(here.custody.requests) == 4


@pytest.mark.parametrize(
    "name",
    ["ExpiredTokenException", "UnrecognizedClientException", "InvalidClientTokenId", "InvalidSignatureException"],
)
async def test_credentials_that_are_over_are_named_and_can_be_replaced(
    name: str, autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        expired = fault(name, "The security token included in the request is expired")
        here.custody.replies = [expired]
        assert (await here.chain())[1].startswith(f"{name}: ")
        assert len(here.custody.requests) == 1
        renewed = Access(
            credentials=Credentials(access_key_id="AKIDNEW", secret_access_key="other"),
            region="us-west-2",
            key_id=ACCESS.key_id,
        )

        def reply(operation: str, members: dict[str, Any]) -> Reply:
            here.client.access = renewed  # while the call runs
            return expired

        here.custody.replies = [reply]
        await here.client.encrypt(b"x")
        assert "Credential=AKIDNEW/" in here.custody.requests[-1].headers["authorization"]
        assert "x-amz-security-token" not in here.custody.requests[-1].headers


# -- no answer


async def test_a_lost_way_is_tried_four_times(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.refusals = 3
        await here.client.encrypt(b"x")
        here.refusals = 4
        await here.transport.aclose()
        assert await here.chain() == (
            "SDK error",
            "no connection to the proxy at vsock:3:8000: Connection refused; is it running on the parent?",
        )
        assert here.refusals == 0
        assert here.peer.connections == 8


async def test_a_stranger_in_kms_s_place_is_tried_twice(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        here.peer._context = authority("Another Root").server()
        assert "the other side is not" in (await here.chain())[1]
        assert here.peer.connections == 2
        assert here.custody.requests == []


async def test_a_dead_way_is_left_alone(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.refusals = 1000
        for _ in range(5):
            await here.chain()
        assert here.peer.connections == 20
        told = (await here.chain())[1]
        assert "did not answer 20 times in a row" in told
        assert "the last time: no connection to the proxy at vsock:3:8000: Connection refused" in told
        assert here.peer.connections == 20
        await trio.sleep(1)
        assert "Connection refused" in (await here.chain())[1]
        assert here.peer.connections == 21, "one probe, without retries"
        here.refusals = 0
        await trio.sleep(1)
        blob = await here.client.encrypt(b"x")
        assert await here.client.decrypt(blob) == b"x"


async def test_a_call_ends_before_the_host_gives_up(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.custody.delay = 1000.0
        began = trio.current_time()
        assert await here.chain() == ("SDK error", "AWS KMS gave no answer to Decrypt within 9 s")
        assert trio.current_time() - began == pytest.approx(9.0)
        here.custody.delay = 0.0
        here.refusals = 1

        async def silent() -> trio.abc.Stream:
            return trio.testing.memory_stream_pair()[0]

        here.transport._connect = silent
        chain = await here.chain()
        assert chain[1].startswith("AWS KMS gave no answer to Decrypt within 9 s; before that: kms.us-west-2")
        assert "did not answer in TLS within 5 s" in chain[1]
        assert here.breaker.failures == 3


async def test_a_module_that_hangs_is_no_fault_of_kms(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.module.delay = 60.0
        assert await here.chain() == (
            "attestation error",
            "the security module gave no document for Decrypt within 9 s",
        )  # fmt: skip
        assert here.breaker.failures == 0
        assert not here.custody.requests
        await here.client.encrypt(b"x")


async def test_no_document_no_call(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        here.module.fails = True
        assert await here.chain() == ("attestation error", "InternalError (the module failed)")
        assert here.custody.requests == []
        await here.client.encrypt(b"x")


async def test_a_denial_is_told_even_if_the_module_fails(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:

        def reply(operation: str, members: dict[str, Any]) -> Reply:
            here.module.fails = True
            return fault("AccessDeniedException")

        here.custody.replies = [reply]
        assert "for this image or not for this role" in (await here.chain())[2]


@pytest.mark.parametrize("late", [0.0, 8.9])
async def test_a_denial_is_told_even_if_the_module_hangs(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey], monkeypatch: pytest.MonkeyPatch, late: float
) -> None:
    """And counts as an answer of KMS, also at the end of the time."""
    monkeypatch.setattr(Module, "describe_pcr", lambda *_: trio.sleep_forever())
    async with world(rsa_keys) as here:
        here.custody.delay = late
        here.custody.replies = [fault("AccessDeniedException")]
        began = trio.current_time()
        chain = await here.chain()
        assert trio.current_time() - began == pytest.approx(late + 0.5)
        assert "AccessDeniedException" in chain[1]
        assert "for this image or not for this role" in chain[2]
        assert here.breaker.failures == 0


async def test_calls_run_side_by_side(autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]) -> None:
    async with world(rsa_keys) as here:
        blobs = [await here.client.encrypt(bytes([number])) for number in range(50)]
        here.custody.delay = 0.02
        began, opened = trio.current_time(), []

        async def decrypt(number: int) -> None:
            opened.append((number, await here.client.decrypt(blobs[number])))

        async with trio.open_nursery() as nursery:
            for number in range(50):
                nursery.start_soon(decrypt, number)
        assert trio.current_time() - began < 0.1
        assert sorted(opened) == [(number, bytearray([number])) for number in range(50)]


@pytest.mark.parametrize("steps", range(1, 40, 3))
async def test_cancelled_anywhere_the_client_goes_on(
    steps: int, autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    async with world(rsa_keys) as here:
        blob = await here.client.encrypt(b"x")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(here.client.decrypt, blob)
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert await here.client.decrypt(blob) == b"x"


async def test_a_refusal_that_quotes_the_request_shows_no_part_of_a_secret(
    autojump_clock: MockClock, rsa_keys: list[RSAPrivateKey]
) -> None:
    """AWS tells the canonical request of a signature that it refuses; the text is cut in the middle of the token."""
    token, secret = "FwoGZXIvYXdz" * 80, "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"
    credentials = Credentials(access_key_id="AKIDEXAMPLE", secret_access_key=secret, session_token=token)
    access = Access(credentials=credentials, region="us-west-2", key_id="alias/baker")
    text = f"The Canonical String should have been 'POST\n/\n\nx-amz-security-token:{token}\n' by {secret}"
    async with world(rsa_keys, access) as here:
        here.custody.replies = [fault("InvalidSignatureException", text)]
        told = ": ".join(await here.chain())
    assert "x-amz-security-token:(secret) ' by (secret)" in told
    assert "FwoG" not in told
    assert "wJal" not in told
