"""The listing of nitro-cli: its format, every field missing or odd, and the choice among several."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.vaults.nitro.describe import DiscoveryError, Wanted, choose, parse, shown
from tests.nitro_cli import PCRS, enclave

ANY = Wanted()
CHECKED = Wanted(check_debug=True, expected={"PCR0": ["a" * 96]})


def listing(*enclaves: object) -> bytes:
    return json.dumps(enclaves, indent=2).encode()


def chosen(wanted: Wanted, *enclaves: object) -> int | None:
    return choose(parse(listing(*enclaves)), wanted).cid


def refusal(wanted: Wanted, *enclaves: object) -> str:
    with pytest.raises(DiscoveryError) as caught:
        chosen(wanted, *enclaves)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(entry: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if name not in names}


def test_the_real_format() -> None:
    (found,) = parse(listing(enclave(16)))
    assert (found.cid, found.name, found.enclave_id) == (16, "signer", "i-0123456789abcdef0-enc16")
    assert found.is_running
    assert found.flags == "NONE"
    assert found.measurements["PCR0"] == PCRS["PCR0"]
    assert str(found) == "signer, i-0123456789abcdef0-enc16, CID 16: RUNNING"
    assert parse(b"[]") == []
    assert parse(b"\n[\n]\n") == []


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "printed nothing where a list of enclaves was expected; see what `nitro-cli"),
        (b" \n", "printed nothing"),
        (b"[{", "no JSON"),
        (b"<html>\n", "but: <html>; see what `nitro-cli describe-enclaves` prints"),
        (b"\xff\xfe\x00", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"{}", "no list of enclaves, but: {}"),
        (b"null", "no list"),
        (b"[1]", "no enclave: 1"),
        (b'[{"EnclaveCID": 16}, "x\\u0000\\n"]', "no enclave: x"),
    ],
)
def test_what_is_no_listing(text: bytes, why: str) -> None:
    with pytest.raises(DiscoveryError, match=why):
        parse(text)


def test_the_one_that_runs() -> None:
    assert chosen(ANY, enclave(16)) == 16
    assert chosen(ANY, enclave("17")) == 17, "numbers may be texts"
    assert chosen(ANY, enclave(16, state="TERMINATING"), enclave(18)) == 18
    assert chosen(ANY, enclave(16, state="running", flags="none")) == 16, "as the documentation spells it"
    assert chosen(ANY, without(enclave(16), "EnclaveName", "Flags", "Measurements")) == 16, "an old version"
    assert chosen(ANY, enclave(4) | {"New": [{}]}) == 4


def test_of_several_the_one_that_is_named() -> None:
    several = enclave(16, name="other"), enclave(17), enclave(18, name="third")
    assert chosen(Wanted(name="signer"), *several) == 17
    assert chosen(Wanted(name="i-0123456789abcdef0-enc18"), *several) == 18
    assert chosen(Wanted(cid=16), *several) == 16
    text = refusal(ANY, *several)
    for part in ("several enclaves are RUNNING", "other", "CID 17", "third", "enclave_name"):
        assert part in text
    assert "several" in refusal(Wanted(name="signer"), enclave(16), enclave(17))
    text = refusal(Wanted(name="nobody"), *several)
    assert "no enclave called nobody is RUNNING" in text
    assert "other" in text
    assert "no enclave with CID 99 is RUNNING" in refusal(Wanted(cid=99), *several)


def test_names_are_compared_as_they_are() -> None:
    for name in ("x" * 150, "two  spaces", " edge", "a\x1b[31mb"):
        assert chosen(Wanted(name=name), enclave(16, name=name), enclave(17, name=name + "y")) == 16
        assert "no enclave called" in refusal(Wanted(name=f"{name}z"), enclave(16, name=name))
    assert "\x1b" not in refusal(Wanted(name="a\x1bb\n"), enclave(16, name="c\x1b\nd", state="E\x1b\n"))


def test_a_name_goes_before_an_id() -> None:
    first, second = enclave(16), enclave(17, name="i-0123456789abcdef0-enc16")
    assert chosen(Wanted(name="i-0123456789abcdef0-enc16"), first, second) == 17
    assert chosen(Wanted(name="i-0123456789abcdef0-enc16"), first, second | {"State": "TERMINATING"}) == 16


def test_a_cid_that_is_there_twice() -> None:
    assert "lists CID 16 more than once" in refusal(Wanted(cid=16), enclave(16), enclave(16, name="other"))


def test_a_long_listing_makes_no_long_error() -> None:
    many = [enclave(16 + number, name="n" * 1000) for number in range(500)]
    assert refusal(ANY, *many).count("CID ") == 8
    assert "; and 492 more)" in refusal(ANY, *many)
    assert len(refusal(Wanted(name="nobody"), *many)) < 2500
    assert "more" not in refusal(ANY, *many[:8])


def test_none_that_runs() -> None:
    assert "no enclave is RUNNING; nitro-cli lists none. Start it" in refusal(ANY)
    assert "CID 16: TERMINATING" in refusal(ANY, enclave(16, state="TERMINATING"))
    assert "(no state)" in refusal(ANY, without(enclave(16), "State"))
    assert "CID 16: EMPTY" in refusal(Wanted(name="signer"), enclave(16, state="EMPTY"))


@pytest.mark.parametrize("cid", [0, 1, 2, 3, 2**32 - 1, 2**40, -1, "x", "", None, 1.5, True, [16], "99999999999"])
def test_a_cid_that_nobody_can_have(cid: Any) -> None:
    assert "names no usable CID" in refusal(ANY, enclave(16) | {"EnclaveCID": cid})


@pytest.mark.parametrize("flags", ["DEBUG_MODE", "Debug", "debug_mode", "", "NONE|DEBUG", 5, []])
def test_debug_mode_is_refused(flags: Any) -> None:
    entry = enclave(16) | {"Flags": flags}
    text = refusal(ANY, entry)
    assert "debug mode" in text
    assert "Nothing was sent to it" in text
    assert chosen(Wanted(allow_debug=True), entry) == 16


def test_flags_that_are_not_told() -> None:
    entry = without(enclave(16), "Flags")
    assert chosen(ANY, entry) == 16
    assert "does not tell whether" in refusal(Wanted(check_debug=True), entry)
    assert chosen(Wanted(check_debug=True, allow_debug=True), entry) == 16


def test_measurements_are_compared() -> None:
    assert chosen(CHECKED, enclave(16)) == 16
    assert chosen(CHECKED, enclave(16, pcrs={"PCR0": "A" * 96})) == 16, "in whatever case"
    text = refusal(CHECKED, enclave(16, pcrs=PCRS | {"PCR0": "d" * 96}))
    assert f"its PCR0 is {'d' * 96}, expected {'a' * 96}" in text
    assert "Nothing was sent to it" in text
    assert "does not tell PCR0" in refusal(CHECKED, enclave(16, pcrs={}))
    assert "does not tell PCR0" in refusal(CHECKED, without(enclave(16), "Measurements"))
    assert "does not tell PCR0" in refusal(CHECKED, enclave(16) | {"Measurements": {"PCR0": 5}})
    either = Wanted(expected={"PCR0": ["a" * 96, "d" * 96], "PCR2": ["c" * 96]})
    assert chosen(either, enclave(16, pcrs=PCRS | {"PCR0": "d" * 96})) == 16
    assert "its PCR2" in refusal(either, enclave(16, pcrs=PCRS | {"PCR2": "e" * 96}))


def test_text_from_outside_is_one_short_line() -> None:
    assert shown("a\n\x1b[31m b\x00") == "a [31m b"
    assert len(shown("x" * 10_000)) < 110


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=10,
)
FIELDS = st.sampled_from(list(enclave(16)))


@given(st.lists(st.dictionaries(FIELDS, JSON, max_size=10) | JSON, max_size=3), st.sampled_from([ANY, CHECKED]))
def test_nothing_but_its_own_error_is_raised(entries: list[object], wanted: Wanted) -> None:
    try:
        assert choose(parse(json.dumps(entries).encode()), wanted).is_running
    except DiscoveryError as exc:
        assert "\n" not in str(exc)


@given(st.binary(max_size=200))
def test_nor_for_bytes_of_any_kind(text: bytes) -> None:
    try:
        parse(text)
    except DiscoveryError:
        pass
