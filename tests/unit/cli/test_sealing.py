"""The command that `seal-for` speaks through: one that is silent, floods, or does not end; the registers it wants."""

import os
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import click
import pytest

from signer import crypto
from signer.cli import sealing
from signer.cli.main import cli
from signer.cli.secret_keys import ImportError_, looks_like_one
from signer.crypto.formats import to_base58
from signer.tezos.keys import Curve

PAUSE = (sys.executable, "-c", "import signal; print('a line', flush=True); signal.pause()")


class Interrupted:
    """Somebody presses Ctrl-C while an answer is waited for."""

    def readline(self, limit: int, /) -> bytes:
        raise KeyboardInterrupt


@pytest.fixture
def pipe() -> Iterator[tuple[int, sealing._Pipe]]:
    """Where to write, and what reads it."""
    reading, writing = os.pipe()
    yield writing, sealing._Pipe(reading, "ssh")
    os.close(reading)


@pytest.mark.parametrize("chunks", [[b"one\ntwo\n", b"rest"], [b"o", b"ne", b"\n", b"two\nrest"]])
def test_lines_however_they_come(pipe: tuple[int, sealing._Pipe], chunks: list[bytes]) -> None:
    writing, lines = pipe
    for chunk in chunks:
        os.write(writing, chunk)
    os.close(writing)
    assert [lines.readline(100) for _ in range(4)] == [b"one\n", b"two\n", b"rest", b""]


def test_a_line_without_end_is_cut(pipe: tuple[int, sealing._Pipe]) -> None:
    writing, lines = pipe
    os.write(writing, b"x" * 1000)  # and the pipe stays open
    assert lines.readline(100) == b"x" * 100
    assert len(lines._buffer) <= 100, "no more is held than was asked for"
    os.close(writing)


def test_a_command_that_says_nothing_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    def ask() -> None:
        with sealing._line(PAUSE) as line:
            assert line.ask(b"\n") == b"a line\n"
            monkeypatch.setattr(sealing, "_ANSWER_TIMEOUT", 0.05)
            line.ask(b"\n")

    with pytest.raises(ImportError_, match="has not answered for 0.05 s"):
        ask()


def test_half_a_line_does_not_buy_time(pipe: tuple[int, sealing._Pipe], monkeypatch: pytest.MonkeyPatch) -> None:
    writing, lines = pipe
    os.write(writing, b"half")
    monkeypatch.setattr(sealing, "_ANSWER_TIMEOUT", 0.05)
    with pytest.raises(ImportError_, match="ssh has not answered"):
        lines.readline(100)
    os.close(writing)


def test_without_standard_output_there_is_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    with pytest.raises(ImportError_, match="standard output is closed"), sealing._line(()):
        raise AssertionError


def test_whoever_interrupts_a_key_on_its_way_learns_that_it_may_be_stored(capsys: pytest.CaptureFixture[str]) -> None:
    sent = BytesIO()
    line = sealing._Line(sent, Interrupted(), "ssh")
    with pytest.raises(KeyboardInterrupt):
        sealing._send(line, b"order\n")
    assert sent.getvalue() == b"order\n"
    assert "interrupted: the sealed key was on its way, and may be stored: run this again" in capsys.readouterr().err


def test_a_command_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "_END_TIMEOUT", 0.05)
    with pytest.raises(ImportError_, match="did not end within 0.05 s, after the keys were stored"):  # noqa: SIM117
        with sealing._line(PAUSE) as line:
            assert line.ask(b"\n") == b"a line\n"


def test_the_end_of_a_command_that_takes_nothing_is_no_fault_of_ours() -> None:
    def ask() -> None:
        with sealing._line((sys.executable, "-c", "")) as line:
            assert line._incoming.readline(1) == b"", "it has ended"
            line.ask(b"x" * 100)

    with pytest.raises(ImportError_, match="said nothing more"):
        ask()


ZEROS, IMAGE = "00" * 48, "11" * 48


def wanted(**registers: str) -> dict[int, frozenset[bytes]]:
    given: dict[str, tuple[str, ...]] = {f"pcr{number}": () for number in (0, 1, 2, 3, 4, 8)}
    return sealing._wanted(given | {name: (text,) for name, text in registers.items()}, None)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_debug_mode_is_never_wanted(number: int) -> None:
    with pytest.raises(click.UsageError, match=rf"^--pcr{number}: a register of zeros is that of debug mode"):
        wanted(**{"pcr0": IMAGE, f"pcr{number}": ZEROS})


def test_no_role_and_no_signature_can_be_wanted() -> None:
    found = wanted(pcr0=IMAGE, pcr3=ZEROS, pcr8=ZEROS)
    assert found == {0: {b"\x11" * 48}, 3: {bytes(48)}, 8: {bytes(48)}}


def test_the_way_without_a_command_has_no_limit() -> None:
    line = sealing._Line(BytesIO(), BytesIO(b"answer\n"), "the other side")
    assert line.ask(b"question\n") == b"answer\n"


@pytest.mark.parametrize("mark", ["", "unencrypted:", "encrypted:"])
@pytest.mark.parametrize("curve", list(Curve))
def test_a_secret_key_in_the_place_of_the_command_is_not_shown(curve: Curve, mark: str, tmp_path: Path) -> None:
    secret = to_base58(crypto.load_secret_key(curve, bytes(16) + bytes(range(16))))
    file = tmp_path / "key"
    file.write_text(secret)
    arguments = ["seal-for", "--pcr0", "ab" * 48, "--from", str(file), mark + secret]
    with pytest.raises(click.UsageError, match="secret keys are no arguments") as error:
        cli.main(arguments, prog_name="signer", standalone_mode=False)
    assert secret not in error.value.format_message()


def test_other_commands_are_none() -> None:
    for text in (
        "ssh",
        "edsk",
        "/usr/bin/ssh",
        "edpkuBknW28nW72KG6RoHtYW7p12T6GKc7nAbwYX5m8Wd9sDVC9yav",
        "tz1" + "a" * 33,
    ):
        assert not looks_like_one(text)
    assert looks_like_one("edesk1GXwWmGjXiLHBKxGBxwmNvG21vKBh6FBxc4CyJ8adQQE2avP5vBB57ZUZ93Anm7i4k8RmsHaPzVAvpnHkFF")
