"""The drill: sign, kill the enclave, boot it under another CID, sign again; nobody touches the signer."""

import itertools
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest

from signer import crypto
from signer.enclave.sealing.local import load_or_create_key_file
from signer.enclave.settings import DEFAULT_LOG_PORT
from signer.tezos.keys import Curve, PublicKey, Signature
from tests.integration import conftest
from tests.integration.conftest import Api, Setup, attestation, running
from tests.nitro.guest import DEADLINE, PORT, Guest, Image, wait_for
from tests.nitro_cli import NitroCli, enclave

CURVES = dict(zip(("tz1", "tz2", "tz3", "tz4"), Curve, strict=True))
PARENT = 3  # the CID of the host, as an enclave sees it
OCTEZ_PAUSES = [step / 10 for step in range(9)]  # seconds between the ten attempts of the Octez client

# The emulator is some ten times slower than an enclave. `wait_timeout` stays as it is for everybody: that is what
# the Octez client's attempts have to cope with.
TIMEOUTS = {"connect_timeout": 30, "exchange_timeout": 60}


class OctezClient:
    """Asks for one signature until it has it: 502 is asked again as the Octez client does it."""

    def __init__(self, api: Api, pkh: str, message: bytes) -> None:
        self._api = api
        self.pkh = pkh
        self.message = message
        self.attempts = 0
        self.turned_away = threading.Event()  # once the first 502 has come

    def run(self) -> str:
        """The signature; any other status than 200 and 502 is an error, as it is for the Octez client."""
        deadline = time.monotonic() + DEADLINE
        for pause in itertools.cycle(OCTEZ_PAUSES):  # after a tenth attempt it is the baker who asks anew
            status, answer = self._api.sign(self.pkh, self.message)
            self.attempts += 1
            if status != 502 or time.monotonic() > deadline:
                break
            self.turned_away.set()
            time.sleep(pause)  # the rule itself
        assert status == 200, answer
        return str(answer["signature"])


@dataclass
class Drill:
    """The signer's setup, the enclaves that nitro-cli tells it of, and the figures that are worth telling."""

    setup: Setup
    cli: NitroCli
    image: Image
    keys: dict[str, PublicKey] = field(default_factory=dict)  # by address
    guests: list[Guest] = field(default_factory=list)
    figures: list[str] = field(default_factory=list)
    latencies: dict[str, list[float]] = field(default_factory=dict)  # seconds, of single requests, by address

    def boot(self, cid: int) -> Guest:
        """Start an enclave; it is listed from now on, long before its program listens."""
        directory = self.setup.directory
        guest = Guest(self.image, cid=cid, base=directory / f"{cid}.sock", log=directory / f"guest-{cid}.log")
        self.guests.append(guest)
        self.cli.show(enclave(cid))
        return guest

    def kill(self, guest: Guest) -> None:
        guest.kill()
        assert not guest.base.exists(), "the vsock device is gone with it"
        self.cli.show()

    def sign(self, pkh: str, message: bytes) -> str:
        """The signature, verified."""
        began = time.monotonic()
        status, answer = self.setup.api.sign(pkh, message)
        self.latencies.setdefault(pkh, []).append(time.monotonic() - began)
        assert status == 200, answer
        self.verify(pkh, message, answer["signature"])
        return str(answer["signature"])

    def verify(self, pkh: str, message: bytes, signature: str) -> None:
        assert crypto.verify(self.keys[pkh], message, Signature.from_base58(signature))

    def sign_with_every_key(self, level: int) -> dict[str, str]:
        return {pkh: self.sign(pkh, attestation(key.curve, level)) for pkh, key in self.keys.items()}

    def check_that_conflicts_are_refused(self, level: int) -> None:
        for pkh, key in self.keys.items():
            assert self.setup.api.sign(pkh, attestation(key.curve, level, payload=1))[0] == 409

    def check_that_it_came_over_vsock(self, guest: Guest) -> None:
        """In the guest: the program's connections are AF_VSOCK, from the parent to the CID that it booted with."""
        sockets = [one for one in guest.sockets() if one[0] != "AF_UNIX"]  # Trio's own, to wake itself up
        assert ["AF_VSOCK", [socket.VMADDR_CID_ANY, PORT], None] in sockets, "the listener"
        peers = [peer for family, own, peer in sockets if (family, own) == ("AF_VSOCK", [guest.cid, PORT])]
        assert PARENT in [cid for cid, _port in filter(None, peers)], sockets
        ways_in = {(family, own[1]) for family, own, _peer in sockets}
        assert ways_in == {("AF_VSOCK", PORT), ("AF_VSOCK", DEFAULT_LOG_PORT)}, "there is no other way in"

    def median_latencies(self) -> str:
        times = [statistics.median(latencies) * 1000 for latencies in self.latencies.values()]
        return "a signature " + ", ".join(f"{kind} {time:.1f} ms" for kind, time in zip(CURVES, times, strict=True))


@pytest.fixture
def drill(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[Drill]:
    directory = tmp_path_factory.mktemp("n")  # short: the path of a unix socket has at most 107 bytes
    key_file = directory / "development.key"
    load_or_create_key_file(key_file)  # in the image, so that both boots have the same
    cli = NitroCli(directory / "bin")
    monkeypatch.setitem(conftest.ENVIRONMENT, "PATH", cli.path_environment()["PATH"])
    with running(directory) as setup:
        setup.nitro.update(enclave_address=f"unix:{directory}/{{cid}}.sock:{PORT}", **TIMEOUTS)
        ready = Drill(setup, cli, Image(directory, key_file))
        try:
            yield ready
        finally:
            for guest in ready.guests:
                guest.kill()


def test_killed_and_booted_under_another_cid(drill: Drill, capsys: pytest.CaptureFixture[str]) -> None:
    setup = drill.setup

    # The first life: keys are made in it, and sign.
    first = drill.boot(16)
    first.wait_until_it_listens()
    drill.figures.append(f"boot until the program listens {since(first.began)}")
    addresses = [pkh for kind in CURVES for pkh in setup.generate(kind)]
    signer = setup.start_signer()
    drill.keys.update((pkh, public_key(setup, pkh)) for pkh in addresses)
    assert [key.curve for key in drill.keys.values()] == list(CURVES.values())
    for level in range(90, 100):
        drill.sign_with_every_key(level)
    signatures = drill.sign_with_every_key(100)
    drill.figures.append(drill.median_latencies())
    drill.check_that_it_came_over_vsock(first)

    # No enclave: what was signed is answered from the store, what is new has to wait.
    drill.kill(first)
    wait_for(lambda: setup.utility.get("/healthz")[0] == 503, "the signer to miss it")
    assert drill.sign_with_every_key(100) == signatures
    clients = [OctezClient(setup.api, pkh, attestation(key.curve, 101)) for pkh, key in drill.keys.items()]
    with ThreadPoolExecutor(len(clients)) as pool:
        waiting = [pool.submit(client.run) for client in clients]
        wait_for(lambda: all(client.turned_away.is_set() for client in clients), "a 502 for each")

        # The second life, under another CID: the requests from before it are answered in it.
        second = drill.boot(17)
        for client, answer in zip(clients, waiting, strict=True):
            drill.verify(client.pkh, client.message, answer.result())
    drill.figures.append(f"boot to the first signature {since(second.began)}")
    drill.figures.append(f"attempts of an Octez client {max(client.attempts for client in clients)}")

    assert drill.sign_with_every_key(102) == drill.sign_with_every_key(102)
    drill.check_that_conflicts_are_refused(102)
    drill.check_that_it_came_over_vsock(second)
    assert signer.poll() is None, "the same process all the time"
    assert setup.stop(signer) == 0
    drill.kill(second)
    with capsys.disabled():
        print("\n" + "; ".join(drill.figures))


def public_key(setup: Setup, pkh: str) -> PublicKey:
    status, answer = setup.api.get(f"/keys/{pkh}")
    assert status == 200, answer
    return PublicKey.from_base58(answer["public_key"])


def since(began: float) -> str:
    return f"{time.monotonic() - began:.1f} s"
