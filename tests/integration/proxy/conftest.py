"""Real processes for the proxy: `python -m proxy`, a remote server that the test plays, and a service manager."""

from __future__ import annotations

import os
import re
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

from tests.integration.conftest import DEADLINE, wait_for

ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID", "WATCHDOG_USEC", "RUST_LOG", "RUST_LOG_STYLE")
}
READY = "Proxy is now in listening state"
# Gives the descriptor to the proxy as a service manager does: as number 3, and with its own process in LISTEN_PID.
_HAND_OVER = (
    "import os, sys\n"
    "os.dup2(int(sys.argv[1]), 3)\n"
    "os.environ['LISTEN_PID'] = str(os.getpid())\n"
    "os.execv(sys.executable, [sys.executable, '-m', 'proxy', *sys.argv[2:]])\n"
)
_RESET = struct.pack("ii", 1, 0)


def reset(end: socket.socket) -> None:
    """Close abortively: the peer sees a reset."""
    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    end.close()


def receive_all(end: socket.socket) -> bytes:
    """Everything up to the end of file."""
    parts = []
    while part := end.recv(1 << 20):
        parts.append(part)
    return b"".join(parts)


def receive(end: socket.socket, size: int) -> bytes:
    """Exactly *size* bytes."""
    data = b""
    while len(data) < size:
        part = end.recv(size - len(data))
        assert part, f"end of file after {len(data)} of {size} bytes"
        data += part
    return data


def is_cut(end: socket.socket) -> bool:
    """Wait for the end of the connection; whether it is a reset."""
    try:
        while end.recv(65536):
            pass
    except ConnectionError:
        return True
    return False


def is_quiet(end: socket.socket, seconds: float = 0.2) -> bool:
    """Whether nothing arrives for so long, neither data nor an end."""
    return not select.select([end], [], [], seconds)[0]


class Background(threading.Thread):
    """Sends in the background: more than fits into all buffers on the way."""

    def __init__(self, end: socket.socket, data: bytes, *, then_end: bool = False) -> None:
        super().__init__(daemon=True)
        self._end, self._data, self._then_end = end, data, then_end
        self.fault: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            self._end.sendall(self._data)
            if self._then_end:
                self._end.shutdown(socket.SHUT_WR)
        except OSError as exc:
            self.fault = exc


class Remote:
    """The server behind the proxy: the test accepts each connection, and speaks for it."""

    def __init__(self, port: int = 0, backlog: int = 4096) -> None:
        self.listener = socket.create_server(("127.0.0.1", port), backlog=backlog)
        self.listener.settimeout(DEADLINE)
        self.port: int = self.listener.getsockname()[1]
        self._ends: list[socket.socket] = []

    def accept(self) -> socket.socket:
        end, _ = self.listener.accept()
        end.settimeout(DEADLINE)
        self._ends.append(end)
        return end

    def close(self) -> None:
        for one in (self.listener, *self._ends):
            one.close()


class ServiceManager:
    """What systemd does for a service: a socket for states, and listening sockets to inherit."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "notify.sock"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.path))
        self._socket.settimeout(DEADLINE)

    @property
    def environ(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self.path)}

    def next(self) -> str:
        """The next state that is sent, other than the signs of life."""
        while (state := self.next_of_all()) == "WATCHDOG=1":
            pass
        return state

    def next_of_all(self) -> str:
        return self._socket.recv(4096).decode()

    def close(self) -> None:
        self._socket.close()


@dataclass
class ProxyProcess:
    """`python -m proxy` with *arguments*; its log and its output are files in *directory*."""

    directory: Path
    arguments: Sequence[str]
    environ: dict[str, str] = field(default_factory=dict)
    descriptor: int | None = None  # a listening socket, handed over as a service manager does
    soft_limit: int | None = None  # of descriptors, at the start

    def __post_init__(self) -> None:
        self._sockets: list[socket.socket] = []
        command = [sys.executable, "-m", "proxy", *self.arguments]
        environ = ENVIRONMENT | self.environ
        keep: tuple[int, ...] = ()
        if self.descriptor is not None:
            command = [sys.executable, "-c", _HAND_OVER, str(self.descriptor), *self.arguments]
            environ["LISTEN_FDS"] = "1"
            keep = (self.descriptor,)
        with (self.directory / "stderr").open("wb") as log, (self.directory / "stdout").open("wb") as out:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=log, env=environ, pass_fds=keep
            )
        if self.soft_limit is not None:  # long before the interpreter has come to our code
            _, hard = resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE)
            resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (self.soft_limit, hard))

    @property
    def log(self) -> str:
        return (self.directory / "stderr").read_text()

    @property
    def output(self) -> str:
        return (self.directory / "stdout").read_text()

    def lines(self, text: str) -> list[str]:
        return [line for line in self.log.splitlines() if text in line]

    def wait_for_log(self, text: str, number: int = 1) -> str:
        """The log, once *text* is in so many of its lines."""
        wait_for(lambda: len(self.lines(text)) >= number or self.process.poll() is not None, f"{text!r} in the log")
        assert len(self.lines(text)) >= number, self.log
        return self.log

    @property
    def ports(self) -> list[int]:
        """The TCP ports that it listens on, in the order of the arguments."""
        return [int(port) for port in re.findall(r"Bound to tcp: 127\.0\.0\.1:(\d+)", self.log)]

    def connect(self, number: int = 0) -> socket.socket:
        """A client of the listener with that number."""
        return self._kept(socket.create_connection(("127.0.0.1", self.ports[number]), DEADLINE))

    def refuses(self, number: int = 0) -> bool:
        """Whether a new client is reset; which it may see while it still connects."""
        try:
            return is_cut(self.connect(number))
        except ConnectionResetError:
            return True

    def connect_unix(self, path: Path) -> socket.socket:
        end = self._kept(socket.socket(socket.AF_UNIX))
        end.settimeout(DEADLINE)
        end.connect(str(path))
        return end

    def _kept(self, end: socket.socket) -> socket.socket:
        self._sockets.append(end)
        return end

    def metrics(self) -> dict[str, float]:
        """What the metrics endpoint shows: `name{labels}` and value."""
        found = re.search(r"Metrics are at (\S+)", self.log)
        assert found is not None, self.log
        with urllib.request.urlopen(found[1], timeout=DEADLINE) as answer:
            text = answer.read().decode()
        rows = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in rows}

    def metric(self, name: str, *labels: str) -> float:
        """The sum of the samples of *name* that have all *labels*, such as `reason="queue"`."""
        rows = self.metrics().items()
        return sum(v for k, v in rows if k.partition("{")[0] == name and all(label in k for label in labels))

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(DEADLINE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.send_signal(number)
        return self.wait()

    def close(self) -> None:
        for end in self._sockets:
            with suppress(OSError):
                end.close()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()


class Starter:
    """Starts proxies, and ends what a test leaves running."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self._stack = stack
        self._number = 0

    def remote(self, port: int = 0, backlog: int = 4096) -> Remote:
        remote = Remote(port, backlog)
        self._stack.callback(remote.close)
        return remote

    def manager(self) -> ServiceManager:
        manager = ServiceManager(self.root)
        self._stack.callback(manager.close)
        return manager

    def allow_list(self, *entries: tuple[str, int]) -> Path:
        """A list with these hosts and ports."""
        path = self.root / "allow.yaml"
        path.write_text(yaml.safe_dump({"allowlist": [{"address": host, "port": port} for host, port in entries]}))
        return path

    def start(
        self,
        *arguments: str,
        environ: dict[str, str] | None = None,
        descriptor: int | None = None,
        soft_limit: int | None = None,
        wait: bool = True,
    ) -> ProxyProcess:
        """A process with exactly these arguments; waits until it listens, unless told otherwise."""
        self._number += 1
        directory = self.root / str(self._number)
        directory.mkdir()
        proxy = ProxyProcess(directory, arguments, environ or {}, descriptor, soft_limit)
        self._stack.callback(proxy.close)
        if wait:
            proxy.wait_for_log(READY)
        return proxy

    def forward(
        self,
        remote: Remote,
        *options: str,
        listen: Sequence[str] = ("tcp:127.0.0.1:0",),
        environ: dict[str, str] | None = None,
        descriptor: int | None = None,
        soft_limit: int | None = None,
        wait: bool = True,
    ) -> ProxyProcess:
        """A proxy from *listen* to *remote*, which its list allows."""
        arguments = [part for address in listen for part in ("--listen", address)]
        arguments += ["127.0.0.1", str(remote.port), "--config", str(self.allow_list(("127.0.0.1", remote.port)))]
        return self.start(
            *arguments, *options, environ=environ, descriptor=descriptor, soft_limit=soft_limit, wait=wait
        )


@pytest.fixture
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts what a test needs, and ends it."""
    with ExitStack() as stack:
        yield Starter(tmp_path_factory.mktemp("p"), stack)


@pytest.fixture
def remote(starter: Starter) -> Remote:
    return starter.remote()


@dataclass(frozen=True)
class Shared:
    """One process for the tests that leave it as it was: a TCP and a unix listener, both to *remote*."""

    proxy: ProxyProcess
    remote: Remote
    unix_path: Path

    def pair(self, transport: str) -> tuple[socket.socket, socket.socket]:
        """A client and the server's end of one connection through the proxy."""
        client = self.proxy.connect() if transport == "tcp" else self.proxy.connect_unix(self.unix_path)
        return client, self.remote.accept()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with ExitStack() as stack:
        starter = Starter(tmp_path_factory.mktemp("s"), stack)
        remote = starter.remote()
        base = starter.root / "v.sock"
        proxy = starter.forward(
            remote,
            "--metrics",
            "127.0.0.1:0",
            listen=["tcp:127.0.0.1:0", f"unix:{base}:8000"],
            environ={"RUST_LOG": "trace"},
        )
        yield Shared(proxy, remote, Path(f"{base}_8000"))
