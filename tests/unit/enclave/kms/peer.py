"""The far end of a connection to KMS, in memory: TLS under a throw-away authority, then whatever a test says."""

import contextlib
import ssl
import warnings
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import h11
import trio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from trio.testing import memory_stream_pair

HOST = "kms.us-west-2.amazonaws.com"


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


@dataclass(frozen=True)
class Authority:
    """A root that certifies servers."""

    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> str:
        return self.certificate.public_bytes(Encoding.PEM).decode()

    def server(
        self, name: str = HOST, *, ends: timedelta = timedelta(days=1), version: ssl.TLSVersion | None = None
    ) -> ssl.SSLContext:
        """What a server needs that calls itself *name*."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, key, self.key, self.certificate.subject, ends=ends, names=[name])
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        if version is not None:
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                context.minimum_version = context.maximum_version = version
        with TemporaryDirectory() as directory:
            chain = Path(directory) / "chain.pem"
            secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
            chain.write_bytes(secret + certificate.public_bytes(Encoding.PEM))
            context.load_cert_chain(chain)
        return context


@cache
def authority(name: str = "Test Root") -> Authority:
    key = ec.generate_private_key(ec.SECP256R1())
    return Authority(_certificate(name, key, key, _name(name), ends=timedelta(days=1)), key)


def _certificate(
    subject: str,
    key: ec.EllipticCurvePrivateKey,
    issuer_key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name,
    *,
    ends: timedelta,
    names: list[str] | None = None,
) -> x509.Certificate:
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=2))
        .not_valid_after(now + ends)
        .add_extension(x509.BasicConstraints(ca=names is None, path_length=None), critical=True)
    )
    if names is not None:
        alternatives = [x509.DNSName(name) for name in names]
        builder = builder.add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
    return builder.sign(issuer_key, SHA256())


class Far:
    """The server's end of one connection, behind the handshake."""

    def __init__(self, stream: trio.SSLStream[trio.abc.Stream], number: int) -> None:
        self.stream = stream
        self.number = number  # of the connection, from 1
        self._http = h11.Connection(h11.SERVER)

    async def request(self) -> tuple[Mapping[str, str], bytes]:
        """The next request: headers and body; raises `EOFError` where the client closed."""
        if self._http.our_state is h11.DONE:
            self._http.start_next_cycle()
        headers: dict[str, str] = {}
        body = b""
        while not isinstance(event := self._http.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                self._http.receive_data(bytes(await self.stream.receive_some()))
            elif isinstance(event, h11.Request):
                assert (event.method, event.target) == (b"POST", b"/")
                headers = {name.decode(): value.decode() for name, value in event.headers}
            elif isinstance(event, h11.Data):
                body += event.data
            else:
                raise EOFError
        return headers, body

    async def respond(self, body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        names = {"content-length": str(len(body))} | dict(headers or {})
        response = h11.Response(status_code=status, headers=list(names.items()))
        data = [self._http.send(event) or b"" for event in (response, h11.Data(data=body), h11.EndOfMessage())]
        await self.stream.send_all(b"".join(data))


class Peer:
    """Runs *script* for each connection; `connect` is what a `Transport` dials with."""

    def __init__(
        self, nursery: trio.Nursery, script: Callable[[Far], Awaitable[None]], context: ssl.SSLContext | None = None
    ) -> None:
        self.connections = 0
        self.broken: list[trio.BrokenResourceError] = []  # handshakes that failed here
        self._nursery = nursery
        self._script = script
        self._context = context or authority().server()

    async def connect(self) -> trio.abc.Stream:
        self.connections += 1
        near, far = memory_stream_pair()
        self._nursery.start_soon(self._serve, far, self.connections)
        return near

    async def _serve(self, stream: trio.abc.Stream, number: int) -> None:
        tls = trio.SSLStream(stream, self._context, server_side=True, https_compatible=True)
        try:
            await tls.do_handshake()
            await self._script(Far(tls, number))
        except trio.BrokenResourceError as exc:
            self.broken.append(exc)
            with contextlib.suppress(trio.BrokenResourceError):  # OpenSSL's alert, which Trio keeps to itself
                await stream.send_all(tls._outgoing.read() or b"")
        except EOFError:
            pass
        await trio.aclose_forcefully(tls)
