"""The allow list: part 1.3, P2.19, P2.20, P2.22, and every kind of bad YAML."""

import ipaddress
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.allowlist import NOT_ALLOWED, AllowList, AllowListError, parse

KMS = "kms.eu-west-1.amazonaws.com"


def listing(*entries: tuple[str, int]) -> AllowList:
    return parse(yaml.safe_dump({"allowlist": [{"address": host, "port": port} for host, port in entries]}))


@pytest.mark.parametrize(
    "text",
    [
        f"allowlist:\n- {{address: {KMS}, port: 443}}\n",
        f"allowlist:\n  - address: {KMS}\n    port: 443\n",
        f'{{"allowlist": [{{"address": "{KMS}", "port": 443}}]}}',
        f"other: [1, {{}}]\nallowlist: [{{address: {KMS}, port: +443, comment: 2001-99-99, more: !!bool x}}]\n",
        f"allowlist: [{{address: {KMS}, port: 443}}]\n--- second document\n",
        f"a: &a {KMS}\nallowlist: [{{address: *a, port: 443}}]\n",
        f"allowlist: [{{address: {KMS}, port: 443}}]\n".encode("utf-16"),
        f"\N{BYTE ORDER MARK}allowlist: [{{address: {KMS}, port: 443}}]\n".encode(),
    ],
)
def test_forms_that_occur(text: str | bytes) -> None:
    allow = parse(text)
    assert [(entry.address, entry.port) for entry in allow.entries] == [(KMS, 443)]
    assert allow.by_name(KMS, 443) is allow.entries[0]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "No allowlist field: the file is empty"),
        ("# a comment\n", "No allowlist field: the file is empty"),
        ("---\n", "No allowlist field: the file is no mapping"),
        ("[]", "No allowlist field: the file is no mapping"),
        ("text", "No allowlist field: the file is no mapping"),
        ("other: 1", "No allowlist field"),
        ("? [allowlist]\n: []", "No allowlist field"),
        ("allowlist:", "No allowlist field: it is no list"),
        ("allowlist: {address: a, port: 1}", "No allowlist field: it is no list"),
        ("allowlist: []", "No allowlist field: the list is empty, nothing is allowed"),
    ],
)
def test_p20_empty_files_and_lists_are_clean_errors(text: str, reason: str) -> None:
    with pytest.raises(AllowListError) as caught:
        parse(text)
    assert str(caught.value).startswith(reason)


BAD_PORT = "No port field or invalid type"


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("{port: 443}", "No address field"),
        ("{address: , port: 443}", "No address field"),
        ("{address: '', port: 443}", "No address field"),
        ("{address: 12, port: 443}", "No address field"),
        ("{address: [a], port: 443}", "No address field"),
        ("{address: !!binary YQ==, port: 443}", "No address field"),
        ("text", "No address field"),
        ("[a, 443]", "No address field"),
        ("", "No address field"),
        ("{<<: {address: a, port: 443}}", "No address field"),
        ("{address: a}", BAD_PORT),
        ("{address: a, port: }", BAD_PORT),
        ("{address: a, port: '443'}", BAD_PORT),
        ("{address: a, port: 443.0}", BAD_PORT),
        ("{address: a, port: true}", BAD_PORT),
        ("{address: a, port: [443]}", BAD_PORT),
        ("{address: a, port: 0673}", BAD_PORT),  # 443 in octal: ambiguous between YAML 1.1 and 1.2
        ("{address: a, port: 4_43}", BAD_PORT),
        ("{address: a, port: 7:23}", BAD_PORT),  # 443 to the base of 60
        ("{address: a, port: !!int x}", BAD_PORT),
        ("{address: a, port: !!int ''}", BAD_PORT),
        ("{address: a, port: !!python/object/apply:os.getpid []}", BAD_PORT),
        (f"{{address: a, port: {'9' * 5000}}}", BAD_PORT),
        ("{address: a, port: -443}", BAD_PORT),
        ("{address: a b, port: 443}", "Could not parse domain name"),
        ("{address: 'a:443', port: 443}", "Could not parse domain name"),
        ('{address: "a\\0", port: 443}', "Could not parse domain name"),
    ],
)
def test_p19_a_bad_entry_is_named_with_number_and_line_wherever_it_stands(entry: str, reason: str) -> None:
    with pytest.raises(AllowListError) as caught:
        parse(f"allowlist:\n- {{address: good.example, port: 443}}\n\n- {entry}\n")
    assert str(caught.value).startswith(f"{reason} (entry 2, line 4")


@pytest.mark.parametrize("port", [0, 65536, 65979, 2**32, 10**19])
def test_p19_ports_out_of_range_are_refused(port: int) -> None:
    """65979 is 443 after 65536: the original lets it pass as that."""
    with pytest.raises(AllowListError, match=rf"^{BAD_PORT} \(entry 1, line 1: {port} is outside 1 to 65535\)$"):
        parse(f"allowlist: [{{address: a, port: {port}}}]")


@pytest.mark.parametrize(
    "text",
    [
        b"\0",
        b"\xff\xfe\xff",
        b"allowlist: \xff",
        "allowlist: [",
        "allowlist: [}",
        "allowlist: ]",
        "\tallowlist: []",
        "allowlist: *missing",
        "allowlist: &a [*a, &a x",
        "allowlist: !<tag:x> %",
        "a: b: c",
        '"unfinished',
        "%YAML 2.0\n---\na: b",
        f"%YAML 1.{'9' * 5000}\n---\na: b",
        "%TAG ! x\n%TAG ! y\n---\na: b",
        "allowlist: [{address: a, port: 1}]\nallowlist: [{address: b, port: 1}]",
        "allowlist: [{address: a, address: b, port: 1}]",
        "allowlist: [{address: a, port: 1, port: 2}]",
        "[" * 100_000,
        "{a: " * 50_000,
        "- " * 20_000,
        "allowlist: !!unknown\n\x01",
        "\ud800",
    ],
    ids=range(23),
)
def test_bad_yaml_of_every_kind(text: str | bytes) -> None:
    with pytest.raises(AllowListError, match=r"^Bad yaml format \([^\n]+\)$"):
        parse(text)


def test_a_list_that_contains_itself_and_aliases_of_aliases_cost_nothing() -> None:
    with pytest.raises(AllowListError, match="No address field"):
        parse("allowlist: &a [*a]")
    bomb = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
    began = time.process_time()
    with pytest.raises(AllowListError, match="No address field"):
        parse(bomb + "allowlist: *a29")
    assert time.process_time() - began < 2


@given(st.one_of(st.text(max_size=60), st.binary(max_size=60)))
def test_any_text_is_a_list_or_the_documented_error(text: str | bytes) -> None:
    with pytest.raises(AllowListError):
        parse(text)


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.dates() | st.binary(max_size=4) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["address", "port", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["allowlist", "x"]), VALUE, max_size=2))
def test_any_document_is_a_list_or_the_documented_error(tree: dict[str, object]) -> None:
    try:
        allow = parse(yaml.safe_dump(tree))
    except AllowListError as exc:
        assert "\n" not in str(exc)
    else:
        assert all(1 <= entry.port <= 65535 for entry in allow.entries)


@pytest.mark.parametrize("asked", [KMS, KMS.upper(), KMS + ".", "KMS.eu-west-1.amazonaws.COM."])
@pytest.mark.parametrize("written", [KMS, KMS.upper() + "."])
def test_p19_names_match_in_any_spelling(written: str, asked: str) -> None:
    assert listing((written, 443)).by_name(asked, 443) is not None


def test_p19_idna_forms_match_each_other() -> None:
    allow = listing(("bücher.example", 443))
    assert allow.by_name("xn--bcher-kva.example", 443) is allow.entries[0]
    assert allow.by_name("BÜCHER.example", 443) is allow.entries[0]


def test_a_name_matches_its_own_port_only_and_in_the_order_of_the_file() -> None:
    allow = listing((KMS, 8443), ("other.example", 443), (KMS.upper(), 443), (KMS, 443))
    assert allow.by_name(KMS, 443) is allow.entries[2]
    assert allow.by_name(KMS, 444) is None
    assert allow.by_name("x" + KMS, 443) is None


@pytest.mark.parametrize(
    ("written", "asked"),
    [("10.0.0.1", "10.0.0.1"), ("2001:db8::1", "[2001:DB8:0::1]"), ("[::1]", "::1"), ("2001:1:1:1:1:1:1:1",) * 2],
)
def test_address_literals_match_by_value(written: str, asked: str) -> None:
    allow = parse(f"allowlist:\n- address: {written if written[0] != '[' else repr(written)}\n  port: 443\n")
    assert allow.by_name(asked, 443) is allow.entries[0]
    assert allow.names_with(443) == []
    assert allow.by_name("10.0.0.2", 443) is None


def test_p21_only_names_with_the_port_are_to_be_looked_up() -> None:
    allow = listing((KMS, 443), ("10.0.0.1", 443), ("other.example", 8443), ("third.example", 443))
    assert [entry.address for entry in allow.names_with(443)] == [KMS, "third.example"]


@pytest.mark.parametrize(
    ("host", "port", "said"),
    [
        (KMS, 444, "the same host is listed with port 443, 8443 (line 2)"),
        (KMS.upper(), 444, "the same host is listed with port 443, 8443 (line 2)"),
        ("10.0.0.1", 80, "the same host is listed with port 443 (line 8)"),
        ("kms.eu-west-2.amazonaws.com", 443, f"the nearest with port 443 is {KMS} (line 2)"),
        ("S3.example", 443, "the nearest with port 443 is s3.example.org (line 4)"),
        ("elsewhere.example", 80, "no entry has port 80"),
    ],
)
def test_p22_a_refusal_says_what_was_asked_and_what_comes_nearest(host: str, port: int, said: str) -> None:
    allow = listing((KMS, 443), ("s3.example.org", 443), (KMS, 8443), ("10.0.0.1", 443))
    text = allow.refusal(host, port)
    assert text.startswith(f"{host} port {port} was compared with 4 entries")
    assert said in text
    assert text.endswith(f": {NOT_ALLOWED}")


def test_p22_a_refusal_says_what_was_compared() -> None:
    found = [ipaddress.ip_address(f"10.0.0.{n}") for n in range(2, 30)]
    assert "resolve to 10.0.0.2, 10.0.0.3;" in listing((KMS, 443)).refusal("10.0.0.1", 443, found[:2])
    assert "10.0.0.9, ...;" in listing((KMS, 443)).refusal("10.0.0.1", 443, found)


def test_a_large_list_is_read_in_reasonable_time() -> None:
    text = "allowlist:\n" + "".join(f"- {{address: h{n}.example, port: 443}}\n" for n in range(2000))
    assert len(parse(text).entries) == 2000
