"""Log lines in the shape of the original, and its variable RUST_LOG: part 1.6 of the proxy specification."""

import logging
import sys
import time
from collections.abc import Mapping
from typing import TextIO

ROOT = "vsock_proxy"  # of our loggers: `vsock_proxy.proxy` is shown as `vsock_proxy::proxy`
_LEVELS = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": logging.DEBUG,
}
_NAMES = {logging.CRITICAL: "ERROR", logging.ERROR: "ERROR", logging.WARNING: "WARN"}
_COLOURS = {"ERROR": "31", "WARN": "33", "INFO": "32", "DEBUG": "34"}
DEFAULT_LEVEL = logging.INFO


def level_of(directives: str) -> int:
    """The level that RUST_LOG asks for: its bare level, or that of a target `vsock_proxy…`, which goes first.

    Other targets, a filter behind a slash and what can't be read are ignored; without any, the level is info.
    """
    bare: int | None = None
    ours: int | None = None
    for item in directives.partition("/")[0].split(","):
        target, separator, name = (part.strip() for part in item.partition("="))
        if separator:
            if target.startswith(ROOT) and (name.lower() in _LEVELS or not name):
                ours = _LEVELS[name.lower()] if name else logging.DEBUG
        elif target.lower() in _LEVELS:
            bare = _LEVELS[target.lower()]
        elif target.startswith(ROOT):
            ours = logging.DEBUG
    return next((level for level in (ours, bare) if level is not None), DEFAULT_LEVEL)


class Formatter(logging.Formatter):
    """`[2025-01-08T06:30:00Z INFO  vsock_proxy::proxy] text`."""

    def __init__(self, *, colour: bool = False) -> None:
        super().__init__()
        self._colour = colour
        self._second = -1  # of the line before, which is mostly that of the next, too
        self._shown = ""

    def format(self, record: logging.LogRecord) -> str:
        level = _NAMES.get(record.levelno, record.levelname)
        shown = f"\x1b[{_COLOURS.get(level, '0')}m{level:5}\x1b[0m" if self._colour else f"{level:5}"
        text = record.getMessage()
        if not text.isprintable():
            text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
        trace = "\n" + self.formatException(record.exc_info) if record.exc_info else ""
        return f"[{self._time(int(record.created))} {shown} {record.name.replace('.', '::')}] {text}{trace}"

    def _time(self, second: int) -> str:
        if second != self._second:
            self._second = second
            self._shown = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
        return self._shown


def configure(environ: Mapping[str, str], stream: TextIO | None = None) -> None:
    """Set up the process's log on standard error as RUST_LOG and RUST_LOG_STYLE say."""
    target = sys.stderr if stream is None else stream
    style = environ.get("RUST_LOG_STYLE", "auto").lower()
    handler = logging.StreamHandler(target)
    handler.setFormatter(Formatter(colour=style == "always" or (style != "never" and target.isatty())))
    logging.raiseExceptions = False  # a broken pipe is not fatal
    # What no line shows need not be found out for each: the place in the code, process, thread (logging how-to,
    # "Optimization"). Three lines for a connection are a good part of what it costs.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    logging.captureWarnings(capture=True)
    logging.getLogger().handlers[:] = [handler]
    level = level_of(environ.get("RUST_LOG", ""))
    logging.getLogger(ROOT).setLevel(level)
    logging.getLogger().setLevel(max(level, logging.WARNING))  # of what others log
