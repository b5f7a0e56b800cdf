"""Temporary credentials over HTTP, as an instance (metadata v2), a container and a web identity get them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

_ROLE = "baker"
_STS = "https://sts.amazonaws.com/doc/2011-06-15/"


@dataclass
class Metadata:
    """The server. Each answer has a session token of its own, TOKEN-1 and so on."""

    url: str = ""
    lifetime: timedelta = timedelta(hours=6)
    mute: bool = False  # replies to PUT (too many hops) and POST (STS) don't come
    refuses: bool = False  # whether the role may not be assumed
    given: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def expiration(self) -> str:
        return (datetime.now(UTC) + self.lifetime).strftime("%Y-%m-%dT%H:%M:%SZ")

    def assumed(self) -> tuple[int, bytes]:
        """The answer of STS to AssumeRoleWithWebIdentity."""
        if self.refuses:
            error = "<Error><Type>Sender</Type><Code>AccessDenied</Code><Message>Not authorized</Message></Error>"
            return 403, f'<ErrorResponse xmlns="{_STS}">{error}</ErrorResponse>'.encode()
        self.given += 1
        members = (
            f"<AccessKeyId>ASIA</AccessKeyId><SecretAccessKey>SECRET</SecretAccessKey>"
            f"<SessionToken>TOKEN-{self.given}</SessionToken><Expiration>{self.expiration}</Expiration>"
        )
        result = (
            f"<AssumeRoleWithWebIdentityResult><Credentials>{members}</Credentials></AssumeRoleWithWebIdentityResult>"
        )
        name = "AssumeRoleWithWebIdentityResponse"
        return 200, f'<{name} xmlns="{_STS}">{result}</{name}>'.encode()

    def credentials(self) -> bytes:
        self.given += 1
        expiration = self.expiration
        facts = {
            "Code": "Success",
            "Type": "AWS-HMAC",
            "AccessKeyId": "ASIA",
            "SecretAccessKey": "SECRET",
            "Token": f"TOKEN-{self.given}",
            "Expiration": expiration,
            "LastUpdated": expiration,
        }
        return json.dumps(facts).encode()


class _Handler(BaseHTTPRequestHandler):
    metadata: ClassVar[Metadata]

    def do_PUT(self) -> None:
        if self.metadata.mute:
            self.metadata.released.wait(20)
            return
        self._reply(b"SESSION" if self.path == "/latest/api/token" else b"")

    def do_GET(self) -> None:
        prefix = "/latest/meta-data/iam/security-credentials/"
        if self.path == "/container":
            self._reply(self.metadata.credentials())
        elif self.path == "/list":
            self._reply(b"[]")
        elif self.headers.get("X-aws-ec2-metadata-token") != "SESSION":
            self.send_error(401)
        else:
            self._reply(_ROLE.encode() if self.path == prefix else self.metadata.credentials())

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.metadata.mute:
            self.metadata.released.wait(20)
            return
        status, content = self.metadata.assumed()
        self._reply(content, status)

    def _reply(self, content: bytes, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("X-aws-ec2-metadata-token-ttl-seconds", "21600")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving() -> Iterator[Metadata]:
    metadata = Metadata()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"metadata": metadata}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    metadata.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield metadata
    finally:
        metadata.released.set()
        server.shutdown()
        thread.join()
        server.server_close()
