"""Whom the vault tells its credentials: every outcome of section 7.3 of the enclave specification."""

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Literal

import pytest
from structlog.testing import capture_logs

from signer.attestation import claims
from signer.attestation.claims import Claims
from signer.attestation.document import ROOT_SHA256
from signer.config import NitroSettings
from signer.rpc.messages import Attest, Attested, Call, RemoteError, Result, RpcErrorChain
from signer.vaults.nitro.judge import Judge, NotAdmittedError, Wanted, wanted_of
from signer.vaults.nitro.session import SessionLostError
from tests.attested.documents import DEBUG_PCRS, PCRS, make_chain, make_document, root

NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
BOOT = bytes(range(16))
ROOT = root().sha256
CHAIN = make_chain(at=NOW)
OURS = {0: [PCRS[0]], 3: [bytes(48), PCRS[3]]}
TEE_SIGNER = RemoteError(RpcErrorChain(('Semantic(None, "unknown variant `Attest`, expected one of ...")',)))

Mode = Literal["off", "warn", "require"]


def enclave(
    *,
    purpose: str = claims.SESSION,
    caller_data: bytes = b"",
    age: float = 0.1,
    pcrs: dict[int, bytes] = PCRS,
    nonce: bytes | None = None,
    user_data: bytes | None = None,
) -> Callable[[Call], Awaitable[Result]]:
    async def ask(call: Call) -> Result:
        assert isinstance(call, Attest)
        assert (call.purpose, call.user_data) == (claims.SESSION, b"")
        told = claims.encode(Claims(purpose=purpose, boot_id=BOOT, caller_data=caller_data))
        return Attested(
            make_document(
                CHAIN,
                made_at=NOW - timedelta(seconds=age),
                pcrs=pcrs,
                nonce=call.nonce if nonce is None else nonce,
                user_data=told if user_data is None else user_data,
            )
        )

    return ask


async def tee_signer(_call: Call) -> Result:
    raise TEE_SIGNER


async def no_module(_call: Call) -> Result:
    raise RemoteError(RpcErrorChain(("attestation error", "no security module")))


class Counts:
    def __init__(self) -> None:
        self.outcomes: list[str] = []

    def enclave_judged(self, vault: str, outcome: str) -> None:
        assert vault == "n"
        self.outcomes.append(outcome)


def judge(mode: Mode, counts: Counts | None = None, *, allow_debug: bool = False, root_sha256: bytes = ROOT) -> Judge:
    wanted = Wanted(pcrs=OURS, allow_debug=allow_debug, root_sha256=root_sha256)
    return Judge("n", mode, wanted, observer=counts, now=lambda: NOW)


FAULTS: list[tuple[Callable[[Call], Awaitable[Result]], str, str]] = [
    (tee_signer, "no answer", "does not attest itself (it does not know how to: tee-signer"),
    (no_module, "no answer", "does not attest itself (attestation error: no security module)"),
    (enclave(pcrs=PCRS | {0: PCRS[1]}), "pcr", f"PCR0 is {PCRS[1].hex()}"),
    (enclave(pcrs=PCRS | {3: PCRS[1]}), "pcr", "PCR3"),
    (enclave(pcrs=DEBUG_PCRS), "debug", "debug mode"),
    (enclave(age=301), "stale", "clock"),
    (enclave(age=-61), "stale", "ahead of this clock"),
    (enclave(nonce=bytes(32)), "nonce", "old one"),
    (enclave(purpose=claims.IMPORT), "user_data", "another purpose"),
    (enclave(caller_data=b"x"), "user_data", "another purpose"),
    (enclave(user_data=b"\xa0"), "user_data", "tezos-signer"),
]


@pytest.mark.parametrize(("ask", "outcome", "text"), FAULTS)
async def test_who_does_not_prove_what_it_is_is_told_nothing(
    ask: Callable[[Call], Awaitable[Result]], outcome: str, text: str
) -> None:
    counts = Counts()
    with pytest.raises(NotAdmittedError, match="was told no credentials") as error:
        await judge("require", counts).admit(ask)
    assert text in str(error.value)
    assert counts.outcomes == [outcome]


@pytest.mark.parametrize(("ask", "outcome", "text"), FAULTS)
async def test_a_warning_is_said_once_and_counted_each_time(
    ask: Callable[[Call], Awaitable[Result]], outcome: str, text: str
) -> None:
    counts = Counts()
    one = judge("warn", counts)
    with capture_logs() as logs:
        assert [await one.admit(ask) for _ in range(3)] == [None] * 3
    (line,) = logs
    assert (line["log_level"], line["vault_name"]) == ("warning", "n")
    assert text in line["error"]
    assert counts.outcomes == [outcome] * 3


@pytest.mark.parametrize("mode", ["warn", "require"])
async def test_an_enclave_that_is_what_it_has_to_be(mode: Mode) -> None:
    counts = Counts()
    one = judge(mode, counts)
    with capture_logs() as logs:
        assert [await one.admit(enclave()) for _ in range(2)] == [BOOT, BOOT]
    (line,) = logs
    assert (line["log_level"], line["event"]) == ("info", "the enclave is attested")
    assert (line["pcr0"], line["boot"]) == (PCRS[0].hex(), BOOT.hex())
    assert counts.outcomes == ["ok", "ok"]


async def test_debug_mode_that_is_allowed_is_said() -> None:
    with capture_logs() as logs:
        assert await judge("require", allow_debug=True).admit(enclave(pcrs=DEBUG_PCRS)) == BOOT
    assert [line["log_level"] for line in logs] == ["warning"]


async def test_what_is_off_asks_nothing() -> None:
    async def never(_call: Call) -> Result:
        raise AssertionError

    one = Judge("n", "off", Wanted())
    with capture_logs() as logs:
        assert [await one.admit(never) for _ in range(2)] == [None, None]
    (line,) = logs
    assert line["log_level"] == "warning"
    assert "not attested" in line["event"]


async def test_a_root_of_its_own_is_refused_where_aws_is_expected() -> None:
    with pytest.raises(NotAdmittedError, match="another root"):
        await judge("require", root_sha256=Wanted().root_sha256).admit(enclave())


@pytest.mark.parametrize("mode", ["warn", "require"])
async def test_a_lost_connection_says_nothing_about_the_enclave(mode: Mode) -> None:
    async def lost(_call: Call) -> Result:
        raise SessionLostError("gone")

    counts = Counts()
    with pytest.raises(SessionLostError):
        await judge(mode, counts).admit(lost)
    assert counts.outcomes == []


async def test_each_question_has_a_nonce_of_its_own() -> None:
    nonces: list[bytes] = []

    async def ask(call: Call) -> Result:
        assert isinstance(call, Attest)
        nonces.append(call.nonce)
        return await enclave()(call)

    for _ in range(3):
        await judge("require").admit(ask)
    assert len(set(nonces)) == 3
    assert {len(nonce) for nonce in nonces} == {32}


async def test_another_root_counts_without_registers_too() -> None:
    """Where nothing is compared, the root is all that there is."""
    admitted = Judge("n", "require", Wanted(root_sha256=ROOT), now=lambda: NOW)
    assert await admitted.admit(enclave()) == BOOT
    with pytest.raises(NotAdmittedError, match="root"):
        await Judge("n", "require", Wanted(), now=lambda: NOW).admit(enclave())


@pytest.mark.parametrize(
    ("configured", "allowed"), [({}, False), ({"allow_debug_mode": False}, False), ({"allow_debug_mode": True}, True)]
)
def test_what_the_configuration_wants(configured: dict[str, bool], allowed: bool) -> None:
    nitro = NitroSettings.model_validate(
        {"encryption_key_id": "alias/baker", "pcrs": {"PCR0": [PCRS[0].hex()], "PCR8": PCRS[3].hex()}} | configured
    )
    wanted = wanted_of(nitro)
    assert wanted == Wanted(pcrs={0: frozenset([PCRS[0]]), 8: frozenset([PCRS[3]])}, allow_debug=allowed)
    other = wanted_of(nitro.model_copy(update={"attestation_root": ROOT.hex()}))
    assert (wanted.root_sha256, other.root_sha256) == (ROOT_SHA256, ROOT)
