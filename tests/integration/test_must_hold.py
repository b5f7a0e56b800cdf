"""What must hold whatever happens: no slot with two signatures, nobody with another's signature, nothing lost."""

import http.client
import json
import random
import re
import shutil
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from signer import crypto
from signer.tezos.keys import Curve, PublicKey, Signature
from tests.integration.conftest import DEADLINE, ENVIRONMENT, Setup, attestation, wait_for

KILLS = 50  # rounds of the drill; some 45 s on two cores


class Kept:
    """A client on one kept connection; opens it again when it was lost."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE)

    def sign(self, pkh: str, message: bytes) -> tuple[int, str]:
        """Status and signature, or error text."""
        self._connection.request("POST", f"/keys/{pkh}?version=2", json.dumps(message.hex()))
        response = self._connection.getresponse()
        answer = json.loads(response.read())
        return response.status, answer["signature"] if response.status == 200 else answer[0]["msg"]

    def close(self) -> None:
        self._connection.close()


def test_two_processes_on_one_directory_never_sign_both(setup: Setup) -> None:
    """8 clients, 2,000 conflicting pairs, each half to another process at the same time."""
    (pkh,) = setup.generate("tz1")
    setup.start_signer()
    other = Setup(setup.directory, policies=setup.policies, processes=setup.processes)
    other.write_config()
    other.start_signer()
    pairs, clients = 2000, 8
    signed: list[int] = []

    def client(number: int) -> None:
        one, two = Kept(setup.port), Kept(other.port)
        chain = struct.pack(">I", number)  # levels rise on each client's own chain
        with ThreadPoolExecutor(2) as pair:
            for level in range(pairs // clients):
                messages = [attestation(Curve.ED25519, level, payload=payload, chain=chain) for payload in (1, 2)]
                answers = list(pair.map(lambda kept, text: kept.sign(pkh, text), (one, two), messages))
                statuses = sorted(status for status, _ in answers)
                assert statuses == [200, 409], answers
                signed.append(level)
        one.close()
        two.close()

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(client, range(clients)))
    assert len(signed) == pairs


def test_killed_at_random_moments_under_load(setup: Setup) -> None:
    """After each SIGKILL: nothing that conflicts with what a client received, and the same bytes, same signature."""
    addresses = setup.generate("tz1") + setup.generate("tz4")
    curves = [Curve.ED25519, Curve.BLS12_381]
    seed = random.randrange(2**32)
    source = random.Random(seed)
    received: dict[tuple[int, int], tuple[bytes, str]] = {}  # key and level to message and signature
    levels = [0, 0]

    def load(index: int, stop: threading.Event) -> None:
        with closing(Kept(setup.port)) as kept:
            while not stop.is_set():
                levels[index] += 1
                level = levels[index]
                message = attestation(curves[index], level, payload=source.randrange(2**31))
                try:
                    status, text = kept.sign(addresses[index], message)
                except (OSError, http.client.HTTPException):
                    return
                assert status == 200, text
                received[index, level] = message, text

    for _ in range(KILLS):
        signer = setup.start_signer("--no-list")
        for index in (0, 1):
            check_latest(setup, received, index, addresses[index], curves[index], seed)
        stop = threading.Event()
        threads = [threading.Thread(target=load, args=(index, stop)) for index in (0, 1)]
        for thread in threads:
            thread.start()
        enough = len(received) + source.randrange(5, 60)
        wait_for(lambda: len(received) >= enough or not any(t.is_alive() for t in threads), "signatures")  # noqa: B023
        signer.send_signal(signal.SIGKILL)
        signer.wait()
        stop.set()
        for thread in threads:
            thread.join()
    setup.start_signer()
    for index in (0, 1):
        check_latest(setup, received, index, addresses[index], curves[index], seed)
    leftovers = [path.name for path in setup.base_dir.iterdir()]
    assert sorted(leftovers) == sorted(
        ["enclave_keys.json", "enclave_keys.json.lock", "watermarks.db", "watermarks.db-shm", "watermarks.db-wal"]
    )


def check_latest(
    setup: Setup,
    received: dict[tuple[int, int], tuple[bytes, str]],
    index: int,
    pkh: str,
    curve: Curve,
    seed: int,
) -> None:
    levels = [level for key, level in received if key == index]
    if not levels:
        return
    message, signature = received[index, max(levels)]
    api = setup.api
    status, answer = api.sign(pkh, attestation(curve, max(levels), payload=2**40))
    assert status == 409, (seed, answer)
    status, answer = api.sign(pkh, message)
    if status == 200:  # unless a later one was on its way when the signer was killed
        assert answer["signature"] == signature, seed
    else:
        assert "below high watermark" in answer[0]["msg"], (seed, answer)
    if len(levels) > 1:
        status, answer = api.sign(pkh, attestation(curve, max(levels) - 1, payload=2**40))
        assert status == 409, (seed, answer)


class SlowRelay:
    """Stands between signer and enclave on a hybrid socket of its own, and holds every reply back for a while."""

    def __init__(self, path: Path, target: Path, delay: float) -> None:
        self._target = target
        self._delay = delay
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.connections = 0
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._threads: list[threading.Thread] = []
        self._start(self._accept)

    def _start(self, target: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=target, args=arguments)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            server = socket.socket(socket.AF_UNIX)
            self._pairs.append((client, server))
            server.connect(str(self._target))
            self._start(self._copy, client, server, 0.0)
            self._start(self._copy, server, client, self._delay)

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket, delay: float) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                time.sleep(delay)
                sink.sendall(data)
        with suppress(OSError):
            sink.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End every connection, and wait until no thread uses a socket any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        for client, server in self._pairs:
            for end in (client, server):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *(end for pair in self._pairs for end in pair)):
            end.close()


@contextmanager
def slow_enclave(setup: Setup, delay: float) -> Iterator[SlowRelay]:
    path = setup.directory / "slow.sock"
    relay = SlowRelay(path, setup.socket, delay)
    setup.nitro["enclave_address"] = f"unix:{path}:2000"
    setup.nitro["enclave_log_port"] = 0  # its connections are counted: they are to be sessions
    setup.write_config()
    try:
        yield relay
    finally:
        relay.close()


def test_clients_that_vanish_in_every_phase(setup: Setup) -> None:
    """With a slow enclave behind: nobody receives a signature that is not over its own bytes under its own key."""
    addresses = setup.generate("tz1", 3) + setup.generate("tz4", 1)
    curves = [Curve.ED25519] * 3 + [Curve.BLS12_381]
    with slow_enclave(setup, 0.02) as relay:
        setup.start_signer()
        keys = [PublicKey.from_base58(setup.api.get(f"/keys/{pkh}")[1]["public_key"]) for pkh in addresses]
        stop = threading.Event()
        checked: list[int] = []

        def honest(index: int) -> None:
            level = 0
            with closing(Kept(setup.port)) as kept:
                while not stop.is_set():
                    level += 1
                    message = attestation(curves[index], level, chain=b"hon" + bytes([index]))
                    status, text = kept.sign(addresses[index], message)
                    assert status == 200, text
                    assert crypto.verify(keys[index], message, Signature.from_base58(text))
                    checked.append(level)

        def vanishing(index: int) -> None:
            source = random.Random(index)
            for level in range(1, 60):
                message = attestation(curves[index], level, chain=b"van" + bytes([index]))
                body = json.dumps(message.hex()).encode()
                request = f"POST /keys/{addresses[index]} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n\r\n"
                data = request.encode() + body
                with socket.create_connection(("127.0.0.1", setup.port), timeout=DEADLINE) as client:
                    client.sendall(data[: source.choice([10, len(request) + 5, len(data), len(data), len(data)])])
                    time.sleep(source.choice([0, 0.005, 0.015, 0.025]))  # the phase in which it goes
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", source.randrange(2), 0))

        with ThreadPoolExecutor(8) as pool:
            honests = [pool.submit(honest, index) for index in range(4)]
            for future in [pool.submit(vanishing, index) for index in range(4)]:
                future.result()
            stop.set()
            for future in honests:
                future.result()
        assert len(checked) > 20
        assert relay.connections == 2, "no client's going away cost the connection to the enclave"
        for index in range(4):  # what a vanished client asked for is there for the repeat
            message = attestation(curves[index], 59, chain=b"van" + bytes([index]))
            status, answer = setup.api.sign(addresses[index], message)
            assert status == 200
            assert crypto.verify(keys[index], message, Signature.from_base58(answer["signature"]))


def test_twins_in_flight_get_one_signature(setup: Setup) -> None:
    (pkh,) = setup.generate("tz4")
    with slow_enclave(setup, 0.05):
        setup.start_signer()
        for level in range(5):
            message = attestation(Curve.BLS12_381, level)
            with ThreadPoolExecutor(8) as pool:
                answers = list(pool.map(lambda _: setup.api.sign(pkh, message), range(8)))  # noqa: B023
            assert len({answer["signature"] for status, answer in answers if status == 200}) == 1
            assert all(status == 200 for status, _ in answers)


def test_the_sync_comes_before_the_reply(setup: Setup) -> None:
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    (pkh,) = setup.generate("tz1")
    signer = setup.start_signer()
    setup.api.sign(pkh, attestation(Curve.ED25519, 1))
    trace = setup.directory / "trace"
    strace = subprocess.Popen(
        ["strace", "-f", "-tt", "-e", "trace=fsync,fdatasync,sendto,write", "-o", str(trace), "-p", str(signer.pid)],
        stderr=subprocess.PIPE,
    )
    assert strace.stderr is not None
    if b"attached" not in strace.stderr.readline():
        strace.wait()
        pytest.skip("strace cannot attach here")
    status, _answer = setup.api.sign(pkh, attestation(Curve.ED25519, 2))
    assert status == 200
    strace.send_signal(signal.SIGINT)
    strace.communicate()
    lines = trace.read_text().splitlines()
    synced = next(number for number, line in enumerate(lines) if re.search(r"fdatasync\(|fsync\(", line))
    replied = next(number for number, line in enumerate(lines) if "HTTP/1.1 200" in line)
    assert synced < replied
    assert "= 0" in lines[synced] or any("resumed>) = 0" in line for line in lines[synced:replied])


def test_no_secret_anywhere(setup: Setup) -> None:
    """After generate, import and signing: no secret in clear on the disk, in the logs, or in any argument list."""
    setup.generate("tz1")
    key = crypto.generate_secret_key(Curve.P256)
    from signer.crypto.formats import encrypt, to_base58

    secret, passphrase = to_base58(key), "correct horse battery staple"
    encrypted = encrypt(key, passphrase, bytes(8))
    password_file = setup.directory / "pass"
    password_file.write_text(passphrase)
    done = setup.run(
        "import",
        "-v",
        "nitro",
        "--log",
        "debug",
        "--password-file",
        str(password_file),
        stdin=encrypted.encode() + b"\n",
    )
    assert done.returncode == 0, done.stderr
    password_file.unlink()
    pkh = str(key.public_key.hash)
    setup.policies[pkh] = {"allow": {"attestation": None}}
    setup.write_config()
    signer = setup.start_signer("--log", "debug")
    assert setup.api.sign(pkh, attestation(Curve.P256, 1))[0] == 200
    needles = [secret.encode(), encrypted.encode(), passphrase.encode(), bytes(key.secret_bytes())]
    needles.append(bytes(key.secret_bytes()).hex().encode())
    haystacks = {str(path): path.read_bytes() for path in setup.directory.rglob("*") if path.is_file()}
    for process in setup.processes:
        if process.poll() is None:
            haystacks[f"arguments of {process.pid}"] = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    haystacks["output of import"] = done.stdout + done.stderr
    for name, content in haystacks.items():
        assert not any(needle in content for needle in needles), name
        if "signatory.yaml" not in name:
            assert b"SECRETKEY" not in content, name
    assert b"SECRETKEY" not in Path(f"/proc/{signer.pid}/environ").read_bytes()


# -- a start that cannot succeed says what to do


def failed_start(setup: Setup) -> str:
    done = subprocess.run(setup.command("serve"), capture_output=True, env=ENVIRONMENT, timeout=DEADLINE, check=False)
    assert done.returncode == 1
    text = done.stderr.decode()
    assert "Traceback" not in text
    assert "\nError: " in f"\n{text}"
    return text


def test_port_in_use(setup: Setup) -> None:
    setup.write_config()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", setup.port))
        taken.listen()
        text = failed_start(setup)
    assert f"Error: listen tcp 127.0.0.1:{setup.port}: Address already in use; another program listens there" in text


@pytest.mark.parametrize(
    "content", [b"not a database at all, but long enough to be looked at" * 100, b"SQLite format 3\0junk"]
)
def test_corrupt_database(setup: Setup, content: bytes) -> None:
    setup.generate("tz1")
    path = setup.base_dir / "watermarks.db"
    path.write_bytes(content)
    text = failed_start(setup)
    assert str(path) in text
    assert "restore" in text
    assert path.read_bytes() == content, "nothing is deleted"


def test_corrupt_blob_file(setup: Setup) -> None:
    setup.generate("tz1")
    path = setup.base_dir / "enclave_keys.json"
    path.write_text(path.read_text()[:-20])
    damaged = path.read_text()
    text = failed_start(setup)
    assert f"{path} is damaged" in text
    assert "restore it from a copy" in text
    assert path.read_text() == damaged


def test_bad_key_in_the_configuration(setup: Setup) -> None:
    setup.policies["tz1nonsense"] = None
    setup.write_config()
    text = failed_start(setup)
    assert re.search(r"signatory.yaml:\d+: tezos.tz1nonsense: gotez: base58", text)


def test_what_is_not_supported_yet_is_refused(setup: Setup) -> None:
    setup.server["jwt"] = {"users": {}}
    setup.top["policy_hook"] = {"address": "http://127.0.0.1:1/"}
    setup.write_config()
    text = failed_start(setup)
    assert "server.jwt: authentication by JWT is not supported" in text
    assert "policy_hook" in text


def test_store_locked_by_another_process(setup: Setup) -> None:
    (pkh,) = setup.generate("tz1")
    setup.start_signer()
    assert setup.api.sign(pkh, attestation(Curve.ED25519, 1))[0] == 200
    other = sqlite3.connect(setup.base_dir / "watermarks.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    status, answer = setup.api.sign(pkh, attestation(Curve.ED25519, 2))
    assert status == 500
    assert "locked" in answer[0]["msg"]
    assert "fuser" in answer[0]["msg"]
    other.execute("ROLLBACK")
    other.close()
    assert setup.api.sign(pkh, attestation(Curve.ED25519, 2))[0] == 200


@contextmanager
def tmpfs(directory: Path, size: str) -> Iterator[None]:
    directory.mkdir(mode=0o700)
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(directory)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        pytest.skip("this user cannot mount a tmpfs")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(directory)], check=False)


def test_full_disk(setup: Setup) -> None:
    """No signature gets out, the text says why, nothing is lost, and the signer goes on when there is room again."""
    with tmpfs(setup.base_dir, "600k"):
        (pkh,) = setup.generate("tz1")
        signer = setup.start_signer()
        assert setup.api.sign(pkh, attestation(Curve.ED25519, 1))[0] == 200
        filler = setup.base_dir / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        level, status = 1, 200
        while status == 200:  # until the pages that SQLite has already are used up
            level += 1
            status, refusal = setup.api.sign(pkh, attestation(Curve.ED25519, level))
        assert status == 500
        assert "the disk is full" in refusal[0]["msg"]
        done = setup.run("generate", "-v", "nitro", "-t", "tz1")
        assert done.returncode == 1
        assert b"space" in done.stderr or b"cannot write" in done.stderr
        filler.unlink()
        wait_for(lambda: setup.api.sign(pkh, attestation(Curve.ED25519, level + 1))[0] == 200, "room")
        assert setup.api.sign(pkh, attestation(Curve.ED25519, level - 1, payload=1))[0] == 409
        setup.stop(signer)


def test_read_only_directory(setup: Setup) -> None:
    with tmpfs(setup.base_dir, "4m"):
        (pkh,) = setup.generate("tz1")
        signer = setup.start_signer()
        assert setup.api.sign(pkh, attestation(Curve.ED25519, 1))[0] == 200
        setup.stop(signer)
        subprocess.run(["mount", "-o", "remount,ro", str(setup.base_dir)], check=True)
        text = failed_start(setup)
        assert "cannot write to directory" in text
        assert "Fix:" in text
        subprocess.run(["mount", "-o", "remount,rw", str(setup.base_dir)], check=True)


def test_a_database_that_vanishes_while_running(setup: Setup) -> None:
    (pkh,) = setup.generate("tz1")
    setup.start_signer()
    assert setup.api.sign(pkh, attestation(Curve.ED25519, 5))[0] == 200
    path = setup.base_dir / "watermarks.db"
    path.rename(setup.directory / "elsewhere.db")
    status, answer = setup.api.sign(pkh, attestation(Curve.ED25519, 6))
    assert (status, "is gone" in answer[0]["msg"]) == (500, True)
    sqlite3.connect(path).close()
    path.touch()
    status, answer = setup.api.sign(pkh, attestation(Curve.ED25519, 6))
    assert (status, "was replaced" in answer[0]["msg"]) == (500, True)
