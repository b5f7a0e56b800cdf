"""`signer config check`: good or not, every fault with its line, the settings that count, and never a secret."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.cli.test_listing import Outcome, call

TZ1 = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
TZ4 = "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME"
SECRET, TOKEN = "hunter2hunter2", "correct-horse-battery"
HIDDEN = "(set, not shown)"
GOOD = f"""
server: {{address: 127.0.0.1:6732}}
vaults:
  enclave:
    driver: nitro
    config:
      enclave_cid: ${{CID}}
      encryption_key_id: alias/signer
      credentials: {{access_key_id: AKID, secret_access_key: "${{SECRET}}", session_token: {TOKEN}, region: eu-west-1}}
tezos:
  {TZ1}: {{allow: {{generic: [transaction, reveal], block: }}}}
  {TZ4}:
base_dir: ${{BASE}}/never-made
"""


def check(tmp_path: Path, text: str, **env: str) -> Outcome:
    path = tmp_path / "signatory.yaml"
    path.write_text(text)
    done = call("config", "check", "-c", str(path), env={"SECRET": SECRET, "CID": "17", "BASE": str(tmp_path)} | env)
    for secret in (SECRET, TOKEN):
        assert secret not in done.out + done.err
    assert list(tmp_path.iterdir()) == [path], "checking changes nothing"
    return done


def settings(done: Outcome) -> dict[str, Any]:
    loaded = yaml.safe_load(done.out)
    assert isinstance(loaded, dict)
    return loaded


def test_a_good_file(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD)
    assert done.status == 0
    assert done.err == f"{tmp_path}/signatory.yaml is good\n"
    found = settings(done)
    assert found["base_dir"] == f"{tmp_path}/never-made"
    assert found["server"]["address"] == "127.0.0.1:6732"
    assert found["server"]["utility_address"] == ":9583", "defaults are shown, too"
    assert found["watermark"]["driver"] == "file"
    nitro = found["vaults"]["enclave"]["config"]
    assert nitro["enclave_address"] == "vsock:17:2000"
    assert nitro["encryption_key_id"] == "alias/signer"
    assert nitro["credentials"] == {
        "access_key_id": "AKID",
        "secret_access_key": HIDDEN,
        "session_token": HIDDEN,
        "region": "eu-west-1",
    }
    assert found["tezos"][TZ1]["allow"] == {"block": None, "generic": ["reveal", "transaction"]}
    assert list(found["tezos"][TZ4]["allow"]) == ["block", "preattestation", "attestation"], "the default policy"


def test_an_empty_secret_shows_that_it_is(tmp_path: Path) -> None:
    found = settings(check(tmp_path, GOOD, SECRET=""))
    assert found["vaults"]["enclave"]["config"]["credentials"]["secret_access_key"] == ""


def test_no_file_means_the_defaults() -> None:
    done = call("config", "check", "-c", "")
    assert (done.status, done.err) == (0, "the default configuration is good\n")
    assert settings(done)["base_dir"] == "/var/lib/signatory"


def test_the_base_dir_of_the_flag(tmp_path: Path) -> None:
    done = call("config", "check", "-c", "", "--base-dir", f"{tmp_path}/other")
    assert settings(done)["base_dir"] == f"{tmp_path}/other"
    assert not (tmp_path / "other").exists()


def test_every_fault_at_once_with_its_line(tmp_path: Path) -> None:
    text = GOOD.replace("server:", "servr:").replace(f"session_token: {TOKEN}", f"session_tokn: {TOKEN}")
    done = check(tmp_path, text.replace(f"  {TZ4}:", "  tz1bad:"), CID="much")
    assert (done.status, done.out) == (1, "")
    lines = done.err.removeprefix("Error: ").splitlines()
    where = f"{tmp_path}/signatory.yaml"
    assert f"{where}:2: servr: unknown key; did you mean server?" in lines
    assert [tuple(line.removeprefix(f"{where}:").split(": ")[:2]) for line in lines] == [
        ("2", "servr"),
        ("7", "vaults.enclave.config.enclave_cid"),
        ("9", "vaults.enclave.config.credentials.session_tokn"),
        ("12", "tezos.tz1bad"),
    ]
    assert lines[2].endswith("unknown key; did you mean session_token?")


@pytest.mark.parametrize(
    "text",
    [
        GOOD.replace('"${SECRET}"', f"[{SECRET}]"),
        GOOD.replace('"${SECRET}"', f"{{{SECRET}: {SECRET}}}"),
        GOOD.replace('"${SECRET}"', f'"{SECRET}'),
        GOOD.replace('"${SECRET}"', f"{SECRET}: {TOKEN}"),
        GOOD.replace('"${SECRET}"', f"{SECRET}, secret_access_key: {SECRET}"),
        GOOD.replace("enclave_cid: ${CID}", f"encryption_key_id: {SECRET}"),
    ],
    ids=["list", "map", "unclosed", "colon", "twice", "other key twice"],
)
def test_a_fault_beside_a_secret_shows_nothing_of_it(tmp_path: Path, text: str) -> None:
    done = check(tmp_path, text)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"Error: {tmp_path}/signatory.yaml:"), done.err


@pytest.mark.parametrize(
    ("addition", "text"),
    [
        ("policy_hook: {address: 'http://127.0.0.1:1/'}", "policy_hook: the policy hook"),
    ],
)
def test_what_serve_would_refuse(tmp_path: Path, addition: str, text: str) -> None:
    done = check(tmp_path, GOOD + addition + "\n")
    assert done.status == 1
    assert f"Error: {tmp_path}/signatory.yaml:14: {text}" in done.err
    assert "is good" not in done.err
    assert settings(done)["server"], "the settings are shown all the same"


def test_what_counts_is_shown(tmp_path: Path) -> None:
    policies = f"  {TZ1}: {{allow_proof_of_possession: true}}\n  {TZ4}: {{allow_proof_of_possession: true}}\n"
    before, _, after = GOOD.partition("tezos:\n")
    found = settings(check(tmp_path, f"{before}tezos:\n{policies}base_dir: {after.rpartition('base_dir: ')[2]}"))
    assert found["tezos"][TZ1]["allow_proof_of_possession"] is False, "a tz1 has none"
    assert found["tezos"][TZ4]["allow_proof_of_possession"] is True
    storage = found["vaults"]["enclave"]["config"]["storage"]
    assert storage == {"driver": "file", "config": f"{tmp_path}/never-made/enclave_keys.json"}
    default = settings(check(tmp_path, GOOD))
    assert default["tezos"][TZ4]["allow_proof_of_possession"] is False
    named = settings(check(tmp_path, GOOD.replace("enclave_cid:", "storage: {config: /k.json}\n      enclave_cid:")))
    assert named["vaults"]["enclave"]["config"]["storage"] == {"driver": "file", "config": "/k.json"}
    table = settings(check(tmp_path, GOOD.replace("enclave_cid:", "storage: {driver: aws}\n      enclave_cid:")))
    assert table["vaults"]["enclave"]["config"]["storage"] == {"driver": "aws", "config": None}


def test_secrets_of_authentication_are_hidden(tmp_path: Path) -> None:
    jwt = f"jwt: {{users: {{u: {{password: {SECRET}, secret: {TOKEN}}}}}}}"
    done = check(tmp_path, GOOD.replace("{address: 127.0.0.1:6732}", f"{{{jwt}}}"))
    assert done.status == 1
    assert settings(done)["server"]["jwt"] == HIDDEN


def test_warnings(tmp_path: Path) -> None:
    done = check(tmp_path, GOOD + "watermark: {driver: mem}\n")
    assert done.status == 0
    assert done.err.startswith("Warning: watermark.driver: mem forgets every mark at exit")
    assert done.err.endswith("is good\n")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    error = "Error: CRITICAL: Config file permission error:"
    done = call("config", "check", "-c", f"{tmp_path}/none")
    assert done == Outcome(1, "", f"{error} file does not exist: {tmp_path}/none\n")
    done = call("config", "check", "-c", str(tmp_path))
    assert done == Outcome(1, "", f"{error} path is a directory, expected a file: {tmp_path}\n")
