"""What is wrong with a configuration: all of it at once, each once, in plain words, and nothing of a secret."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer import config
from signer.config import escaped
from signer.errors import ConfigurationError
from tests.unit.config.test_loading import TZ1, TZ4, faults, load

SECRET = "hunter2hunter2"


def test_no_fault_of_a_policy_hides_another(tmp_path: Path) -> None:
    text = f"""tezos:
  {TZ1}:
    allowed_chains: [NetXdQprcVkpaWU, bad, NetXdQprcVkpaWU, worse]
    allow:
      blok:
      generic: [transacton, 5]
    vault: m
  tz1x:
    allow: {{blok: }}
"""
    found = faults(tmp_path, text)
    chain = "gotez: base58Check decoding error: "
    assert [line.removeprefix("signatory.yaml:").partition(" ")[0] for line in found] == [
        "3:", "3:", "4:", "4:", "6:", "7:", "8:", "9:",
    ]  # fmt: skip
    assert f"tezos.{TZ1}.allowed_chains.1: {chain}" in found[0]
    assert f"tezos.{TZ1}.allowed_chains.3: {chain}" in found[1]
    assert "invalid request kind `blok`" in found[2]
    assert "invalid operation kind `transacton`" in found[3]
    assert found[4].endswith("allow.generic.1: expected a text")
    assert "no vault is called m" in found[5]
    assert "tezos.tz1x: gotez" in found[6]
    assert "tezos.tz1x.allow: invalid request kind `blok`" in found[7]


def test_what_is_not_supported_has_its_place(tmp_path: Path) -> None:
    text = f"""server:
  jwt: {{users: {{}}}}
watermark:
  driver: dynamodb
vaults:
  k: {{driver: awskms}}
tezos:
  {TZ1}:
    jwt_users: []
"""
    found = [line.removeprefix(f"{tmp_path}/") for line in config.unsupported(load(tmp_path, text))]
    assert [line.partition(" are ")[0].partition(" is ")[0] for line in found] == [
        "signatory.yaml:2: server.jwt: authentication by JWT",
        f"signatory.yaml:9: tezos.{TZ1}.jwt_users: authentication by JWT",
    ]


def test_faults_hide_nothing_that_is_not_supported(tmp_path: Path) -> None:
    text = f"""server:
  jwt: {{users: {{}}}}
  address: nonsense
vaults:
  n:
    driver: nitro
    config:
      enclave_cid: much
tezos:
  {TZ1}:
    authorized_keys: []
    log_payloads: perhaps
servr:
"""
    assert [line.split(": ")[1] for line in faults(tmp_path, text + "  x: 1\n")] == [
        "server.jwt",
        "server.address",
        "vaults.n.config",
        "vaults.n.config.enclave_cid",
        f"tezos.{TZ1}.authorized_keys",
        f"tezos.{TZ1}.log_payloads",
        "servr",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: [1 2", "expected ',' or ']', but got '<stream end>'"),
        ("a: {b: 'x' 'hunter2hunter2'}", "expected ',' or '}', but got '<scalar>'"),
        ("a: [\n}", "expected the node content, but found '}'"),
        ("- a\nb: c", "expected <block end>, but found '?'"),
        ("a:\n\tb: c", "found character '\\t' that cannot start any token"),
        ("a: @hunter2hunter2", "a value that begins with @, ` or % must be quoted"),
        ("a: %hunter2hunter2", "a value that begins with @, ` or % must be quoted"),
        ("a: !hunter2hunter2 x", "a value that begins with ! must be quoted"),
        ("a: !!hunter2hunter2", "a value that begins with ! must be quoted"),
        ("a: !hunter2!hunter2 x", "found undefined tag handle '...'"),
        ("a: *hunter2hunter2", "found undefined alias '...'"),
        ("a: &hunter2!hunter2", "expected alphabetic or numeric character, but found '...'"),
        ("a: *]", "expected alphabetic or numeric character, but found '...'"),
        ("a: |hunter2", "expected chomping or indentation indicators, but found '...'"),
        ('a: "\\hunter2hunter2"', "found unknown escape character '...'"),
    ],
)
def test_yaml_errors_name_tokens_and_show_no_value(tmp_path: Path, text: str, expected: str) -> None:
    (fault,) = faults(tmp_path, text)
    assert fault.partition(": ")[2] == expected


@given(
    st.text(st.sampled_from("hunter2\"'!&*@`%|>#{}[],:?- \t\n\\"), max_size=12),
    st.text(st.sampled_from("\"'!&*@`%|>#{}[],:?- \t\n\\x"), max_size=12),
)
def test_no_yaml_error_shows_a_secret(before: str, after: str) -> None:
    from signer.config._yaml import YamlError, parse

    try:
        parse(f"password: {before}{SECRET}{after}\nb: c\n", {})
    except YamlError as exc:
        if "the key" not in str(exc):  # a key that is there twice is named
            assert SECRET[:4] not in str(exc)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("vaults: {n: {driver: nitro, config: 5}}", "expected a map"),
        ("vaults: {k: {driver: awskms, config: [5]}}", "expected a map"),
        ("base_dir: 5", "expected a path"),
        ("base_dir: [a]", "expected a path"),
        ("server: {known_keys: perhaps}", "expected true or false"),
        ("server: {max_body_bytes: many}", "expected an integer"),
        ("server: {max_body_bytes: 9000000}", "must be less than or equal to 1048576"),
        ("server: {header_timeout: long}", "expected a number"),
        ("server: {header_timeout: 0}", "must be greater than 0"),
        (f"tezos: {{{TZ1}: {{allowed_chains: 5}}}}", "expected a list"),
        (f"tezos: {{{TZ1}: 5}}", "expected a map"),
        ("vaults: {n: {driver: nitro, config: {encryption_key_id: [k]}}}", "expected a text"),
        (
            "vaults: {n: {driver: nitro, config: {encryption_key_id: k, storage: {config: 5}}}}",
            "expected the path of the key file",
        ),
    ],
)
def test_each_fault_once_in_plain_words(tmp_path: Path, text: str, expected: str) -> None:
    (fault,) = faults(tmp_path, text)
    assert fault.rpartition(": ")[2] == expected


@pytest.mark.parametrize(
    "text",
    [
        "server: {address: '${NOPE}'}",
        "base_dir: ${NOPE}",
        "base_dir: $NOPE",
        "watermark: {driver: '${NOPE}'}",
        "vaults: {n: {driver: '${NOPE}'}}",
        "vaults: {n: {driver: nitro, config: {encryption_key_id: '${NOPE}'}}}",
        "vaults: {n: {driver: nitro, config: {encryption_key_id: k, enclave_cid: '${NOPE}'}}}",
        "vaults: {n: {driver: nitro, config: {encryption_key_id: k, enclave_address: '${NOPE}'}}}",
        f"tezos: {{{TZ4}: {{allowed_chains: ['${{NOPE}}']}}}}",
        f"tezos: {{{TZ4}: {{vault: '${{NOPE}}'}}}}",
    ],
)
def test_an_unset_variable_is_one_fault(tmp_path: Path, text: str) -> None:
    (fault,) = faults(tmp_path, text)
    assert fault.endswith("the environment variable NOPE is not set")


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("${NOPE}/x", "--base-dir: the environment variable NOPE is not set"),
        ("$NOPE", "--base-dir: the environment variable NOPE is not set"),
        ("$EMPTY", "--base-dir: Key: 'Config.BaseDir' Error"),
    ],
)
def test_faults_of_the_flag_name_the_flag(tmp_path: Path, flag: str, expected: str) -> None:
    path = tmp_path / "signatory.yaml"
    path.write_text("base_dir: /good\n")
    with pytest.raises(ConfigurationError) as caught:
        config.load(str(path), base_dir=flag, environ={"EMPTY": ""})
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("one", "other", "clash"),
    [
        (":6732", ":6732", True),
        ("127.0.0.1:6732", ":6732", True),
        ("[::1]:6732", "0.0.0.0:6732", True),
        ("127.0.0.1:6732", "127.0.0.2:6732", False),
        ("127.0.0.1:6732", "127.0.0.1:6733", False),
    ],
)
def test_two_servers_on_one_address(tmp_path: Path, one: str, other: str, clash: bool) -> None:
    text = f"server:\n  address: '{one}'\n  utility_address: '{other}'\n"
    if clash:
        assert faults(tmp_path, text) == [
            "signatory.yaml:3: server.utility_address: server.address takes this port already"
        ]
    else:
        assert load(tmp_path, text).server.utility_address == other


@pytest.mark.parametrize("address", ["tcp:h:0", "vsock:16:0", "unix:/run/v.sock:0"])
def test_nothing_listens_on_port_0(tmp_path: Path, address: str) -> None:
    text = f"vaults: {{n: {{driver: nitro, config: {{encryption_key_id: k, enclave_address: '{address}'}}}}}}"
    (fault,) = faults(tmp_path, text)
    assert "vaults.n.config.enclave_address" in fault


@given(st.text(st.sampled_from("$${}aB_1/ "), max_size=12))
def test_what_is_escaped_is_read_as_it_was(text: str) -> None:
    from signer.config._yaml import parse
    from signer.config.loading import _SHELL_VARIABLE, _SHELL_VARIABLE_OR_BRACED, _expand

    def read(written: str) -> object:
        document = parse(f"a: {written!r}\n", {"aB_1": "x"})
        assert document.faults == []
        assert isinstance(document.value, dict)
        return document.value["a"]

    assert read(escaped(text)) == text
    in_path = read(escaped(text, path=True))
    assert isinstance(in_path, str)
    assert _expand(_SHELL_VARIABLE, in_path, {}) == (text, [])
    assert _expand(_SHELL_VARIABLE_OR_BRACED, escaped(text, path=True), {}) == (text, [])
