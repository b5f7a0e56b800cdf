"""`signer watermark list | set | reset | import | export`: `set` only raises, `reset` wants to hear it twice."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.cli.test_listing import Outcome, call

TZ1 = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
TZ4 = "tz4XXtsYav3fZz2FSDa7hcx4F8sh8SaDWNME"
MAIN, OTHER = "NetXdQprcVkpaWU", "NetXnHfVqm9iesp"
VH = "vh2gXnNzbwzsj4Z7sJ8xWChrZGr19321fTdvrKokqrwVNs3XBeVx"
SURE = ("--confirm-key", TZ1, "--confirm-chain", MAIN)


def marks(base_dir: Path, *arguments: str) -> Outcome:
    """`signer watermark ...` on *base_dir*."""
    return call("watermark", *arguments, "-c", "", "--base-dir", str(base_dir))


def done(base_dir: Path, *arguments: str) -> str:
    outcome = marks(base_dir, *arguments)
    assert (outcome.status, outcome.err) == (0, "")
    return outcome.out


def refused(base_dir: Path, *arguments: str) -> str:
    before = marks(base_dir, "list", "--json").out
    outcome = marks(base_dir, *arguments)
    assert (outcome.status, outcome.out) == (1, "")
    assert outcome.err.startswith("Error: ")
    assert marks(base_dir, "list", "--json").out == before, "nothing has moved"
    return outcome.err


def listed(base_dir: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(done(base_dir, "list", "--json"))
    return rows


def test_list_as_text_and_as_json(tmp_path: Path) -> None:
    done(tmp_path, "set", TZ4, OTHER, "preattestation", "7", "2")
    done(tmp_path, "set", TZ1, MAIN, "block", "9")
    done(tmp_path, "set", TZ1, MAIN, "attestation", "10", "1")
    assert done(tmp_path, "list") == (
        f"{MAIN} {TZ1} attestation    level 10 round 1\n"
        f"{MAIN} {TZ1} block          level 9 round 0\n"
        f"{OTHER} {TZ4} preattestation level 7 round 2\n"
    )
    assert listed(tmp_path)[0] == {
        "chain_id": MAIN,
        "public_key_hash": TZ1,
        "slot": "attestation",
        "level": 10,
        "round": 1,
        "hash": None,
    }


def test_list_of_nothing_makes_nothing(tmp_path: Path) -> None:
    place = tmp_path / "none"
    assert marks(place, "list") == Outcome(0, "", f"there are no marks in {place}\n")
    assert marks(place, "list", "--json") == Outcome(0, "[]\n", "")
    assert not place.exists()


def test_set_only_raises(tmp_path: Path) -> None:
    assert done(tmp_path, "set", TZ1, MAIN, "block", "10", "2") == f"block mark of {TZ1} on {MAIN}: level 10, round 2\n"
    for level, round_ in ((10, 2), (10, 1), (9, 9), (0, 0)):
        text = refused(tmp_path, "set", TZ1, MAIN, "block", str(level), str(round_))
        assert text.startswith(f"Error: set only raises: the block mark of {TZ1} on {MAIN} stands at level 10, round 2")
    assert "stands at level 10" in refused(tmp_path, "set", TZ1, MAIN, "block", "10")
    done(tmp_path, "set", TZ1, MAIN, "block", "10", "3")
    done(tmp_path, "set", TZ1, MAIN, "block", "11")
    assert [(row["level"], row["round"]) for row in listed(tmp_path)] == [(11, 0)]


def test_set_touches_one_slot_of_one_key_on_one_chain(tmp_path: Path) -> None:
    done(tmp_path, "set", TZ1, MAIN, "block", "10")
    for pkh, chain, slot in ((TZ4, MAIN, "block"), (TZ1, OTHER, "block"), (TZ1, MAIN, "attestation")):
        done(tmp_path, "set", pkh, chain, slot, "1")
    assert sorted(row["level"] for row in listed(tmp_path)) == [1, 1, 1, 10]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((TZ1, MAIN, "block", "2147483648"), "level 2147483648 is outside 0 to 2147483647"),
        ((TZ1, MAIN, "block", "1", "2147483648"), "round 2147483648 is outside"),
        (("--", TZ1, MAIN, "block", "-1"), "level -1 is outside"),
        ((TZ1, MAIN, "block", "many"), "'many' is not a valid integer"),
        ((TZ1, MAIN, "endorsement", "1"), "'endorsement' is not one of"),
        ((TZ1[:-1], MAIN, "block", "1"), "base58"),
        ((TZ1, "NetXdQprcVkpaWX", "block", "1"), "checksum"),
        ((TZ1, "main", "block", "1"), "base58"),
    ],
)
def test_set_refuses_what_is_no_mark(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    # the flags of `marks` would stand behind the `--` here
    outcome = call("watermark", "-c", "", "--base-dir", str(tmp_path), "set", *arguments)
    assert (outcome.status, outcome.out) == (1, "")
    assert text in outcome.err
    assert listed(tmp_path) == []


def test_the_highest_mark_there_is(tmp_path: Path) -> None:
    done(tmp_path, "set", TZ1, MAIN, "block", "2147483647", "2147483647")
    assert listed(tmp_path)[0]["level"] == 2147483647


@pytest.mark.parametrize(
    "confirmation",
    [
        (),
        ("--confirm-key", TZ1),
        ("--confirm-chain", MAIN),
        ("--confirm-key", TZ4, "--confirm-chain", MAIN),
        ("--confirm-key", TZ1, "--confirm-chain", OTHER),
        ("--confirm-key", TZ1, "--confirm-chain", MAIN[:-1]),
    ],
)
def test_reset_demands_confirmation(tmp_path: Path, confirmation: tuple[str, ...]) -> None:
    done(tmp_path, "set", TZ1, MAIN, "block", "10")
    text = refused(tmp_path, "reset", TZ1, MAIN, *confirmation)
    assert "nothing was reset" in text
    assert "slashed" in text
    assert f"--confirm-key {TZ1} --confirm-chain {MAIN}" in text


def test_reset_forgets_what_was_named_and_no_more(tmp_path: Path) -> None:
    done(tmp_path, "set", TZ1, MAIN, "block", "10", "1")
    done(tmp_path, "set", TZ1, MAIN, "attestation", "11")
    done(tmp_path, "set", TZ4, MAIN, "block", "12")
    done(tmp_path, "set", TZ1, OTHER, "block", "13")
    assert done(tmp_path, "reset", TZ1, MAIN, "--slot", "block", *SURE) == (
        f"forgotten: block mark of {TZ1} on {MAIN}, level 10, round 1\n"
    )
    assert [row["level"] for row in listed(tmp_path)] == [11, 12, 13]
    assert "level 11, round 0" in done(tmp_path, "reset", TZ1, MAIN, *SURE)
    assert [row["level"] for row in listed(tmp_path)] == [12, 13]
    assert done(tmp_path, "reset", TZ1, MAIN, *SURE) == "there was no such mark\n"
    done(tmp_path, "set", TZ1, MAIN, "block", "1")


def test_import_of_signatory_and_octez(tmp_path: Path) -> None:
    base_dir, theirs = tmp_path / "base", tmp_path / "theirs"
    (theirs / "watermark_v2").mkdir(parents=True)
    kinds = {"block": {"level": 20, "round": 1, "hash": VH}, "endorsement": {"level": 5, "round": 0, "hash": VH}}
    (theirs / "watermark_v2" / f"{MAIN}.json").write_text(json.dumps({TZ1: kinds}))
    (theirs / "block_high_watermarks").write_text(json.dumps({MAIN: {TZ1: {"level": 30, "round": 0}}}))
    done(base_dir, "set", TZ1, MAIN, "attestation", "6")
    assert done(base_dir, "import", str(theirs)) == "3 mark(s) read, 1 of ours raised\n"
    assert [(row["slot"], row["level"]) for row in listed(base_dir)] == [("attestation", 6), ("block", 30)]
    assert done(base_dir, "import", str(theirs / "watermark_v2")) == "2 mark(s) read, 0 of ours raised\n"


@pytest.mark.parametrize("content", [None, "{", json.dumps({TZ1: {"block": {"level": -1}}})])
def test_import_of_what_is_no_source(tmp_path: Path, content: str | None) -> None:
    base_dir, theirs = tmp_path / "base", tmp_path / "theirs"
    theirs.mkdir()
    if content is not None:
        (theirs / f"{MAIN}.json").write_text(content)
    assert str(theirs) in refused(base_dir, "import", str(theirs))
    assert "does not exist" in refused(base_dir, "import", str(tmp_path / "none"))


def test_export_can_be_imported_again(tmp_path: Path) -> None:
    ours, theirs, again = tmp_path / "ours", tmp_path / "theirs", tmp_path / "again"
    source = tmp_path / f"{MAIN}.json"
    source.write_text(json.dumps({TZ1: {"attestation": {"level": 20877, "round": 3, "hash": VH}}}))
    done(ours, "import", str(source))
    done(ours, "set", TZ1, MAIN, "block", "5", "1")
    done(ours, "set", TZ4, OTHER, "preattestation", "6")
    written = done(ours, "export", str(theirs), "--format", "signatory").splitlines()
    assert written == [f"{theirs}/{MAIN}.json", f"{theirs}/{OTHER}.json"]
    assert json.loads((theirs / f"{OTHER}.json").read_text()) == {
        TZ4: {"preattestation": {"level": 6, "round": 0, "hash": None}}
    }
    exported = json.loads((theirs / f"{MAIN}.json").read_text())[TZ1]
    assert exported["attestation"] == exported["attestation_with_dal"] == {"level": 20877, "round": 3, "hash": VH}
    assert done(again, "import", str(theirs)).endswith(" mark(s) read, 3 of ours raised\n")
    assert listed(again) == listed(ours)
    assert listed(again)[0]["hash"] == VH


def test_export_overwrites_nothing_and_writes_no_emptiness(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    assert "there are no marks" in refused(ours, "export", str(theirs))
    assert not theirs.exists()
    done(ours, "set", TZ1, MAIN, "block", "5")
    done(ours, "export", str(theirs))
    done(ours, "set", TZ1, MAIN, "block", "6")
    assert f"{theirs}/{MAIN}.json exists already" in refused(ours, "export", str(theirs))
    assert json.loads((theirs / f"{MAIN}.json").read_text())[TZ1]["block"]["level"] == 5
    assert "'csv' is not" in refused(ours, "export", str(tmp_path / "new"), "--format", "csv")


def test_marks_in_memory_are_none_to_look_at(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"watermark: {{driver: mem}}\nbase_dir: {tmp_path}/base\n")
    outcome = call("watermark", "list", "-c", str(path))
    assert outcome == Outcome(1, "", "Error: watermark.driver is mem: there is no file to look at\n")
