"""DynamoDB over real HTTP: moto behind a front that can do to requests and replies what a network does.

moto's tables are no transactions between threads, so each request is executed under one lock: decided in one moment, as
DynamoDB decides it.
"""

from __future__ import annotations

import json
import logging
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import boto3
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

_HELD = 1.5  # seconds at most that a reply is held back: longer than the signer waits for it
_BODIES = {
    "throttled": (400, b'{"__type": "com.amazonaws#ProvisionedThroughputExceededException", "message": "slow down"}'),
    "broken": (500, b'{"__type": "com.amazonaws#InternalServerError", "message": "broken"}'),
}
FAULTS = ("lost", "cut", "dropped", "late", "twice", "again", "held", *_BODIES)
_BODIES["denied"] = (400, b'{"__type": "com.amazonaws#AccessDeniedException", "Message": "no"}')
"""Done, no reply; half a reply; not arrived; done later, no reply; done twice, first or second reply; late reply."""

Environ = dict[str, Any]
Reply = tuple[str, list[tuple[str, str]], bytes]


class Front:
    """A WSGI application in front of moto; *choose* names the fault of a request by its action, "" for none."""

    def __init__(self) -> None:
        self.choose: Callable[[str], str] = lambda _: ""
        self.allows: Callable[[str, str], bool] = lambda _action, _table: True  # the role's policy
        self.met: dict[str, int] = {}  # faults that happened
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._changed = threading.Condition()
        self._executed = 0
        self._late: list[tuple[Environ, bytes]] = []

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        body = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        action = environ.get("HTTP_X_AMZ_TARGET", "").rpartition(".")[2]
        fault = self.choose(action) if action else ""
        with self._changed:
            self.met[fault] = self.met.get(fault, 0) + 1
            if not all(self.allows(*needed) for needed in _permissions(action, body)):
                fault = "denied"
            if fault in _BODIES:
                status, content = _BODIES[fault]
                start_response(f"{status} -", [("Content-Type", "application/x-amz-json-1.0")])
                return [content]
            reply = self._carry_out(environ, body, fault)
            if fault == "held":
                after = self._executed + 3
                self._changed.wait_for(lambda: self._executed >= after, _HELD)
        if reply is None:
            environ["werkzeug.socket"].shutdown(2)
            raise ConnectionAbortedError
        start_response(reply[0], [*reply[1], ("Content-Length", str(len(reply[2])))])
        return [reply[2][: len(reply[2]) // 2] if fault == "cut" else reply[2]]

    def _carry_out(self, environ: Environ, body: bytes, fault: str) -> Reply | None:
        """The reply, None where there is none."""
        if fault == "late":
            self._late.append((environ, body))
        if fault in ("late", "dropped"):
            return None
        if self._late and random.random() < 0.5:  # before or after what came later
            self._execute(*self._late.pop(0))
        reply = self._execute(environ, body)
        if fault in ("twice", "again"):
            second = self._execute(environ, body)
            return reply if fault == "twice" else second
        return None if fault == "lost" else reply

    def _execute(self, environ: Environ, body: bytes) -> Reply:
        kept: list[Any] = []
        environ = environ | {"wsgi.input": BytesIO(body)}
        content = b"".join(self._moto(environ, lambda status, headers, *_: kept.extend((status, headers))))
        self._executed += 1
        self._changed.notify_all()
        headers = [(name, value) for name, value in kept[1] if name.lower() != "content-length"]
        return kept[0], headers, content


def _permissions(action: str, body: bytes) -> list[tuple[str, str]]:
    """What policies call *action*, and the table that it is on; a transaction needs what its members need."""
    parameters: dict[str, Any] = json.loads(body) if action else {}
    if action == "TransactWriteItems":
        members = [pair for item in parameters["TransactItems"] for pair in item.items()]
        return [(f"{member}Item", facts["TableName"]) for member, facts in members]
    return [(action, parameters["TableName"])] if "TableName" in parameters else []


@contextmanager
def serving() -> Iterator[tuple[str, Front]]:
    """The address of a server without tables, and its front."""
    log = logging.getLogger("werkzeug")
    before, log.disabled = log.disabled, True
    front = Front()
    server = make_server("127.0.0.1", 0, front, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield url, front
    finally:
        client = plain(url)
        for name in client.list_tables()["TableNames"]:
            client.delete_table(TableName=name)
        client.close()
        server.shutdown()
        thread.join()
        server.server_close()
        log.disabled = before


def plain(url: str) -> Any:
    """boto3's own client of the server."""
    return boto3.client(
        "dynamodb", region_name="eu-west-1", aws_access_key_id="AKID", aws_secret_access_key="SECRET", endpoint_url=url
    )
