"""Points 9, 14, 21 to 23: the allow list applied, with the lookups that it takes."""

from __future__ import annotations

import ipaddress
import logging
from collections.abc import Mapping, Sequence

import pytest
import trio

from proxy.allowlist import AllowList, AllowListError, Entry
from proxy.decision import LOOKUP_LIMIT, Decision, UndecidedError, decide, without_list
from proxy.names import IpAddress
from proxy.resolver import LookupFailedError

NOT_ALLOWED = "The given address and port are not allowed"


def listed(*entries: tuple[str, int]) -> AllowList:
    return AllowList(tuple(Entry(address, port, line) for line, (address, port) in enumerate(entries, 1)))


def addresses(*texts: str) -> list[IpAddress]:
    return [ipaddress.ip_address(text) for text in texts]


class Names:
    """A name server: *known* names and what they resolve to, after *seconds*; all others fail."""

    def __init__(self, known: Mapping[str, Sequence[str]] | None = None, seconds: float = 0.0) -> None:
        self.known = dict(known or {})
        self.seconds = seconds
        self.asked: list[str] = []

    async def __call__(self, host: str) -> list[IpAddress]:
        self.asked.append(host)
        await trio.sleep(self.seconds)
        if host not in self.known:
            raise LookupFailedError("DNS lookup failed!")
        return addresses(*self.known[host])


async def decided(
    allow: AllowList, host: str, port: int = 443, family: int | None = None, names: Names | None = None
) -> Decision:
    return await decide(allow, host, port, family, names or Names())


async def refused(allow: AllowList, host: str, port: int = 443, names: Names | None = None) -> str:
    with pytest.raises(AllowListError) as caught:
        await decided(allow, host, port, None, names)
    assert not isinstance(caught.value, UndecidedError)
    return str(caught.value)


@pytest.mark.parametrize(
    ("listed_as", "asked"),
    [
        ("kms.example", "kms.example"),
        ("KMS.Example", "kms.eXample."),
        ("kms.example.", "kms.example"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("10.0.0.1", "10.0.0.1"),
        ("::1", "0:0::1"),
    ],
)
async def test_p09_p19_a_listed_name_needs_no_lookup(
    caplog: pytest.LogCaptureFixture, listed_as: str, asked: str
) -> None:
    names = Names()
    with caplog.at_level(logging.INFO):
        decision = await decided(listed((listed_as, 443)), asked, names=names)
    assert names.asked == []
    assert decision.entry == Entry(listed_as, 443, 1)
    assert caplog.messages == [f'Matched with host name "{listed_as}" and port "443"']


@pytest.mark.parametrize("family", [4, 6])
async def test_p11_families_filter_the_addresses_of_dual_stack_names(family: int) -> None:
    decision = await decided(listed(("kms.example", 443)), "kms.example", family=family)
    both = addresses("10.0.0.1", "fd00::1")
    assert decision.accept(both) == [one for one in both if one.version == family]
    with pytest.raises(LookupFailedError, match=r"No accepted IP was found\."):
        decision.accept([one for one in both if one.version != family])


@pytest.mark.parametrize(("host", "family"), [("10.0.0.1", 6), ("fd00::1", 4)])
async def test_p11_a_literal_of_the_other_family_is_refused(host: str, family: int) -> None:
    with pytest.raises(AllowListError, match=r"No accepted IP was found\."):
        await decided(listed((host, 443)), host, family=family)


async def test_p21_names_are_looked_up_for_a_literal_in_parallel(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    names = Names({f"{number}.example": [f"10.0.0.{number}", "fd00::1"] for number in range(1, 51)}, seconds=3)
    allow = listed(*((name, 443) for name in names.known), ("other.example", 444), ("10.9.9.9", 443))
    with caplog.at_level(logging.INFO):
        decision = await decided(allow, "10.0.0.50", names=names)
    assert trio.current_time() == 3
    assert sorted(names.asked) == sorted(names.known)  # neither the other port's nor the literal
    assert decision.name == "50.example"
    assert caplog.messages == ['Matched with host IP "10.0.0.50" and port "443"']


async def test_p21_all_lookups_together_have_a_limit(autojump_clock: trio.testing.MockClock) -> None:
    with pytest.raises(UndecidedError, match=r"1 listed name\(s\) could not be looked up \(slow\.example\)"):
        await decided(listed(("slow.example", 443)), "10.0.0.1", names=Names(seconds=1e9))
    assert trio.current_time() == LOOKUP_LIMIT


async def test_p21_one_slow_name_does_not_hide_a_match(autojump_clock: trio.testing.MockClock) -> None:
    async def lookup(host: str) -> list[IpAddress]:
        await trio.sleep(1e9 if host == "slow.example" else 1)
        return addresses("10.0.0.1")

    decision = await decide(listed(("slow.example", 443), ("a.example", 443)), "10.0.0.1", 443, None, lookup)
    assert decision.name == "a.example"


async def test_p21_a_name_that_is_not_listed_looks_up_no_listed_name() -> None:
    names = Names({"a.example": ["10.0.0.1"], "b.example": ["10.0.0.1"]})
    assert NOT_ALLOWED in await refused(listed(("a.example", 443)), "b.example", names=names)
    assert names.asked == []


async def test_p14_a_name_allowed_by_address_is_held_to_the_listed_addresses() -> None:
    names = Names({"b.example": ["10.0.0.9", "10.0.0.1"]})
    decision = await decided(listed(("10.0.0.1", 443), ("10.0.0.2", 444)), "b.example", names=names)
    assert decision.name is None
    assert decision.accept(addresses("10.0.0.1")) == addresses("10.0.0.1")
    assert decision.accept(addresses("10.0.0.9", "10.0.0.1")) == addresses("10.0.0.1")
    with pytest.raises(LookupFailedError, match=r"b\.example resolves to 10\.0\.0\.2 now, which is not in the"):
        decision.accept(addresses("10.0.0.2"))  # listed, but for another port


async def test_p14_an_unknown_address_is_no_refusal() -> None:
    with pytest.raises(UndecidedError, match="DNS lookup failed!"):
        await decided(listed(("10.0.0.1", 443)), "b.example")


async def test_p22_refusals_say_what_was_asked_compared_and_near(caplog: pytest.LogCaptureFixture) -> None:
    allow = listed(("kms.example", 443), ("sts.example", 443))
    text = await refused(allow, "kms.example", 8443)
    assert text == (
        "kms.example port 8443 was compared with 2 entries; the same host is listed with port 443 (line 1): "
        + NOT_ALLOWED
    )
    assert caplog.messages == ['Unable to resolve allow listed host: "kms.example".']
    text = await refused(allow, "s3.example", 443)
    assert "port 443" in text
    assert "kms.example (line 1)" in text
    names = Names({"kms.example": ["10.0.0.1"], "sts.example": ["10.0.0.2"]})
    text = await refused(allow, "10.0.0.3", 443, names)
    assert "10.0.0.1, 10.0.0.2" in text
    assert text.endswith(NOT_ALLOWED)


@pytest.mark.parametrize("host", ["16", "0", "4294967295"])
async def test_p23_a_bare_number_is_not_the_cid(host: str) -> None:
    text = await refused(listed(("kms.example", 443)), host)
    assert "this is the TCP host to connect to, not the CID of the enclave" in text


@pytest.mark.parametrize(
    "host", ["", ".", "a..b", "a b", "-a.example", "a" * 64, "a." * 200, "a/b", "ä" * 300, "\\xff"]
)
async def test_bad_names_are_refused_without_a_lookup(host: str) -> None:
    names = Names()
    assert "Could not parse domain name" in await refused(listed(("10.0.0.1", 443)), host, names=names)
    assert names.asked == []


def test_without_a_list_every_address_of_the_family_will_do() -> None:
    both = addresses("10.0.0.1", "fd00::1")
    assert without_list(None).accept(both) == both
    assert without_list(6).accept(both) == addresses("fd00::1")
    assert without_list(None).name is None
