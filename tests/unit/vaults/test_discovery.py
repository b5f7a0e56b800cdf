"""Running nitro-cli: a real program on the PATH, in every bad mood; and what the settings make of it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import trio
from pydantic import ValidationError
from structlog.testing import capture_logs

from proxy.address import parse
from signer.config import NitroSettings
from signer.vaults.nitro import discovery
from signer.vaults.nitro.discovery import DiscoveryError, Place, locator
from tests.nitro_cli import PCRS, NitroCli, enclave
from tests.unit.vaults.fake import until


@pytest.fixture
def nitro_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> NitroCli:
    found = NitroCli(tmp_path / "bin of nitro")
    monkeypatch.setenv("PATH", found.path_environment()["PATH"])
    return found


def settings(**changes: Any) -> NitroSettings:
    return NitroSettings.model_validate({"encryption_key_id": "k", **changes})


async def refusal(nitro: NitroSettings) -> str:
    with pytest.raises(DiscoveryError) as caught:
        await locator(nitro).locate()
    return str(caught.value)


async def test_the_place_follows_the_listing(nitro_cli: NitroCli) -> None:
    for text in ({}, {"enclave_cid": "auto"}):
        found = locator(settings(**text, enclave_port=2001))
        assert not found.fixed
        nitro_cli.show(enclave(16))
        place = await found.locate()
        assert place == Place(parse("vsock:16:2001"), "i-0123456789abcdef0-enc16")
        assert str(place) == "vsock:16:2001 (i-0123456789abcdef0-enc16)"
        nitro_cli.show(enclave(17))
        assert (await found.locate()).address == parse("vsock:17:2001")
    assert nitro_cli.calls == 4


async def test_a_place_that_is_fixed_asks_nobody(nitro_cli: NitroCli) -> None:
    nitro_cli.fail(39, "")
    for nitro, text in (
        (settings(enclave_cid=20), "vsock:20:2000"),
        (settings(enclave_address="unix:/run/v.sock:5"), "unix:/run/v.sock:5"),
        (settings(enclave_cid=7, allow_debug_mode=True), "vsock:7:2000"),
        (settings(enclave_cid=21, enclave_address="unix:/run/{cid}.sock:5"), "unix:/run/21.sock:5"),
    ):
        found = locator(nitro)
        assert found.fixed
        assert await found.locate() == Place(parse(text))
    assert nitro_cli.calls == 0


async def test_a_fixed_cid_is_checked_where_that_is_asked_for(nitro_cli: NitroCli) -> None:
    nitro_cli.show(enclave(16, name="other"), enclave(20, flags="DEBUG_MODE"))
    assert "debug mode" in await refusal(settings(enclave_cid=20, allow_debug_mode=False))
    expecting = settings(enclave_cid=20, expected_pcrs={"PCR0": "d" * 96}, allow_debug_mode=True)
    assert "expected " + "d" * 96 in await refusal(expecting)
    nitro_cli.show(enclave(20, pcrs={"PCR0": "d" * 96}))
    assert (await locator(expecting).locate()).address == parse("vsock:20:2000")
    nitro_cli.show(enclave(21, pcrs={"PCR0": "d" * 96}))
    assert "no enclave with CID 20" in await refusal(expecting)


async def test_a_name_and_a_pattern(nitro_cli: NitroCli) -> None:
    nitro_cli.show(enclave(16, name="other"), enclave(20))
    assert "several enclaves" in await refusal(settings())
    named = settings(enclave_name="signer", enclave_address="tcp:127.0.0.1:{cid}")
    assert (await locator(named).locate()).address == parse("tcp:127.0.0.1:20")


async def test_without_nitro_cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    found = locator(settings())
    with capture_logs() as logs:
        for _ in range(3):
            assert (await found.locate()).address == parse("vsock:16:2000"), "as the reference has it"
    assert [line["log_level"] for line in logs] == ["warning"]
    for changes in (
        {"enclave_cid": "auto"},
        {"enclave_name": "signer"},
        {"allow_debug_mode": False},
        {"expected_pcrs": PCRS},
    ):
        assert "not on the PATH" in await refusal(settings(**changes))
    (tmp_path / "nitro-cli").write_text("not executable")
    assert "cannot be executed" in await refusal(settings(enclave_cid="auto"))
    (tmp_path / "nitro-cli").write_bytes(b"\x7fELF and no program")
    (tmp_path / "nitro-cli").chmod(0o755)
    assert "cannot be run" in await refusal(settings(enclave_cid="auto"))


async def test_a_failure_is_told(nitro_cli: NitroCli) -> None:
    nitro_cli.fail(19, "Start...\n[ E19 ] File operation failure.\x1b[0m\n\nFor more details, please visit ...\n")
    text = await refusal(settings())
    assert "ended with status 19: [ E19 ] File operation failure." in text
    assert "\x1b" not in text
    nitro_cli.fail(1, "")
    assert "status 1: it said nothing" in await refusal(settings())
    nitro_cli.fail(1, "only this\n", b'{"not": "a list"}')
    assert "status 1: only this" in await refusal(settings())


async def test_a_listing_counts_in_spite_of_a_failure(nitro_cli: NitroCli) -> None:
    """One silent enclave process makes it end with 39; the others are listed all the same."""
    nitro_cli.show(enclave(16))
    listing = (nitro_cli.directory / "output").read_bytes()
    nitro_cli.fail(39, "Failed connections: 1\n", listing)
    found = locator(settings())
    with capture_logs() as logs:
        for _ in range(2):
            assert (await found.locate()).address == parse("vsock:16:2000")
    assert [line["event"].partition(";")[0] for line in logs] == [
        "nitro-cli describe-enclaves ended with status 39: Failed connections: 1"
    ]


async def test_a_failure_is_told_with_what_the_listing_lacks(nitro_cli: NitroCli) -> None:
    """The enclave that doesn't answer may be the very one that is wanted."""
    nitro_cli.fail(39, "Failed connections: 1\n", b"[]\n")
    with capture_logs() as logs:
        text = await refusal(settings())
    assert "no enclave is RUNNING" in text
    assert "ended with status 39: Failed connections: 1" in text
    assert logs == [], "it is said already"


async def test_a_cid_that_does_not_fit_the_address(nitro_cli: NitroCli) -> None:
    nitro_cli.show(enclave(70000))
    text = await refusal(settings(enclave_address="tcp:127.0.0.1:{cid}"))
    assert "does not fit enclave_address" in text
    assert "70000" in text


@pytest.mark.parametrize(("output", "why"), [(b"", "printed nothing"), (b"[{", "no JSON"), (b"{}", "no list")])
async def test_success_without_a_listing(nitro_cli: NitroCli, output: bytes, why: str) -> None:
    nitro_cli.say(output)
    assert why in await refusal(settings())


def gone(process_id: int) -> bool:
    """Whether the process has ended; a zombie that somebody has yet to fetch has ended, too."""
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


async def test_a_command_that_hangs_is_ended_with_its_child(
    nitro_cli: NitroCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    nitro_cli.hang()
    found = locator(settings())
    with trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(found.locate)
            await until(lambda: nitro_cli.process_id("child") is not None)
            scope.cancel()
    ids = [nitro_cli.process_id("pid"), nitro_cli.process_id("child")]
    assert None not in ids
    await until(lambda: all(gone(one or 0) for one in ids))
    with pytest.raises(ProcessLookupError):
        os.kill(ids[0] or 0, 0)  # nor is it left as a zombie of ours
    monkeypatch.setattr(discovery, "TIMEOUT", 0.2)
    assert "gave no answer within 0.2 s" in await refusal(settings())
    nitro_cli.show(enclave(16))
    assert (await found.locate()).address == parse("vsock:16:2000")


async def test_a_command_that_never_stops_talking(nitro_cli: NitroCli) -> None:
    nitro_cli.babble()
    assert "printed more than 1048576 bytes" in await refusal(settings())
    process_id = nitro_cli.process_id()
    assert process_id is not None
    assert gone(process_id)


@pytest.mark.parametrize("stream", ["1", "2"])
async def test_talking_without_end_is_not_waited_for(
    nitro_cli: NitroCli, monkeypatch: pytest.MonkeyPatch, stream: str
) -> None:
    """The other stream of it stays open, and a closed one does not end it."""
    nitro_cli.program.write_text(f"#!/bin/sh\ntrap '' PIPE\nwhile :; do yes endless >&{stream}; done\n")
    monkeypatch.setattr(discovery, "TIMEOUT", 300.0)
    with trio.fail_after(30):
        assert "printed more than 1048576 bytes" in await refusal(settings())


async def test_only_what_nobody_has_waited_for_is_killed(nitro_cli: NitroCli, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of a process that has ended may be another's by now."""
    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    nitro_cli.show(enclave(16))
    await locator(settings()).locate()
    nitro_cli.fail(19, "[ E19 ] x")
    await refusal(settings())
    assert killed == []


async def test_a_command_that_cannot_be_killed_holds_nobody(
    nitro_cli: NitroCli, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that the kernel holds fast in a call to the device."""
    nitro_cli.hang()
    monkeypatch.setattr(discovery, "TIMEOUT", 0.5)
    monkeypatch.setattr(discovery, "KILL_TIMEOUT", 0.1)
    open_process, opened = trio.lowlevel.open_process, []

    async def open_and_note(*arguments: Any, **options: Any) -> trio.Process:
        opened.append(await open_process(*arguments, **options))
        return opened[-1]

    monkeypatch.setattr(trio.lowlevel, "open_process", open_and_note)
    with monkeypatch.context() as patched:
        patched.setattr(os, "killpg", lambda group, number: None)
        with trio.fail_after(30):
            assert "gave no answer" in await refusal(settings())
    (process,) = opened
    os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"enclave_cid": "none"}, "expected auto, or the CID"),
        ({"enclave_cid": 2**32}, "from 0 to 4294967295"),
        ({"enclave_cid": 16, "enclave_name": "signer"}, "says which CID to take"),
        ({"enclave_address": "tcp:h:1", "enclave_name": "signer"}, "about what nitro-cli tells"),
        ({"enclave_address": "tcp:h:1", "expected_pcrs": PCRS}, "about what nitro-cli tells"),
        ({"enclave_address": "tcp:h:1", "allow_debug_mode": False}, "about what nitro-cli tells"),
        ({"enclave_address": "unix:/{cid}:1", "enclave_port": 1}, "takes the place"),
        ({"enclave_address": "unix:/{cid}:1", "proxy_remote_address": "kms:443"}, "where the built-in proxy has to"),
        ({"enclave_address": "{cid}"}, "unix:"),
        ({"expected_pcrs": {"PCR3": "a" * 96}}, "PCR0, PCR1 or PCR2"),
        ({"expected_pcrs": {"PCR0": "a" * 95}}, "96 hexadecimal digits"),
        ({"expected_pcrs": {"PCR0": ["a" * 96, 5]}}, "96 hexadecimal digits"),
        ({"expected_pcrs": {"PCR0": "0" * 96}}, "debug mode"),
        ({"expected_pcrs": {0: "a" * 96, "pcr0": "a" * 96}}, "PCR0 is given twice"),
        ({"expected_pcrs": ["a" * 96]}, "expected a map"),
        ({"sessions": 0}, "greater than or equal to 1"),
        ({"sessions": 17}, "less than or equal to 16"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        settings(**changes)


def test_settings_in_every_spelling() -> None:
    found = settings(enclave_cid=" AUTO ", expected_pcrs={0: "A" * 96, "pcr1": ["b" * 96, "C" * 96], "PCR2": "d" * 96})
    assert found.enclave_cid == "auto"
    assert found.expected_pcrs == {"PCR0": ("a" * 96,), "PCR1": ("b" * 96, "c" * 96), "PCR2": ("d" * 96,)}
    assert found.sessions == 2
    assert settings(enclave_cid="0x10").fixed_cid == 16
    assert settings(expected_pcrs=None).expected_pcrs == {}
