"""A DynamoDB table, made sure of at start: found, or made where it is missing and the role may.

Sections 3.7 and 4.6 of the signer specification. A role without `DescribeTable` or `CreateTable` works on a table that
exists: whoever opens it brings a *probe*, a call that changes nothing and shows that the table can be used.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import structlog
import trio

from signer.aws.client import AwsError, AwsUnavailableError
from signer.errors import SignerError

OPEN_LIMIT = 300.0  # seconds until a table must be usable, as in the reference
_POLL, _LONGEST_POLL = 0.05, 1.0  # seconds between two looks at a table that isn't usable yet, doubled up to the next
_USABLE = ("ACTIVE", "UPDATING")
_ABSENT, _HIDDEN = "absent", "hidden"  # beside the states of DynamoDB; hidden: the role may not ask

logger = structlog.get_logger(__name__)

Probe = Callable[[], Awaitable[None]]


class Client(Protocol):
    """The part of `signer.aws.client.AwsClient` that is needed here."""

    async def call(
        self, action: str, *, resource: str = "", deadline: float | None = None, **parameters: Any
    ) -> dict[str, Any]: ...


class TableError(SignerError):
    """The table can't be used, and asking again won't help; the text says what to do."""


class Table:
    """The table *name*; *keys* name its key attributes, which are strings: the partition's, and the sort's if any."""

    def __init__(self, client: Client, name: str, *keys: str) -> None:
        self._client = client
        self.name = name
        self._keys = keys
        self.status = "no answer"  # while it is opened: what DynamoDB says of it, or why it says nothing

    async def call(self, action: str, *, deadline: float | None = None, **parameters: Any) -> dict[str, Any]:
        """One call; raises `AwsError`, `AwsUnavailableError`."""
        return await self._client.call(action, resource=f"table/{self.name}", deadline=deadline, **parameters)

    async def open(self, probe: Probe, *, patient: bool = True) -> bool:
        """Return once the table can be used; tells whether it was made for that.

        A server that doesn't answer is asked again until `OPEN_LIMIT` if *patient*. Raises `TableError`, `AwsError`.
        """
        opening = _Opening(self, probe, patient)
        with trio.move_on_after(OPEN_LIMIT):
            await opening.run()
            return opening.made
        raise TableError(f"DynamoDB table {self.name} is not usable after {OPEN_LIMIT:g} s: {self.status}")

    async def state(self) -> str:
        """What DynamoDB says of the table, or why it says nothing. Raises `TableError` for keys that aren't ours."""
        try:
            described = (await self.call("DescribeTable", TableName=self.name))["Table"]
        except AwsError as exc:
            if exc.code == "ResourceNotFoundException":
                return _ABSENT
            if exc.code == "AccessDeniedException":
                return _HIDDEN
            raise
        self._check(described)
        return str(described["TableStatus"])

    def _check(self, described: Mapping[str, Any]) -> None:
        found = tuple(one["AttributeName"] for one in sorted(described["KeySchema"], key=lambda one: one["KeyType"]))
        types = {one["AttributeName"]: one["AttributeType"] for one in described["AttributeDefinitions"]}
        if found != self._keys or any(types.get(name) != "S" for name in found):
            keys = ", ".join(f"{name} ({types.get(name)})" for name in found)
            raise TableError(
                f"DynamoDB table {self.name} has the key {keys}, and {', '.join(self._keys)} (strings) is needed: it "
                "is the table of another program, set another name under: table"
            )
        replicas = [one.get("RegionName", "?") for one in described.get("Replicas") or ()]
        if replicas:
            logger.warning(
                "this is a global table: a condition holds in one region only, so let every signer use the same one",
                table=self.name,
                replicas=replicas,
            )

    async def create(self) -> None:
        """Ask for the table; another process may be first. Raises `TableError` where the role may not."""
        try:
            await self.call("CreateTable", **self._definition())
        except AwsError as exc:
            if exc.code in ("ResourceInUseException", "LimitExceededException"):
                return  # it is being made by another process; or too many are, then it is asked for again
            if exc.code == "AccessDeniedException":
                raise TableError(
                    f"DynamoDB table {self.name} doesn't exist, and the role may not make it ({exc}). Look whether "
                    f"region and table name are right; if they are, make it with: {self._command()}"
                ) from exc
            raise

    def _definition(self) -> dict[str, Any]:
        """On demand, not with the reference's 5 units: a write that is throttled is a missed slot."""
        return {
            "TableName": self.name,
            "AttributeDefinitions": [{"AttributeName": name, "AttributeType": "S"} for name in self._keys],
            "KeySchema": [
                {"AttributeName": name, "KeyType": kind}
                for name, kind in zip(self._keys, ("HASH", "RANGE"), strict=False)
            ],
            "BillingMode": "PAY_PER_REQUEST",
        }

    def _command(self) -> str:
        definition = self._definition()
        attributes = " ".join(f"AttributeName={name},AttributeType=S" for name in self._keys)
        keys = " ".join(
            f"AttributeName={one['AttributeName']},KeyType={one['KeyType']}" for one in definition["KeySchema"]
        )
        return (
            f"aws dynamodb create-table --table-name {self.name} --billing-mode PAY_PER_REQUEST "
            f"--attribute-definitions {attributes} --key-schema {keys}"
        )


class _Opening:
    """One attempt to get a table that can be used."""

    def __init__(self, table: Table, probe: Probe, patient: bool) -> None:
        self._table = table
        self._probe = probe
        self._patient = patient
        self.made = False

    async def run(self) -> None:
        pause = _POLL
        while not await self._is_usable():
            if self._table.status == _ABSENT and not self.made:
                logger.info("the DynamoDB table doesn't exist and is made", table=self._table.name)
                await self._table.create()
                self.made = True
            await trio.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)
        text = "the DynamoDB table was made" if self.made else "the DynamoDB table exists and is used as it is"
        logger.info(text, table=self._table.name)

    async def _is_usable(self) -> bool:
        """Whether the table is there and takes our calls; notes its state."""
        try:
            self._table.status = await self._table.state()
            if self._table.status in (*_USABLE, _HIDDEN):
                await self._probe()
                return True
        except AwsUnavailableError as exc:
            if not self._patient:
                raise
            if self._table.status != str(exc):
                logger.warning(
                    "the DynamoDB table can't be asked, trying again", table=self._table.name, error=str(exc)
                )
            self._table.status = str(exc)
        except AwsError as exc:
            if exc.code != "ResourceNotFoundException":
                raise
            self._table.status = _ABSENT  # the probe's word: the role may not ask for the state, or it was early
        return False
