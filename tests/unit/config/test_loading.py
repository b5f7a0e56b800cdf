"""The configuration file: what is accepted, what is refused with which text, and what never shows."""

import re
import stat
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from proxy.address import UnixAddress, VsockAddress
from signer import config
from signer.config import NitroSettings, Settings, models
from signer.errors import ConfigurationError
from signer.tezos.keys import PublicKeyHash

TZ1 = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
TZ4 = "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME"
EDPK = "edpkv45regue1bWtuHnCgLU8xWKLwa9qRqv4gimgJKro4LSc3C5VjV"


def load(tmp_path: Path, text: str, **environ: str) -> Settings:
    path = tmp_path / "signatory.yaml"
    path.write_text(text)
    return config.load(str(path), environ=environ)


def faults(tmp_path: Path, text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load(tmp_path, text, **environ)
    return [line.removeprefix(f"{tmp_path}/") for line in str(caught.value).splitlines()]


def nitro(tmp_path: Path, text: str, **environ: str) -> NitroSettings:
    indented = "\n".join(f"      {line}" for line in text.splitlines())
    settings = load(tmp_path, f"vaults:\n  n:\n    driver: nitro\n    config:\n{indented}\n", **environ)
    found = settings.vaults["n"].config
    assert isinstance(found, NitroSettings)
    return found


def test_defaults() -> None:
    settings = config.load("", environ={})
    assert settings.server.address == ":6732"
    assert settings.server.utility_address == ":9583"
    assert str(settings.base_dir) == "/var/lib/signatory"
    assert settings.watermark.driver == "file"
    assert str(config.load("", base_dir="/x", environ={}).base_dir) == "/x"


@pytest.mark.parametrize(
    "text", ["", "# nothing\n", "server:\nvaults:\ntezos:\nwatermark:\npolicy_hook:\n", "server:\n  address:\n  jwt:\n"]
)
def test_null_means_the_default(tmp_path: Path, text: str) -> None:
    settings = load(tmp_path, text)
    assert settings.server.address == ":6732"
    assert settings.watermark.driver == "file"
    assert config.unsupported(settings) == []


def test_every_fault_at_once_each_with_its_line(tmp_path: Path) -> None:
    text = f"""server:
  adress: ":6732"
  utility_address: "localhost:0"
vaults:
  kms:
  empty: {{}}
  other: {{driver: hashicorp}}
  n:
    driver: nitro
    config:
      encryption_key_id: k
      storge: {{}}
tezos:
  {TZ1}:
    allow: {{blok: , generic: [transacton]}}
    vault: m
  tz1x: null
watermark: {{driver: flie}}
"""
    assert faults(tmp_path, text) == [
        "signatory.yaml:2: server.adress: unknown key; did you mean address?",
        "signatory.yaml:3: server.utility_address: Key: 'Config.Server.UtilityAddress' Error:Field validation for "
        "'UtilityAddress' failed on the 'hostname_port' tag; expected host:port, such as 127.0.0.1:6732 or :6732, "
        "with a port from 1 to 65535",
        "signatory.yaml:5: vaults.kms: Key: 'Config.Vaults[kms]' Error:Field validation for 'Vaults[kms]' failed on "
        "the 'required' tag",
        "signatory.yaml:6: vaults.empty: Key: 'Config.Vaults[empty].Driver' Error:Field validation for 'Driver' failed "
        "on the 'required' tag",
        "signatory.yaml:7: vaults.other.driver: unknown vault driver: hashicorp; known: nitro, awskms",
        "signatory.yaml:12: vaults.n.config.storge: unknown key; did you mean storage?",
        f"signatory.yaml:15: tezos.{TZ1}.allow: invalid request kind `blok` in `allow` list; known: attestation, "
        "attestation_with_dal, block, generic, pack, preattestation",
        f"signatory.yaml:15: tezos.{TZ1}.allow: invalid operation kind `transacton` in `allow.generic` list; see: "
        "signer list-ops",
        f"signatory.yaml:16: tezos.{TZ1}.vault: no vault is called m; did you mean kms?",
        "signatory.yaml:17: tezos.tz1x: gotez: base58Check decoding error: data is too short: 3",
        "signatory.yaml:18: watermark.driver: unknown watermark backend: flie; did you mean file?",
    ]


@pytest.mark.parametrize(
    ("address", "good"),
    [
        (":6732", True),
        ("localhost:6732", True),
        ("127.0.0.1:1", True),
        ("[::1]:6732", True),
        ("a-b.example.:65535", True),
        ("", False),
        ("6732", False),
        (":0", False),
        (":65536", False),
        ("::1:6732", False),
        ("-a:1", False),
        ("host:port", False),
        ("http://host:1", False),
    ],
)
def test_addresses(tmp_path: Path, address: str, good: bool) -> None:
    text = f"server: {{address: '{address}'}}"
    if good:
        assert load(tmp_path, text).server.address == address
    else:
        assert "'Config.Server.Address' Error" in faults(tmp_path, text)[0]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    prefix = "CRITICAL: Config file permission error:"
    with pytest.raises(ConfigurationError, match=f"{prefix} file does not exist: {tmp_path}/no"):
        config.load(f"{tmp_path}/no")
    with pytest.raises(ConfigurationError, match=f"{prefix} path is a directory, expected a file"):
        config.load(str(tmp_path))
    (tmp_path / "bin").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigurationError, match="not a UTF-8 text"):
        config.load(str(tmp_path / "bin"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b: c", "signatory.yaml:1: mapping values are not allowed here"),
        ("server: {\n", "signatory.yaml:2: "),
        ("base_dir: a\nbase_dir: b\n", "signatory.yaml:2: the key 'base_dir' is there twice"),
        ("- a\n", "signatory.yaml:1: expected a map"),
        ("a: &a [*a]", "signatory.yaml:1: nested too deep"),
        ("server: 5", "server: expected a map"),
        ("vaults: []", "vaults: expected a map"),
        ("tezos: 5", "tezos: expected a map"),
        ("base_dir: ''", "'Config.BaseDir' Error"),
        ("base_dir: $NO_SUCH_NAME/x", "the environment variable NO_SUCH_NAME is not set"),
        ("base_dir: ${NO_SUCH_NAME}/x", "the environment variable NO_SUCH_NAME is not set"),
        ("server: {path_prefix: 'a b'}", "expected a path"),
        ("server: {max_body_bytes: 9000000}", "less than or equal to 1048576"),
    ],
)
def test_malformed_texts(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in "\n".join(faults(tmp_path, text))


def test_variables_in_every_string(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        "base_dir: $HOME/${SUB}\nserver: {path_prefix: '${PREFIX}'}\n",
        HOME="/home/b",
        SUB="x",
        PREFIX="/signer/v1/",
    )
    assert str(settings.base_dir) == "/home/b/x"
    assert settings.server.path_prefix == "/signer/v1"
    text = "encryption_key_id: '$${NAME} $5 a$b'\nenclave_cid: ${CID}\nenclave_port: '0x7d0'"
    found = nitro(tmp_path, text, CID="0x11")
    assert found.encryption_key_id == "${NAME} $5 a$b"
    assert found.fixed_enclave == VsockAddress(17, 2000)
    injected = nitro(tmp_path, "encryption_key_id: ${KEY}", KEY="k}\nenclave_cid: 99")
    assert injected.encryption_key_id == "k}\nenclave_cid: 99"


@pytest.mark.parametrize(
    ("text", "environ", "cid", "port"),
    [
        ("encryption_key_id: k", {"ENCLAVE_CID": "16"}, 16, 2000),
        ("encryption_key_id: k", {"ENCLAVE_CID": "0b10001", "ENCLAVE_PORT": "2_001"}, 17, 2001),
        ("encryption_key_id: k\nenclave_cid: 0", {"ENCLAVE_CID": "17"}, 0, 2000),
        ("enclave_cid:\nenclave_port: 017", {"ENCLAVE_CID": "021", "ENCRYPTION_KEY_ID": "k"}, 17, 15),
    ],
)
def test_the_configuration_wins_over_the_environment(
    tmp_path: Path, text: str, environ: dict[str, str], cid: int, port: int
) -> None:
    assert nitro(tmp_path, text, **environ).fixed_enclave == VsockAddress(cid, port)


@pytest.mark.parametrize("name", ["ENCLAVE_CID", "ENCLAVE_PORT", "PROXY_LOCAL_PORT", "PROXY_REMOTE_ADDRESS"])
@pytest.mark.parametrize("value", ["abc", "-1", "4294967296", "1.5"])
def test_an_unparsable_variable_is_an_error(tmp_path: Path, name: str, value: str) -> None:
    text = "vaults: {n: {driver: nitro, config: {encryption_key_id: k}}}"
    (fault,) = faults(tmp_path, text, **{name: value})
    assert f"the environment variable {name}" in fault
    assert value in fault


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "(Nitro): missing encryption key id"),
        ("encryption_key_id: k\nenclave_cid: x", "expected auto, or the CID as an integer"),
        ("encryption_key_id: k\nenclave_cid: true", "expected auto, or the CID as an integer"),
        ("encryption_key_id: k\nenclave_address: bogus", "expected vsock:<cid>:<port>"),
        ("encryption_key_id: k\nenclave_address: 'tcp:h:1'\nenclave_cid: 5", "takes the place of enclave_cid"),
        ("encryption_key_id: k\nstorage: {driver: s3}", "(Nitro): unknown key storage s3"),
        ("encryption_key_id: k\nstorage: {config: {table: t}}", "expected the path of the key file"),
        ("encryption_key_id: k\nstorage: {config: $NOPE/x}", "NOPE is not set"),
        ("encryption_key_id: k\nproxy_remote_address: nohost", "expected host:port"),
        ("encryption_key_id: k\ncredentials: {region: r, acces_key_id: x}", "did you mean access_key_id?"),
    ],
)
def test_faults_of_a_nitro_vault(tmp_path: Path, text: str, expected: str) -> None:
    indented = "\n".join(f"      {line}" for line in text.splitlines())
    found = faults(tmp_path, f"vaults:\n  n:\n    driver: nitro\n    config:\n{indented}\n")
    assert expected in "\n".join(found)


def test_an_address_and_a_storage_path(tmp_path: Path) -> None:
    found = nitro(
        tmp_path,
        "encryption_key_id: k\nenclave_address: unix:/run/v.sock:2000\nstorage: {driver: file, config: $D/k.json}",
        D="/data",
        ENCLAVE_CID="99",
    )
    assert found.fixed_enclave == UnixAddress("/run/v.sock", 2000)
    assert found.storage is not None
    assert found.storage.config == "/data/k.json"


def test_documented_configurations_that_the_reference_rejects(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        f"""
vaults: {{n: {{driver: nitro, config: {{enclave_cid: "${{ENCLAVE_CID}}", encryption_key_id: k}}}}}}
tezos:
  {TZ1}: {{vault: n, allow: {{block: , failing_noop: }}}}
  {TZ4}: {{allow: {{generic: [set_companion_key]}}, allow_proof_of_possession: true}}
policy_hook: {{address: "host:8080"}}
""",
        ENCLAVE_CID="16",
    )
    first, second = settings.tezos.items()
    assert config.compile_policy(*first).requests == ("block", "generic")
    assert config.compile_policy(*first).operations == ("failing_noop",)
    assert config.compile_policy(*second).operations == ("update_companion_key",)
    assert any("write generic: [failing_noop]" in warning for warning in config.warnings(settings))


@pytest.mark.parametrize(
    ("policy", "requests", "operations"),
    [
        (None, ("block", "preattestation", "attestation"), ()),
        ({}, (), ()),
        ({"log_payloads": True}, (), ()),
        ({"allow": {"block": None, "attestation": ["ignored"]}}, ("attestation", "block"), ()),
        ({"allow": {"endorsement": None, "preendorsement": None}}, ("attestation", "preattestation"), ()),
        ({"allow": {"generic": ["transaction", "ballot:yay"]}}, ("generic",), ("ballot:yay", "transaction")),
        ({"allow": {"generic": None}, "allowed_kinds": ["reveal"]}, ("generic",), ()),
        (
            {"allowed_operations": ["generic", "endorsement"], "allowed_kinds": ["reveal"]},
            ("attestation", "generic"),
            ("reveal",),
        ),
    ],
)
def test_what_a_policy_allows(
    tmp_path: Path, policy: Any, requests: tuple[str, ...], operations: tuple[str, ...]
) -> None:
    settings = load(tmp_path, yaml.safe_dump({"tezos": {TZ1: policy}}))
    ((pkh, written),) = settings.tezos.items()
    assert pkh == PublicKeyHash.from_base58(TZ1)
    compiled = config.compile_policy(pkh, written)
    assert (compiled.requests, compiled.operations) == (requests, operations)


@pytest.mark.parametrize(
    "kind", ["endorsement", "double_endorsement_evidence", "attestation", "ballot:maybe", "reveal:x"]
)
def test_operation_kinds_that_are_none(tmp_path: Path, kind: str) -> None:
    assert (
        "invalid operation kind"
        in faults(tmp_path, yaml.safe_dump({"tezos": {TZ1: {"allow": {"generic": [kind]}}}}))[0]
    )


def test_warnings(tmp_path: Path) -> None:
    text = f"""
tezos:
  {TZ1}: {{allowed_operations: [generic, endorsement], allowed_kinds: [reveal], allow_proof_of_possession: true}}
watermark: {{driver: mem}}
"""
    found = "\n".join(config.warnings(load(tmp_path, text)))
    assert "allowed_operations and allowed_kinds are deprecated" in found
    assert "    generic:\n      - reveal" in found
    assert "endorsement is called attestation now" in found
    assert f"proof of possession is not supported for {TZ1}" in found
    assert "mem forgets every mark" in found


def test_what_is_asked_for_in_vain(tmp_path: Path) -> None:
    text = f"""
server: {{jwt: {{users: {{}}}}, authorized_keys: [{EDPK}, [{EDPK}]]}}
vaults:
  k: {{driver: awskms, config: {{region: r}}}}
  n:
    driver: nitro
    config: {{encryption_key_id: k, proxy_remote_address: "kms:443", storage: {{driver: aws, config: {{table: t}}}}}}
tezos: {{{TZ1}: {{authorized_keys: {EDPK}, jwt_users: [a]}}}}
watermark: {{driver: aws, config: {{table: w}}}}
policy_hook: {{address: "http://h/"}}
"""
    settings = load(tmp_path, text)
    found = "\n".join(config.unsupported(settings))
    for place in (
        "cannot use both JWT and static authorized keys",
        "server.jwt",
        "server.authorized_keys",
        "policy_hook",
        f"tezos.{TZ1}.authorized_keys",
        f"tezos.{TZ1}.jwt_users",
    ):
        assert place in found
    assert EDPK in config.effective(settings)
    assert "unknown public key prefix" in faults(tmp_path, f"server: {{authorized_keys: {TZ1}}}")[0]
    assert "expected a public key" in faults(tmp_path, "server: {authorized_keys: [5]}")[0]


def test_secrets_never_show(tmp_path: Path) -> None:
    text = f"""
server: {{jwt: {{users: {{alice: {{password: PassWord, secret: TopSecret}}}}}}}}
vaults:
  n:
    driver: nitro
    config:
      encryption_key_id: k
      credentials: {{access_key_id: A, secret_access_key: TopSecret, session_token: TopToken}}
tezos: {{{TZ4}: null}}
"""
    settings = load(tmp_path, text)
    shown = [repr(settings), str(settings), config.effective(settings)]
    shown += faults(tmp_path, text.replace("access_key_id: A", "access_key_id: [A]"))
    for secret in ("PassWord", "TopSecret", "TopToken"):
        assert not any(secret in one for one in shown)
    assert "(set, not shown)" in config.effective(settings)
    assert yaml.safe_load(config.effective(settings))["tezos"][TZ4]["allow"].keys() == {
        "block",
        "preattestation",
        "attestation",
    }


@given(st.text(max_size=300))
def test_any_text_is_a_configuration_or_an_error(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("c") / "f.yaml"
    path.write_bytes(text.encode("utf-8", errors="surrogatepass"))
    try:
        config.load(str(path), environ={})
    except ConfigurationError as exc:
        assert str(exc)


TREES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["server", "vaults", "tezos", "watermark", "driver", "config", "nitro", "address", TZ1, "allow"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(TREES)
def test_any_tree_is_a_configuration_or_an_error(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    path = tmp_path_factory.mktemp("c") / "f.yaml"
    path.write_text(yaml.safe_dump(tree))
    try:
        config.load(str(path), environ={})
    except ConfigurationError as exc:
        assert re.search(r"f\.yaml", str(exc))


def test_the_base_directory(tmp_path: Path) -> None:
    settings = config.load("", base_dir=str(tmp_path / "a" / "b"), environ={})
    config.prepare_base_dir(settings)
    assert stat.S_IMODE(settings.base_dir.stat().st_mode) == 0o700
    assert list(settings.base_dir.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot create directory"):
        config.prepare_base_dir(config.load("", base_dir=str(tmp_path / "file" / "x"), environ={}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("base_dir: !!bool foo", "signatory.yaml:1: not a value of type bool"),
        ("base_dir: !!timestamp foo", "signatory.yaml:1: not a value of type timestamp"),
        ("\n? [a, b]\n: 1", "signatory.yaml:2: a key must be a text"),
        ('base_dir: "/tmp/a\\0b"', "signatory.yaml:1: base_dir: a text must not hold a NUL character"),
        (f"a: {'9' * 5000}", "signatory.yaml:1: not a value of type int"),
        ("a: *hunter2hunter2", "signatory.yaml:1: found undefined alias '...'"),
        ("server: {header_timeout: yes}", "signatory.yaml:1: server.header_timeout: expected a number"),
    ],
)
def test_values_that_are_none(tmp_path: Path, text: str, expected: str) -> None:
    """One line with its place, no trace, and nothing quoted that may be half of a secret."""
    assert expected in faults(tmp_path, text)


def test_anchors_that_multiply(tmp_path: Path) -> None:
    text = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    text += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
    assert "more than 100000 values, counting what anchors repeat" in faults(tmp_path, text)[0]


def test_faults_beside_a_faulty_vault(tmp_path: Path) -> None:
    text = """vaults:
  n:
    driver: nitro
    confg: {}
    config:
      enclave_cid: much
"""
    assert faults(tmp_path, text) == [
        "signatory.yaml:4: vaults.n.confg: unknown key; did you mean config?",
        "signatory.yaml:5: vaults.n.config: (Nitro): missing encryption key id",
        "signatory.yaml:6: vaults.n.config.enclave_cid: expected auto, or the CID as an integer",
    ]


def test_null_means_the_default_at_any_depth(tmp_path: Path) -> None:
    found = nitro(tmp_path, "encryption_key_id: k\ncredentials: {session_token: , region: r}")
    assert (found.credentials.region, found.credentials.session_token.get_secret_value()) == ("r", "")


@pytest.mark.parametrize(("address", "good"), [("[::1]:5", True), ("[:::::]:5", False), ("[1.2.3.4]:5", False)])
def test_bracketed_hosts_are_ipv6(tmp_path: Path, address: str, good: bool) -> None:
    if good:
        assert load(tmp_path, f"server: {{address: '{address}'}}").server.address == address
    else:
        assert "hostname_port" in faults(tmp_path, f"server: {{address: '{address}'}}")[0]


def test_the_snippet_of_a_deprecation_earns_no_second_warning(tmp_path: Path) -> None:
    settings = load(tmp_path, f"tezos: {{{TZ1}: {{allowed_operations: [endorsement, block]}}}}")
    snippet = next(text for text in config.warnings(settings) if "deprecated" in text)
    assert snippet.splitlines()[1:] == ["  allow:", "    attestation:", "    block:"]


def test_a_password_in_a_url_is_not_shown(tmp_path: Path) -> None:
    settings = load(tmp_path, "policy_hook: {address: 'http://u:hunter5@h/x'}")
    assert "hunter5" not in config.effective(settings)


def test_two_built_in_proxies_on_one_port(tmp_path: Path) -> None:
    """The second would find a proxy at work there, and its enclave would call on another host."""

    def vault(name: str, remote: str, port: int = 8000) -> str:
        config = f"{{encryption_key_id: k, proxy_remote_address: '{remote}', proxy_local_port: {port}}}"
        return f"  {name}: {{driver: nitro, config: {config}}}\n"

    (fault,) = faults(tmp_path, "vaults:\n" + vault("a", "kms.eu:443") + vault("b", "kms.us:443"))
    assert fault.endswith(
        "vaults.b.config.proxy_local_port: the proxy of vault a takes this port already, and leads to kms.eu:443"
    )
    load(tmp_path, "vaults:\n" + vault("a", "kms.eu:443") + vault("b", "kms.eu:443"))
    load(tmp_path, "vaults:\n" + vault("a", "kms.eu:443") + vault("b", "kms.us:443", 8001))


@pytest.mark.parametrize(
    ("enclave", "listen"),
    [
        ("enclave_cid: 16", "vsock:any:9000"),
        ("enclave_address: 'unix:/run/v.sock:2000'", "unix:/run/v.sock:9000"),
        ("enclave_address: 'tcp:127.0.0.1:2000'", "tcp:127.0.0.1:9000"),
    ],
)
def test_where_the_enclave_finds_its_proxy(tmp_path: Path, enclave: str, listen: str) -> None:
    found = nitro(tmp_path, f"encryption_key_id: k\nproxy_local_port: 9000\n{enclave}")
    assert str(found.proxy_listen) == listen


def test_marks_and_blobs_in_tables(tmp_path: Path) -> None:
    text = """
vaults:
  n: {driver: nitro, config: {encryption_key_id: k, storage: {driver: dynamodb}}}
  m: {driver: nitro, config: {encryption_key_id: k, storage: {driver: aws, config: {table: t, region: r}}}}
watermark: {driver: aws, config: {region: r, write_timeout: 1.5}}
"""
    settings = load(tmp_path, text)
    assert config.unsupported(settings) == []
    assert settings.watermark.in_table == models.WatermarkTable(region="r", write_timeout=1.5)
    assert load(tmp_path, "watermark: {driver: dynamodb}").watermark.in_table == models.WatermarkTable()
    assert load(tmp_path, "watermark: {driver: file, config: {table: t}}").watermark.in_table is None
    found = {}
    for name, vault in settings.vaults.items():
        assert isinstance(vault.config, NitroSettings)
        assert vault.config.storage is not None
        found[name] = vault.config.storage.in_table
    assert found == {"n": models.AwsTable(), "m": models.AwsTable(table="t", region="r")}
    assert "did you mean write_timeout?" in faults(tmp_path, "watermark: {driver: aws, config: {write_timeot: 1}}")[0]
    assert faults(tmp_path, "watermark: {driver: aws, config: {write_timeout: 0}}")
