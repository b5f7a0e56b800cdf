"""Secret keys as people give them: files, arguments, standard input, a prompt; with their passphrase."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli.common import standard_input
from signer.errors import SignerError

if TYPE_CHECKING:
    from signer.crypto.interface import SecretKey

_MAX_INPUT = 1024 * 1024  # characters of standard input or a file


class ImportError_(SignerError):  # noqa: N801, N818
    """An import or generation that can't be done; the text is the reference's."""


def parse_all(texts: list[bytes], ask: Callable[[], str | None]) -> list[SecretKey]:
    """Every key, before the first is stored: a slip in the last one leaves nothing half done."""
    from signer.crypto import CryptoError, PassphraseNeededError
    from signer.crypto.formats import parse_secret_key

    keys: list[SecretKey] = []
    for number, text in enumerate(texts, 1):
        try:
            keys.append(parse_secret_key(text, ask))
        except CryptoError as exc:
            for key in keys:
                key.wipe()
            advice = "; use --password-file" if isinstance(exc, PassphraseNeededError) else ""
            raise ImportError_(f"{which(number, texts)}{exc}{advice}") from None
    return keys


def looks_like_one(text: str) -> bool:
    """Whether *text* is a secret key in Base58, plain or encrypted, as far as its form tells."""
    return bool(re.fullmatch(r"(unencrypted:|encrypted:)?(ed|sp|p2|BL)e?sk[1-9A-HJ-NP-Za-km-z]{30,}", text))


def which(number: int, keys: Sequence[object]) -> str:
    return f"key {number} of {len(keys)}: " if len(keys) > 1 else ""


def read(arguments: tuple[str, ...], source: Path | None) -> list[bytes]:
    if source is not None:
        return [_read(source)]
    if arguments:
        return [os.fsencode(argument) for argument in arguments]
    if _on_terminal():
        return [os.fsencode(_prompt("Enter the secret key"))]
    data = standard_input().read(_MAX_INPUT)
    if not data.strip():
        raise ImportError_("standard input holds no secret key")
    lines = data.split()
    one_a_line = len(lines) > 1 and all(
        re.fullmatch(rb"(unencrypted:|encrypted:)?[1-9A-HJ-NP-Za-km-z]{40,120}", line) for line in lines
    )
    return lines if one_a_line else [data]


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()[:_MAX_INPUT]
    except OSError as exc:
        raise ImportError_(f"cannot read {file}: {exc.strerror}") from exc


def _on_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _prompt(text: str) -> str:
    """A line typed without echo."""
    try:
        typed: str = click.prompt(text, hide_input=True, prompt_suffix=": ")
    except UnicodeDecodeError:
        raise ImportError_("what was typed is not UTF-8") from None
    return typed


def passphrase(password: str | None, file: Path | None) -> Callable[[], str | None]:
    """Asked for once, at the first encrypted key."""
    known: list[str] = []

    def ask() -> str | None:
        if known:
            return known[0]
        if password:
            known.append(password)
        elif file is not None:
            known.append(os.fsdecode(_read(file)).rstrip("\r\n"))
        elif _on_terminal():
            known.append(_prompt("Enter the password"))
        return known[0] if known else None

    return ask
