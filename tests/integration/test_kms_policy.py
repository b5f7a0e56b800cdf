"""`signer kms-policy --check` against a KMS server over real HTTP: moto, with actions denied in front of it."""

import io
import json
import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server
from werkzeug.test import run_wsgi_app

from signer.aws import kms_key
from tests.nitro_cli import PCRS, NitroCli, enclave
from tests.unit.aws.test_kms_policy import ROLE, Json, ours
from tests.unit.cli.test_listing import Outcome, call

REGION = "eu-west-1"
MOTO_ACCOUNT = "123456789012"
LISTED = PCRS["PCR0"]


@dataclass
class Kms:
    """The server; *denied* are actions that it refuses as KMS does."""

    denied: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    url: str = ""
    client: Any = None

    def __post_init__(self) -> None:
        self._moto: Callable[..., Iterable[bytes]] = DomainDispatcherApplication(create_backend_app)

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        action = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        self.calls.append(action)
        if action not in self.denied:
            return (
                self._page_of_grants(environ, start_response)
                if action == "ListGrants"
                else self._moto(environ, start_response)
            )
        environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        start_response("400 Bad Request", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps({"__type": "AccessDeniedException", "Message": f"not authorized: kms:{action}"}).encode()]

    def _page_of_grants(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        """moto answers with all grants at once, whatever Limit says."""
        asked = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        parameters = json.loads(asked)
        environ["wsgi.input"] = io.BytesIO(asked)
        whole = run_wsgi_app(self._moto, environ)
        answer = json.loads(b"".join(whole[0]))
        start, limit = int(parameters.get("Marker", 0)), parameters["Limit"]
        page = {"Grants": answer["Grants"][start : start + limit], "Truncated": start + limit < len(answer["Grants"])}
        start_response("200 OK", [("Content-Type", "application/x-amz-json-1.1")])
        return [json.dumps(page | ({"NextMarker": str(start + limit)} if page["Truncated"] else {})).encode()]

    def key(self, policy: Json, **options: Any) -> str:
        """A new key with *policy*: its id."""
        made = self.client.create_key(Policy=json.dumps(policy), **options)
        return str(made["KeyMetadata"]["KeyId"])


@pytest.fixture
def kms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Kms]:
    for name, value in (
        ("AWS_ACCESS_KEY_ID", "AKID"),
        ("AWS_SECRET_ACCESS_KEY", "SECRET"),
        ("AWS_EC2_METADATA_DISABLED", "true"),
        ("AWS_CONFIG_FILE", str(tmp_path / "none")),
        ("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none")),
    ):
        monkeypatch.setenv(name, value)
    for name in ("AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    log = logging.getLogger("werkzeug")
    monkeypatch.setattr(log, "disabled", True)
    served = Kms()
    server = make_server("127.0.0.1", 0, served, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    served.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL_KMS", served.url)
    served.client = boto3.client("kms", region_name=REGION)
    try:
        yield served
    finally:
        served.client.close()
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def nitro_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NitroCli:
    found = NitroCli(tmp_path / "bin")
    found.show(enclave(16))
    monkeypatch.setenv("PATH", found.path_environment()["PATH"])
    return found


def check(key: str, *arguments: str) -> Outcome:
    return call("kms-policy", "--check", key, *(arguments or ("-c", "", "--region", REGION)))


def good() -> Json:
    policy: Json = json.loads(json.dumps(ours(PCR0=[LISTED])).replace(ROLE.split(":")[4], MOTO_ACCOUNT))
    return policy


def arn(key: str) -> str:
    return f"arn:aws:kms:{REGION}:{MOTO_ACCOUNT}:key/{key}"


def test_the_policy_that_is_printed_is_in_force(kms: Kms) -> None:
    key = kms.key(good())
    kms.client.create_alias(AliasName="alias/sealing", TargetKeyId=key)
    nothing = Outcome(0, "nothing found\n", f"{arn(key)}: 0 error(s), 0 warning(s)\n")
    assert check(key) == nothing
    assert check("alias/sealing") == nothing
    assert check(arn(key), "-c", "") == nothing, "the region is that of the ARN"


def test_the_policy_that_aws_makes(kms: Kms) -> None:
    done = check(str(kms.client.create_key()["KeyMetadata"]["KeyId"]))
    assert done.status == 1
    assert (
        "error: statement 1 (Enable IAM User Permissions): the whole policy is kms:* for the account's root" in done.out
    )
    assert "error: policy: no statement lets an enclave decrypt by the PCR0 of its image" in done.out


def test_a_policy_that_is_put_later(kms: Kms) -> None:
    key = kms.key(good())
    kms.client.put_key_policy(KeyId=key, PolicyName="default", Policy=json.dumps(ours(PCR0=["d4" * 48])))
    assert f"its PCR0 {LISTED} is not accepted" in check(key).out


def test_grants_on_all_pages(kms: Kms) -> None:
    key = kms.key(good())
    for number in range(101):
        name = f"arn:aws:iam::{MOTO_ACCOUNT}:role/r{number}"
        kms.client.create_grant(KeyId=key, GranteePrincipal=name, Operations=["Decrypt"])
    done = check(key)
    assert done.status == 1
    assert kms.calls.count("ListGrants") == 2
    assert done.out.count("warning: grant ") == 101
    assert "role/r100 call kms:Decrypt, whatever the conditions" in done.out
    assert "(only the Deny of statement 4 (OnlyTheEnclaveDecrypts) stops it)" in done.out


def test_more_grants_than_anybody_reads(kms: Kms, monkeypatch: pytest.MonkeyPatch) -> None:
    key = kms.key(good())
    name = f"arn:aws:iam::{MOTO_ACCOUNT}:role/r"
    for _ in range(101):
        kms.client.create_grant(KeyId=key, GranteePrincipal=name, Operations=["DescribeKey"])
    assert "grants" not in check(key).err
    monkeypatch.setattr(kms_key, "_PAGES", 1)
    assert "Note: only the first 100 grants of the key were seen\n" in check(key).err


def test_a_key_of_no_vault_is_not_compared_with_the_enclave(kms: Kms, tmp_path: Path, nitro_cli: NitroCli) -> None:
    """By id: an alias of the vault may be this key."""
    key = kms.key(json.loads(json.dumps(good()).replace(LISTED, "d4" * 48)))
    kms.client.create_alias(AliasName="alias/by-hand", TargetKeyId=key)
    path = tmp_path / "signatory.yaml"
    note = "Note: nothing of this host was compared: v0: encryption_key_id is another key\n"
    two = note.replace("v0", "v0, v1")
    for keys, said, status in (
        ([arn("0c23")], note, 0),
        (["alias/other"], "", 1),
        ([key], "", 1),
        ([arn("0c23"), "0c24"], two, 0),
        ([arn("0c23"), "alias/other"], "", 1),
    ):
        vaults = [f"  v{n}: {{driver: nitro, config: {{encryption_key_id: '{one}'}}}}\n" for n, one in enumerate(keys)]
        path.write_text("vaults:\n" + "".join(vaults))
        for asked in (key, "alias/by-hand"):
            done = check(asked, "-c", str(path), "--region", REGION)
            assert (done.status, f"its PCR0 {LISTED} is not accepted" in done.out) == (status, bool(status))
            assert said in done.err
            assert bool(said) is ("nothing of this host" in done.err)


def test_the_state_of_the_key(kms: Kms) -> None:
    key = kms.key(good(), MultiRegion=True)
    kms.client.schedule_key_deletion(KeyId=key)
    done = check(key)
    assert done.status == 1
    assert "error: key: its state is PendingDeletion: all sealed keys go with it\n    Stop that at once" in done.out
    assert "warning: key: it is a multi-Region key" in done.out
    signing = kms.key(good(), KeySpec="ECC_SECG_P256K1", KeyUsage="SIGN_VERIFY")
    assert "error: key: its KeySpec is ECC_SECG_P256K1" in check(signing).out


def test_what_may_not_be_seen_is_said(kms: Kms) -> None:
    key = kms.key(good())
    kms.denied = {"DescribeKey", "ListGrants"}
    done = check(key)
    assert (done.status, done.out) == (0, "nothing found\n")
    assert "Note: the state of the key was not seen: kms:DescribeKey is not allowed" in done.err
    assert "Note: the grants of the key were not seen: kms:ListGrants is not allowed" in done.err


def test_what_cannot_be_checked(kms: Kms) -> None:
    key = kms.key(good())
    kms.denied = {"GetKeyPolicy"}
    done = check(key)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Error: cannot check: kms-policy: kms:GetKeyPolicy on arn:aws:kms:")
    kms.denied = {"DescribeKey"}
    assert "kms:DescribeKey on alias/sealing" in check("alias/sealing").err
    kms.denied = set()
    done = check("0c23e1b9-0000-0000-0000-000000000000")
    assert (done.status, done.out) == (2, "")
    assert "NotFoundException" in done.err


def test_credentials_and_region_of_the_configuration(kms: Kms, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = kms.key(good())
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    path = tmp_path / "signatory.yaml"
    credentials = f"{{access_key_id: A, secret_access_key: S, region: {REGION}}}"
    path.write_text(
        f"vaults: {{n: {{driver: nitro, config: {{encryption_key_id: '{arn(key)}', credentials: {credentials}, "
        f"expected_pcrs: {{PCR0: {LISTED}}}}}}}, o: {{driver: nitro, config: {{encryption_key_id: other}}}}}}\n"
    )
    assert check(key, "-c", str(path)).status == 0
    assert check(key, "-c", "", "--region", REGION).status == 2, "no credentials"
