"""Structured logs on standard error; section 9 of the signer specification.

`configure` is called once by the command line. A line is logfmt (`time="…" level=info msg="…" key=value`), a shorter
coloured form on a terminal, or JSON on request. As a last line of defence, values under telling names and everything
that looks like a secret key are masked; the first line is that nobody logs them. A log that cannot be written never
disturbs the signer.
"""

import contextlib
import json
import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from datetime import UTC, datetime
from typing import Any, TextIO

import structlog

LEVELS = {
    "panic": logging.CRITICAL,
    "fatal": logging.CRITICAL,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
_SHORT = {"critical": "FATA", "error": "ERRO", "warning": "WARN", "info": "INFO", "debug": "DEBU"}
_COLOURS = {"critical": "31", "error": "31", "warning": "33", "info": "36", "debug": "37"}
_MASK = "***"
_TELLING = re.compile(r"secret|password|passphrase|token|credential|private", re.IGNORECASE)
_SECRET_KEY = re.compile(r"\b(edsk|spsk|p2sk|BLsk|edesk|spesk|p2esk|BLesk)[1-9A-HJ-NP-Za-km-z]{20,}")
_UNPRINTABLE = re.compile("[\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")  # with those that turn text round
_PLAIN = re.compile(r"[A-Za-z0-9._/@^+:,\[\]-]+")

Event = MutableMapping[str, Any]


def configure(level: str = "info", *, json_lines: bool = False, stream: TextIO | None = None) -> None:
    """Set up logging for the process; *level* is one of `LEVELS`."""
    target = stream or sys.stderr  # None: a process without standard error, whose log nobody reads
    threshold = LEVELS[level]
    if json_lines:
        render = _render_json
    elif target is not None and target.isatty():
        render = _render_terminal
    else:
        render = _render_logfmt
    structlog.configure(
        processors=[structlog.stdlib.add_log_level, structlog.processors.format_exc_info, _mask, render],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=lambda *_: _Writer(target),
        cache_logger_on_first_use=True,
    )
    root = logging.getLogger()
    root.handlers[:] = [_StandardHandler()]
    root.setLevel(max(threshold, logging.WARNING))  # libraries speak up only when something is wrong
    # A renewal that fails is told by who asked for it, once; botocore adds 45 lines of trace each time.
    logging.getLogger("botocore.credentials").setLevel(threshold if threshold < logging.INFO else logging.CRITICAL)
    logging.getLogger("vsock_proxy").setLevel(threshold)  # the built-in proxy is no library in this sense


class _Writer:
    """Writes whole lines; a closed pipe or a full disk is not the signer's fault."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, line: str) -> None:
        if self._stream is None:
            return
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(line + "\n")
            self._stream.flush()

    debug = info = warning = error = critical = exception = msg = write


class _StandardHandler(logging.Handler):
    """Hands records of the standard library's logging to structlog."""

    def emit(self, record: logging.LogRecord) -> None:
        log = structlog.get_logger(record.name)
        write = log.error
        if record.levelno < logging.ERROR:
            write = log.warning if record.levelno >= logging.WARNING else log.info
        try:
            write(record.getMessage(), exc_info=record.exc_info, source=record.name)
        except Exception as exc:  # arguments that don't fit the text: no reason to disturb the library
            write(str(record.msg), error=repr(exc), source=record.name)


def _mask(_logger: object, _method: str, event: Event) -> Event:
    for key, value in event.items():
        event[key] = _masked(key, value)
    return event


def _masked(key: str, value: object) -> object:
    """*value* fit to be written: secrets masked, everything but numbers, lists and maps as text."""
    match value:
        case None | bool() | int() | float():
            return value
        case dict():
            return {name: _masked(str(name), item) for name, item in value.items()}
        case list() | tuple() | set():
            return [_masked(key, item) for item in value]
        case _:
            text = str(value)
            if _TELLING.search(key):
                return _MASK
            # the shortest secret key has 54 characters
            return _SECRET_KEY.sub(_mask_key, text) if len(text) >= 50 and "sk" in text else text


def _mask_key(match: re.Match[str]) -> str:
    return match[1] + _MASK


def _now() -> str:
    return datetime.now(tz=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _parts(event: Event) -> tuple[str, str, Event]:
    level = event.pop("level", "info")
    return level, str(event.pop("event", "")), event


def _render_json(_logger: object, _method: str, event: Event) -> str:
    level, message, fields = _parts(event)
    return _json({"time": _now(), "level": level, "msg": message, **fields})


def _render_logfmt(_logger: object, _method: str, event: Event) -> str:
    level, message, fields = _parts(event)
    trace = _trace(fields)
    return f'time="{_now()}" level={level} msg={_json(message)}{_pairs(fields)}{trace}'


def _render_terminal(_logger: object, _method: str, event: Event) -> str:
    level, message, fields = _parts(event)
    trace = _trace(fields)
    clock = datetime.now().astimezone().strftime("%H:%M:%S")
    head = f"\x1b[{_COLOURS.get(level, '0')}m{_SHORT.get(level, level)}\x1b[0m[{clock}]"
    return f"{head} {_json(message)[1:-1]}{_pairs(fields)}{trace}"


def _trace(fields: Event) -> str:
    """The trace of an exception, taken out of *fields*: the one thing that has lines of its own."""
    lines = str(fields.pop("exception", "")).splitlines()
    return "".join("\n" + (line if line.isprintable() else _json(line)[1:-1]) for line in lines)


def _pairs(fields: Mapping[str, Any]) -> str:
    return "".join(f" {key}={_value(value)}" for key, value in fields.items())


def _value(value: object) -> str:
    if isinstance(value, dict):
        return "map[" + " ".join(f"{key}:{_value(item)}" for key, item in value.items()) + "]"
    text = str(value)
    return text if _PLAIN.fullmatch(text) else _json(text)


def _json(value: object) -> str:
    """JSON without a control character, also those beyond ASCII; other letters stay readable."""
    text = json.dumps(value, ensure_ascii=False)
    return text if text.isprintable() else _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
