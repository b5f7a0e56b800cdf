"""The program of an image, put together: module and KMS are those of the tests."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

from signer.enclave import program
from signer.enclave.clock import Clock
from signer.enclave.log import journal
from signer.enclave.nsm.interface import Nsm, NsmError
from signer.enclave.program import Program
from signer.enclave.recipient import Recipient
from signer.enclave.settings import Settings
from signer.rpc.messages import (
    Attest,
    Attested,
    Created,
    GenerateAndImport,
    ImportUnencrypted,
    Initialize,
    RemoteError,
    Sign,
    decode_reply,
    encode_call,
)
from signer.tezos.keys import Curve, Signature
from tests.attested.nsm import FakeNsm
from tests.unit.enclave.kms.custody import Custody
from tests.unit.enclave.kms.peer import HOST, Peer, authority

INITIALIZE = Initialize(
    access_key_id="AKIDEXAMPLE", secret_access_key="secret", encryption_key_id="alias/baker", region="us-west-2"
)


class Image:
    """A machine to start the program on; what is done to it stands in `nsm.calls`, in its order."""

    def __init__(self, nursery: trio.Nursery, rsa_key: RSAPrivateKey, endpoint: str = HOST) -> None:
        self.nsm = FakeNsm()
        self.custody = Custody()
        self._peer = Peer(nursery, self.custody.script, authority().server(endpoint))
        self._rsa_key = rsa_key

    async def start(self, settings: Settings) -> Program:
        return await program.start(
            self.nsm,
            settings,
            self._peer.connect,
            roots=lambda: authority().pem,
            clock=Clock(step=self._step),
            seed=self._seed,
            make_recipient=self._recipient,
        )

    def _step(self, which: int, to: float) -> None:
        raise PermissionError(1, "not in a test")

    async def _seed(self, nsm: Nsm) -> int:
        self.nsm.calls.append("seed")
        return 1024

    def _recipient(self, nsm: Nsm) -> Recipient:
        async def make_key() -> RSAPrivateKey:
            self.nsm.calls.append("RSA key")
            return self._rsa_key

        return Recipient(nsm, make_key=make_key)


@asynccontextmanager
async def image(rsa_keys: list[RSAPrivateKey], endpoint: str = HOST) -> AsyncIterator[Image]:
    async with trio.open_nursery() as nursery:
        yield Image(nursery, rsa_keys[0], endpoint)
        nursery.cancel_scope.cancel()


async def test_all_is_made_before_anybody_is_served(rsa_keys: list[RSAPrivateKey]) -> None:
    async with image(rsa_keys) as here:
        running = await here.start(Settings())
        duties = ["seed", "DescribeNSM", "Attestation", "GetRandom", "RSA key", "Attestation"]
        assert here.nsm.calls == [*duties, "DescribePCR"]
        await running.aclose()


async def test_a_start_without_the_measurement(rsa_keys: list[RSAPrivateKey]) -> None:
    """Only the texts of refusals need it."""
    async with image(rsa_keys) as here:
        here.nsm.failures = {7: "InternalError"}
        running = await here.start(Settings())
        assert here.nsm.calls[6] == "DescribePCR"
        await running.aclose()


async def test_a_module_that_fails_at_any_duty_ends_the_start(rsa_keys: list[RSAPrivateKey]) -> None:
    for duty in (2, 3, 4, 6):
        async with image(rsa_keys) as here:
            here.nsm.failures = {duty: "InternalError"}
            with pytest.raises(NsmError):
                await here.start(Settings())
            assert len(here.nsm.calls) == duty


@pytest.mark.parametrize("endpoint", [None, "kms-fips.us-west-2.amazonaws.com"])
async def test_a_session_seals_by_kms_draws_from_both_and_attests(
    rsa_keys: list[RSAPrivateKey], endpoint: str | None
) -> None:
    async with image(rsa_keys, endpoint or HOST) as here:
        running = await here.start(Settings(endpoint=endpoint))
        here.nsm.calls.clear()
        session = running.new_session()
        for call, kind in (
            (Attest("session", bytes(16)), Attested),
            (INITIALIZE, type(None)),
            (GenerateAndImport(Curve.ED25519), Created),
            (Sign(0, b"message", 2), Signature),
        ):
            assert isinstance(decode_reply(call, await session.answer(encode_call(call))), kind)
        assert here.nsm.calls == ["Attestation", "GetRandom"]
        assert here.custody.operations() == ["Encrypt"]
        assert here.custody.requests[0].headers["host"] == (endpoint or HOST)
        await running.aclose()


async def test_a_strict_image_takes_no_key_in_clear(rsa_keys: list[RSAPrivateKey]) -> None:
    call = ImportUnencrypted(Curve.ED25519, bytes(32))
    async with image(rsa_keys) as here:
        for strict in (False, True):
            running = await here.start(Settings(strict=strict))
            session = running.new_session()
            await session.answer(encode_call(INITIALIZE))
            reply = await session.answer(encode_call(call))
            if strict:
                with pytest.raises(RemoteError, match="^legacy blob refused"):
                    decode_reply(call, reply)
            else:
                assert isinstance(decode_reply(call, reply), Created)
            await running.aclose()


async def test_the_image_s_key_is_the_only_one(rsa_keys: list[RSAPrivateKey]) -> None:
    async with image(rsa_keys) as here:
        running = await here.start(Settings(kms_key="arn:aws:kms:us-west-2:123456789012:key/0d990263"))
        reply = await running.new_session().answer(encode_call(INITIALIZE))
        with pytest.raises(RemoteError, match="seals under arn:.* alone"):
            decode_reply(INITIALIZE, reply)
        await running.aclose()


async def test_sessions_share_import_keys_and_the_limit(
    rsa_keys: list[RSAPrivateKey], autojump_clock: trio.testing.MockClock
) -> None:
    async with image(rsa_keys) as here:
        running = await here.start(Settings())
        call = Attest("import", bytes(16))
        began = trio.current_time()
        for number in range(6):
            reply = await running.new_session().answer(encode_call(call))
            assert isinstance(decode_reply(call, reply), Attested)
            assert (trio.current_time() == began) == (number < 5)
        await running.aclose()


async def test_the_clock_is_kept(rsa_keys: list[RSAPrivateKey], autojump_clock: trio.testing.MockClock) -> None:
    async with image(rsa_keys) as here:
        running = await here.start(Settings())
        here.nsm.calls.clear()
        with trio.move_on_after(1500):
            await running.tend()
        assert here.nsm.calls == ["Attestation"] * 2
        await running.aclose()


async def test_import_keys_die_though_nobody_asks(
    rsa_keys: list[RSAPrivateKey], autojump_clock: trio.testing.MockClock
) -> None:
    async with image(rsa_keys) as here:
        running = await here.start(Settings())
        reply = await running.new_session().answer(encode_call(Attest("import", bytes(16))))
        assert isinstance(decode_reply(Attest("import", bytes(16)), reply), Attested)
        for outstanding, seconds in ((1, 590), (0, 70)):
            with trio.move_on_after(seconds):
                await running.tend()
            assert json.loads(journal.counters())["gauges"]["import_keys"] == outstanding
        await running.aclose()
