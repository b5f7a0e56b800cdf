"""A client of one AWS service, with the credentials of one component; boto3 in worker threads.

Nothing is exported to the environment, so one component's credentials and region never reach another's (weakness 31 of
the signer specification). What the configuration leaves open comes from botocore's chain: environment, shared files
with profiles, web identity, container, instance metadata; botocore renews what expires. What may be repeated is
repeated here, not by botocore, which knows nothing of the caller's deadline.
"""

import json
import os
import random
import threading
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import trio
from pydantic import SecretStr

from signer.aws.errors import AwsError, AwsUnavailableError, Call, answered, unanswered

__all__ = ["AwsClient", "AwsError", "AwsUnavailableError", "CredentialValues"]

_TRIES = 3  # where the caller sets no deadline
_PAUSE, _LONGEST_PAUSE = 0.05, 1.0  # seconds before the second try, doubled up to the next
_ABANDONED = 4  # times as many threads as calls that are waited for: the others hang
_RENEWAL = 1.0  # seconds that a client lives at least before stale credentials are looked up anew
_STS_TIMEOUTS = 2.0, 5.0  # seconds to connect and to read, of the clients that ask for credentials (STS, SSO)
_SHOWN = 60  # bytes of a reply that is none
_CONTAINER_MARKS = ("/.dockerenv", "/run/.containerenv")


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


class AwsClient:
    """A client of *service*; *component* is what its errors are said to belong to.

    Nothing is contacted, and boto3 not imported, before the first call. At most *workers* calls are waited for at
    once. One that nobody waits for any more keeps its thread until the timeouts end it (seconds, from one byte to the
    next: a reply that drips may take minutes), but not the place of another call.
    """

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
        self._region = credentials.region or os.environ.get("AWS_REGION", "")  # which boto3 itself passes over
        self._making = threading.Lock()
        self._boto: Any = None
        self._made_at = 0.0  # Trio's clock
        self._renewals = 0
        self._limiter = trio.CapacityLimiter(workers)
        self._threads = trio.CapacityLimiter(_ABANDONED * workers)

    @property
    def region(self) -> str:
        """The region that is asked; "" while only a shared file may tell it and no call was made."""
        return self._region

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        """The answer to *action* ("Sign", "PutItem"); *resource* is what errors say it was about.

        What may be repeated is repeated until *deadline* (Trio's clock; None: 3 tries). Raises `AwsError`, and
        `AwsUnavailableError` where all tries failed or the deadline came first. Cancelling it abandons the wait: the
        call may still be executed.
        """
        tries, pause, renewed = 1, _PAUSE, False
        last: AwsUnavailableError | None = None
        while True:
            used = self._renewals
            try:
                return await self._try(action, resource, deadline, parameters, last)
            except AwsUnavailableError as exc:
                last = exc
                wait = pause * random.uniform(0.5, 1)  # noqa: S311  # spreads retries, keeps no secret
                if tries >= _TRIES if deadline is None else trio.current_time() + wait >= deadline:
                    raise
                await trio.sleep(wait)
            except AwsError as exc:
                if renewed or not exc.stale or not self._forget(used):
                    raise
                renewed = True
            tries, pause = tries + 1, min(2 * pause, _LONGEST_PAUSE)

    async def _try(
        self,
        action: str,
        resource: str,
        deadline: float | None,
        parameters: Mapping[str, Any],
        last: AwsUnavailableError | None,
    ) -> dict[str, Any]:
        """One try; where *deadline* ends it, *last* (of the try before) says more than that."""
        began = trio.current_time()
        call = partial(self._call, action, resource, parameters, began)
        with trio.move_on_at(float("inf") if deadline is None else deadline):
            async with self._limiter:
                return await trio.to_thread.run_sync(call, limiter=self._threads, abandon_on_cancel=True)
        elapsed = trio.current_time() - began
        raise last or self._facts(action, resource).fails(f"no answer: none within {elapsed:.1f} s", repeat=True)

    def _facts(self, action: str, resource: str) -> Call:
        return Call(self._component, self._service, action, resource, self._region, _in_container())

    @property
    def _given(self) -> bool:
        """Whether the configuration gives the credentials; then nothing is looked up."""
        return bool(self._credentials.access_key_id and self._credentials.secret_access_key.get_secret_value())

    def _forget(self, used: int) -> bool:
        """Have the next call look up the credentials anew; not where that was done a moment ago.

        *used* are those that were refused, as `_renewals` counts them: of many calls with the same the first one
        has new ones looked up, and the others may try these.
        """
        if used != self._renewals:
            return True
        if self._given or self._boto is None or trio.current_time() - self._made_at < _RENEWAL:
            return False
        self._boto = None
        self._renewals += 1
        return True

    # -- in a worker thread

    def _call(self, action: str, resource: str, parameters: Mapping[str, Any], now: float) -> dict[str, Any]:
        from botocore import xform_name
        from botocore.exceptions import ClientError

        client: Any = None
        try:
            client = self._client(now)
            answer: dict[str, Any] = getattr(client, xform_name(action))(**parameters)
        except ClientError as exc:
            raise answered(self._facts(action, resource), exc.response, operation=exc.operation_name) from exc
        except Exception as exc:
            # botocore lets through whatever its parts raise: FileNotFoundError where a token's file is missing,
            # TypeError for a reply of another shape. None of that is a reason to end the process.
            raise unanswered(self._facts(action, resource), exc, made=client is not None) from exc
        return answer

    def _client(self, now: float) -> Any:
        with self._making:
            if self._boto is None:
                self._boto, self._made_at = self._make(), now
                self._region = self._boto.meta.region_name or self._region
            return self._boto

    def _make(self) -> Any:
        import boto3
        from botocore.config import Config
        from botocore.session import Session

        base = Session()
        connect, read = _STS_TIMEOUTS  # botocore's own are 60 s, five times, and whoever needs credentials waits
        base.set_default_client_config(
            Config(connect_timeout=connect, read_timeout=read, retries={"total_max_attempts": 2})
        )
        own, given, (connect, read) = self._credentials, self._given, self._timeouts
        session = boto3.session.Session(
            own.access_key_id if given else None,
            own.secret_access_key.get_secret_value() if given else None,
            (own.session_token.get_secret_value() or None) if given else None,
            region_name=self._region or None,
            botocore_session=base,
        )
        config = Config(
            connect_timeout=connect,
            read_timeout=read,
            retries={"total_max_attempts": 1},
            max_pool_connections=_ABANDONED * self._workers,
            tcp_keepalive=True,
        )
        client = session.client(self._service, config=config)
        client.meta.events.register(f"before-parse.{self._service}", _check_reply)
        return client


def _check_reply(response_dict: Mapping[str, Any], **_: object) -> None:
    """A reply that was cut, or a page of somebody in between: botocore takes both for answers without any member."""
    from botocore.exceptions import IncompleteReadError
    from botocore.parsers import ResponseParserError

    announced, body = response_dict["headers"].get("content-length", ""), response_dict["body"]
    if announced.isdecimal() and len(body) < int(announced):
        raise IncompleteReadError(actual_bytes=len(body), expected_bytes=int(announced))
    if response_dict["status_code"] < 300 and not _is_json_object(body):
        raise ResponseParserError(f"the reply is no JSON object: {body[:_SHOWN]!r}")


def _is_json_object(body: bytes) -> bool:
    """As the answers of KMS and DynamoDB are."""
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def _in_container() -> bool:
    return any(Path(mark).exists() for mark in _CONTAINER_MARKS)
