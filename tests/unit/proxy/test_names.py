"""Host names: the form in which they are compared (P2.19), and what is no name."""

import ipaddress
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.names import NameError_, canonical, literal

LABEL = st.from_regex(r"[a-z]([a-z0-9_-]{0,20}[a-z0-9])?", fullmatch=True)
NAME = st.lists(LABEL, min_size=1, max_size=6).map(".".join)
ADDRESS = st.ip_addresses()


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("KMS.eu-west-1.AmazonAWS.com", "kms.eu-west-1.amazonaws.com"),
        ("kms.eu-west-1.amazonaws.com.", "kms.eu-west-1.amazonaws.com"),
        ("bücher.example", "xn--bcher-kva.example"),
        ("BÜCHER.example.", "xn--bcher-kva.example"),
        ("bücher。example。", "xn--bcher-kva.example"),  # the ideographic full stop separates labels, too
        ("XN--bcher-kva.example", "xn--bcher-kva.example"),
        ("localhost", "localhost"),
        ("_dmarc.example", "_dmarc.example"),
        ("3com.example", "3com.example"),
        ("a" * 63 + ".example", "a" * 63 + ".example"),
    ],
)
def test_p19_names_are_compared_without_case_final_dot_and_in_idna_form(written: str, compared: str) -> None:
    assert canonical(written) == compared


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a..b",
        ".a",
        "a..",
        "-a",
        "a-",
        "a b",
        "a/b",
        "a\0b",
        "a\nb",
        "a:443",
        "*.example",
        "[::1",
        "::1",
        "%",
        "_",
        "a" * 64,
        ".".join(["a" * 63] * 4),  # 255 characters
        "ü" * 64,
        "ü" * 100_000,
        "\ud800",
        "a\u2100b",  # becomes a/c
        "xn--\u00fc",
    ],
)
def test_what_is_no_host_name(text: str) -> None:
    with pytest.raises(NameError_, match="^Could not parse domain name$"):
        canonical(text)


@pytest.mark.parametrize(
    "text", ["127.1", "2130706433", "0x7f000001", "0x", "1.2.3", "a.0x1F", "10.0.0.0177", "１２７.0.0.1", "a.443"]
)
def test_old_forms_of_addresses_are_no_names(text: str) -> None:
    """The system's resolver would take them for addresses that no list names."""
    assert literal(text) is None
    with pytest.raises(NameError_):
        canonical(text)


def test_a_long_text_is_refused_before_it_is_converted() -> None:
    """The conversion of a megabyte takes seconds."""
    began = time.process_time()
    with pytest.raises(NameError_):
        canonical("ü." * 5_000_000)
    assert time.process_time() - began < 5


@given(NAME)
def test_every_spelling_of_a_name_is_the_same(name: str) -> None:
    try:
        compared = canonical(name)
    except NameError_:
        return
    assert canonical(compared) == compared
    assert canonical(name.upper() + ".") == compared


@given(st.text(max_size=40))
def test_any_text_gives_a_name_or_the_documented_error(text: str) -> None:
    try:
        compared = canonical(text)
    except NameError_:
        return
    assert canonical(compared) == compared
    assert compared.isascii()


@given(ADDRESS)
def test_addresses_are_literals_with_and_without_brackets(address: ipaddress.IPv4Address) -> None:
    assert literal(str(address)) == literal(f"[{address}]") == address


@pytest.mark.parametrize(
    "text", ["[127.0.0.1", "127.0.0.1]", "[[::1]]", "", "[]", "localhost", "127.0.0.01", "1.2.3.4 ", "١.2.3.4"]
)
def test_what_is_no_literal(text: str) -> None:
    assert literal(text) is None
