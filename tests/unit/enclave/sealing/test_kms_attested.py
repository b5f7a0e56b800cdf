"""Sealing against the fake KMS that verifies documents, signatures, contexts and conditions; faults of every kind."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta

import pytest
import trio
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey
from trio.testing import MockClock

from signer.crypto import generate_secret_key, load_secret_key, verify
from signer.enclave.clock import Clock
from signer.enclave.kms.transport import MAX_CONNECTIONS, Transport, tls_context
from signer.enclave.recipient import Recipient
from signer.enclave.sealing.interface import Sealer, SealingError
from signer.enclave.sealing.kms import KmsSealing
from signer.rpc.messages import Initialize
from signer.tezos.keys import Curve
from tests.attested.account import CREDENTIALS, Spelling, Tamper
from tests.attested.certificates import Tls, authority
from tests.attested.documents import PCRS
from tests.attested.kms import Fault, Kms, in_memory
from tests.attested.nsm import FakeNsm

INITIALIZE = Initialize(
    access_key_id=CREDENTIALS.access_key_id,
    secret_access_key=CREDENTIALS.secret_access_key,
    encryption_key_id="alias/baker",
    region="us-west-2",
)
VERSION_1 = replace(INITIALIZE, seal="v1")


def _no_step(clock: int, moment: float) -> None:
    raise PermissionError(1, "Operation not permitted")


@dataclass
class World:
    """An enclave's sealing, its module and the KMS that it talks to."""

    kms: Kms
    nsm: FakeNsm
    clock: Clock
    sealing: KmsSealing

    def sealer(self, credentials: Initialize = VERSION_1) -> Sealer:
        return self.sealing.session(credentials)


@asynccontextmanager
async def world(
    rsa_keys: list[RSAPrivateKey], *, debug: bool = False, pcr0: bytes = PCRS[0], drift: float = 0.0
) -> AsyncIterator[World]:
    async def make_key() -> RSAPrivateKey:
        await trio.lowlevel.checkpoint()
        return rsa_keys[0]

    kms, nsm = Kms(), FakeNsm(debug=debug, pcrs=PCRS | {0: pcr0})
    kms.account.keys[0].pcrs = {0: [PCRS[0]]}
    clock = Clock(read=lambda: datetime.now(UTC).timestamp() + drift, step=_no_step)
    async with in_memory(kms) as connect:
        sealing = KmsSealing(
            recipient=Recipient(nsm, make_key=make_key),
            make_transport=lambda host: Transport(host, connect, tls_context(authority().pem), place="vsock:3:8000"),
            clock=clock,
        )
        yield World(kms, nsm, clock, sealing)
        await sealing.aclose()


async def refusal(sealer: Sealer, blob: bytes) -> str:
    with pytest.raises(SealingError) as caught:
        await sealer.open(blob)
    return str(caught.value)


@pytest.mark.parametrize("curve", list(Curve))
@pytest.mark.parametrize("credentials", [INITIALIZE, VERSION_1], ids=["legacy", "version 1"])
async def test_seal_and_open(
    curve: Curve, credentials: Initialize, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        here.kms.account.chunk_size = 7
        key = generate_secret_key(curve)
        blob = await here.sealer(credentials).seal(key)
        opened = await here.sealer(credentials).open(blob)  # by another session
        assert opened.public_key == key.public_key
        assert here.kms.names == ["kms.us-west-2.amazonaws.com"]
        documents = [call.document for call in here.kms.account.calls if call.operation != "Encrypt"]
        assert all(document is not None and document.pcrs[0] == PCRS[0] for document in documents)


async def test_another_image_opens_nothing(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    key = load_secret_key(Curve.ED25519, bytes(32))
    async with world(rsa_keys) as here:
        legacy, sealed = await here.sealer(INITIALIZE).seal(key), await here.sealer().seal(key)
    changed = bytes([PCRS[0][0] ^ 1]) + PCRS[0][1:]
    async with world(rsa_keys, pcr0=changed) as here:
        for blob in (legacy, sealed):
            text = await refusal(here.sealer(), blob)
            assert "AccessDeniedException" in text
            assert f"PCR0 {changed.hex()}" in text
    async with world(rsa_keys, debug=True) as here:
        for blob in (legacy, sealed):
            assert "this enclave runs in debug mode" in await refusal(here.sealer(), blob)


@pytest.mark.parametrize("spelling", list(Spelling))
async def test_every_spelling_of_an_error(
    spelling: Spelling, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        blob = await here.sealer().seal(load_secret_key(Curve.P256, bytes(31) + b"\1"))
        here.kms.account.spelling = spelling
        here.kms.script.append(Fault.EXPIRED_TOKEN)
        text = await refusal(here.sealer(), blob)
        assert text.startswith("encryption error: SDK error: ExpiredTokenException")
        assert "the host must send new credentials" in text


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        (Tamper.OTHER_KEY, "answered Decrypt for another key"),
        (Tamper.OTHER_PLAINTEXT, "encryption error: decrypt"),
        (Tamper.OTHER_RECIPIENT, "envelope error"),
        (Tamper.PLAINTEXT_TOO, "in clear although it was sent an attestation document"),
        (Tamper.PLAINTEXT_ONLY, "in clear although it was sent an attestation document"),
        (Tamper.NO_ENVELOPE, "zero output"),
        (Tamper.DAMAGED_ENVELOPE, "encryption error: "),
        (Fault.GARBAGE, "no JSON object"),
        (Fault.NO_OBJECT, "no JSON object"),
        (Fault.EMPTY, "zero output"),
    ],
)
async def test_a_wrong_answer_costs_one_call(
    plan: Tamper | Fault, text: str, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        sealer = here.sealer()
        keys = [load_secret_key(Curve.ED25519, bytes(31) + bytes([number])) for number in (1, 2)]
        blobs = [await sealer.seal(key) for key in keys]
        await sealer.open(blobs[1])
        here.kms.script.append(plan)
        assert text in await refusal(sealer, blobs[0])
        opened = await sealer.open(blobs[0])
        assert opened.public_key == keys[0].public_key
        assert verify(keys[0].public_key, b"message", opened.sign(b"message"))


@pytest.mark.parametrize(
    "fault",
    [
        Fault.THROTTLED, Fault.TOO_MANY, Fault.INTERNAL, Fault.HTML, Fault.RETRY_AFTER, Fault.CUT, Fault.LOST,
        Fault.CLOSED, Fault.NO_HTTP, Fault.ENDLESS, Fault.HUGE,
    ],
)  # fmt: skip
async def test_what_passes_is_not_noticed(
    fault: Fault, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        key = load_secret_key(Curve.ED25519, bytes(32))
        sealer = here.sealer()
        blob = await sealer.seal(key)
        here.kms.script.extend([fault, fault])
        assert (await sealer.open(blob)).public_key == key.public_key


async def test_a_silent_kms_is_said_in_time(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        sealer = here.sealer()
        blob = await sealer.seal(load_secret_key(Curve.ED25519, bytes(32)))
        here.kms.script.append(Fault.SILENT)
        began = trio.current_time()
        assert "gave no answer to Decrypt within 9 s" in await refusal(sealer, blob)
        assert trio.current_time() - began == pytest.approx(9.0)
        await sealer.open(blob)


@pytest.mark.parametrize("tls", [each for each in Tls if each not in (Tls.GOOD, Tls.SILENT)])
async def test_who_is_not_kms_is_told_nothing(
    tls: Tls, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    async with world(rsa_keys) as here:
        here.kms.tls = tls
        with pytest.raises(
            SealingError, match="SDK error: (the other side is not kms|no TLS with kms|the connection to kms.*closed)"
        ):
            await here.sealer(INITIALIZE).seal(load_secret_key(Curve.ED25519, bytes(32)))
        assert here.kms.requests == 0


async def test_a_wrong_clock_is_set_by_kms(rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys, drift=-900.0) as here:
        sealer = here.sealer()
        blob = await sealer.seal(load_secret_key(Curve.ED25519, bytes(32)))
        await sealer.open(blob)
        assert here.clock.offset == pytest.approx(900.0, abs=2.0)
        assert abs(here.clock.now() - datetime.now(UTC)) < timedelta(seconds=2)
        assert here.kms.requests == 3, "one refusal, and never again"


@pytest.mark.parametrize(
    ("state", "text"), [("Disabled", "custody key disabled"), ("PendingDeletion", "destroys every sealed key")]
)
async def test_key_states(state: str, text: str, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    async with world(rsa_keys) as here:
        sealer = here.sealer()
        blob = await sealer.seal(load_secret_key(Curve.ED25519, bytes(32)))
        here.kms.account.keys[0].state = state
        assert text in await refusal(sealer, blob)


async def test_a_blob_of_another_key_does_not_choose_its_key(
    rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock
) -> None:
    """Somebody seals a key of his own under a KMS key of his own, and puts it into our store."""
    async with world(rsa_keys) as here:
        here.kms.account.add(aliases=["alias/theirs"])
        theirs = await here.sealer(replace(INITIALIZE, encryption_key_id="alias/theirs")).seal(
            load_secret_key(Curve.ED25519, bytes(32))
        )
        assert "IncorrectKeyException" in await refusal(here.sealer(INITIALIZE), theirs)


@pytest.mark.parametrize("number", [1, 50, 200])
async def test_keys_open_side_by_side(number: int, rsa_keys: list[RSAPrivateKey], autojump_clock: MockClock) -> None:
    """With 20 ms per call, 200 keys take far less than 200 calls one after another."""
    async with world(rsa_keys) as here:
        sealer = here.sealer()
        blob = await sealer.seal(load_secret_key(Curve.ED25519, bytes(32)))
        here.kms.delay = 0.02
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            for _ in range(number):
                nursery.start_soon(sealer.open, blob)
        assert trio.current_time() - began < 0.3
        assert here.kms.peak == min(number, MAX_CONNECTIONS)
        assert here.kms.connections == min(number, MAX_CONNECTIONS)
