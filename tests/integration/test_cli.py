"""The command line as operators use it: real processes, a real enclave process, a real terminal (section 7)."""

from __future__ import annotations

import errno
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)

from signer import __version__, crypto
from signer.crypto.formats import encrypt, parse_secret_key, to_base58
from signer.crypto.interface import SecretKey
from signer.tezos.keys import Curve, PublicKey, Signature
from tests.integration.conftest import DEADLINE, ENVIRONMENT, Setup, attestation, free_port, running, wait_for

CURVES = dict(zip(("tz1", "tz2", "tz3", "tz4"), Curve, strict=True))
COMPAT = Path(__file__).parents[2] / "contrib" / "compat"
BIN = Path(sys.executable).parent
PASSWORD = "correct horse battery staple"
COMMANDS = """
serve | version | v | list | import | generate | prove-possession | list-requests | list-ops | decode | config |
config check | watermark | watermark list | watermark set | watermark reset | watermark import | watermark export | demo
"""

# Known answers of section 6.8: public test keys.
TZ1_SECRET, TZ1 = "edsk4FTF78Qf1m2rykGpHqostAiq5gYW4YZEoGUSWBTJr2njsDHSnd", "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
TZ1_MESSAGE = bytes.fromhex(
    "13ed9d217cfc81eee810737b04018acef4db74d056b79edc43e6be46cae7e4c217c22a82f01500120000518d0000000003e7ea1f"
    "67dbb0bb6cfa372cb092cd9cf786b4f1b5e5139da95b915fb95e698d"
)
TZ1_SIGNATURE = "edsigtuRwihvmjUkXsNXix1isC4aEaHjwSqL4csc2cQrcqufFmDkVsWdqWT1t15NVjVSfcJMzqvcXnyA1EGy1BgQCt6ZQxSDk9Y"
TZ4_SECRET, TZ4 = "BLsk1XMDG3iepYGj15mBWc7dYjrkpVVM4VH3y5DyBCN9iAGrELwRbY", "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME"
TZ4_PROOF = (
    "BLsigAy8AtcyrqtA8AsyYZq4GUj3b2hbbJswfTphEj1haJJVmwoueZhwGcV5Ewjm5YAvrQVeuikt5tK9BXjhhbPWaroBmpfCWpmCGYwJ5FvUn7"
    "dkW7ekQHAeHy3yiWzik2NaT1q6KTKfqv"
)
OTHER_BLPK = "BLpk1w7hcraa8qBo8f7sNBteUVoSejrS779YUra1deGqZgWSw8xUVYrNSMkxWrDAAwTtFtJxvMbK"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Setup]:
    """One enclave and one base directory for the tests that only add keys of their own."""
    with running(tmp_path_factory.mktemp("c")) as setup:
        setup.start_enclave()
        setup.write_config()
        yield setup


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str


def run(setup: Setup, *arguments: str, stdin: bytes = b"") -> Done:
    done = setup.run(*arguments, stdin=stdin)
    return Done(done.returncode, done.stdout.decode(), done.stderr.decode())


def secret(curve: Curve) -> SecretKey:
    return crypto.generate_secret_key(curve)


def imported(done: Done, *keys: SecretKey) -> str:
    """What an import wrote to standard error: the log lines of *keys*, in order, and nothing of a secret."""
    assert (done.status, done.out) == (0, ""), done.err
    for text in ("Requesting import operation", "Successfully imported"):
        assert re.findall(rf'level=info msg="{text}" pkh=(\S+) vault=NitroEnclave\n', done.err) == [
            str(key.public_key.hash) for key in keys
        ]
    no_secret(done, *keys)
    return done.err


def refused(done: Done, *keys: SecretKey) -> str:
    assert (done.status, done.out) == (1, "")
    assert "Traceback" not in done.err
    no_secret(done, *keys)
    return done.err.partition("Error: ")[2].partition("\n")[0]


def no_secret(done: Done, *keys: SecretKey) -> None:
    for key in keys:
        for text in (to_base58(key), bytes(key.secret_bytes()).hex()):
            assert text not in done.out + done.err
    assert PASSWORD not in done.out + done.err


def stored(setup: Setup) -> set[str]:
    """The addresses whose sealed keys are on the disk."""
    return {entry["public_key_hash"] for entry in json.loads((setup.base_dir / "enclave_keys.json").read_text())}


def listed(setup: Setup) -> dict[str, dict[str, Any]]:
    done = run(setup, "list", "--json")
    assert done.status == 0, done.err
    return {key["public_key_hash"]: key for key in json.loads(done.out)}


# -- generate, list


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tz1", "tz1"),
        ("ed25519", "tz1"),
        ("tz2", "tz2"),
        ("secp256k1", "tz2"),
        ("tz3", "tz3"),
        ("p256", "tz3"),
        ("tz4", "tz4"),
        ("bls", "tz4"),
    ],
)
def test_generate_prints_the_key(shared: Setup, name: str, kind: str) -> None:
    done = run(shared, "generate", "-v", "nitro", "--type", name)
    assert done.status == 0, done.err
    match = re.fullmatch(
        r"Public Key Hash:           (\S+)\n"
        r"Public Key:                (\S+)\n"
        r"Reference:                 \n"
        r"Vault:                     NitroEnclave\n"
        r"Active:                    false\n"
        r"\n",
        done.out,
    )
    assert match is not None, done.out
    key = PublicKey.from_base58(match[2])
    assert str(key.hash) == match[1]
    assert match[1].startswith(kind)
    assert match[1] in stored(shared)


def test_generate_several(shared: Setup) -> None:
    before = stored(shared) if (shared.base_dir / "enclave_keys.json").exists() else set()
    done = run(shared, "generate", "--vault", "nitro", "-n", "3")
    made = re.findall(r"^Public Key Hash: +(tz1\S+)$", done.out, re.MULTILINE)
    assert done.out.count("\n\n") == len(set(made)) == 3
    done = run(shared, "generate", "-v", "nitro", "--num", "2", "-t", "tz4", "--json")
    more = [key["public_key_hash"] for key in json.loads(done.out)]
    assert stored(shared) == before | {*made, *more}
    assert len(more) == 2


def test_list(setup: Setup) -> None:
    addresses = setup.generate("tz1", 3) + setup.generate("tz4")
    plain, default, explicit, proving = addresses
    del setup.policies[plain]
    setup.policies[default] = None
    setup.policies[explicit] = {"allow": {"generic": ["transaction", "reveal"], "block": None, "attestation": None}}
    setup.write_config()
    done = run(setup, "list")
    assert done.status == 0
    blocks = done.out.split("\n\n")
    assert blocks.pop() == "", "a blank line behind each, the last one too"
    by_key = {block.partition("\n")[0].split()[-1]: block.splitlines() for block in blocks}
    assert set(by_key) == set(addresses)
    keys = listed(setup)
    policy = {
        plain: ["Active:                    false"],
        default: [
            "Active:                    true",
            "Allowed Requests:          [block preattestation attestation]",
            "Allowed Operations:        []",
            "Allow Proof of Possession: false",
        ],
        explicit: [
            "Active:                    true",
            "Allowed Requests:          [attestation block generic]",
            "Allowed Operations:        [reveal transaction]",
            "Allow Proof of Possession: false",
        ],
        proving: [
            "Active:                    true",
            "Allowed Requests:          [attestation attestation_with_dal block preattestation]",
            "Allowed Operations:        []",
            "Allow Proof of Possession: true",
        ],
    }
    for pkh, lines in by_key.items():
        assert lines == [
            f"Public Key Hash:           {pkh}",
            f"Public Key:                {keys[pkh]['public_key']}",
            "Reference:                 ",
            "Vault:                     NitroEnclave",
            *policy[pkh],
        ]
    facts = {"reference": "", "vault": "NitroEnclave", "vault_name": "nitro"}
    head = {"public_key_hash": plain, "public_key": keys[plain]["public_key"]}
    assert keys[plain] == head | facts | {"active": False}
    assert keys[explicit] == keys[explicit] | facts | {
        "active": True,
        "allowed_requests": ["attestation", "block", "generic"],
        "allowed_operations": ["reveal", "transaction"],
        "allow_proof_of_possession": False,
    }
    assert run(setup, "list", "-v", "nitro").out == done.out
    assert refused(run(setup, "list", "-v", "other")) == "vault other is not found; the configuration has: nitro"


def test_without_its_enclave(setup: Setup) -> None:
    setup.generate("tz1")
    setup.stop(setup.processes[0])
    done = run(setup, "list")
    assert (done.status, done.out) == (0, ""), "a vault that fails is skipped"
    assert 'level=error msg="Error initializing vault, skipping..." vault_name=nitro' in done.err
    text = "import: vault nitro is not found; it is in the configuration but cannot be used now, the log above says why"
    assert refused(run(setup, "generate", "-v", "nitro")) == text
    assert refused(run(setup, "import", "-v", "nitro", stdin=TZ1_SECRET.encode())) == text


# -- import


@pytest.mark.parametrize("kind", list(CURVES))
def test_import_from_an_argument_warns(shared: Setup, kind: str) -> None:
    key = secret(CURVES[kind])
    text = imported(run(shared, "import", "-v", "nitro", to_base58(key)), key)
    assert text.startswith("WARNING: secrets given as arguments stay in the shell's history")
    assert listed(shared)[str(key.public_key.hash)]["public_key"] == str(key.public_key)


def test_import_of_several_arguments_reads_all_before_it_stores_one(shared: Setup) -> None:
    first, third = secret(Curve.P256), secret(Curve.P256)
    done = run(shared, "import", "--vault", "nitro", to_base58(first), "edsk-nonsense", to_base58(third))
    text = refused(done, first, third)
    assert text.startswith("key 2 of 3: ")
    assert "nonsense" not in done.err
    assert not {str(first.public_key.hash), str(third.public_key.hash)} & stored(shared)


def test_import_of_several_arguments_stops_at_the_first_that_the_vault_refuses(shared: Setup) -> None:
    first, third = secret(Curve.P256), secret(Curve.P256)
    done = run(shared, "import", "--vault", "nitro", *map(to_base58, (first, first, third)))
    pkh = first.public_key.hash
    text = refused(done, first, third)
    assert text == f"key 2 of 3: (Nitro): {pkh} is in the vault already; stored before it: {pkh}"
    assert str(pkh) in stored(shared)
    assert str(third.public_key.hash) not in stored(shared)


@pytest.mark.parametrize("form", ["{}", "{}\n", "  unencrypted:{}\r\n\n"])
def test_import_from_piped_standard_input(shared: Setup, form: str) -> None:
    key = secret(Curve.ED25519)
    text = imported(run(shared, "import", "-v", "nitro", stdin=form.format(to_base58(key)).encode()), key)
    assert "WARNING" not in text
    assert str(key.public_key.hash) in stored(shared)


def test_import_of_several_lines(shared: Setup) -> None:
    keys = [secret(curve) for curve in Curve]
    lines = "\n".join(to_base58(key) for key in keys)
    imported(run(shared, "import", "-v", "nitro", stdin=lines.encode()), *keys)
    assert {str(key.public_key.hash) for key in keys} <= stored(shared)


@pytest.mark.parametrize(
    ("stdin", "text"),
    [
        (b"", "standard input holds no secret key"),
        (b" \n", "standard input holds no secret key"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "failed to decode PEM block"),
        (TZ1.encode(), "gotez: unknown private key prefix"),
        (TZ1_SECRET[:-1].encode(), "gotez: base58Check decoding error"),
    ],
)
def test_import_of_what_is_no_key(shared: Setup, stdin: bytes, text: str) -> None:
    done = run(shared, "import", "-v", "nitro", stdin=stdin)
    assert refused(done).startswith(text), done.err
    assert TZ1_SECRET[:-1] not in done.err


@pytest.mark.parametrize("encoding", [Encoding.PEM, Encoding.DER])
@pytest.mark.parametrize("passphrase", [None, PASSWORD])
def test_import_from_a_file(shared: Setup, tmp_path: Path, encoding: Encoding, passphrase: str | None) -> None:
    protection: KeySerializationEncryption = NoEncryption()
    if passphrase is not None:
        protection = BestAvailableEncryption(passphrase.encode())
    data = ec.generate_private_key(ec.SECP256R1()).private_bytes(encoding, PrivateFormat.PKCS8, protection)
    (tmp_path / "key").write_bytes(data)
    (tmp_path / "password").write_text(PASSWORD + "\n")
    key = parse_secret_key(data, lambda: passphrase)
    arguments = ["--from", str(tmp_path / "key"), "--password-file", str(tmp_path / "password")]
    # a file comes before arguments, arguments before standard input
    text = imported(run(shared, "import", "-v", "nitro", *arguments, stdin=TZ1_SECRET.encode()), key)
    assert "WARNING" not in text
    assert str(key.public_key.hash) in stored(shared)


def test_import_from_a_file_that_is_not_there(shared: Setup, tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        assert refused(run(shared, "import", "-v", "nitro", "-f", str(path))).startswith(f"cannot read {path}: ")


@pytest.mark.parametrize("kind", list(CURVES))
def test_import_of_an_encrypted_key(shared: Setup, tmp_path: Path, kind: str) -> None:
    key = secret(CURVES[kind])
    text = f"encrypted:{encrypt(key, PASSWORD, os.urandom(8))}"
    (tmp_path / "password").write_text(PASSWORD + "\n")
    done = run(shared, "import", "-v", "nitro", "--password-file", str(tmp_path / "password"), stdin=text.encode())
    assert "WARNING" not in imported(done, key)
    assert str(key.public_key.hash) in stored(shared)


def test_import_of_an_encrypted_key_without_its_password(shared: Setup, tmp_path: Path) -> None:
    key = secret(Curve.ED25519)
    text = encrypt(key, PASSWORD, os.urandom(8)).encode()
    (tmp_path / "password").write_text(PASSWORD + "r\n")
    done = run(shared, "import", "-v", "nitro", "--password-file", str(tmp_path / "password"), stdin=text)
    assert refused(done, key) == "gotez: unable to decrypt the private key"
    advice = "the secret key is encrypted and no passphrase was given; use --password-file"
    assert refused(run(shared, "import", "-v", "nitro", stdin=text), key) == advice
    assert str(key.public_key.hash) not in stored(shared)


def test_a_password_given_as_an_argument_warns(shared: Setup, tmp_path: Path) -> None:
    key = secret(Curve.ED25519)
    (tmp_path / "key").write_text(encrypt(key, PASSWORD, bytes(8)))
    done = run(shared, "import", "-v", "nitro", "-f", str(tmp_path / "key"), "--password", PASSWORD)
    assert imported(done, key).startswith("WARNING: secrets given as arguments")


# -- a terminal


class Terminal:
    """A process whose standard streams and controlling terminal are a new pseudo-terminal."""

    def __init__(self, command: list[str]) -> None:
        self._ours, theirs = os.openpty()
        self.shown = ""
        try:
            self._process = subprocess.Popen(
                ["setsid", "--ctty", *command], stdin=theirs, stdout=theirs, stderr=theirs, env=ENVIRONMENT
            )
        finally:
            os.close(theirs)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        os.close(self._ours)

    def answer(self, prompt: str, text: str) -> None:
        """Type *text* once *prompt* is the last thing shown: by then nothing that is typed is echoed."""
        while not self.shown.endswith(prompt):
            assert self._read(), f"no prompt {prompt!r}, but: {self.shown!r}"
        os.write(self._ours, text.encode() + b"\n")

    def end(self) -> int:
        while self._read():
            pass
        return self._process.wait(DEADLINE)

    def _read(self) -> bool:
        """Take what is shown next; False when the process has let go of the terminal."""
        if not select.select([self._ours], [], [], DEADLINE)[0]:
            raise TimeoutError(self.shown)
        try:
            self.shown += os.read(self._ours, 4096).decode()
        except OSError as exc:
            assert exc.errno == errno.EIO
            return False
        return True


def test_import_from_the_prompt(shared: Setup) -> None:
    key = secret(Curve.SECP256K1)
    with Terminal(shared.command("import", "-v", "nitro")) as terminal:
        terminal.answer("Enter the secret key: ", to_base58(key))
        assert terminal.end() == 0, terminal.shown
    assert "Successfully imported" in terminal.shown
    assert "WARNING" not in terminal.shown
    no_secret(Done(0, terminal.shown, ""), key)
    assert str(key.public_key.hash) in stored(shared)


def test_import_of_encrypted_keys_asks_for_the_password_once(shared: Setup, tmp_path: Path) -> None:
    first, second = secret(Curve.BLS12_381), secret(Curve.ED25519)
    texts = [encrypt(key, PASSWORD, os.urandom(8)) for key in (first, second)]
    with Terminal(shared.command("import", "-v", "nitro", *texts)) as terminal:
        terminal.answer("Enter the password: ", PASSWORD)
        assert terminal.end() == 0, terminal.shown
    assert terminal.shown.count("Enter the password") == 1
    no_secret(Done(0, terminal.shown, ""), first, second)
    assert {str(first.public_key.hash), str(second.public_key.hash)} <= stored(shared)


def test_a_wrong_password_at_the_prompt(shared: Setup) -> None:
    key = secret(Curve.P256)
    with Terminal(shared.command("import", "-v", "nitro")) as terminal:
        terminal.answer("Enter the secret key: ", encrypt(key, PASSWORD, os.urandom(8)))
        terminal.answer("Enter the password: ", "guess")
        assert terminal.end() == 1
    assert "Error: gotez: unable to decrypt the private key" in terminal.shown
    assert str(key.public_key.hash) not in stored(shared)


def test_progress_on_a_terminal(shared: Setup) -> None:
    with Terminal(shared.command("generate", "-v", "nitro", "-n", "3")) as terminal:
        assert terminal.end() == 0
    assert "generating" in terminal.shown
    assert terminal.shown.count("Public Key Hash:") == 3


# -- beside a running server


def test_an_imported_key_is_usable_at_once(setup: Setup) -> None:
    setup.generate("tz3")
    setup.policies[TZ1] = {"allow": {"attestation": None}}
    setup.write_config()
    setup.start_signer()
    assert setup.api.sign(TZ1, TZ1_MESSAGE)[0] == 404
    imported(run(setup, "import", "-v", "nitro", stdin=TZ1_SECRET.encode()), parse_secret_key(TZ1_SECRET.encode(), str))
    assert setup.api.sign(TZ1, TZ1_MESSAGE) == (200, {"signature": TZ1_SIGNATURE})


def test_every_kind_of_import_signs(setup: Setup) -> None:
    keys = {secret(curve) for curve in Curve}
    setup.policies |= {str(key.public_key.hash): {"allow": {"attestation": None}} for key in keys}
    setup.write_config()
    setup.start_signer()
    run(setup, "import", "-v", "nitro", stdin="\n".join(map(to_base58, keys)).encode())
    for key in keys:
        message = attestation(key.curve, 1)
        status, answer = setup.api.sign(str(key.public_key.hash), message)
        assert status == 200, answer
        assert crypto.verify(key.public_key, message, Signature.from_base58(answer["signature"]))


# -- proof of possession


def test_prove_possession(setup: Setup) -> None:
    (other,) = setup.generate("tz1")
    (unproven,) = setup.generate("tz4")
    setup.policies[unproven]["allow_proof_of_possession"] = False
    setup.policies[TZ4] = {"allow_proof_of_possession": True}
    setup.write_config()
    assert refused(run(setup, "prove-possession", TZ4)) == "this key not found in any vault"
    run(setup, "import", "-v", "nitro", stdin=TZ4_SECRET.encode())
    done = run(setup, "prove-possession", TZ4)
    assert (done.status, done.out) == (0, TZ4_PROOF + "\n")
    assert run(setup, "prove-possession", TZ4, "-v", "nitro").out == done.out
    assert refused(run(setup, "prove-possession", TZ4, "-v", "x")) == "this key not found in any vault"

    key, over = parse_secret_key(TZ4_SECRET.encode(), str).public_key, PublicKey.from_base58(OTHER_BLPK)
    done = run(setup, "prove-possession", TZ4, "--bls-pk", OTHER_BLPK)
    assert done.status == 0
    assert crypto.verify_possession(key, Signature.from_base58(done.out.strip()), over=over)

    for pkh in (other, unproven):
        assert "proof of possession is not allowed" in refused(run(setup, "prove-possession", pkh))
    assert refused(run(setup, "prove-possession", TZ1)) == f"{TZ1} is not listed in config"
    assert refused(run(setup, "prove-possession", TZ4[:-1])).startswith("gotez: ")
    assert "gotez: " in refused(run(setup, "prove-possession", TZ4, "--bls-pk", TZ1))


# -- help, and the programs of the reference


def test_every_help_exits_with_0() -> None:
    def ask(path: str) -> subprocess.CompletedProcess[str]:
        command = [str(BIN / "signer"), *path.split(), "--help"]
        return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=60, check=False)

    paths = ["", *(path.strip() for path in COMMANDS.split("|"))]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for path, done in zip(paths, pool.map(ask, paths), strict=True):
            assert (done.returncode, done.stderr) == (0, "")
            assert done.stdout.startswith(f"Usage: {' '.join(('signer', *path.split()))} [OPTIONS]")
            assert "--json-log" in done.stdout


def compat(name: str, *arguments: str) -> list[str]:
    return [str(COMPAT / name), *arguments]


def compat_environment() -> dict[str, str]:
    return {**ENVIRONMENT, "PATH": f"{BIN}{os.pathsep}{ENVIRONMENT.get('PATH', os.defpath)}"}


@pytest.mark.parametrize("name", ["signatory", "signatory-cli"])
@pytest.mark.parametrize(
    ("arguments", "status", "out"),
    [
        (("version",), 0, f"Release Version: {__version__}\n"),
        (("v",), 0, f"Release Version: {__version__}\n"),
        (("--log", "debug", "-c", "/nowhere", "version"), 0, f"Release Version: {__version__}\n"),
        (("--help",), 0, "Usage: signer"),
        (("list-ops", "--nothing"), 1, ""),
    ],
)
def test_names_of_the_reference(name: str, arguments: tuple[str, ...], status: int, out: str) -> None:
    done = subprocess.run(
        compat(name, *arguments), env=compat_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stderr
    assert done.stdout.startswith(out)
    assert bool(done.stdout) is bool(out)


@pytest.mark.parametrize("command", [["-c", "FILE"], ["-c", "FILE", "serve"], ["serve", "--no-list", "-c", "FILE"]])
def test_signatory_serves(setup: Setup, command: list[str]) -> None:
    (pkh,) = setup.generate("tz2")
    arguments = [str(setup.config) if argument == "FILE" else argument for argument in command]
    with setup.log.open("ab") as log:
        process = subprocess.Popen(compat("signatory", *arguments), stdout=log, stderr=log, env=compat_environment())
    setup.processes.append(process)
    wait_for(lambda: process.poll() is not None or setup.answers(), "the signer")
    assert setup.api.sign(pkh, attestation(Curve.SECP256K1, 1))[0] == 200
    assert setup.stop(process) == 0
    keys_in_log = re.findall(r'msg=Key |msg="Key" ', setup.log.read_text())
    assert bool(keys_in_log) is ("--no-list" not in command)


def test_signatory_cli_lists(setup: Setup) -> None:
    (pkh,) = setup.generate("tz1")
    command = compat("signatory-cli", "-c", str(setup.config), "list")
    done = subprocess.run(command, env=compat_environment(), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0
    assert done.stdout == run(setup, "list").out
    assert done.stdout.startswith(f"Public Key Hash:           {pkh}\n")


# -- the demo


def demo(directory: Path, name: str) -> tuple[dict[str, Any], int]:
    """Run the demo in *directory*/*name* until it is ready, then end it with SIGINT: what it printed, its status."""
    out = directory / "out.json"
    command = [sys.executable, "-m", "signer", "demo", "--dir", name, "--json", "--keys", "tz1=1", "--keys", "tz4=2"]
    command += ["--address", f"127.0.0.1:{free_port()}", "--utility-address", f"127.0.0.1:{free_port()}"]
    environment = ENVIRONMENT | {"PYTHONPATH": str(Path(__file__).parents[2])}
    with out.open("wb") as file, (directory / "err").open("wb") as err:
        process = subprocess.Popen(command, cwd=directory, stdout=file, stderr=err, env=environment)
    try:
        wait_for(lambda: out.read_bytes().endswith(b"\n") or process.poll() is not None, "the demo")
        process.send_signal(signal.SIGINT)
        status = process.wait(DEADLINE)
    finally:
        process.kill()
        process.wait()
    assert (directory / "err").read_text() == ""
    return json.loads(out.read_text()), status


@pytest.mark.parametrize("name", [".demo", "a b$c ${d} $$e"])
def test_the_demo_finds_its_keys_again(tmp_path: Path, name: str) -> None:
    first, status = demo(tmp_path, name)
    assert status == 0
    assert [key["type"] for key in first["keys"]] == ["tz1", "tz4", "tz4"]
    again, status = demo(tmp_path, name)
    assert status == 0
    assert again["keys"] == first["keys"]
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [name]
