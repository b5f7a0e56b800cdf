"""The fake KMS as a process of its own, over TCP, with requests that botocore signed."""

import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPSConnection
from pathlib import Path
from typing import Any

import pytest

from tests.attested.certificates import HOST, authority
from tests.attested.documents import PCRS, root
from tests.integration.conftest import DEADLINE, ENVIRONMENT
from tests.unit.attested.client import context
from tests.unit.attested.signing import signed
from tests.unit.attested.test_account import recipient


class _Process:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        self.where = self._line()

    def ask(self, **fields: Any) -> Any:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(fields) + "\n")
        self.process.stdin.flush()
        return self._line()

    def _line(self) -> Any:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@contextmanager
def running(*arguments: str) -> Iterator[_Process]:
    command = [sys.executable, "-m", "tests.attested.kms", *arguments]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as process:
        try:
            yield _Process(process)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            assert process.wait(DEADLINE) == 0


class _Connection(HTTPSConnection):
    """To KMS's name at the port of the process."""

    def __init__(self, port: int) -> None:
        super().__init__(HOST, timeout=DEADLINE, context=context())
        self._place = ("127.0.0.1", port)
        self._create_connection = lambda _address, *rest: socket.create_connection(self._place, *rest)


def post(port: int, operation: str, fields: Any) -> Any:
    request = signed(operation, fields)
    connection = _Connection(port)
    try:
        connection.request("POST", "/", request.body, dict(request.headers))
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read() or b"null")
    finally:
        connection.close()


def test_a_process_of_its_own(tmp_path: Path) -> None:
    fields = {"KeyId": "alias/baker", "KeySpec": "AES_256", "Recipient": recipient()}
    with running("--ca-file", str(tmp_path / "ca.pem"), "--pcr0", PCRS[0].hex(), "--delay", "0.001") as kms:
        port = kms.where["port"]
        assert kms.where["host"] == HOST
        assert kms.where["root_sha256"] == root().sha256.hex()
        assert (tmp_path / "ca.pem").read_text() == authority().pem, "the same in every process"
        status, answer = post(port, "GenerateDataKey", fields)
        assert (status, answer["KeyId"]) == (200, kms.where["key"])
        kms.ask(key="alias/baker", pcrs={"0": [PCRS[1].hex()]})
        status, answer = post(port, "GenerateDataKey", fields)
        assert (status, answer["__type"]) == (400, "AccessDeniedException")
        kms.ask(script=["throttled"])
        assert post(port, "GenerateRandom", {"NumberOfBytes": 1})[1]["__type"] == "ThrottlingException"
        calls = kms.ask(calls=True)["calls"]
        assert [(call["operation"], call["error"]) for call in calls] == [
            ("GenerateDataKey", ""),
            ("GenerateDataKey", "AccessDeniedException"),
        ]
        kms.ask(tls="wrong-name")
        with pytest.raises(ssl.SSLCertVerificationError, match="not valid for"):
            post(port, "GenerateRandom", {"NumberOfBytes": 1})
