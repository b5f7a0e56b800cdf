"""AWS credentials for one component: from its configuration, else from the chain of the AWS SDK.

Nothing is written to the process environment, so that one component's credentials never reach another's (weakness
31 of the reference). The enclave gets them in `Initialize`. A provider is asked again and again while the signer runs:
temporary credentials are renewed by the SDK in the last quarter of an hour of their life, and shared files that were
changed are read anew (weakness 9).
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from signer.errors import SignerError

if TYPE_CHECKING:
    import botocore.session

_MAX_SHOWN = 200  # characters of the SDK's text

CredentialsProvider = Callable[[], Awaitable["Credentials"]]

MAX_LOOKUPS = 3  # at once: one that hangs is left behind in its thread, and threads are needed elsewhere


class CredentialsError(SignerError):
    """No usable credentials; the text says where they were looked for."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What `Initialize` carries; the secrets stay out of the repr."""

    access_key_id: str
    secret_access_key: str = field(repr=False)
    session_token: str | None = field(repr=False)
    region: str

    @property
    def secrets(self) -> Sequence[str]:
        """What must not be shown, be it in the words of another; shorter texts are placeholders, for a mock."""
        return [secret for secret in (self.secret_access_key, self.session_token) if secret and len(secret) >= 8]


def provider(
    *, access_key_id: str, secret_access_key: str, session_token: str, region: str, kms_region: str = ""
) -> CredentialsProvider:
    """A function that resolves credentials each time it is called; empty values come from the SDK's chain.

    *kms_region* is where the KMS key is, as far as the configuration tells: the region where nothing else names one.
    """
    configured = Credentials(access_key_id, secret_access_key, session_token or None, region)
    chain, lookups = _Chain(configured, kms_region), trio.CapacityLimiter(MAX_LOOKUPS)

    async def resolve() -> Credentials:
        if access_key_id and secret_access_key and region:
            return configured
        found = await trio.to_thread.run_sync(chain.resolve, abandon_on_cancel=True, limiter=lookups)
        if not found.access_key_id or not found.secret_access_key:
            raise CredentialsError(
                "(Nitro): missing credentials: neither the configuration (credentials), nor the environment, "
                "nor the shared files, nor the instance's role has any"
            )
        if not found.region:
            raise CredentialsError(
                "(Nitro): missing region: set credentials.region, or AWS_REGION, or give the ARN as encryption_key_id"
            )
        return found

    return resolve


class _Chain:
    """botocore's chain, which fills what is empty; it blocks, and loads a heavy library only when it is needed."""

    def __init__(self, configured: Credentials, kms_region: str) -> None:
        self._configured = configured
        self._kms_region = kms_region
        self._session: botocore.session.Session | None = None  # kept: it renews what expires
        self._stamps: list[tuple[int, int]] = []
        self._last: Credentials | None = None

    def resolve(self) -> Credentials:
        """The credentials now. Raises `CredentialsError` where there are none, or where they can't be renewed."""
        import botocore.exceptions
        import botocore.session

        stamps = _stamps()
        try:
            if self._session is None or stamps != self._stamps:
                self._session, self._stamps = botocore.session.Session(), stamps
            return self._from(self._session)
        except CredentialsError:
            raise
        except (
            botocore.exceptions.BotoCoreError,
            botocore.exceptions.ClientError,
        ) as exc:  # the latter is no BotoCoreError
            raise CredentialsError(f"(Nitro): missing credentials: {_shown(exc)}") from exc
        except Exception as exc:  # what the SDK lets through: a RuntimeError for what is still expired after it was
            # renewed (a clock that is wrong), a ValueError for what a credential_process prints, and the like
            raise CredentialsError(f"(Nitro): missing credentials: {type(exc).__name__}: {_shown(exc)}") from exc

    def _from(self, session: "botocore.session.Session") -> Credentials:
        own = self._configured
        region = own.region or session.get_config_variable("region") or os.environ.get("AWS_REGION") or self._kms_region
        if own.access_key_id and own.secret_access_key:
            return Credentials(own.access_key_id, own.secret_access_key, own.session_token, region)
        source = session.get_credentials()
        if source is None:
            return Credentials("", "", None, region)
        frozen = source.get_frozen_credentials()
        found = Credentials(frozen.access_key or "", frozen.secret_key or "", frozen.token or None, region)
        if found == self._last and getattr(source, "refresh_needed", bool)():
            raise CredentialsError(
                f"(Nitro): the temporary credentials ({source.method}) expire within a quarter of an hour, "
                "and renewing them fails: see whether their source can be reached"
            )
        self._last = found
        return found


def _shown(error: Exception) -> str:
    """*error* on one line: its source may have answered with a page of HTML."""
    text = " ".join(str(error).split())
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _stamps() -> list[tuple[int, int]]:
    """What changes when one of the SDK's shared files does."""
    found: list[tuple[int, int]] = []
    for variable, default in (("AWS_SHARED_CREDENTIALS_FILE", "credentials"), ("AWS_CONFIG_FILE", "config")):
        path = Path(os.environ.get(variable) or f"~/.aws/{default}")
        try:
            status = path.expanduser().stat()
        except (OSError, RuntimeError):  # the latter: nobody's home
            found.append((0, 0))
        else:
            found.append((status.st_ino, status.st_mtime_ns))
    return found
