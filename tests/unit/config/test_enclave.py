"""Where the enclave is, and which one it has to be: the keys for it, what the environment adds, each fault's place."""

from pathlib import Path

import pytest
import yaml

from proxy.address import parse
from signer import config
from tests.unit.config.test_loading import faults, load, nitro

A, B = "a" * 96, "b" * 96
HEAD = "encryption_key_id: k\n"


def config_faults(tmp_path: Path, text: str, **environ: str) -> list[str]:
    """The faults of *text* in a vault's config, whose own first line is line 5 of the file."""
    indented = "\n".join(f"      {line}" for line in text.splitlines())
    text = f"vaults:\n  n:\n    driver: nitro\n    config:\n{indented}\n      encryption_key_id: k\n"
    return [line.removeprefix("signatory.yaml:") for line in faults(tmp_path, text, **environ)]


@pytest.mark.parametrize(
    ("text", "environ", "cid"),
    [
        ("", {}, None),
        ("", {"ENCLAVE_CID": ""}, None),
        ("", {"ENCLAVE_CID": "auto"}, "auto"),
        ("", {"ENCLAVE_CID": "17"}, 17),
        ("enclave_cid: auto", {"ENCLAVE_CID": "17"}, "auto"),
        ("enclave_cid: Auto", {}, "auto"),
        ("enclave_cid: 18", {"ENCLAVE_CID": "17"}, 18),
        ("enclave_cid: ${ENCLAVE_CID}", {"ENCLAVE_CID": "auto"}, "auto"),
        ("enclave_name: signer", {"ENCLAVE_CID": "17"}, None),
        ("enclave_address: 'tcp:h:5'", {"ENCLAVE_CID": "17", "ENCLAVE_PORT": "5"}, None),
        ("enclave_address: 'tcp:h:{cid}'", {"ENCLAVE_CID": "17", "ENCLAVE_PORT": "5"}, 17),
        ("enclave_address: 'tcp:h:{cid}'\nenclave_name: signer", {"ENCLAVE_CID": "17"}, None),
    ],
)
def test_the_file_wins_and_a_name_decides_too(
    tmp_path: Path, text: str, environ: dict[str, str], cid: int | str | None
) -> None:
    """A script that exports the CID may go on doing so, whatever the file has said since."""
    assert nitro(tmp_path, HEAD + text, **environ).enclave_cid == cid


def test_a_pattern_is_filled(tmp_path: Path) -> None:
    found = nitro(tmp_path, HEAD + "enclave_address: unix:/run/{cid}/{cid}.sock:2000")
    assert found.fixed_enclave is None
    assert found.enclave_at(18) == parse("unix:/run/18/18.sock:2000")
    found = nitro(tmp_path, HEAD + "enclave_address: unix:/run/{cid}.sock:2000\nenclave_cid: 17")
    assert found.fixed_enclave == parse("unix:/run/17.sock:2000")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("enclave_cid: 0xFFFFFFFF", ["5: enclave_cid: 4294967295 is where to listen"]),
        ("enclave_cid: nine", ["5: enclave_cid: expected auto, or the CID as an integer"]),
        ("sessions: 0", ["5: sessions: must be greater"]),
        ("allow_debug_mode: perhaps", ["5: allow_debug_mode: expected true or false"]),
        ("enclave_name: [signer]", ["5: enclave_name: expected a text"]),
        ("enclave_nam: signer", ["5: enclave_nam: unknown key; did you mean enclave_name?"]),
        ("enclave_cid: 70000\nenclave_address: 'tcp:h:{cid}'", ["4: 'tcp:h:70000': the port is a number of at most"]),
        ("enclave_cid: 0\nenclave_address: 'tcp:h:{cid}'", ["4: port 0 is none to connect to"]),
        ("enclave_address: 'tcp:h:{cid}{cid}{cid}'", ["5: enclave_address: 'tcp:h:161616': the port is"]),
        ("enclave_cid: 16\nenclave_name: signer", ["4: enclave_name says which CID to take"]),
        ("expected_pcrs: 5", ["5: expected_pcrs: expected a map"]),
        (f"expected_pcrs:\n  PCR0: {A}\n  pcr0: {B}", ["5: expected_pcrs: PCR0 is given twice"]),
        (
            f"expected_pcrs:\n  0: {A}x\n  pcr1: '{'0' * 96}'\n  PCR2:\n  - {A}\n  - short\n  PCR3: {A}\nsessions: 17",
            [
                "6: expected_pcrs.0: expected 96 hexadecimal digits",
                "7: expected_pcrs.pcr1: a register of zeros is that of debug mode",
                "10: expected_pcrs.PCR2.1: expected 96 hexadecimal digits",
                "11: expected_pcrs.PCR3: expected PCR0, PCR1 or PCR2",
                "12: sessions: must be less",
            ],
        ),
        ("expected_pcrs:\n  PCR0: [bad]", ["6: expected_pcrs.PCR0.0: expected 96"]),
        ("pcrs: {PCR32: " + A + "}", ["5: pcrs.PCR32: expected PCR0 to PCR31"]),
        ("pcrs: {PCR0: '" + "0" * 96 + "'}", ["5: pcrs: PCR0: a register of zeros is that of debug mode"]),
        (f"pcrs:\n  0: {A}\n  2: [{A}, '{'0' * 96}']", ["5: pcrs: PCR2: a register of zeros is that of debug mode"]),
        ("pcrs: {8: " + A + ", pcr8: " + A + "}", ["5: pcrs: PCR8 is given twice"]),
        ("attestation: maybe", ["5: attestation: expected off, warn or require"]),
        ("attestation: on", ["5: attestation: expected off, warn or require"]),
        ("attestation: off\npcrs: {PCR0: " + A + "}", ["4: pcrs are compared by attestation: warn or require"]),
        ("attestation_root: abcd", ["5: attestation_root: expected the SHA-256 of a root certificate"]),
        ("seal: v2", ["5: seal: must be 'legacy' or 'v1'"]),
        ("expected_pcrs:\n  PCR0: ${NOPE}", ["6: expected_pcrs.PCR0: the environment variable NOPE is not set"]),
    ],
)
def test_each_fault_has_its_place(tmp_path: Path, text: str, expected: list[str]) -> None:
    found = config_faults(tmp_path, text)
    assert len(found) == len(expected), found
    for fault, start in zip(found, expected, strict=True):
        line, _, rest = fault.partition(": vaults.n.config")
        assert f"{line}: {rest.removeprefix(': ').removeprefix('.')}".startswith(start)


@pytest.mark.parametrize("value", ["", "''", "[]", "~", "[~]"])
def test_a_register_without_a_value_is_no_register_that_may_have_any(tmp_path: Path, value: str) -> None:
    """Elsewhere a key without a value means the default; here the check would be gone, and nobody told."""
    for key in ("expected_pcrs", "pcrs"):
        (fault,) = config_faults(tmp_path, f"{key}:\n  PCR0: {value}")
        assert fault.startswith(f"6: vaults.n.config.{key}.PCR0")


@pytest.mark.parametrize(
    ("text", "judging"),
    [
        ("", "off"),
        ("attestation: off", "off"),
        ("attestation:", "off"),
        ("attestation: warn", "warn"),
        ("attestation: require", "require"),
        (f"pcrs: {{0: {A.upper()}, pcr8: [{A}, {B}]}}", "require"),
        (f"pcrs: {{0: {A}}}\nattestation: warn", "warn"),
    ],
)
def test_whoever_expects_registers_wants_them_proved(tmp_path: Path, text: str, judging: str) -> None:
    found = nitro(tmp_path, HEAD + text)
    assert found.judging == judging
    if "pcr8" in text:
        assert found.pcrs == {"PCR0": (A,), "PCR8": (A, B)}


@pytest.mark.parametrize(
    ("text", "warned"),
    [
        (f"attestation_root: '{A[:64]}'\npcrs: {{PCR0: {A}}}", ["attestation_root: documents are verified to another"]),
        ("attestation: require", ["attestation: without pcrs any image passes"]),
        ("attestation: warn", ["attestation: without pcrs any image passes"]),
        (f"pcrs: {{PCR0: {A}}}", []),
        ("attestation: off", []),
        ("sessions: 1", []),
    ],
)
def test_what_weakens_the_proof_is_warned_of(tmp_path: Path, text: str, warned: list[str]) -> None:
    indented = "\n".join(f"      {line}" for line in (HEAD + text).splitlines())
    found = config.warnings(load(tmp_path, f"vaults:\n  n:\n    driver: nitro\n    config:\n{indented}\n"))
    assert len(found) == len(warned)
    for warning, start in zip(found, warned, strict=True):
        assert warning.startswith(f"vaults.n.config.{start}")


def test_zeros_are_what_a_register_without_a_role_or_a_signature_has(tmp_path: Path) -> None:
    zeros = "0" * 96
    found = nitro(tmp_path, f"{HEAD}pcrs: {{0: {A}, 3: '{zeros}', 8: ['{zeros}', {B}]}}")
    assert found.pcrs == {"PCR0": (A,), "PCR3": (zeros,), "PCR8": (zeros, B)}


def test_what_counts_is_shown(tmp_path: Path) -> None:
    text = f"""
vaults:
  auto: {{driver: nitro, config: {{encryption_key_id: k, enclave_name: n, expected_pcrs: {{0: [{A.upper()}, {B}]}}}}}}
  fixed: {{driver: nitro, config: {{encryption_key_id: k, enclave_cid: 17}}}}
  pattern: {{driver: nitro, config: {{encryption_key_id: k, enclave_address: 'tcp:h:{{cid}}'}}}}
"""
    shown = {
        name: vault["config"]
        for name, vault in yaml.safe_load(config.effective(load(tmp_path, text)))["vaults"].items()
    }
    places = {name: (one["enclave_cid"], one["enclave_port"], one["enclave_address"]) for name, one in shown.items()}
    assert places == {
        "auto": ("auto", 2000, None),
        "fixed": (None, None, "vsock:17:2000"),
        "pattern": ("auto", None, "tcp:h:{cid}"),
    }
    assert shown["auto"]["expected_pcrs"] == {"PCR0": [A, B]}
    assert (shown["auto"]["enclave_name"], shown["auto"]["sessions"]) == ("n", 2)


@pytest.mark.parametrize(
    ("key", "proxy", "region"),
    [
        ("arn:aws:kms:us-west-2:123456789012:key/771dfdac-e8e9-4f40-9747-f56d0911fce4", "", "us-west-2"),
        ("arn:aws-us-gov:kms:us-gov-west-1:123456789012:alias/a", "kms.us-west-2.amazonaws.com:443", "us-gov-west-1"),
        ("771dfdac-e8e9-4f40-9747-f56d0911fce4", "kms.us-west-2.amazonaws.com:443", "us-west-2"),
        ("alias/a", "kms-fips.us-east-1.amazonaws.com:443", "us-east-1"),
        ("alias/a", "kms.cn-north-1.amazonaws.com.cn:443", "cn-north-1"),
        ("alias/a", "vpce-0a1b-2c3d.kms.eu-west-1.vpce.amazonaws.com:443", "eu-west-1"),
        ("alias/a", "kms.eu-west-1.api.aws:443", "eu-west-1"),
        ("alias/kms.eu-west-1.x", "127.0.0.1:8443", ""),
        ("alias/a", "kms.example.com:443", ""),
        ("alias/a", "", ""),
    ],
)
def test_the_region_that_key_or_proxy_name(tmp_path: Path, key: str, proxy: str, region: str) -> None:
    settings = nitro(tmp_path, f"encryption_key_id: {key}\nproxy_remote_address: '{proxy}'\n")
    assert settings.kms_region == region
