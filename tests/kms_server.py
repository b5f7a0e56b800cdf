"""KMS over real HTTP: moto behind a front that mends what moto leaves out, and does what networks and AWS do at times.

moto has no pages, takes a digest for a message, hands out the public key of a symmetric key, and knows no Ed25519. The
front answers by moto's keys, states and aliases as KMS does. `python -m tests.kms_server --keys 1000` runs it as a
process of its own: the first line it prints is its address, and its keys are secp256k1 and P-256 by turns.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
from cryptography.hazmat.primitives.hashes import SHA256
from moto.core.models import DEFAULT_ACCOUNT_ID
from moto.kms.models import kms_backends
from moto.kms.utils import ECDSAPrivateKey
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from werkzeug.datastructures import Headers
from werkzeug.test import EnvironBuilder

REGION = "eu-west-1"
CREDENTIALS = {"access_key_id": "AKID", "secret_access_key": "SECRET", "region": REGION}
PAGE = 100  # keys or aliases of one reply, whatever the caller asks for
_HTML = b"<html>no healthy upstream</html>"
_FAULTS = {  # what KMS or a load balancer in front of it answers: status, body
    "throttled": (400, b'{"__type": "ThrottlingException", "message": "Rate exceeded"}'),
    "broken": (500, b'{"__type": "KMSInternalException", "message": "internal"}'),
    "unavailable": (503, _HTML),
    "expired": (400, b'{"__type": "ExpiredTokenException", "message": "The security token in the request is expired"}'),
    "skewed": (
        400,
        b'{"__type": "InvalidSignatureException", "message": "Signature expired: 20261125T090000Z is now earlier than '
        b'20261125T091000Z (20261125T091500Z - 5 min.)"}',
    ),
    "denied": (400, b'{"__type": "AccessDeniedException", "Message": "not authorized to perform this"}'),
    "page": (200, _HTML),
    "empty": (200, b""),
    "list": (200, b"[]"),
    "list with 400": (400, b"[]"),
    "null with 503": (503, b"null"),
    "no UTF-8": (502, b"\xff"),
    "other types": (200, b'{"NextMarker": "1", "Keys": 5}'),
}
GARBLED = ("page", "empty", "list", "list with 400", "null with 503", "no UTF-8", "other types")
"""What is no answer of KMS at all."""
CUTS = ("lost", "cut", "dropped")
"""Executed, no reply; executed, half a reply; not executed, no reply."""


class _Refusal(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class _Digests(ECDSAPrivateKey):
    """moto's key, which signs a digest as MessageType DIGEST has it."""

    def sign(self, message: bytes, signing_algorithm: str) -> bytes:
        assert signing_algorithm == "ECDSA_SHA_256"
        return self.private_key.sign(message, ec.ECDSA(Prehashed(SHA256())))


class _Ed25519:
    """A key of the spec ECC_NIST_EDWARDS25519, which moto doesn't know."""

    def __init__(self) -> None:
        self._key = Ed25519PrivateKey.generate()

    def sign(self, message: bytes, signing_algorithm: str) -> bytes:
        assert signing_algorithm == "ED25519_SHA_512"
        return self._key.sign(message)

    def public_key(self) -> bytes:
        return self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )


@dataclass
class Kms:
    """The server. *choose* names the fault of a request by action and key, "" for none."""

    url: str = ""
    choose: Callable[[str, str], str] = lambda _action, _key: ""
    denied: set[str] = field(default_factory=set)  # actions, or key ids, that the role may not
    calls: list[tuple[str, str]] = field(default_factory=list)  # action and key of each request
    regions: set[str] = field(default_factory=set)  # that requests were signed for
    tokens: set[str] = field(default_factory=set)  # session tokens of requests
    hold: threading.Event = field(default_factory=threading.Event)  # requests with the fault "held" wait for it

    def __post_init__(self) -> None:
        self._moto = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self.backend = kms_backends[DEFAULT_ACCOUNT_ID][REGION]

    # -- what the account holds

    def add(self, spec: str, usage: str = "SIGN_VERIFY", *, alias: str = "", tags: dict[str, str] | None = None) -> str:
        """A new key's ARN."""
        pairs = [{"TagKey": name, "TagValue": value} for name, value in (tags or {}).items()]
        known = "ECC_NIST_P256" if spec == "ECC_NIST_EDWARDS25519" or spec.startswith("ML_") else spec
        key = self.backend.create_key(None, usage, known, "", pairs)
        key.key_spec = spec
        if spec in ("ECC_SECG_P256K1", "ECC_NIST_P256"):
            key.private_key = _Digests(spec)
        elif spec == "ECC_NIST_EDWARDS25519":
            key.private_key = _Ed25519()  # type: ignore[assignment]  # moto has a base class for what it knows
        if alias:
            self.backend.create_alias(key.id, alias)
        return str(key.arn)

    def count(self, action: str) -> int:
        return sum(one == action for one, _ in self.calls)

    # -- one request

    def respond(self, headers: Mapping[str, str], body: bytes) -> tuple[int, str, bytes, str] | None:
        """Status, content type, content and fault of the reply; None where there is none."""
        action = headers.get("X-Amz-Target", "").rpartition(".")[2]
        parameters = json.loads(body or b"{}")
        key = str(parameters.get("KeyId", ""))
        self._note(headers, action, key)
        fault = self.choose(action, key)
        if fault == "held":
            self.hold.wait(20)
        if fault == "dropped":
            return None
        if fault in _FAULTS:
            status, content = _FAULTS[fault]
        else:
            status, content = self._answer(headers, action, key, parameters, body)
        kind = "text/html" if content is _HTML else "application/x-amz-json-1.1"
        return None if fault == "lost" else (status, kind, content, fault)

    def _note(self, headers: Mapping[str, str], action: str, key: str) -> None:
        with self._lock:
            self.calls.append((action, key))
            scope = headers.get("Authorization", "").partition("Credential=")[2].split("/")
            self.regions.update(scope[2:3])
            self.tokens.add(headers.get("X-Amz-Security-Token", ""))

    def _answer(
        self, headers: Mapping[str, str], action: str, key: str, parameters: dict[str, Any], body: bytes
    ) -> tuple[int, bytes]:
        try:
            if action in self.denied or (key and self._id(key) in self.denied):
                raise _Refusal("AccessDeniedException", f"User: arn:aws:iam::1:role/r may not perform: kms:{action}")
            if action in ("GetPublicKey", "Sign"):
                self._check(action, key, parameters)
            if action == "GetPublicKey":
                return 200, json.dumps(self._public_key(key)).encode()
            if action == "Sign" and isinstance(self.backend.keys[self._id(key)].private_key, _Ed25519):
                return 200, json.dumps(self._of_ed25519(key, parameters)).encode()
        except _Refusal as exc:
            return 400, json.dumps({"__type": exc.code, "message": str(exc)}).encode()
        status, content = self._of_moto(headers, body)
        if status == 200 and action in ("ListKeys", "ListAliases"):
            content = self._page(content, action.removeprefix("List"), parameters)
        return status, content

    def _of_moto(self, headers: Mapping[str, str], body: bytes) -> tuple[int, bytes]:
        kept: list[str] = []
        environ = EnvironBuilder(
            "/", self.url, method="POST", headers=Headers(headers.items()), data=body
        ).get_environ()
        content = b"".join(self._moto(environ, lambda status, _headers, *_: kept.append(status)))
        return int(kept[0].split()[0]), content

    def _page(self, content: bytes, name: str, parameters: dict[str, Any]) -> bytes:
        items, first = json.loads(content)[name], int(parameters.get("Marker") or 0)
        last = first + min(PAGE, int(parameters.get("Limit") or PAGE))
        more = {"NextMarker": str(last), "Truncated": True} if last < len(items) else {"Truncated": False}
        return json.dumps({name: items[first:last], **more}).encode()

    def _id(self, key: str) -> str:
        if key.startswith("arn:") and key.split(":")[3] != REGION:
            return ""
        try:
            return str(self.backend.any_id_to_key_id(key))
        except KeyError:
            return ""

    def _check(self, action: str, key: str, parameters: dict[str, Any]) -> None:
        found = self.backend.keys.get(self._id(key))
        if found is None:
            raise _Refusal("NotFoundException", f"Key '{key}' does not exist")
        if found.key_state == "PendingDeletion":
            raise _Refusal("KMSInvalidStateException", f"{found.arn} is pending deletion.")
        if not found.enabled:
            raise _Refusal("DisabledException", f"{found.arn} is disabled.")
        if found.key_spec == "SYMMETRIC_DEFAULT" or found.key_spec.startswith("HMAC"):
            raise _Refusal("UnsupportedOperationException", f"{found.arn} key is not asymmetric")
        if action == "Sign" and parameters.get("MessageType") != _MESSAGE_TYPES.get(found.key_spec):
            raise _Refusal("ValidationException", "MessageType doesn't fit the key")

    def _of_ed25519(self, key: str, parameters: dict[str, Any]) -> dict[str, Any]:
        found = self.backend.keys[self._id(key)]
        signature = found.private_key.sign(base64.b64decode(parameters["Message"]), parameters["SigningAlgorithm"])
        return {"KeyId": found.arn, "Signature": base64.b64encode(signature).decode()}

    def _public_key(self, key: str) -> dict[str, Any]:
        found = self.backend.keys[self._id(key)]
        return {
            "KeyId": found.arn,
            "KeySpec": found.key_spec,
            "CustomerMasterKeySpec": found.key_spec,
            "KeyUsage": found.key_usage,
            "PublicKey": base64.b64encode(found.private_key.public_key()).decode(),
        }


_MESSAGE_TYPES = {"ECC_SECG_P256K1": "DIGEST", "ECC_NIST_P256": "DIGEST", "ECC_NIST_EDWARDS25519": "RAW"}


class _Handler(BaseHTTPRequestHandler):
    """Keeps connections, as AWS does; werkzeug's own server closes each."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    kms: ClassVar[Kms]

    def do_POST(self) -> None:
        reply = self.kms.respond(dict(self.headers.items()), self.rfile.read(int(self.headers["Content-Length"])))
        if reply is None:
            self.close_connection = True
            return
        status, kind, content, fault = reply
        self.send_response(status)
        self.send_header("Content-Type", kind)
        for _ in range(2 if fault == "length twice" else 1):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "cut":
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True  # a kept connection is no reason to stay
    request_queue_size = 64

    def handle_error(self, *_: object) -> None:
        """A client that went away."""


@contextmanager
def serving() -> Iterator[Kms]:
    """A server whose account holds no keys."""
    kms = Kms()
    kms.backend.reset()
    server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"kms": kms}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    kms.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield kms
    finally:
        kms.hold.set()
        server.shutdown()
        thread.join()
        server.server_close()
        kms.backend.reset()


def environment(url: str, directory: Path) -> dict[str, str]:
    """Nothing of this machine's AWS configuration, and every call of KMS to *url*."""
    return {
        "AWS_ENDPOINT_URL_KMS": url,
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(directory / "aws-config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(directory / "aws-credentials"),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--keys", type=int, default=1)
    arguments = parser.parse_args()
    with serving() as kms:
        for number in range(arguments.keys):
            kms.add(("ECC_SECG_P256K1", "ECC_NIST_P256")[number % 2])
        print(kms.url, flush=True)
        sys.stdin.read()  # until whoever started it closes the pipe, or ends


if __name__ == "__main__":
    main()
