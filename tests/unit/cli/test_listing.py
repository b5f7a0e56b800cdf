"""What needs no configuration: kinds, version, help, flags, usage errors, and the listing to the space (section 7)."""

import importlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import click
import pytest
from click.testing import CliRunner

from signer import __version__
from signer.cli import listing
from signer.cli.common import CliGroup
from signer.cli.keys import parse_options
from signer.observe import logs
from signer.policy import KeyPolicy
from signer.service import ListedKey
from signer.tezos.keys import PublicKey
from signer.vaults.interface import Vault, VaultKey

# `signer.cli.main` is a function, too: the module is found by its name only.
program = importlib.import_module("signer.cli.main")

CLEAN = dict.fromkeys(("ENCLAVE_CID", "ENCLAVE_PORT", "ENCRYPTION_KEY_ID", "PROXY_LOCAL_PORT", "PROXY_REMOTE_ADDRESS"))
REQUESTS = ["attestation", "attestation_with_dal", "block", "generic", "pack", "preattestation"]
EDPK = "edpkv45regue1bWtuHnCgLU8xWKLwa9qRqv4gimgJKro4LSc3C5VjV"
TZ1 = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


SEED = "edsk4FTF78Qf1m2rykGpHqostAiq5gYW4YZEoGUSWBTJr2njsDHSnd"  # of the vectors of section 6


def call(*arguments: str, stdin: str | bytes = b"", env: Mapping[str, str | None] | None = None) -> Outcome:
    """Run the program in this process, without what it does to a whole process: logging, core dumps."""
    runner = CliRunner(env={**CLEAN, **(env or {})})
    with pytest.MonkeyPatch.context() as patch, runner.isolation(stdin) as (out, err, _):
        patch.setattr(logs, "configure", lambda *_, **__: None)
        patch.setattr(program, "forbid_core_dumps", lambda: None)
        status = program.run([*arguments])
        return Outcome(status, out.getvalue().decode(), err.getvalue().decode())


def commands(group: click.Group = program.cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command's path, groups included."""
    found = [path]
    for name, command in group.commands.items():
        found += commands(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


def test_request_kinds() -> None:
    expected = "Possible request types:\n" + "".join(f"    - {kind}\n" for kind in REQUESTS)
    assert call("list-requests") == Outcome(0, expected, "")
    assert json.loads(call("list-requests", "--json").out) == REQUESTS


def test_operation_kinds() -> None:
    done = call("list-ops")
    title, *lines = done.out.splitlines()
    assert (done.status, title, done.err) == (0, "Possible operation types:", "")
    kinds = [line.removeprefix("    - ") for line in lines]
    assert lines == [f"    - {kind}" for kind in kinds]
    assert len(set(kinds)) == 39
    assert kinds == sorted(kinds)
    assert {"transaction", "stake", "update_companion_key", "activate_account", "zk_rollup_update"} < set(kinds)
    assert json.loads(call("list-ops", "--json").out) == kinds


@pytest.mark.parametrize("name", ["version", "v"])
def test_version(name: str) -> None:
    assert call(name) == Outcome(0, f"Release Version: {__version__}\n", "")


def test_no_command_prints_the_help() -> None:
    assert call() == call("--help")
    assert call().status == 0


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_explains_itself(path: tuple[str, ...]) -> None:
    done = call(*path, "--help")
    assert (done.status, done.err) == (0, "")
    assert done.out.startswith(f"Usage: {' '.join(('signer', *path))} ")
    for flag in ("-c, --config", "--log", "--base-dir", "--json-log", "-h, --help"):
        assert f"  {flag} " in done.out
    assert call(*path, "-h") == done


def test_the_commands_of_the_issue() -> None:
    names = "serve import generate list list-requests list-ops version decode config watermark demo prove-possession"
    more = "help completion kms-policy measure attest seal-for reseal"
    assert set(program.cli.commands) == {*more.split(), *names.split()}


@pytest.mark.parametrize("name", ["list", "import", "generate", "prove-possession"])
def test_v_means_vault_everywhere(tmp_path: Path, name: str) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SEED)
    argument = {"prove-possession": (TZ1,), "import": ("--from", str(secret))}.get(name, ())
    common = ("-c", "", "--base-dir", str(tmp_path), *argument)
    done = call(name, "-v", "nowhere", *common)
    assert done.status == 1
    assert done.err.startswith("Error: ")
    assert done == call(name, "--vault", "nowhere", *common)
    assert "No such option" not in done.err
    missing = "vault nowhere is not found; the configuration has no vaults"
    expected = {"list": missing, "prove-possession": f"{TZ1} is not listed in config"}
    assert expected.get(name, f"import: {missing}") in done.err


@pytest.mark.parametrize("name", ["import", "generate"])
def test_the_vault_is_required(name: str) -> None:
    done = call(name, "-c", "")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f'Error: required flag(s) "vault" not set\nUsage: signer {name} ')


@pytest.mark.parametrize("level", [("--log", "debug"), ("--log=debug",), ("--log", "trace"), ("--log=trace",)])
def test_the_trace_of_a_bug_shows_at_debug(level: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("signer.cli.requests._print_kinds", fail)
    done = call("list-ops", "--log=info")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error: internal error (ZeroDivisionError); --log debug shows the trace")
    with pytest.raises(ZeroDivisionError):
        call("list-ops", *level)
    with pytest.raises(ZeroDivisionError):
        call(*level, "list-ops")


def test_unknown_key_type() -> None:
    done = call("generate", "-v", "x", "-t", "tz5", "-c", "")
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith("Error: unknown key type: tz5\nUsage: signer generate ")


@pytest.mark.parametrize(
    ("arguments", "text", "usage"),
    [
        (("nothing",), "No such command 'nothing'", "signer"),
        (("--nothing",), "No such option '--nothing'", "signer"),
        (("list-ops", "--nothing"), "No such option '--nothing'", "signer list-ops"),
        (("list-ops", "extra"), "Got unexpected extra argument (extra)", "signer list-ops"),
        (("version", "--log", "loud"), "'loud' is not one of", "signer version"),
        (("generate", "-v", "x", "-n", "0"), "0 is not in the range", "signer generate"),
        (("watermark", "nothing"), "No such command 'nothing'", "signer watermark"),
        (("demo", "--keys", "tz5=1"), "expected tz1|tz2|tz3|tz4=NUMBER", "signer demo"),
        (("demo", "--keys", "tz4=0"), "a demo needs at least one key", "signer demo"),
    ],
)
def test_usage_errors(arguments: tuple[str, ...], text: str, usage: str) -> None:
    done = call(*arguments)
    assert (done.status, done.out) == (1, "")
    first, second = done.err.splitlines()
    assert first.startswith("Error: ")
    assert text in first
    assert second.startswith(f"Usage: {usage} ")


@pytest.mark.parametrize("level", ["error", "warn", "info", "debug", "trace", "fatal", "panic", "warning"])
def test_global_flags_before_or_after_the_command(level: str) -> None:
    flags = ("--log", level, "--json-log", "--base-dir", "/nowhere", "-c", "/nowhere")
    expected = call("version")
    assert call(*flags, "version") == expected
    assert call("version", *flags) == expected


def test_a_flag_after_the_command_wins(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{}")
    assert call("-c", str(path), "config", "check").status == 0
    assert call("config", "-c", "/nowhere", "check", "-c", str(path)).status == 0
    done = call("config", "check")
    assert done.err == "Error: CRITICAL: Config file permission error: file does not exist: /etc/signatory.yaml\n"


def listed(policy: KeyPolicy | None) -> ListedKey:
    class Nitro:
        name, kind = "mine", "NitroEnclave"

    return ListedKey(cast(Vault, Nitro()), VaultKey(PublicKey.from_base58(EDPK), ""), policy)


def test_the_listing_to_the_space() -> None:
    policy = KeyPolicy(requests=("attestation", "block"), operations=(), allow_proof_of_possession=False)
    head = (
        f"Public Key Hash:           {TZ1}\n"
        f"Public Key:                {EDPK}\n"
        "Reference:                 \n"
        "Vault:                     NitroEnclave\n"
    )
    assert listing.as_text(listed(None)) == head + "Active:                    false\n"
    assert listing.as_text(listed(policy)) == (
        head + "Active:                    true\n"
        "Allowed Requests:          [attestation block]\n"
        "Allowed Operations:        []\n"
        "Allow Proof of Possession: false\n"
    )


def test_the_listing_as_values() -> None:
    policy = KeyPolicy(requests=("generic",), operations=("reveal",), allow_proof_of_possession=True)
    facts: dict[str, Any] = {
        "public_key_hash": TZ1,
        "public_key": EDPK,
        "reference": "",
        "vault": "NitroEnclave",
        "vault_name": "mine",
    }
    allowed = {"allowed_requests": ["generic"], "allowed_operations": ["reveal"], "allow_proof_of_possession": True}
    assert listing.as_json(listed(None)) == facts | {"active": False}
    assert listing.as_json(listed(policy)) == facts | {"active": True} | allowed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a:b", {"a": "b"}),
        ("a:b,c:d", {"a": "b", "c": "d"}),
        ("a:'b,c',d:\"e:'f\"", {"a": "b,c", "d": "e:'f"}),
        (r"a:b\,c\\", {"a": r"b,c" + "\\"}),
        ("a:b:c", {"a": "b:c"}),
        ("a:", {"a": ""}),
        ("a", None),
        ("", None),
        (":b", None),
        ("a:'b", None),
    ],
)
def test_options_of_a_vault(text: str, expected: dict[str, str] | None) -> None:
    if expected is not None:
        assert parse_options(text) == expected
        return
    with pytest.raises(click.UsageError, match=re.escape(f"--opt {text}: ")):
        parse_options(text)


def test_aliases_hide_no_command() -> None:
    group = program.cli
    assert isinstance(group, CliGroup)
    assert group.get_command(click.Context(group), "v") is group.commands["version"]
    assert "v" not in group.commands


def test_help_of_a_command() -> None:
    assert call("help", "watermark", "set") == call("watermark", "set", "--help")
    assert call("help") == call("--help")
    assert call("help", "nope").err.startswith("Error: no such command: nope\n")


def test_a_group_alone_explains_itself() -> None:
    assert call("config") == call("config", "--help")
    assert call().status == 0


def test_a_script_for_the_shell() -> None:
    assert "_SIGNER_COMPLETE" in call("completion", "bash").out


@pytest.mark.parametrize("text", ["a:b\\", "a:'b", "a", ":b", "a:b,,"])
def test_options_that_are_none(text: str) -> None:
    with pytest.raises(click.UsageError):
        parse_options(text)


class _Kms:
    name, kind = "k", "AWSKMS"


KMS = cast(Vault, _Kms())


def test_what_people_call_a_key_of_kms_has_lines_of_its_own() -> None:
    arn = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
    labels = {"aliases": ("alias/baker", "alias/b"), "tags": (("Name", "baker"), ("team", "ops"))}
    key = ListedKey(KMS, VaultKey(PublicKey.from_base58(EDPK), arn, **cast("Any", labels)), None)
    lines = listing.as_text(key).splitlines()
    assert lines[2:6] == [
        f"Reference:                 {arn}",
        "Aliases:                   [alias/baker alias/b]",
        "Tags:                      [Name=baker team=ops]",
        "Vault:                     AWSKMS",
    ]
    assert listing.as_json(key)["aliases"] == ["alias/baker", "alias/b"]
    assert listing.as_json(key)["tags"] == {"Name": "baker", "team": "ops"}


def test_a_key_of_kms_without_labels_is_listed_as_the_reference_does() -> None:
    key = ListedKey(KMS, VaultKey(PublicKey.from_base58(EDPK), "arn:aws:kms:x"), None)
    assert listing.as_text(key).splitlines()[2:4] == [
        "Reference:                 arn:aws:kms:x",
        "Vault:                     AWSKMS",
    ]
    assert not {"aliases", "tags"} & listing.as_json(key).keys()
