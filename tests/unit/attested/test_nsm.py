"""The fake module against the vectors, and its documents against the reader."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from signer.attestation.document import Expected, verify
from signer.enclave.nsm.interface import NsmError, Register
from signer.enclave.nsm.messages import decode_description
from tests.attested.documents import MODULE_ID, PCRS, ZERO
from tests.attested.nsm import FakeNsm

DATA = json.loads((Path(__file__).parents[2] / "vectors" / "attestation.json").read_text())
VECTORS = {one["name"]: one for one in DATA["nsm"]}
DRAWN = ("GetRandom", "Attestation")  # their answers differ from call to call


def test_the_vectors() -> None:
    pcrs = {int(index): bytes.fromhex(value) for index, value in DATA["defaults"]["pcrs"].items()}
    module_id = decode_description(bytes.fromhex(VECTORS["DescribeNSM"]["response"])).module_id
    nsm = FakeNsm(pcrs=pcrs, module_id=module_id)
    for name, vector in VECTORS.items():
        answer = nsm.exchange(bytes.fromhex(vector["request"]))
        if name not in DRAWN:
            assert answer.hex() == vector["response"], name
    assert (
        len(nsm.exchange(bytes.fromhex(VECTORS["GetRandom"]["request"]))) == len(VECTORS["GetRandom"]["response"]) // 2
    )


async def test_documents_are_genuine_under_its_root() -> None:
    nsm = FakeNsm()
    document = await nsm.attest(user_data=b"said", nonce=b"\1\2", public_key=b"key")
    expected = Expected(
        nonce=b"\1\2",
        user_data=b"said",
        module_id=MODULE_ID,
        pcrs={0: [PCRS[0]], 4: [PCRS[4]]},
        needs_public_key=True,
        root_sha256=nsm.root_sha256,
    )
    found = verify(document, expected, now=datetime.now(UTC))
    assert (found.public_key, sorted(found.pcrs)) == (b"key", list(range(16)))
    assert not found.is_debug
    plain = verify(await nsm.attest(), Expected(nonce=None, root_sha256=nsm.root_sha256), now=datetime.now(UTC))
    assert (plain.user_data, plain.nonce, plain.public_key) == (None, None, None)


async def test_debug_mode_zeroes_registers() -> None:
    nsm = FakeNsm(debug=True)
    assert await nsm.describe_pcr(0) == Register(True, ZERO)
    assert await nsm.describe_pcr(4) == Register(True, PCRS[4])
    expected = Expected(nonce=None, allow_debug=True, root_sha256=nsm.root_sha256)
    assert verify(await nsm.attest(), expected, now=datetime.now(UTC)).is_debug


async def test_registers_are_extended_and_locked() -> None:
    nsm = FakeNsm()
    assert (await nsm.describe()).locked_pcrs == set(range(16))
    value = await nsm.extend_pcr(16, b"boot")
    assert value.hex().startswith("98ddef47d8c6fb9d")
    assert await nsm.describe_pcr(16) == Register(False, value)
    await nsm.lock_pcr(16)
    for call in (nsm.extend_pcr(16, b"more"), nsm.lock_pcr(16), nsm.extend_pcr(0, b"boot")):
        with pytest.raises(NsmError, match="ReadOnlyIndex"):
            await call
    await nsm.lock_pcrs(20)
    assert (await nsm.describe()).locked_pcrs == set(range(20))
    for other in (nsm.describe_pcr(32), nsm.lock_pcrs(33), nsm.lock_pcr(40)):
        with pytest.raises(NsmError, match="InvalidIndex"):
            await other
    found = verify(await nsm.attest(), Expected(nonce=None, root_sha256=nsm.root_sha256), now=datetime.now(UTC))
    assert found.pcrs[16] == value
    assert sorted(found.pcrs) == list(range(20))


async def test_its_time() -> None:
    at = datetime(2026, 11, 20, 12, tzinfo=UTC)
    nsm = FakeNsm(at=at, drift=2.5)
    expected = Expected(nonce=None, root_sha256=nsm.root_sha256)
    assert verify(await nsm.attest(), expected, now=at).made_at == at + timedelta(seconds=2.5)
    nsm.at = at + timedelta(hours=30)  # the leaf of then is over
    assert verify(await nsm.attest(), expected, now=nsm.at).made_at == nsm.at + timedelta(seconds=2.5)


async def test_failures_and_short_answers() -> None:
    nsm = FakeNsm(failures={2: "InternalError"})
    assert len(await nsm.get_random()) == 256
    with pytest.raises(NsmError, match="InternalError"):
        await nsm.describe()
    assert (await nsm.describe()).module_id == MODULE_ID
    assert nsm.calls == ["GetRandom", "DescribeNSM", "DescribeNSM"]
    with pytest.raises(NsmError, match="InternalError"):
        await FakeNsm(cut=100).attest()
    assert len(await FakeNsm(random_length=7).get_random()) == 7


@pytest.mark.parametrize(
    ("request_", "value"),
    [
        ("", "InvalidOperation"),
        ("ff", "InvalidOperation"),
        ("00", "InvalidOperation"),
        ("a0", "InvalidOperation"),
        ("a1674c6f636b50435200", "InvalidOperation"),
        ("a1674c6f636b504352a0", "InvalidArgument"),
        ("a1674c6f636b504352a165696e64657820", "InvalidArgument"),
        ("a169457874656e64504352a165696e64657810", "InvalidArgument"),
        ("a16b4174746573746174696f6ea1656e6f6e636500", "InvalidArgument"),
    ],
)
def test_requests_that_are_none(request_: str, value: str) -> None:
    assert FakeNsm().exchange(bytes.fromhex(request_)).endswith(value.encode())
