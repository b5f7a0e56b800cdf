"""A client of one AWS service, with the credentials of one component; boto3 in worker threads.

Nothing is exported to the environment (weakness 31). What may be repeated is repeated here, not by botocore.
"""

import random
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import trio
from pydantic import SecretStr

from signer.errors import SignerError, UnavailableError

_TRIES = 3  # where the caller sets no deadline
_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds before the second try, doubled up to the next
_THROTTLED = (
    "ProvisionedThroughputExceededException",
    "RequestLimitExceeded",
    "RequestThrottled",
    "Throttling",
    "ThrottlingException",
    "TooManyRequestsException",
)


class CredentialValues(Protocol):
    """What of the credentials the configuration gives; what is empty comes from botocore's chain."""

    @property
    def access_key_id(self) -> str: ...
    @property
    def secret_access_key(self) -> SecretStr: ...
    @property
    def session_token(self) -> SecretStr: ...
    @property
    def region(self) -> str: ...


class AwsError(SignerError):
    """AWS refused a call, which was not executed; *response* is its answer as botocore parses it."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "",
        action: str = "",
        resource: str = "",
        response: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.action = action
        self.resource = resource
        self.response: Mapping[str, Any] = response or {}


class AwsUnavailableError(AwsError, UnavailableError):
    """Throttled, or no answer: the call may have been executed, and may be repeated."""

    status = 502


class AwsClient:
    """A client of *service*; *component* is what its errors are said to belong to. Nothing is contacted at first."""

    def __init__(
        self,
        service: str,
        credentials: CredentialValues,
        *,
        component: str,
        workers: int = 16,
        connect_timeout: float = 2.0,
        read_timeout: float = 5.0,
    ) -> None:
        self._service = service
        self._credentials = credentials
        self._component = component
        self._workers = workers
        self._timeouts = connect_timeout, read_timeout
        self._making = threading.Lock()
        self._boto: Any = None
        self._limiter = trio.CapacityLimiter(workers)

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """One call; where it may be repeated, it is, until *deadline* (Trio's clock; None: 3 tries)."""
        tries, pause = 1, _PAUSE
        while True:
            try:
                return await trio.to_thread.run_sync(
                    partial(self._call, action, resource, parameters), limiter=self._limiter, abandon_on_cancel=True
                )
            except AwsUnavailableError:
                wait = pause * random.uniform(0.5, 1)  # noqa: S311  # spreads retries, keeps no secret
                if tries >= _TRIES if deadline is None else trio.current_time() + wait >= deadline:
                    raise
                await trio.sleep(wait)
            tries, pause = tries + 1, min(2 * pause, _LONGEST_PAUSE)

    # -- in a worker thread

    def _call(self, action: str, resource: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
        from botocore import xform_name
        from botocore.exceptions import (
            BotoCoreError,
            ChecksumError,
            ClientError,
            HTTPClientError,
            IncompleteReadError,
        )
        from botocore.parsers import ResponseParserError

        name = f"{self._service}:{action}"
        try:
            answer: dict[str, Any] = getattr(self._client(), xform_name(action))(**parameters)
        except ClientError as exc:
            code = str(exc.response.get("Error", {}).get("Code", ""))
            status = exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            kind = AwsUnavailableError if status >= 500 or code in _THROTTLED else AwsError
            text = f"{self._component}: {name} on {resource}: {exc}"
            raise kind(text, code=code, action=name, resource=resource, response=exc.response) from exc
        except (BotoCoreError, ResponseParserError) as exc:  # the last ones: a reply that was cut or garbled
            unknown = (HTTPClientError, ChecksumError, IncompleteReadError, ResponseParserError)
            kind = AwsUnavailableError if isinstance(exc, unknown) else AwsError
            raise kind(f"{self._component}: {name} on {resource}: {exc}", action=name, resource=resource) from exc
        return answer

    def _client(self) -> Any:
        with self._making:
            if self._boto is None:
                self._boto = self._make()
            return self._boto

    def _make(self) -> Any:
        import boto3
        from botocore.config import Config

        own, (connect, read) = self._credentials, self._timeouts
        session = boto3.session.Session(
            own.access_key_id or None,
            own.secret_access_key.get_secret_value() or None,
            own.session_token.get_secret_value() or None,
            region_name=own.region or None,
        )
        config = Config(
            connect_timeout=connect,
            read_timeout=read,
            retries={"total_max_attempts": 1},
            max_pool_connections=self._workers,
        )
        return session.client(self._service, config=config)
