"""`signer kms-policy`: the options, where it learns what is expected, and the status; the policies are the core's."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.nitro_cli import PCRS, NitroCli, enclave
from tests.unit.aws.test_kms_policy import ACCOUNT, ADMIN, BAD, NEW, OLD, ROLE, ZEROS, allow, ours
from tests.unit.cli.test_listing import Outcome, call

NAMED = ("--role", ROLE, "--account", ACCOUNT)
NO_CONFIG = ("-c", "")
NOT_COMPARED = "Note: the enclave that runs was not compared: "
LISTED = PCRS["PCR0"]  # of the enclave that nitro-cli lists


@pytest.fixture(autouse=True)
def nitro_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NitroCli:
    """A host with one enclave."""
    found = NitroCli(tmp_path / "bin")
    found.show(enclave(16))
    monkeypatch.setenv("PATH", found.path_environment()["PATH"])
    return found


def printed(*arguments: str) -> dict[str, Any]:
    done = call("kms-policy", *arguments)
    assert (done.status, done.err) == (0, "")
    policy: dict[str, Any] = json.loads(done.out)
    return policy


def checked(policy: object, *arguments: str) -> Outcome:
    text = policy if isinstance(policy, str) else json.dumps(policy)
    return call("kms-policy", "--check-file", "-", *(arguments or NO_CONFIG), stdin=text)


def refused(*arguments: str) -> str:
    done = call("kms-policy", *arguments)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error: ")
    return done.err


def configured(tmp_path: Path, *vaults: str) -> tuple[str, str]:
    path = tmp_path / "signatory.yaml"
    lines = [f"  {name}: {{driver: nitro, config: {text}}}\n" for name, text in enumerate(vaults)]
    path.write_text("vaults:\n" + "".join(lines))
    return "-c", str(path)


def test_the_policy_is_printed() -> None:
    assert printed("--pcr0", NEW, *NAMED) == ours(PCR0=[NEW])
    more = printed("--pcr0", NEW, "--pcr0", OLD.upper(), "--pcr3", OLD, "--pcr8", NEW, "--admin", ADMIN, *NAMED)
    assert more == ours(PCR0=[OLD, NEW], PCR3=[OLD], PCR8=[NEW], administrators=(ADMIN,))
    assert call("kms-policy", "--pcr0", NEW, *NAMED).out == json.dumps(ours(PCR0=[NEW]), indent=2) + "\n"


def test_the_example_is_what_is_printed() -> None:
    example = Path(__file__).parents[3] / "contrib/kms/key-policy.json"
    role = ("--role", "signatory-nitro-role", "--account", ACCOUNT, "--admin", ADMIN)
    assert call("kms-policy", "--pcr0", OLD, *role).out == example.read_text()


def test_account_and_partition_come_from_the_arn() -> None:
    assert printed("--pcr0", NEW, "--role", ROLE) == ours(PCR0=[NEW])
    china = json.dumps(printed("--pcr0", NEW, "--role", ROLE.replace("aws", "aws-cn")))
    assert china == json.dumps(ours(PCR0=[NEW])).replace("arn:aws:", "arn:aws-cn:")
    role = ("--role", "signatory-nitro-role", "--account", ACCOUNT, "--pcr0", NEW)
    assert printed(*role) == ours(PCR0=[NEW])
    assert json.dumps(printed(*role, "--region", "cn-north-1")) == china
    assert json.dumps(printed(*role, "--partition", "aws-cn")) == china


def test_the_role_of_a_session() -> None:
    session = f"arn:aws:sts::{ACCOUNT}:assumed-role/signatory-nitro-role/i-0123456789abcdef0"
    done = call("kms-policy", "--pcr0", NEW, "--role", session)
    assert (done.status, json.loads(done.out)) == (0, ours(PCR0=[NEW]))
    assert f"taken for {ROLE}" in done.err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("--pcr0", NEW), "--pcr0 and --role are needed"),
        (("--role", ROLE), "--pcr0 and --role are needed"),
        (("--pcr0", NEW, "--role", "name"), "--account is needed"),
        (("--pcr0", NEW, "--role", "name", "--account", "1"), "expected twelve digits"),
        (("--pcr0", ZEROS, *NAMED), "PCR0: a register of zeros is that of debug mode"),
        (("--pcr0", NEW, "--pcr8", ZEROS, *NAMED), "PCR8: a register of zeros"),
        (("--pcr0", "abc", *NAMED), "PCR0: expected 96"),
        (("--pcr0", NEW, "--role", ROLE, "--account", "444455556666"), f"is of account {ACCOUNT}"),
        (("--pcr0", NEW, *NAMED, "--partition", "aws-cn"), "of another partition"),
        (("--pcr0", NEW, *NAMED, "--admin", "me"), "--admin me: expected arn:aws:iam::"),
        (("--pcr0", NEW, *NAMED, "--admin", ROLE), "--admin and --role are the same"),
        (("--pcr0", NEW, *NAMED, "--admin", f"arn:aws:iam::{ACCOUNT}:role/*"), "expected arn:aws:iam::"),
        (("--pcr0", NEW, *NAMED, "--admin", "arn:aws:iam::444455556666:role/x"), "nobody of another account"),
        (("--pcr0", NEW, *NAMED, "--check", ""), "not an empty text"),
        (("--pcr0", NEW, *NAMED, "--check-file", ""), "not an empty text"),
        (("--check", "k", "--pcr0", "abc"), "PCR0: expected 96"),
        (("--check", "k", "--role", "name"), "--account is needed"),
        (("--check", "k", "--role", ROLE, "--account", "444455556666"), f"is of account {ACCOUNT}"),
        (("--check", "k", "--account", "1"), "expected twelve digits"),
        (("--check", "k", "--check-file", "f"), "one of --check and --check-file"),
        (("--check", "k", "--admin", ADMIN), "--admin is for the policy to print"),
    ],
)
def test_options_refused(arguments: tuple[str, ...], reason: str) -> None:
    assert reason in refused(*arguments)


def test_nothing_found() -> None:
    assert checked(ours(PCR0=[LISTED])) == Outcome(0, "nothing found\n", "-: 0 error(s), 0 warning(s)\n")


def test_findings() -> None:
    done = checked(ours(PCR0=[OLD]))
    assert done.status == 1
    assert done.out == (
        f"error: running enclave signer: its PCR0 {LISTED} is not accepted: it can't open its keys\n"
        "    Add it to the policy, in Allow and Deny, or run the released image.\n"
        f"warning: policy: PCR0 {OLD} is of no release known here: an old image can still open the keys\n"
        "    Remove it once nothing of that image runs.\n"
    )
    assert done.err == "-: 1 error(s), 1 warning(s)\n"


def test_a_policy_writes_nothing_of_its_own_to_the_terminal() -> None:
    policy = ours(PCR0=[LISTED])
    policy["Statement"].append(allow("kms:Decrypt", "\x1b[1A", Sid="x)\nnothing found\r\x1b[2K"))
    done = checked(policy)
    assert (done.status, done.err) == (1, "-: 0 error(s), 1 warning(s)\n")
    assert "statement 6 (x)\\u000anothing found\\u000d\\u001b[2K): kms:Decrypt" in done.out
    assert "is open to \\u001b[1A without" in done.out
    assert done.out.replace("\n", "").isprintable()
    assert len(done.out.splitlines()) == 2


def test_a_warning_alone_is_a_finding() -> None:
    done = checked(ours(PCR0=[OLD, LISTED]))
    assert (done.status, done.err) == (1, "-: 0 error(s), 1 warning(s)\n")


@pytest.mark.parametrize("name", BAD)
def test_bad_policies(name: str) -> None:
    severity, text, policy = BAD[name]
    done = checked({"Statement": policy}, "--account", ACCOUNT, *NO_CONFIG)
    assert done.status == 1
    assert any(line.startswith(f"{severity}: ") and text in line for line in done.out.splitlines())


def test_a_file_and_what_the_aws_cli_prints(tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({"Policy": json.dumps(ours(PCR0=[LISTED]))}).encode())
    done = call("kms-policy", "--check-file", str(path), *NO_CONFIG)
    assert (done.status, done.out) == (0, "nothing found\n")


@pytest.mark.parametrize(
    ("text", "reason"), [("", "no JSON"), ("{}", "no Statement"), (" " * (1024 * 1024 + 1), "no key policy")]
)
def test_what_is_no_policy_cannot_be_checked(text: str, reason: str) -> None:
    done = checked(text)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("Error: cannot check: ")
    assert reason in done.err


def test_what_cannot_be_read_cannot_be_checked(tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    done = call("kms-policy", "--check-file", missing, *NO_CONFIG)
    assert done == Outcome(2, "", f"Error: cannot check: {missing}: No such file or directory\n")
    done = checked(ours(PCR0=[LISTED]), "-c", missing)
    assert (done.status, done.out) == (2, "")
    assert '-c "" leaves the configuration out' in done.err


def test_without_nitro_cli_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = checked(ours(PCR0=[OLD]))
    assert (done.status, done.out) == (0, "nothing found\n")
    assert done.err.startswith(f"{NOT_COMPARED}nitro-cli is not on the PATH\n")


def test_what_nitro_cli_says(nitro_cli: NitroCli) -> None:
    nitro_cli.fail(39, "[ E39 ] Enclave process connection failure")
    assert f"{NOT_COMPARED}nitro-cli describe-enclaves ended with status 39" in checked(ours(PCR0=[OLD])).err
    nitro_cli.show()
    assert f"{NOT_COMPARED}no enclave is RUNNING" in checked(ours(PCR0=[OLD])).err
    nitro_cli.show(enclave(16), enclave(17, name="other"))
    assert f"{NOT_COMPARED}several enclaves are RUNNING" in checked(ours(PCR0=[OLD])).err
    nitro_cli.show(enclave(16, flags="DEBUG_MODE"))
    done = checked(ours(PCR0=[LISTED]))
    assert done.status == 1
    assert "error: running enclave signer: runs in debug mode" in done.out


def test_the_configuration_says_which_enclave_and_which_images(tmp_path: Path, nitro_cli: NitroCli) -> None:
    nitro_cli.show(enclave(16), enclave(17, name="other", pcrs={"PCR0": OLD}))
    named = configured(tmp_path, "{encryption_key_id: k, enclave_name: other}")
    assert checked(ours(PCR0=[OLD]), *named).status == 0
    by_cid = configured(tmp_path, "{encryption_key_id: k, enclave_cid: 16}")
    assert f"its PCR0 {LISTED} is not accepted" in checked(ours(PCR0=[OLD]), *by_cid).out
    images = f"{{encryption_key_id: k, enclave_name: other, expected_pcrs: {{PCR0: [{OLD}, {NEW}]}}}}"
    done = checked(ours(PCR0=[OLD]), *configured(tmp_path, images))
    assert f"warning: 0: expected_pcrs: PCR0 {NEW} is not accepted" in done.out
    assert checked(ours(PCR0=[OLD, NEW]), *configured(tmp_path, images)).status == 0


def test_two_vaults_and_no_word_which(tmp_path: Path) -> None:
    two = configured(tmp_path, f"{{encryption_key_id: k, expected_pcrs: {{PCR0: {NEW}}}}}", "{encryption_key_id: l}")
    assert checked(ours(PCR0=[LISTED]), *two).status == 0


def test_the_images_given() -> None:
    done = checked(ours(PCR0=[LISTED, OLD]), "--pcr0", NEW, "--pcr0", OLD, *NO_CONFIG)
    assert done.status == 1
    assert done.out.startswith(f"warning: --pcr0: PCR0 {NEW} is not accepted by the policy\n")
    assert "of no release" not in done.out


def test_a_register_that_is_not_asked_for() -> None:
    done = checked(ours(PCR0=[LISTED]), "--pcr0", LISTED, "--pcr8", OLD, *NO_CONFIG)
    assert (done.status, "warning: policy: PCR8 is not asked for" in done.out) == (1, True)


def test_the_account_of_the_role_given() -> None:
    policy = ours(PCR0=[LISTED])
    policy["Statement"].append(allow("kms:DescribeKey", "arn:aws:iam::444455556666:root"))
    done = checked(policy, "--role", ROLE, *NO_CONFIG)
    assert f"is of another account than the key ({ACCOUNT})" in done.out


def test_the_role_given() -> None:
    assert checked(ours(PCR0=[LISTED]), *NAMED, *NO_CONFIG).status == 0
    done = checked(ours(PCR0=[LISTED]), "--role", "another", "--account", ACCOUNT, *NO_CONFIG)
    assert "role/another is not the one that may decrypt" in done.out
