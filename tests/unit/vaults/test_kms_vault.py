"""The vault awskms over a KMS in memory: which keys it has, what it asks for, and what it survives."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from signer import crypto
from signer.errors import KeyNotFoundError
from signer.observe.tasks import Tasks, TaskState
from signer.tezos.keys import Curve, PublicKeyHash, Signature
from signer.vaults.awskms.account import READERS
from signer.vaults.awskms.vault import LOOK_AGAIN, ROUNDS, AwsKmsVault
from signer.vaults.interface import (
    SignatureMismatchError,
    UnsupportedByVaultError,
    VaultError,
    VaultUnavailableError,
)
from tests.unit.vaults.kms import FakeKms, arn, private, refused, silent, throttled, told


@dataclass
class Open:
    vault: AwsKmsVault
    tasks: Tasks
    kms: FakeKms

    def state(self) -> TaskState:
        return self.tasks.all()["vault k"].state


@asynccontextmanager
async def opened(kms: FakeKms, **options: Any) -> AsyncIterator[Open]:
    tasks = Tasks()
    vault = AwsKmsVault(name="k", client=kms, tasks=tasks, **options)
    async with trio.open_nursery() as nursery:
        await nursery.start(vault.run)
        yield Open(vault, tasks, kms)
        nursery.cancel_scope.cancel()


def accepting(vault: AwsKmsVault, pkh: PublicKeyHash, message: bytes) -> Callable[[Signature], Awaitable[bool]]:
    async def accept(signature: Signature) -> bool:
        return crypto.verify(vault.keys()[pkh].public_key, message, signature)

    return accept


async def sign(vault: AwsKmsVault, pkh: PublicKeyHash, message: bytes = b"m", *, patience: float = 2.5) -> Signature:
    accept = accepting(vault, pkh, message)
    deadline = trio.current_time() + patience
    return await vault.sign(pkh, message, version=2, accept=accept, deadline=deadline)


# -- which keys


@pytest.mark.parametrize("number", [0, 1, 99, 100, 101, 150, 1000])
async def test_every_key_of_every_page_is_listed(autojump_clock: MockClock, number: int) -> None:
    """Weakness 27 of the reference: over a page, or none, and it crashes."""
    kms = FakeKms()
    for _ in range(number):
        kms.add("ECC_NIST_P256")
    async with opened(kms) as at:
        assert [key.reference for key in at.vault.keys().values()] == list(kms.keys)
        assert kms.count("ListKeys") == max(-(-number // 100), 1)
        assert kms.count("GetPublicKey") == number
        assert kms.peak <= READERS
        health = at.vault.health()
        assert (health.ready, health.keys, health.skipped) == (True, number, {})
        assert health.detail == f"{number} key(s)"
        assert at.state() is TaskState.RUNNING


async def test_an_empty_page_in_between_is_not_the_last(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    pages: list[dict[str, Any]] = [
        {"Keys": [], "Truncated": True, "NextMarker": "7"},
        {"Truncated": True, "NextMarker": "8"},
        {"Keys": [{"KeyArn": arn(0), "KeyId": "x"}], "Truncated": False},
    ]
    kms.answer = lambda action, _key, given: pages.pop(0) if action == "ListKeys" else given
    async with opened(kms) as at:
        assert len(at.vault.keys()) == 1


async def test_pages_without_end_are_a_failure_not_a_hang(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.answer = lambda *_: {"Keys": [], "Truncated": True, "NextMarker": "5"}
    async with opened(kms) as at:
        assert not at.vault.ready
        assert "began again" in at.vault.health().detail


@pytest.mark.parametrize(
    "code",
    [
        "AccessDeniedException",
        "UnsupportedOperationException",
        "DisabledException",
        "KMSInvalidStateException",
        "NotFoundException",
        "InvalidKeyUsageException",
    ],
)
async def test_a_key_that_kms_refuses_is_skipped_and_said(
    autojump_clock: MockClock, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    kms = FakeKms()
    good, bad = kms.add(), kms.add()
    kms.trouble = lambda action, key: refused(code, action, key) if key == bad else None
    async with opened(kms) as at:
        assert [key.reference for key in at.vault.keys().values()] == [good]
        assert at.vault.health().skipped == {bad: f"{code}: no"}
        assert at.vault.health().ready
        for _ in range(3):
            await at.vault.reload()
    assert capsys.readouterr().out.count(f"1 key(s) of KMS not used: {code}") == 1


@pytest.mark.parametrize(
    ("spec", "usage", "why"),
    [
        ("RSA_2048", "SIGN_VERIFY", "KeySpec RSA_2048: Tezos has no such keys"),
        ("ML_DSA_65", "SIGN_VERIFY", "KeySpec ML_DSA_65: Tezos has no such keys"),
        ("ECC_NIST_P384", "SIGN_VERIFY", "KeySpec ECC_NIST_P384: Tezos has no such keys"),
        ("ECC_NIST_P256", "KEY_AGREEMENT", "KeyUsage KEY_AGREEMENT: it does not sign"),
        ("RSA_2048", "ENCRYPT_DECRYPT", "KeyUsage ENCRYPT_DECRYPT: it does not sign"),
    ],
)
async def test_a_key_of_another_kind_is_skipped_and_said(
    autojump_clock: MockClock, spec: str, usage: str, why: str
) -> None:
    """Weakness 28: one RSA key breaks the reference's listing."""
    kms = FakeKms()
    good, bad = kms.add(), kms.add(spec, usage=usage)
    async with opened(kms) as at:
        assert [key.reference for key in at.vault.keys().values()] == [good]
        assert at.vault.health().skipped == {bad: why}


async def test_an_account_with_unfit_keys_alone_is_not_ready(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add("RSA_2048")
    async with opened(kms) as at:
        assert not at.vault.health().ready


async def test_a_thousand_skipped_keys_are_one_line_and_a_bounded_health(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    kms = FakeKms()
    shared = told("RSA_2048", private("ECC_NIST_P256"), "x")
    kms.keys = {arn(number): shared for number in range(1000)}
    async with opened(kms) as at:
        skipped = at.vault.health().skipped
    assert len(skipped) == 101
    assert skipped["..."] == "and 900 more"
    assert capsys.readouterr().out.count("of KMS not used") == 1


async def test_keys_sign_while_others_are_still_on_their_way(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    first, last = kms.add(), kms.add()
    slow = trio.Event()
    given = kms.call

    async def call(action: str, **facts: Any) -> dict[str, Any]:
        if facts.get("KeyId") == last:
            await slow.wait()
        return await given(action, **facts)

    kms.call = call  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        vault = AwsKmsVault(name="k", client=kms)
        nursery.start_soon(vault.run)
        await wait_all_tasks_blocked()
        await sign(vault, kms.address(first))
        assert not vault.ready
        assert vault.health().detail == "reading the keys, 1 in"
        slow.set()
        await vault.wait_for(kms.address(last), trio.current_time() + 1)
        await sign(vault, kms.address(last))
        nursery.cancel_scope.cancel()


async def test_two_ids_of_the_same_key_are_one_key(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    first, second = kms.add(), kms.add()
    kms.keys[second] = kms.keys[first] | {"KeyId": second}
    async with opened(kms) as at:
        (key,) = at.vault.keys().values()
        (left_out,) = at.vault.health().skipped.items()
        assert {key.reference, left_out[0]} == {first, second}
        assert left_out[1] == f"the same key as {key.reference}"


# -- keys named in the configuration


async def test_named_keys_need_no_list(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    by_alias, by_arn = kms.add(alias="alias/baker"), kms.add()
    kms.trouble = lambda action, key: refused("AccessDeniedException", action, key) if action == "ListKeys" else None
    async with opened(kms, names=["alias/baker", by_arn]) as at:
        assert [key.reference for key in at.vault.keys().values()] == [by_alias, by_arn]
        assert kms.count("ListKeys") == 0
        await sign(at.vault, kms.address(by_alias))
        assert kms.calls[-1] == ("Sign", by_alias)  # not by its alias, which may come to mean another key
        await at.vault.refresh()
        assert kms.count("GetPublicKey") == 2


async def test_an_alias_and_the_arn_of_one_key_are_one_key(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add(alias="alias/baker")
    async with opened(kms, names=["alias/baker", only]) as at:
        assert [key.reference for key in at.vault.keys().values()] == [only]
        assert at.vault.health().skipped == {}


async def test_a_named_key_that_cannot_be_used_is_a_warning_of_its_own(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    kms = FakeKms()
    async with opened(kms, names=["alias/absent"]) as at:
        assert at.vault.health().skipped == {"alias/absent": "NotFoundException: no"}
        assert not at.vault.health().ready
    assert "[warning" in (text := capsys.readouterr().out)
    assert "alias/absent" in text


async def test_an_alias_that_means_another_key_now_is_followed_at_a_reload(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    old, new = kms.add(alias="alias/baker"), kms.add()
    async with opened(kms, names=["alias/baker"]) as at:
        kms.names["alias/baker"] = new
        await at.vault.reload()
        assert [key.reference for key in at.vault.keys().values()] == [new]
        assert not at.vault.serves(kms.address(old))


async def test_an_alias_that_means_another_key_after_an_outage_is_not_followed_before_a_reload(
    autojump_clock: MockClock,
) -> None:
    kms = FakeKms()
    old, new = kms.add(alias="alias/baker"), kms.add()
    async with opened(kms, names=["alias/baker"]) as at:
        pkh = kms.address(old)
        kms.trouble = lambda *_: silent()
        with pytest.raises(VaultUnavailableError):
            await sign(at.vault, pkh)
        kms.names["alias/baker"] = new
        kms.trouble = lambda *_: None
        await at.vault.wait_for(pkh, trio.current_time() + 5)
        await wait_all_tasks_blocked()  # the reading comes to its end
        assert [key.reference for key in at.vault.keys().values()] == [old]
        assert at.vault.serves(pkh)


# -- what changes


async def test_a_new_key_is_found_by_the_first_request_for_it(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    async with opened(kms) as at:
        await trio.sleep(LOOK_AGAIN)
        new = kms.add()
        await at.vault.refresh()
        assert at.vault.serves(kms.address(new))
        assert kms.count("GetPublicKey") == 2  # what was known is not asked for again


async def test_unknown_hashes_cause_one_look_in_a_while_however_many_are_asked(autojump_clock: MockClock) -> None:
    """Weakness 30: `GET /keys/...` needs no authentication."""
    kms = FakeKms()
    kms.add("RSA_2048")
    kms.add()
    async with opened(kms) as at:
        await trio.sleep(LOOK_AGAIN)
        async with trio.open_nursery() as nursery:
            for _ in range(500):
                nursery.start_soon(at.vault.refresh)
        for _ in range(100):
            await at.vault.refresh()
        assert kms.count("ListKeys") == 2
        assert kms.count("GetPublicKey") == 2


async def test_a_request_waits_for_a_look_that_another_has_caused(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    async with opened(kms) as at:
        await trio.sleep(LOOK_AGAIN)
        kms.gate, new = trio.Event(), kms.add()
        served: list[bool] = []

        async def ask() -> None:
            await at.vault.refresh()
            served.append(at.vault.serves(kms.address(new)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            nursery.start_soon(ask)
            await wait_all_tasks_blocked()
            kms.gate.set()
        assert served == [True, True]
        assert kms.count("ListKeys") == 2


async def test_keys_stand_in_the_order_of_the_list(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    async with opened(kms) as at:
        kms.add()
        kms.keys = dict(reversed(kms.keys.items()))
        await trio.sleep(LOOK_AGAIN)
        await at.vault.refresh()
        assert [key.reference for key in at.vault.keys().values()] == list(kms.keys)


async def test_a_look_that_hangs_lets_the_request_go(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    async with opened(kms) as at:
        await trio.sleep(LOOK_AGAIN)
        kms.gate = trio.Event()
        began = trio.current_time()
        await at.vault.refresh()
        assert trio.current_time() - began == pytest.approx(2.5)


async def test_the_list_is_read_again_now_and_then(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    async with opened(kms, refresh_interval=300.0) as at:
        new = kms.add()
        await at.vault.wait_for(kms.address(new), trio.current_time() + 1)
        assert not at.vault.serves(kms.address(new))
        await trio.sleep(300 * 1.1 + 1)
        assert at.vault.serves(kms.address(new))
        assert kms.count("ListKeys") == 2


async def test_a_list_that_is_short_for_once_takes_no_key_away(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.answer = lambda action, _key, given: {"Keys": []} if action == "ListKeys" else given
        await trio.sleep(700)
        assert kms.count("ListKeys") > 1
        assert at.vault.serves(kms.address(only))
        await at.vault.reload()  # an operator means what they say
        assert not at.vault.serves(kms.address(only))


async def test_a_reload_drops_what_is_refused_and_takes_what_is_refused_no_more(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    one, other = kms.add(), kms.add()
    disabled = one
    kms.trouble = lambda action, key: refused("DisabledException", action, key) if key == disabled else None
    async with opened(kms) as at:
        assert [key.reference for key in at.vault.keys().values()] == [other]
        disabled = other
        await at.vault.reload()
        assert [key.reference for key in at.vault.keys().values()] == [one]
        assert list(at.vault.health().skipped) == [other]


async def test_a_refused_key_is_not_asked_for_again_without_a_reload(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    bad = kms.add()
    kms.trouble = lambda action, key: refused("AccessDeniedException", action, key) if key == bad else None
    async with opened(kms):
        await trio.sleep(3600)
        assert kms.count("GetPublicKey") == 1


async def test_a_public_key_that_changes_under_its_id_is_not_taken(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    kms = FakeKms()
    only = kms.add()
    before = kms.address(only)
    async with opened(kms) as at:
        kms.keys[only] = told("ECC_SECG_P256K1", private("ECC_SECG_P256K1"), only)
        await at.vault.reload()
        assert list(at.vault.keys()) == [before]
        assert "KMS told another public key than" in at.vault.health().skipped[only]
        await at.vault.reload()
        assert list(at.vault.keys()) == [before]
    text = capsys.readouterr().out
    assert text.count("another public key") == 1
    assert "[warning" in text


# -- what goes wrong with readings


async def test_a_denied_list_is_said_and_tried_again(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    kms.trouble = lambda action, _key: refused("AccessDeniedException", action) if action == "ListKeys" else None
    async with opened(kms) as at:
        assert not at.vault.ready
        assert "kms:ListKeys: AccessDeniedException" in at.vault.health().detail
        assert at.state() is TaskState.FAILING
        assert at.tasks.all()["vault k"].fault.startswith("kms:ListKeys: ")  # the log puts the vault before it
        kms.trouble = lambda *_: None
        await at.vault.wait_for(kms.address(only), trio.current_time() + 5)
        assert at.vault.serves(kms.address(only))
        await wait_all_tasks_blocked()  # the reading comes to its end
        assert at.state() is TaskState.RUNNING


async def test_a_reading_that_fails_keeps_the_keys_known(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda action, _key: refused("AccessDeniedException", action) if action == "ListKeys" else None
        with pytest.raises(VaultError, match="AccessDeniedException"):
            await at.vault.reload()
        assert at.vault.serves(kms.address(only))
        assert at.vault.health().ready
        assert "the last look at the keys failed" in at.vault.health().detail
        await sign(at.vault, kms.address(only))


async def test_what_is_wrong_with_the_credentials_is_no_fault_of_a_key(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    for _ in range(40):
        kms.add()
    expired = refused("ExpiredTokenException")
    kms.trouble = lambda action, _key: expired if action == "GetPublicKey" else None
    async with opened(kms) as at:
        assert "ExpiredTokenException" in at.vault.health().detail
        assert at.vault.health().skipped == {}
        assert kms.count("GetPublicKey") <= READERS


async def test_a_key_without_an_answer_is_asked_for_again_soon(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    good, slow = kms.add(), kms.add()
    kms.trouble = lambda action, key: throttled() if key == slow else None
    async with opened(kms) as at:
        assert at.vault.serves(kms.address(good))
        assert at.vault.ready
        assert not at.vault.health().ready  # a request for the other key is to be repeated, not refused
        assert at.vault.health().skipped == {slow: "throttled"}
        kms.trouble = lambda *_: None
        await at.vault.wait_for(kms.address(slow), trio.current_time() + 5)
        assert at.vault.serves(kms.address(slow))
        await wait_all_tasks_blocked()  # the reading comes to its end
        assert at.vault.health().ready
        assert at.vault.health().skipped == {}


async def test_a_key_that_never_gets_an_answer_holds_nobody_up_for_ever(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    slow = kms.add()
    kms.trouble = lambda action, key: throttled() if key == slow else None
    async with opened(kms) as at:
        await trio.sleep(60)
        assert ROUNDS < kms.count("GetPublicKey") < 80  # the pauses grow
        assert at.vault.health().ready
        began = trio.current_time()
        await at.vault.wait_for(kms.address(slow), began + 2.5)
        assert trio.current_time() == began


@pytest.mark.parametrize("named", [False, True])
async def test_a_long_throttling_costs_no_minutes_when_it_is_over(autojump_clock: MockClock, named: bool) -> None:
    kms = FakeKms()
    only = kms.add()
    kms.trouble = lambda action, _key: throttled() if action == "GetPublicKey" else None
    async with opened(kms, names=[only] if named else []) as at:
        await trio.sleep(60)
        kms.trouble = lambda *_: None
        await trio.sleep(10)
        assert at.vault.serves(kms.address(only))


async def test_a_refusal_that_nobody_knows_is_of_one_key_and_tried_again(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    odd = kms.add()
    others = [kms.add() for _ in range(40)]
    kms.trouble = lambda _action, key: refused("XksKeyNotFoundException") if key == odd else None
    async with opened(kms) as at:
        assert [key.reference for key in at.vault.keys().values()] == others
        assert "XksKeyNotFoundException" in at.vault.health().skipped[odd]
        kms.trouble = lambda *_: None
        await at.vault.wait_for(kms.address(odd), trio.current_time() + 5)
        assert at.vault.serves(kms.address(odd))


@pytest.mark.parametrize("named", [False, True])
async def test_an_answer_about_another_key_is_none(autojump_clock: MockClock, named: bool) -> None:
    kms = FakeKms()
    asked, other = kms.add(), kms.add()
    kms.answer = lambda action, key, given: kms.keys[other] if (action, key) == ("GetPublicKey", asked) else given
    async with opened(kms, names=[asked] if named else []) as at:
        assert at.vault.health().skipped == {asked: f"kms:GetPublicKey on {asked}: KMS told the key {other}"}
        assert at.vault.serves(kms.address(other)) is not named
        kms.answer = lambda _action, _key, given: given
        await at.vault.wait_for(kms.address(asked), trio.current_time() + 5)
        assert at.vault.serves(kms.address(asked))


async def test_a_key_named_by_its_id_is_known_by_its_arn(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    name = only.rpartition("/")[2]
    kms.names[name] = only
    async with opened(kms, names=[name]) as at:
        assert [key.reference for key in at.vault.keys().values()] == [only]


async def test_an_answer_without_a_list_takes_no_key_away(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.answer = lambda action, _key, given: {"Truncated": False} if action == "ListKeys" else given
        with pytest.raises(VaultError, match="kms:ListKeys: KMS told no Keys"):
            await at.vault.reload()
        assert at.vault.serves(kms.address(only))


@pytest.mark.parametrize("named", [False, True])
async def test_kms_out_of_reach_and_back(autojump_clock: MockClock, named: bool) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms, names=[only] if named else []) as at:
        pkh = kms.address(only)
        kms.trouble = lambda *_: silent()
        with pytest.raises(VaultUnavailableError, match="nobody answers"):
            await sign(at.vault, pkh)
        assert not at.vault.serves(pkh)  # so that no mark moves before there is a signature
        assert pkh in at.vault.keys()
        assert at.vault.health().detail == "KMS is out of reach: nobody answers"
        assert at.state() is TaskState.FAILING
        await trio.sleep(20)
        assert not at.vault.serves(pkh)
        kms.trouble = lambda *_: None
        began = trio.current_time()
        await at.vault.wait_for(pkh, began + 60)
        assert at.vault.serves(pkh)
        assert trio.current_time() - began < 4
        await wait_all_tasks_blocked()
        assert at.vault.health().ready
        assert at.state() is TaskState.RUNNING


async def test_a_refusal_that_tells_of_kms_takes_no_key_away(autojump_clock: MockClock) -> None:
    """A look for KMS that is back asks about a key that is known; only a reload takes such a one away."""
    kms = FakeKms()
    only = kms.add()
    async with opened(kms, names=[only]) as at:
        kms.trouble = lambda *_: silent()
        with pytest.raises(VaultUnavailableError):
            await sign(at.vault, kms.address(only))
        kms.trouble = lambda action, key: (
            refused("DisabledException", action, key) if action == "GetPublicKey" else None
        )
        await trio.sleep(5)
        assert at.vault.serves(kms.address(only))
        assert at.vault.health().skipped == {}


async def test_a_refused_list_shows_that_kms_is_back(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda *_: silent()
        with pytest.raises(VaultUnavailableError):
            await sign(at.vault, kms.address(only))
        assert not at.vault.serves(kms.address(only))
        kms.trouble = lambda action, _key: refused("AccessDeniedException") if action == "ListKeys" else None
        await at.vault.wait_for(kms.address(only), trio.current_time() + 5)
        assert at.vault.serves(kms.address(only))


async def test_a_known_key_without_an_answer_stays(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    one, other = kms.add(), kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda _action, key: throttled() if key == one else None
        await at.vault.reload()
        assert [key.reference for key in at.vault.keys().values()] == [one, other]
        assert at.vault.health().skipped == {}
        assert at.vault.health().ready


async def test_a_reload_that_fails_is_made_up_for(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    one, other = kms.add(), kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda action, _key: throttled() if action == "ListKeys" else None
        with pytest.raises(VaultError):
            await at.vault.reload()
        gone = kms.address(other)
        del kms.keys[other]
        kms.trouble = lambda *_: None
        await trio.sleep(5)
        assert not at.vault.serves(gone)
        assert at.vault.serves(kms.address(one))


async def test_a_signature_shows_that_kms_is_back_before_any_reading_does(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda *_: silent()
        with pytest.raises(VaultUnavailableError):
            await sign(at.vault, kms.address(only))
        kms.trouble = lambda action, _key: None if action == "Sign" else silent()
        await sign(at.vault, kms.address(only))
        assert at.vault.serves(kms.address(only))


async def test_throttling_is_no_absence(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda action, _key: throttled() if action == "Sign" else None
        with pytest.raises(VaultUnavailableError):
            await sign(at.vault, kms.address(only))
        assert at.vault.serves(kms.address(only))
        assert at.vault.ready


async def test_kms_away_at_start_is_waited_for(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    kms.trouble = lambda *_: silent()
    async with opened(kms) as at:
        assert (at.vault.ready, dict(at.vault.keys())) == (False, {})
        began = trio.current_time()
        await at.vault.wait_for(kms.address(only), began + 2.5)
        assert trio.current_time() - began == pytest.approx(2.5)
        kms.trouble = lambda *_: None
        await at.vault.wait_for(kms.address(only), trio.current_time() + 60)
        assert at.vault.serves(kms.address(only))


async def test_an_unknown_key_is_not_waited_for(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add()
    async with opened(kms) as at:
        began = trio.current_time()
        await at.vault.wait_for(PublicKeyHash(Curve.P256, bytes(20)), began + 2.5)
        assert trio.current_time() == began


async def test_life_is_shown_while_nothing_is_due(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        await trio.sleep(100)
        assert at.vault.last_sign_of_life == trio.current_time()
        kms.gate = trio.Event()
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_sign_in_vain, at.vault, kms.address(only))
            await trio.sleep(1)
            assert at.vault.last_sign_of_life == began
        assert at.vault.last_sign_of_life == trio.current_time()


async def _sign_in_vain(vault: AwsKmsVault, pkh: PublicKeyHash) -> None:
    with pytest.raises(VaultUnavailableError):
        await sign(vault, pkh)


async def test_the_task_ends_with_the_vault(autojump_clock: MockClock) -> None:
    async with opened(FakeKms()) as at:
        assert at.state() is TaskState.RUNNING
    assert at.state() is TaskState.STOPPED


async def test_a_change_is_told(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    async with opened(kms) as at:
        told_of = trio.Event()

        async def follow() -> None:
            await at.vault.wait_change()
            told_of.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(follow)
            await wait_all_tasks_blocked()
            kms.add()
            await at.vault.reload()
        assert told_of.is_set()


# -- signatures


@pytest.mark.parametrize("spec", ["ECC_SECG_P256K1", "ECC_NIST_P256", "ECC_NIST_EDWARDS25519"])
async def test_a_signature_verifies(autojump_clock: MockClock, spec: str) -> None:
    kms = FakeKms()
    only = kms.add(spec)
    async with opened(kms) as at:
        pkh = kms.address(only)
        for number in range(8):
            assert (await sign(at.vault, pkh, bytes([number]))).curve is pkh.curve


async def test_a_signature_that_does_not_verify_never_leaves(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only, other = kms.add(), kms.add()
    async with opened(kms) as at:
        kms.private[only] = kms.private[other]
        with pytest.raises(SignatureMismatchError):
            await sign(at.vault, kms.address(only))


@pytest.mark.parametrize("signature", [None, b"", b"\x30\x00", "text", b"\x30\x06\x02\x01\x01\x02\x01\x01\x00"])
async def test_an_answer_without_a_signature_is_an_error_that_names_the_key(
    autojump_clock: MockClock, signature: object
) -> None:
    kms = FakeKms()
    only = kms.add()
    kms.answer = lambda action, _key, given: {"Signature": signature} if action == "Sign" else given
    async with opened(kms) as at:
        with pytest.raises(VaultError) as caught:
            await sign(at.vault, kms.address(only))
        assert str(caught.value) == f"(AWSKMS/{only}): crypt: invalid ASN.1"


async def test_a_refusal_to_sign_is_500_and_no_answer_502(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.trouble = lambda action, key: refused("DisabledException", action, key) if action == "Sign" else None
        with pytest.raises(VaultError, match=f"kms:Sign on {only}: DisabledException") as denied:
            await sign(at.vault, kms.address(only))
        kms.trouble = lambda action, _key: throttled() if action == "Sign" else None
        with pytest.raises(VaultUnavailableError) as away:
            await sign(at.vault, kms.address(only))
    assert (denied.value.status, away.value.status) == (500, 502)


async def test_an_unknown_key_signs_nothing(autojump_clock: MockClock) -> None:
    async with opened(FakeKms()) as at:
        with pytest.raises(KeyNotFoundError):
            await at.vault.sign(
                PublicKeyHash(Curve.P256, bytes(20)), b"m", version=2, accept=_never, deadline=trio.current_time() + 1
            )


async def _never(_: Signature) -> bool:
    return False


async def test_a_caller_that_goes_away_disturbs_nobody(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        kms.gate = trio.Event()
        with trio.move_on_after(0.1) as scope:
            await sign(at.vault, kms.address(only))
        assert scope.cancelled_caught
        kms.gate = None
        await sign(at.vault, kms.address(only))
        assert at.vault.last_sign_of_life == trio.current_time()


async def test_what_kms_cannot_do_is_refused_in_the_words_of_the_reference(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    only = kms.add()
    async with opened(kms) as at:
        with pytest.raises(UnsupportedByVaultError, match="^import: vault k doesn't support import operation$"):
            await at.vault.import_key(crypto.generate_secret_key(Curve.P256))
        with pytest.raises(UnsupportedByVaultError, match="^import: vault k doesn't support generate operation$"):
            await at.vault.generate(Curve.P256)
        with pytest.raises(UnsupportedByVaultError, match="^proof of possession is not supported$"):
            await at.vault.prove_possession(kms.address(only), accept=_never)


# -- what people call the keys


async def test_aliases_and_tags_are_told_where_they_are_wanted(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.page = 1
    first = kms.add(alias="alias/baker")
    kms.names["alias/second-name"] = first
    second = kms.add()
    kms.tags[first] = [("Name", "baker"), ("team", "ops")]
    async with opened(kms, describe=True) as at:
        keys = {key.reference: key for key in at.vault.keys().values()}
        assert keys[first].aliases == ("alias/baker", "alias/second-name")
        assert keys[first].tags == (("Name", "baker"), ("team", "ops"))
        assert (keys[second].aliases, keys[second].tags) == ((), ())


async def test_aliases_and_tags_that_may_not_be_read_are_no_fault(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    for _ in range(200):
        kms.add(alias="alias/a")
    kms.trouble = lambda action, key: (
        refused("AccessDeniedException", action, key) if action in ("ListAliases", "ListResourceTags") else None
    )
    async with opened(kms, describe=True) as at:
        assert at.vault.health().ready
        assert len(at.vault.keys()) == 200
        assert kms.count("ListResourceTags") <= READERS


async def test_tags_that_get_no_answer_are_not_waited_for_key_by_key(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    for _ in range(200):
        kms.add()
    kms.trouble = lambda action, _key: silent() if action == "ListResourceTags" else None
    async with opened(kms, describe=True) as at:
        assert len(at.vault.keys()) == 200
        assert kms.count("ListResourceTags") == READERS


async def test_a_signer_asks_for_no_aliases_and_tags(autojump_clock: MockClock) -> None:
    kms = FakeKms()
    kms.add(alias="alias/a")
    async with opened(kms):
        assert {action for action, _ in kms.calls} == {"ListKeys", "GetPublicKey"}
