"""The processes of the benchmark, and what they use; a process tree is measured as a whole."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_START = 15.0  # seconds for a proxy to answer first
HOST = "127.0.0.1"


class FailedError(Exception):
    """A proxy did not start, or did not do what was asked."""


@contextmanager
def server() -> Iterator[int]:
    """The server behind the proxies; gives its port."""
    with socket.create_server((HOST, 0), backlog=4096) as listener:
        command = [sys.executable, "-m", "tests.bench.proxy.server", str(listener.fileno())]
        process = subprocess.Popen(command, pass_fds=[listener.fileno()])
        try:
            yield listener.getsockname()[1]
        finally:
            process.kill()
            process.wait()


class Proxy:
    """A proxy at work, or none at all: then the port is the server's."""

    def __init__(self, port: int, process: subprocess.Popen[bytes] | None) -> None:
        self.port = port
        self._process = process

    def processor_time(self) -> float:
        """Seconds that the process tree has used so far."""
        return sum(map(_processor_time, self._tree()))

    def resident(self) -> float:
        """Resident memory of the process tree, MiB."""
        return sum(map(_resident, self._tree())) / 2**20

    def _tree(self) -> list[int]:
        """The process and its descendants."""
        if self._process is None:
            return []
        parents = {pid: parent for pid in _pids() if (parent := _parent(pid)) is not None}
        tree = [self._process.pid]
        for pid in tree:
            tree.extend(child for child, parent in parents.items() if parent == pid)
        return tree


@contextmanager
def running(command: str, target: int, log: Path) -> Iterator[Proxy]:
    """The proxy started by *command*, which is told {listen}, {target}, {listen_port} and {target_port}."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    places = {"listen": f"{HOST}:{port}", "target": f"{HOST}:{target}", "listen_port": port, "target_port": target}
    for name, value in places.items():
        command = command.replace(f"{{{name}}}", str(value))
    environment = os.environ | {"RUST_LOG": "warn"}
    with log.open("ab") as output:
        process = subprocess.Popen(
            shlex.split(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    try:
        _wait_for_answer(process, port, log)
        yield Proxy(port, process)
    finally:
        with suppress(ProcessLookupError):  # it has ended by itself, and so have its children
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_for_answer(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    until = time.monotonic() + _START
    while True:
        try:
            load(port, "ping", 1, 0.01)
            return
        except FailedError:
            if process.poll() is not None or time.monotonic() > until:
                end = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
                raise FailedError(f"the proxy does not answer; its last words:\n{end}") from None
            time.sleep(0.1)


def _load_command(port: int, kind: str, arguments: Sequence[float]) -> list[str]:
    return [sys.executable, "-m", "tests.bench.proxy.load", HOST, str(port), kind, *map(str, arguments)]


def load(port: int, kind: str, *arguments: float) -> dict[str, float]:
    """Run the load (see `tests.bench.proxy.load`) on *port* to its end; raises `FailedError`."""
    done = subprocess.run(_load_command(port, kind, arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        raise FailedError(done.stderr.strip().rpartition("\n")[2])
    return dict(json.loads(done.stdout))


@contextmanager
def held(port: int, connections: int) -> Iterator[int]:
    """Keep so many connections open; gives how many are answered."""
    command = _load_command(port, "hold", [connections])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise FailedError("the load ended early")
        yield int(json.loads(line)["live"])
        assert process.stdin is not None
        process.stdin.close()


def _pids() -> Iterator[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _stat(pid: int) -> list[str]:
    """The fields of /proc/PID/stat behind the name: state, parent, ...; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _parent(pid: int) -> int | None:
    fields = _stat(pid)
    return int(fields[1]) if fields else None


def _processor_time(pid: int) -> float:
    """With that of children that have ended."""
    return sum(map(int, _stat(pid)[11:15])) / _TICK


def _resident(pid: int) -> int:
    fields = _stat(pid)
    return int(fields[21]) * _PAGE if fields else 0
