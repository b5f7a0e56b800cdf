"""The settings of an image: its environment, which is measured with it; sections 3.1, 5.2 and 10.6 of the enclave
specification.

An empty value means the default (an unset argument of a Dockerfile arrives as such); any other that makes no sense
refuses the start, in place of the reference's silent default.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

DEFAULT_PORT = 2000  # LISTEN_PORT
DEFAULT_LOG_PORT = 2001  # LOG_PORT
_PARENT = 3  # the CID of the parent, as an enclave sees it
_KMS_PORT = 8000  # of the parent's proxy
_LAST = 2**32 - 2  # the greatest CID and port; above it: any
_KEY_ARN = re.compile(r"arn:aws(?:-[a-z]+)*:kms:[a-z0-9-]{1,32}:[0-9]{12}:key/[A-Za-z0-9-]{1,64}")
_HOST = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)(\.(?!-)[a-z0-9-]{1,63}(?<!-))+")


class SettingsError(Exception):
    """A variable of the environment makes no sense; the text says which, and what was expected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an image is built with."""

    listen_port: int = DEFAULT_PORT
    log_port: int = DEFAULT_LOG_PORT  # 0: no log stream
    proxy_cid: int = _PARENT
    proxy_port: int = _KMS_PORT
    endpoint: str | None = None  # the host name of KMS, in place of the region's
    strict: bool = False  # whether legacy blobs and keys in clear are refused
    kms_key: str | None = None  # ARN of the only KMS key that seals and opens here; None: the host names it


def read(environment: Mapping[str, str]) -> Settings:
    """The settings in *environment*; raises `SettingsError`."""
    return Settings(
        listen_port=_number(environment, "LISTEN_PORT", "a port number", DEFAULT_PORT),
        log_port=_number(environment, "LOG_PORT", "a port number, or 0 for none", DEFAULT_LOG_PORT, least=0),
        proxy_cid=_number(environment, "PROXY_CID", "a CID", _PARENT),
        proxy_port=_number(environment, "PROXY_PORT", "a port number", _KMS_PORT),
        endpoint=_endpoint(environment.get("ENDPOINT", "")),
        strict=_switch(environment, "SEAL_STRICT"),
        kms_key=_key_arn(environment.get("KMS_KEY", "")),
    )


def _number(environment: Mapping[str, str], name: str, what: str, default: int, *, least: int = 1) -> int:
    text = environment.get(name, "")
    if text == "":
        return default
    if not (text.isascii() and text.isdigit() and len(text) <= 10) or not least <= int(text) <= _LAST:
        raise SettingsError(f"{name}: expected {what}, got {text!r}")
    return int(text)


def _switch(environment: Mapping[str, str], name: str) -> bool:
    text = environment.get(name, "")
    if text not in ("", "0", "1"):
        raise SettingsError(f"{name}: expected 0 or 1, got {text!r}")
    return text == "1"


def _key_arn(text: str) -> str | None:
    """A key's ARN, which names account and region: an alias or an id could be anybody's."""
    if text == "":
        return None
    if _KEY_ARN.fullmatch(text) is None:
        raise SettingsError(f"KMS_KEY: expected arn:aws:kms:<region>:<account>:key/<id>, got {text!r}")
    return text


def _endpoint(text: str) -> str | None:
    """The host of a URL `https://<host>`: TLS is checked against this name, so plain HTTP is never spoken."""
    if text == "":
        return None
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        raise SettingsError(f"ENDPOINT: expected https://<host name>, got {text!r}") from None
    host = parts.netloc.removesuffix(":443")
    plain = port in (None, 443) and parts.path in ("", "/") and not parts.query and not parts.fragment
    if parts.scheme != "https" or not plain or _HOST.fullmatch(host) is None:
        raise SettingsError(f"ENDPOINT: expected https://<host name>, got {text!r}")
    return host
