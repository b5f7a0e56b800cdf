"""A program whose output nobody reads ends as it would otherwise."""

import os
import subprocess
import sys

import pytest

WRITING = "import sys; from proxy import output; print('x'); sys.stderr.write('y'); output.settle(); sys.exit({status})"
CLOSED = "import sys; from proxy import output; sys.stdout = sys.stderr = None; output.settle(); sys.exit(3)"


def run(program: str, *, stdout: int, stderr: int) -> subprocess.CompletedProcess[bytes]:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run([sys.executable, "-c", program], stdout=stdout, stderr=stderr, env=environment, check=False)


@pytest.mark.parametrize("status", [0, 3])
@pytest.mark.parametrize("closed", ["stdout", "stderr"])
def test_a_pipe_without_a_reader_does_not_change_the_status(closed: str, status: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    program = WRITING.format(status=status)
    if closed == "stdout":
        done = run(program, stdout=writer, stderr=subprocess.PIPE)
    else:
        done = run(program, stdout=subprocess.PIPE, stderr=writer)
    os.close(writer)
    assert done.returncode == status
    assert (done.stdout or b"") + (done.stderr or b"") == (b"y" if closed == "stdout" else b"x\n")


def test_streams_that_were_closed_before() -> None:
    assert run(CLOSED, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 3
