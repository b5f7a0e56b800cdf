"""Part 1.6: the shape of a line, RUST_LOG and RUST_LOG_STYLE."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator

import pytest

from proxy.logs import Formatter, configure, level_of
from tests.unit.proxy.log_state import log_as_before

OFF = logging.CRITICAL + 10


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    with log_as_before():
        yield


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("", logging.INFO),
        ("off", OFF),
        ("error", logging.ERROR),
        ("WARN", logging.WARNING),
        ("Info", logging.INFO),
        ("debug", logging.DEBUG),
        ("tRaCe", logging.DEBUG),
        (" warn ", logging.WARNING),
        ("error,warn", logging.WARNING),  # the last one counts
        ("hyper=trace", logging.INFO),
        ("hyper=trace,error", logging.ERROR),
        ("warn,hyper=trace", logging.WARNING),
        ("vsock_proxy=debug", logging.DEBUG),
        ("vsock_proxy=debug,error", logging.DEBUG),  # a target goes before the bare level
        ("error,vsock_proxy::proxy=debug", logging.DEBUG),
        ("vsock_proxy=off,trace", OFF),
        ("vsock_proxy = error", logging.ERROR),
        ("vsock_proxy", logging.DEBUG),
        ("vsock_proxy=", logging.DEBUG),
        ("vsock_proxy=loud,error", logging.ERROR),
        ("nonsense", logging.INFO),
        (",,=,", logging.INFO),
        ("error/some=filter,trace", logging.ERROR),
        ("warn\udcff", logging.INFO),
    ],
)
def test_rust_log(text: str, level: int) -> None:
    assert level_of(text) == level


def record(level: int, text: str, name: str = "vsock_proxy.proxy") -> logging.LogRecord:
    made = logging.LogRecord(name, level, "file", 1, text, None, None)
    made.created = 1736317800.9  # the seconds are cut, not rounded
    return made


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        (logging.CRITICAL, "ERROR"),
        (logging.ERROR, "ERROR"),
        (logging.WARNING, "WARN "),
        (logging.INFO, "INFO "),
        (logging.DEBUG, "DEBUG"),
    ],
)
def test_shape_of_a_line(level: int, shown: str) -> None:
    line = Formatter().format(record(level, "Bound to cid: 3 port: 8000"))
    assert line == f"[2025-01-08T06:30:00Z {shown} vsock_proxy::proxy] Bound to cid: 3 port: 8000"


def test_module_path() -> None:
    assert "vsock_proxy::dns] " in Formatter().format(record(logging.INFO, "x", "vsock_proxy.dns"))


def test_a_line_stays_one_line_and_shows_no_control_characters() -> None:
    line = Formatter().format(record(logging.INFO, "a\nb\x1b[31m\udcff"))
    assert line.endswith(r"a\nb\x1b[31m\udcff")


def test_an_exception_has_its_trace_below() -> None:
    made = record(logging.ERROR, "internal error")
    try:
        raise RuntimeError("why")
    except RuntimeError:
        made.exc_info = sys.exc_info()
    first, *rest = Formatter().format(made).splitlines()
    assert first.endswith("internal error")
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "RuntimeError: why"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("style", "stream", "coloured"),
    [
        ("always", io.StringIO, True),
        ("ALWAYS", io.StringIO, True),
        ("never", Terminal, False),
        ("auto", Terminal, True),
        ("auto", io.StringIO, False),
        ("nonsense", io.StringIO, False),
        (None, Terminal, True),
        (None, io.StringIO, False),
    ],
)
def test_rust_log_style(style: str | None, stream: type[io.StringIO], coloured: bool) -> None:
    target = stream()
    configure({} if style is None else {"RUST_LOG_STYLE": style}, target)
    logging.getLogger("vsock_proxy.proxy").info("text")
    assert ("\x1b[32mINFO \x1b[0m" in target.getvalue()) == coloured


def test_level_and_what_other_libraries_log() -> None:
    target = io.StringIO()
    configure({"RUST_LOG": "warn"}, target)
    logging.getLogger("vsock_proxy.proxy").info("not shown")
    logging.getLogger("vsock_proxy.proxy").warning("ours")
    logging.getLogger("other").info("not shown")
    logging.getLogger("other").warning("theirs")
    assert [line.partition("] ")[2] for line in target.getvalue().splitlines()] == ["ours", "theirs"]


def test_off_is_off_for_everybody() -> None:
    target = io.StringIO()
    configure({"RUST_LOG": "off"}, target)
    logging.getLogger("vsock_proxy.proxy").critical("ours")
    logging.getLogger("other").critical("theirs")
    assert target.getvalue() == ""


def test_a_stream_that_is_gone_is_no_fault() -> None:
    target = io.StringIO()
    configure({}, target)
    target.close()
    logging.getLogger("vsock_proxy.proxy").error("nobody reads it")
