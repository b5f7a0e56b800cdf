"""An attested enclave and its host as processes: KMS, security module and root are those of the tests."""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import pytest

from signer import crypto
from signer.attestation.document import ROOT_SHA256, Expected
from signer.crypto.formats import to_base58
from signer.crypto.interface import SecretKey
from signer.tezos.keys import Curve, PublicKeyHash, Signature
from signer.vaults.nitro import sealed_import as lines
from tests import nitro_cli
from tests.attested.documents import PCRS
from tests.attested.enclave import registers_of
from tests.attested.world import PCR0, ROOT, World, attested_world
from tests.integration.conftest import ENVIRONMENT, attestation, wait_for

OTHER = registers_of("other")[0].hex()
SECRET = crypto.load_secret_key(Curve.BLS12_381, bytes(16) + bytes(range(16)))
NONCE = bytes(range(32))


@pytest.fixture
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with attested_world(tmp_path_factory.mktemp("s")) as ready:
        yield ready


def test_generate_restart_and_sign_with_all_four_curves(world: World) -> None:
    """The keys open again in another life of the same image, and for nobody else."""
    enclave = world.start_enclave()
    addresses = [address for kind in ("tz1", "tz2", "tz3", "tz4") for address in world.setup.generate(kind)]
    assert all(b"VFpTQg" in entry for entry in world.key_file().split(b"encrypted_private_key")[1:]), "TZSB"
    world.setup.stop(enclave)
    enclave = world.start_enclave()
    world.setup.start_signer()
    for address in addresses:
        curve = PublicKeyHash.from_base58(address).curve
        status, answer = world.setup.api.sign(address, attestation(curve, 1))
        assert (status, address) == (200, address), answer
    world.setup.stop(enclave)

    other = world.start_enclave("--image", "other")  # changed by one byte
    wait_for(lambda: "is not admitted" in world.setup.log.read_text(), "the refusal")
    assert f"PCR0 is {OTHER}" in world.setup.log.read_text()
    assert world.setup.api.sign(addresses[0], attestation(Curve.ED25519, 2))[0] == 502
    world.setup.stop(other)

    debug = world.start_enclave("--debug")
    wait_for(lambda: "debug mode" in world.setup.log.read_text(), "the refusal of debug mode")
    world.setup.stop(debug)
    world.start_enclave()
    wait_for(
        lambda: world.setup.api.sign(addresses[0], attestation(Curve.ED25519, 3))[0] == 200,
        "a signature by the right image",
    )


def test_kms_refuses_what_the_host_lets_pass(world: World) -> None:
    """With attestation off, the policy of the key is the wall that it has to be."""
    enclave = world.start_enclave()
    world.setup.generate("tz1")
    world.setup.stop(enclave)
    for key in ("pcrs", "attestation_root"):
        del world.setup.nitro[key]
    world.setup.nitro["attestation"] = "off"
    world.setup.write_config()
    world.start_enclave("--image", "other")
    done = world.setup.run("list")
    assert b"AccessDeniedException" in done.stderr
    assert OTHER.encode() in done.stderr, "the image's own register helps to mend the policy"


def test_what_the_enclave_says_is_in_the_hosts_log_and_metrics(world: World) -> None:
    """Counters and classes of errors, never what a call or a refusal of KMS carried."""
    world.start_enclave()
    (address,) = world.setup.generate("tz1")
    world.tell_kms(always="AccessDeniedException")
    refused = world.setup.run("generate", "-v", "nitro", "--log", "debug")
    assert refused.returncode == 1
    assert b"enclave: " not in refused.stderr, "the lines of the signer would hide those of the command"
    assert seal_for(world, b"unencrypted:" + secret_text(SECRET)).returncode == 1
    world.tell_kms(always=None)
    world.setup.start_signer()
    assert world.setup.api.sign(address, attestation(Curve.ED25519, 1))[0] == 200
    wait_for(lambda: "enclave: session 1: opened" in world.setup.log.read_text(), "the enclave's log")

    def counted(*labels: str) -> bool:
        text = world.setup.utility.request("GET", "/metrics")[1].decode()
        return all(f"enclave_counter{{{label}}}" in text for label in labels)

    wait_for(
        lambda: counted(
            'counter="kms_failures",name="AccessDeniedException",vault="nitro"',
            'counter="calls",name="GenerateAndImport",vault="nitro"',
            'counter="errors",name="encryption error",vault="nitro"',
            'counter="sessions_total",name="",vault="nitro"',
        ),
        "the enclave's counters",
    )
    told = world.log_stream()
    for secret in (b"wJalrXUtnFEMI", b"AKIDEXAMPLE", address.encode(), *forms(SECRET)):
        assert secret not in told


def test_legacy_keys_are_sealed_anew_while_the_signer_serves(world: World) -> None:
    world.start_enclave()
    world.setup.nitro["seal"] = "legacy"
    first, second = world.setup.generate("tz1")[0], world.setup.generate("tz4")[0]
    legacy = world.key_file()
    assert blobs_of(legacy)[first][:4] == b"\1\2\2\0"
    world.setup.start_signer()
    assert world.setup.api.sign(first, attestation(Curve.ED25519, 1))[0] == 200
    world.tell_kms(calls=True)
    done = world.setup.run("reseal", "-v", "nitro", first, "--yes")
    assert (done.returncode, done.stdout.decode()) == (0, f"{first}: sealed anew\n"), done.stderr
    done = world.setup.run("reseal", "-v", "nitro", "--all", "--yes")
    assert done.stdout.decode() == f"{first}: of version 1 already\n{second}: sealed anew\n", done.stderr
    assert {blob[:5] for blob in blobs_of(world.key_file()).values()} == {b"TZSB\1"}
    assert all(
        call["context"] for call in world.tell_kms(calls=True)["calls"] if call["operation"] == "GenerateDataKey"
    )
    assert world.setup.api.sign(first, attestation(Curve.ED25519, 2))[0] == 200
    assert world.setup.run("reseal", "-v", "nitro", "--all").returncode == 1, "nobody said yes"


def test_what_cannot_be_sealed_anew_stays_as_it_is(world: World) -> None:
    world.start_enclave()
    world.setup.nitro["seal"] = "legacy"
    (address,) = world.setup.generate("tz1")
    before = world.key_file()
    world.tell_kms(key=world.key, denied=["GenerateDataKey"])
    done = world.setup.run("reseal", "-v", "nitro", address, "--yes")
    assert done.returncode == 1
    assert b"AccessDeniedException" in done.stderr
    done = world.setup.run("reseal", "-v", "nitro", str(SECRET.public_key.hash), "--yes")
    assert b"is not in the vault" in done.stderr
    assert world.key_file() == before


def test_a_key_that_cannot_be_opened_is_not_said_to_be_missing(world: World) -> None:
    world.start_enclave()
    first, second = world.setup.generate("tz1", 2)
    entries = json.loads(world.key_file())
    entries[0]["encrypted_private_key"] = entries[1]["encrypted_private_key"]
    (world.setup.base_dir / "enclave_keys.json").write_text(json.dumps(entries))
    world.setup.start_signer()
    assert world.setup.api.sign(second, attestation(Curve.ED25519, 1))[0] == 200
    wait_for(lambda: "a key of the configuration" in world.setup.log.read_text(), "the warning")
    (told,) = [line for line in world.setup.log.read_text().splitlines() if "a key of the configuration" in line]
    assert f'cannot be used" pkh={first} error="the blob holds the key of {second}"' in told


def test_keys_that_cannot_be_opened_are_not_passed_over_in_silence(world: World) -> None:
    world.start_enclave()
    world.setup.nitro["seal"] = "legacy"
    first, second = world.setup.generate("tz1")[0], world.setup.generate("tz2")[0]
    entries = json.loads(world.key_file())
    damaged = base64.b64decode(entries[0]["encrypted_private_key"])[:-1]
    entries[0]["encrypted_private_key"] = base64.b64encode(damaged).decode()
    (world.setup.base_dir / "enclave_keys.json").write_text(json.dumps(entries))
    done = world.setup.run("reseal", "-v", "nitro", "--all", "--yes")
    assert (done.returncode, done.stdout.decode()) == (1, f"{second}: sealed anew\n"), done.stderr
    assert f"Error: not looked at, for the enclave does not open them: {first}".encode() in done.stderr
    assert blobs_of(world.key_file())[first] == damaged


def blobs_of(key_file: bytes) -> dict[str, bytes]:
    return {
        entry["public_key_hash"]: base64.b64decode(entry["encrypted_private_key"]) for entry in json.loads(key_file)
    }


@pytest.mark.parametrize("seal", ["v1", "legacy"])
def test_a_swapped_blob_never_signs(world: World, seal: str) -> None:
    """Each opens as the key that it is; the store on the host has another address for it."""
    world.start_enclave()
    world.setup.nitro["seal"] = seal
    first, second, third = world.setup.generate("tz1", 3)
    entries = json.loads(world.key_file())
    for one, other in ((0, 1), (1, 0)):
        entries[one]["public_key_hash"] = (first, second)[other]
    (world.setup.base_dir / "enclave_keys.json").write_text(json.dumps(entries))
    world.setup.start_signer()
    assert world.setup.api.sign(third, attestation(Curve.ED25519, 1))[0] == 200
    for address in (first, second):
        status, answer = world.setup.api.sign(address, attestation(Curve.ED25519, 1))
        assert status == 502, answer
        assert f"the blob holds the key of {second if address == first else first}" in str(answer)


# -- signer attest


def attest(world: World, *arguments: str) -> tuple[int, str, str]:
    done = world.setup.run("attest", *arguments)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_what_runs_is_shown(world: World) -> None:
    world.start_enclave()
    status, out, _ = attest(world)
    assert status == 0, out
    assert f"PCR0     the whole image\n          {PCR0}\n          as in the configuration\n" in out
    assert "Debug:    no" in out
    assert "verified to attestation_root, NOT to AWS's root\n" in out
    assert out.endswith("\nas expected\n")
    status, out, _ = attest(world, "--json")
    facts = json.loads(out)
    assert (status, facts["pcrs"]["PCR0"], facts["debug"], facts["differs"]) == (0, PCR0, False, [])
    assert facts["root_sha256"] == ROOT
    assert 0 <= facts["age_seconds"] < 30


def test_nothing_is_made_where_only_a_question_is_asked(world: World) -> None:
    """Root asks before the signer's first start: a directory of root's would keep the signer from it."""
    world.start_enclave()
    assert attest(world)[0] == 0
    assert not world.setup.base_dir.exists()


def test_another_image_differs(world: World) -> None:
    world.start_enclave("--image", "other")
    status, out, _ = attest(world)
    assert status == 1
    assert "NOT as in the configuration" in out
    assert f"DIFFERS: PCR0 is not that of the configuration: {PCR0}" in out


def test_debug_mode_differs(world: World) -> None:
    world.start_enclave("--debug")
    status, out, _ = attest(world)
    assert status == 1
    assert "Debug:    YES" in out
    assert "DIFFERS: it runs in debug mode" in out


def test_what_nitro_cli_says_keeps_nothing_from_being_shown(world: World) -> None:
    """An enclave that the signer would not talk to is the one that somebody asks about."""
    command = nitro_cli.NitroCli(world.setup.directory / "bin")
    world.setup.environment = command.path_environment()
    other = {register: value.hex() for register, value in zip(("PCR0", "PCR1"), (PCRS[1], PCRS[1]), strict=True)}
    world.setup.nitro |= {"enclave_address": f"unix:{world.setup.socket}:{{cid}}", "expected_pcrs": other}
    world.setup.write_config()
    command.show(nitro_cli.enclave(2000, flags="DEBUG_MODE"))  # here the CID stands for the port
    world.start_enclave()
    status, out, err = attest(world)
    assert status == 1, err
    assert f"PCR0     the whole image\n          {PCR0}\n          as in the configuration\n" in out
    assert f"DIFFERS: PCR0 is not that of expected_pcrs of the configuration: {other['PCR0']}" in out
    assert "as in expected_pcrs of the configuration" in out


def test_what_proves_nothing(world: World) -> None:
    assert attest(world)[0] == 2
    world.setup.start_enclave()
    status, out, err = attest(world)
    assert (status, out) == (2, "")
    assert "no security module" in err
    world.setup.stop_all()
    world.start_enclave()
    world.setup.nitro["attestation_root"] = ROOT_SHA256.hex()
    world.setup.write_config()
    status, _, err = attest(world)
    assert status == 2
    assert "another root than AWS" in err


@pytest.mark.parametrize(("hangs_up", "text"), [(True, "closed the connection"), (False, "did not answer within 1 s")])
def test_what_does_not_answer_proves_nothing(world: World, hangs_up: bool, text: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        world.setup.nitro |= {"enclave_address": place, "exchange_timeout": 1}
        world.setup.write_config()
        asked = subprocess.Popen(
            world.setup.command("attest"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENVIRONMENT
        )
        with asked, listener.accept()[0] as connection:
            assert connection.recv(1000), "the question"
            if hangs_up:
                connection.close()
            out, err = asked.communicate(timeout=60)
    assert (asked.returncode, out) == (2, b"")
    assert err.decode() == f"Error: no proof: the enclave at {place}: the enclave {text}\n"


# -- sealed import


def seal_for(
    world: World, secret: bytes, *arguments: str, pcr0: str = PCR0, host: Sequence[str] = ()
) -> subprocess.CompletedProcess[bytes]:
    """*host* is the command that reaches the host, else it is our own."""
    key = world.setup.directory / "secret"
    key.write_bytes(secret)
    host = host or world.setup.command("import", "--sealed", "-v", "nitro")
    command = [sys.executable, "-m", "signer", "seal-for", "--from", str(key), "--root", ROOT, "--pcr0", pcr0]
    return subprocess.run(
        [*command, *arguments, "--", *host], capture_output=True, env=ENVIRONMENT, timeout=60, check=False
    )


def secret_text(secret: SecretKey) -> bytes:
    return to_base58(secret).encode()


def test_a_key_crosses_the_host_sealed(world: World) -> None:
    world.start_enclave()
    done = seal_for(world, secret_text(SECRET))
    assert done.returncode == 0, done.stderr
    address = str(SECRET.public_key.hash)
    assert f"stored: {address}".encode() in done.stderr
    assert PCR0.encode() in done.stderr
    assert address.encode() in world.key_file()
    world.setup.policies[address] = {"allow": {"attestation": None}, "allow_proof_of_possession": True}
    world.setup.write_config()
    world.setup.start_signer()
    message = attestation(Curve.BLS12_381, 1)
    status, answer = world.setup.api.sign(address, message)
    assert status == 200, answer
    assert crypto.verify(SECRET.public_key, message, Signature.from_base58(answer["signature"]), version=2)


@pytest.mark.parametrize(
    ("enclave", "pcr0", "text"),
    [(("--image", "other"), PCR0, "PCR0 is"), (("--debug",), PCR0, "debug"), ((), OTHER, "PCR0 is")],
)
def test_nothing_is_sealed_for_another_program(world: World, enclave: tuple[str, ...], pcr0: str, text: str) -> None:
    world.setup.nitro |= {"attestation": "off"}
    for key in ("pcrs", "attestation_root"):
        del world.setup.nitro[key]
    world.setup.write_config()
    world.start_enclave(*enclave)
    done = seal_for(world, secret_text(SECRET), pcr0=pcr0)
    assert done.returncode == 1
    assert text.encode() in done.stderr
    assert b"Traceback" not in done.stderr
    assert not (world.setup.base_dir / "enclave_keys.json").exists()


def relay(world: World, pass_on: str) -> list[str]:
    """A command between the operator and the host; *pass_on* is what it does with `line`, the answer `number`."""
    script = world.setup.directory / "relay.py"
    script.write_text(f"""
import subprocess, sys
command = {world.setup.command("import", "--sealed", "-v", "nitro")!r}
def say(line):
    sys.stdout.buffer.write(line); sys.stdout.buffer.flush()
real = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
for number in range(2):
    real.stdin.write(sys.stdin.buffer.readline()); real.stdin.flush()
    line = real.stdout.readline()
    {pass_on}
real.stdin.close(); real.wait()
""")
    return [sys.executable, str(script)]


def test_a_host_that_lies_is_found_out(world: World) -> None:
    """A host that stores another key than ours says so only if it wants to: the answer is compared."""
    other = crypto.load_secret_key(Curve.BLS12_381, bytes(31) + b"\x07")
    world.start_enclave()
    lying = relay(world, f"say(line if number == 0 else {lines.Imported(other.public_key).line()!r})")
    done = seal_for(world, secret_text(SECRET), host=lying)
    assert done.returncode == 1
    assert b"don't trust it" in done.stderr


def test_whoever_hears_no_answer_learns_that_the_key_may_be_stored(world: World) -> None:
    world.start_enclave()
    done = seal_for(world, secret_text(SECRET), host=relay(world, "number == 0 and say(line)"))
    assert done.returncode == 1
    assert b"may be stored: run this again" in done.stderr
    again = seal_for(world, secret_text(SECRET))
    assert b"is in the vault already" in again.stderr
    assert b"may be stored" not in again.stderr


def test_whoever_starts_the_hosts_side_by_hand_is_told_what_it_waits_for(world: World) -> None:
    world.start_enclave()
    terminal, theirs = os.openpty()
    host = subprocess.Popen(
        world.setup.command("import", "--sealed", "-v", "nitro"),
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    os.close(theirs)
    os.write(terminal, b"\x04")  # the end of input
    with host:
        out, err = host.communicate(timeout=60)
    os.close(terminal)
    assert (host.returncode, out) == (0, b"")
    assert b"waiting for the lines of `signer seal-for`" in err
    assert b"ssh HOST signer import --sealed -v nitro" in err


def test_an_import_that_is_interrupted_ends_in_order(world: World) -> None:
    """Its thread still waits for the operator's machine."""
    world.start_enclave()
    host = subprocess.Popen(
        world.setup.command("import", "--sealed", "-v", "nitro"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
    )
    with host:
        assert host.stdin is not None
        assert host.stdout is not None
        assert host.stderr is not None
        host.stdin.write(lines.Question(NONCE).line())
        host.stdin.flush()
        lines.read_answer(host.stdout.readline())
        host.send_signal(signal.SIGINT)
        told = host.stderr.read()
        assert host.wait() == 1, told
    assert b"Aborted." in told
    assert b"Fatal" not in told


def test_no_key_in_clear_is_left_on_the_host(world: World) -> None:
    """Memory, log and disk of the host, after a sealed import and a generation."""
    world.start_enclave()
    with (world.setup.directory / "import.log").open("wb") as log:
        host = subprocess.Popen(
            world.setup.command("import", "--sealed", "-v", "nitro", "--log", "trace"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=ENVIRONMENT,
        )
    assert host.stdin is not None
    assert host.stdout is not None
    with host:

        def ask(line: bytes) -> bytes:
            host.stdin.write(line)  # type: ignore[union-attr]
            host.stdin.flush()  # type: ignore[union-attr]
            return host.stdout.readline()  # type: ignore[union-attr]

        answer = lines.read_answer(ask(lines.Question(NONCE).line()))
        expected = Expected(nonce=NONCE, pcrs={0: [PCRS[0]]}, root_sha256=bytes.fromhex(ROOT), needs_public_key=True)
        order, _ = lines.seal_for(answer.document, SECRET, expected, now=datetime.now(UTC))
        imported = lines.read_imported(ask(lines.order_line(order)))
        assert imported.public_key == SECRET.public_key
        memory = memory_of(host.pid)
        assert order.address.encode() in memory, "the search finds what is there"
        for form in forms(SECRET):
            assert form not in memory
    assert host.returncode == 0
    kept = [path for path in world.setup.directory.rglob("*") if path.is_file()]
    for path in kept:
        for form in forms(SECRET):
            assert form not in path.read_bytes(), path


def forms(secret: SecretKey) -> list[bytes]:
    raw = bytes(secret.secret_bytes())
    return [raw, raw[::-1], raw.hex().encode(), secret_text(secret)]


def memory_of(pid: int) -> bytes:
    """What the process can write to: where a secret would be."""
    found = []
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            where, rights, *_ = line.split()
            if "w" not in rights:
                continue
            start, end = (int(part, 16) for part in where.split("-"))
            memory.seek(start)
            found.append(memory.read(end - start))
    return b"".join(found)
