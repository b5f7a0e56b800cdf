"""The signing API: a plain async function from request values to response values.

Implements section 2 of the signer specification and sections 2, 7 and 8 of the remote-signer specification. It knows
nothing of the server in front, which can be exchanged; body limits and timeouts are that server's.
"""

import itertools
import secrets
import time
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import parse_qsl

import structlog

from signer.errors import MalformedRequestError, RefusedError, SignerError
from signer.http._payload import parse_payload
from signer.http.values import (
    ApiRequest,
    ApiResponse,
    error_response,
    json_response,
    method_not_allowed,
    not_found,
    status_text,
)
from signer.observe.metrics import Metrics
from signer.policy import Caller
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKey, PublicKeyHash, Signature

logger = structlog.get_logger(__name__)

_VERSIONS = {"0": 0, "1": 1}
LATEST_VERSION = 2
_MAX_PARAMETERS = 100  # in the query of a request
_MAX_SHOWN = 64  # characters of what should be an address, in a log line
_MAX_TEXT = 128  # characters of a path or a host name, in a log line


class SigningService(Protocol):
    """What the API needs of the signer; `signer.signing.Signing` is it."""

    def authorized_keys(self) -> Sequence[PublicKeyHash] | None: ...

    def known_keys(self) -> Sequence[PublicKeyHash]: ...

    async def public_key(self, pkh: PublicKeyHash) -> PublicKey: ...

    async def sign(self, pkh: PublicKeyHash, message: bytes, *, version: int, caller: Caller) -> Signature: ...

    async def prove_possession(
        self, pkh: PublicKeyHash, *, over: PublicKey | None = None, caller: Caller
    ) -> Signature: ...


class SigningApi:
    """Answers the requests of bakers.

    *known_keys* opens `GET /known_keys`; *path_prefix* ("" or "/signer/v1") stands in front of every route.
    """

    def __init__(
        self, service: SigningService, *, metrics: Metrics, known_keys: bool = False, path_prefix: str = ""
    ) -> None:
        self._service = service
        self._metrics = metrics
        self._known_keys = known_keys
        self._prefix = _segments(path_prefix)
        self._run = secrets.token_hex(3)  # tells this process's request ids from another's in a shared log
        self._numbers = itertools.count(1)

    async def respond(self, request: ApiRequest) -> ApiResponse:
        """The answer to *request*; never raises. Errors are a JSON list, with the status that clients act on."""
        route = self._route(request.path)
        match route:
            case ["keys", key] if request.method == "POST":
                return await self._sign(request, key)  # its one line in the log is that of the signing
        began = time.perf_counter()
        response = await self._look_up(request, route)
        _log(request, response, began)
        return response

    def _route(self, path: str) -> list[str]:
        """The segments of *path* below the prefix; none for a path elsewhere."""
        segments, own = _segments(path), len(self._prefix)
        return [] if path.endswith("/") or segments[:own] != self._prefix else segments[own:]

    async def _look_up(self, request: ApiRequest, route: list[str]) -> ApiResponse:
        """The answer to what is no signing request."""
        match route:
            case ["keys", key]:
                return await self._get(request, "GET, POST", lambda: self._public_key(key))
            case ["authorized_keys"]:
                return await self._get(request, "GET", self._authorized_keys)
            case ["known_keys"]:
                return await self._get(request, "GET", self._list_known_keys)
            case ["bls_prove_possession", key]:
                return await self._get(request, "GET", lambda: self._prove_possession(request, key))
        return not_found()

    async def _get(self, request: ApiRequest, allowed: str, answer: "_Answer") -> ApiResponse:
        if request.method != "GET":
            return method_not_allowed(allowed)
        return await self._guarded(request, answer)

    async def _guarded(self, request: ApiRequest, answer: "_Answer") -> ApiResponse:
        """Run *answer*; what it raises becomes an error reply."""
        try:
            return await answer()
        except SignerError as exc:
            return error_response(exc.status, str(exc))
        except TezosError as exc:
            return error_response(400, str(exc))
        except Exception:
            logger.exception("internal error", method=request.method, path=request.path)
            return error_response(500, "internal error, see the signer's log")

    async def _sign(self, request: ApiRequest, key: str) -> ApiResponse:
        began = time.perf_counter()
        response = await self._guarded(request, lambda: self._signature(request, key, began))
        self._metrics.handled(key, status_text(response.status), time.perf_counter() - began)
        return response

    async def _signature(self, request: ApiRequest, key: str, began: float) -> ApiResponse:
        caller = self._caller(request)
        try:
            pkh = PublicKeyHash.from_base58(key)
            version = _VERSIONS.get(_parameter(request.query, "version"), LATEST_VERSION)
            message = parse_payload(request.body)
        except (MalformedRequestError, TezosError) as exc:  # what gets further is logged by the signer
            logger.error(
                f"Error signing request: {exc}",
                request_id=caller.request_id,
                peer=request.peer,
                pkh=key[:_MAX_SHOWN],
                outcome="refused",
                status=400,
                duration_ms=_milliseconds_since(began),
            )
            raise
        signature = await self._service.sign(pkh, message, version=version, caller=caller)
        return json_response({"signature": str(signature)})

    async def _public_key(self, key: str) -> ApiResponse:
        public_key = await self._service.public_key(PublicKeyHash.from_base58(key))
        return json_response({"public_key": str(public_key)})

    async def _authorized_keys(self) -> ApiResponse:
        keys = self._service.authorized_keys()
        return json_response({} if keys is None else {"authorized_keys": [str(key) for key in keys]})

    async def _list_known_keys(self) -> ApiResponse:
        if not self._known_keys:
            raise RefusedError("List known keys request not allowed.", rule="server.known_keys")
        return json_response({"known_keys": [str(key) for key in self._service.known_keys()]})

    async def _prove_possession(self, request: ApiRequest, key: str) -> ApiResponse:
        pkh = PublicKeyHash.from_base58(key)
        subject = _parameter(request.query, "bls_pk")
        over = PublicKey.from_base58(subject) if subject else None
        if over is not None and over.curve is not pkh.curve:
            raise MalformedRequestError("bls_pk is not a BLS public key")
        proof = await self._service.prove_possession(pkh, over=over, caller=self._caller(request))
        return json_response({"bls_prove_possession": str(proof)})

    def _caller(self, request: ApiRequest) -> Caller:
        return Caller(request.peer, f"{self._run}-{next(self._numbers)}")


class _Answer(Protocol):
    async def __call__(self) -> ApiResponse: ...


def _log(request: ApiRequest, response: ApiResponse, began: float) -> None:
    """One line for a request that signs nothing: a client with a wrong address would otherwise fail in silence."""
    log = logger.debug if response.status < 400 else logger.warning
    log(
        f"{request.method[:_MAX_SHOWN]} {request.path[:_MAX_TEXT]}",
        status=response.status,
        duration_ms=_milliseconds_since(began),
        hostname=request.host[:_MAX_TEXT],
        peer=request.peer,
    )


def _milliseconds_since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 3)


def _segments(path: str) -> list[str]:
    """The parts of a path; repeated slashes count as one (clients copy URLs that end in a slash)."""
    return [segment for segment in path.split("/") if segment]


def _parameter(query: str, name: str) -> str:
    if not query:
        return ""
    try:
        fields = parse_qsl(query, max_num_fields=_MAX_PARAMETERS)
    except ValueError:
        raise MalformedRequestError(f"more than {_MAX_PARAMETERS} query parameters") from None
    return next((value for key, value in fields if key == name), "")
