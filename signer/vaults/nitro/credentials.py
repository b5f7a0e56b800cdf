"""AWS credentials for one component: from its configuration, else from the chain of the AWS SDK.

Nothing is written to the process environment, so that one component's credentials never reach another's (weakness
31 of the reference). The enclave gets them in `Initialize`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from signer.errors import SignerError

CredentialsProvider = Callable[[], Awaitable["Credentials"]]


class CredentialsError(SignerError):
    """No usable credentials; the text says where they were looked for."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What `Initialize` carries; the secrets stay out of the repr."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False)
    region: str


def provider(*, access_key_id: str, secret_access_key: str, session_token: str, region: str) -> CredentialsProvider:
    """A function that resolves credentials when it is called; empty values come from the SDK's chain."""

    async def resolve() -> Credentials:
        if access_key_id and secret_access_key and region:
            return Credentials(access_key_id, secret_access_key, session_token or None, region)
        found = await trio.to_thread.run_sync(
            _from_chain, access_key_id, secret_access_key, session_token, region, abandon_on_cancel=True
        )
        if not found.access_key_id or not found.secret_access_key:
            raise CredentialsError(
                "(Nitro): missing credentials: neither the configuration (credentials), nor the environment, "
                "nor the shared files, nor the instance's role has any"
            )
        if not found.region:
            raise CredentialsError("(Nitro): missing region: set credentials.region, or AWS_REGION")
        return found

    return resolve


def _from_chain(access_key_id: str, secret_access_key: str, session_token: str, region: str) -> Credentials:
    """Fill what is empty from botocore's chain; blocks, and loads a heavy library only when it is needed."""
    import botocore.exceptions
    import botocore.session

    try:
        session = botocore.session.Session()
        region = region or session.get_config_variable("region") or _region_of_environment()
        if access_key_id and secret_access_key:
            return Credentials(access_key_id, secret_access_key, session_token or None, region or "")
        found = session.get_credentials()
        if found is None:
            return Credentials("", "", None, region or "")
        frozen = found.get_frozen_credentials()
    except (
        botocore.exceptions.BotoCoreError,
        botocore.exceptions.ClientError,
    ) as exc:  # the latter is no BotoCoreError
        raise CredentialsError(f"(Nitro): missing credentials: {exc}") from exc
    return Credentials(frozen.access_key or "", frozen.secret_key or "", frozen.token or None, region or "")


def _region_of_environment() -> str:
    """AWS_REGION, which the SDK of the reference reads and botocore doesn't."""
    import os

    return os.environ.get("AWS_REGION", "")
