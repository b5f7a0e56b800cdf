"""Undoes what `proxy.logs.configure` does to the process, which here is pytest's."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

_SWITCHES = ("raiseExceptions", "logThreads", "logProcesses", "logMultiprocessing", "_srcfile")


@contextmanager
def log_as_before() -> Iterator[None]:
    """Whatever is set up meanwhile, afterwards the log is as it was."""
    loggers = [logging.getLogger(), logging.getLogger("vsock_proxy")]
    before = [(one, one.handlers[:], one.level) for one in loggers]
    switches = {name: getattr(logging, name) for name in _SWITCHES}
    try:
        yield
    finally:
        logging.captureWarnings(capture=False)
        for name, value in switches.items():
            setattr(logging, name, value)
        for one, handlers, level in before:
            one.handlers[:] = handlers
            one.setLevel(level)
