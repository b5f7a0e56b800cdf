"""DynamoDB for the unit tests: moto's tables behind the seam of the client, without a network, with faults."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import boto3
import trio
from botocore import xform_name
from botocore.exceptions import ClientError
from moto import mock_aws

from signer.aws.client import AwsError, AwsUnavailableError


class Dynamo:
    """Implements `signer.aws.table.Client`: one call at a time, as if DynamoDB decided each in one moment."""

    def __init__(self) -> None:
        self.boto: Any = boto3.client(
            "dynamodb", region_name="eu-west-1", aws_access_key_id="AKID", aws_secret_access_key="SECRET"
        )
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.denied: set[str] = set()  # actions that the role may not
        self.faults: deque[str] = (
            deque()
        )  # of the next calls: "", "lost" (executed), "throttled" (not), an error code, "reason X"
        self.gate: trio.Event | None = None  # calls wait for it, before they are executed

    @property
    def actions(self) -> list[str]:
        return [action for action, _ in self.calls]

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]:
        self.calls.append((action, parameters))
        await (trio.lowlevel.checkpoint() if self.gate is None else self.gate.wait())
        fault = self.faults.popleft() if self.faults else ""
        if action in self.denied:
            raise self._error("AccessDeniedException", action, resource, {})
        if fault == "throttled":
            raise self._unavailable("ThrottlingException", action, resource)
        if fault.startswith("reason "):
            reasons = [{"Code": "None"}, {"Code": fault.removeprefix("reason ")}]
            raise self._error("TransactionCanceledException", action, resource, {"CancellationReasons": reasons})
        if fault not in ("", "lost"):
            raise self._error(fault, action, resource, {})
        answer = self._execute(action, resource, parameters)
        if fault == "lost":
            raise self._unavailable("", action, resource)
        return answer

    def _execute(self, action: str, resource: str, parameters: dict[str, Any]) -> dict[str, Any]:
        try:
            answer: dict[str, Any] = getattr(self.boto, xform_name(action))(**parameters)
        except ClientError as exc:
            response: dict[str, Any] = dict(exc.response)
            raise self._error(response["Error"]["Code"], action, resource, response) from exc
        return answer

    def _error(self, code: str, action: str, resource: str, response: dict[str, Any]) -> AwsError:
        return AwsError(
            f"{code} of {action}", code=code, action=f"dynamodb:{action}", resource=resource, response=response
        )

    def _unavailable(self, code: str, action: str, resource: str) -> AwsUnavailableError:
        return AwsUnavailableError(
            f"no answer from {action}", code=code, action=f"dynamodb:{action}", resource=resource
        )


@contextmanager
def dynamo() -> Iterator[Dynamo]:
    """Empty tables."""
    with mock_aws():
        yield Dynamo()
