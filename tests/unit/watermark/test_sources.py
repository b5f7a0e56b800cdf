"""Marks of other signers: every format, old names, the higher wins, damaged files, and the way back."""

import errno
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import structlog

from signer.tezos.keys import PublicKeyHash, digest_text
from signer.watermark import admin
from signer.watermark.admin import MarkRefusedError
from signer.watermark.database import FILE_NAME, Database
from signer.watermark.interface import Mark, MarkKey, Slot, WatermarkStoreError
from signer.watermark.migration import take_over
from signer.watermark.sources import find, merge, read

CHAIN = "NetXdQprcVkpaWU"
TZ1 = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
DIGEST = bytes(range(32))
VH = digest_text(DIGEST)
PKH = PublicKeyHash.from_base58(TZ1)
SIGNATURE = "edsigtuRwihvmjUkXsNXix1isC4aEaHjwSqL4csc2cQrcqufFmDkVsWdqWT1t15NVjVSfcJMzqvcXnyA1EGy1BgQCt6ZQxSDk9Y"


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def key(slot: Slot) -> MarkKey:
    return MarkKey(CHAIN, PKH, slot)


def test_every_format_and_the_higher_wins(tmp_path: Path) -> None:
    mark = {"level": 10, "round": 1, "hash": VH}
    write(tmp_path / "watermark_v2" / f"{CHAIN}.json", {TZ1: {"block": mark, "endorsement": {"level": 5, "round": 0}}})
    write(
        tmp_path / "watermark_v1" / f"{CHAIN}.json",
        {TZ1: {"level": 20, "round": None, "order": 2, "hash": None}},
    )
    write(tmp_path / "watermark" / f"{CHAIN}.json", {"preendorsement": {TZ1: {"level": 7, "round": 2, "hash": VH}}})
    write(
        tmp_path / "attestation_high_watermarks",
        {CHAIN: {TZ1: {"level": 30, "round": 4, "hash": DIGEST.hex(), "signature": SIGNATURE}}},
    )
    write(tmp_path / "endorsement_high_watermarks", {CHAIN: {TZ1: {"level": 29}}})
    write(tmp_path / "block_high_watermarks", {CHAIN: {TZ1: {"level": 9, "round": 9, "hash": "00" * 32}}})
    assert merge(find(tmp_path)) == {
        key(Slot.BLOCK): Mark(10, 1, DIGEST),
        key(Slot.ATTESTATION): Mark(30, 4, DIGEST, SIGNATURE),
        key(Slot.PREATTESTATION): Mark(7, 2, DIGEST),
    }


@pytest.mark.parametrize(
    ("order", "slot"), [(0, Slot.BLOCK), (None, Slot.BLOCK), (1, Slot.PREATTESTATION), (2, Slot.ATTESTATION)]
)
def test_orders_of_v1(tmp_path: Path, order: int | None, slot: Slot) -> None:
    write(tmp_path / "watermark_v1" / f"{CHAIN}.json", {TZ1: {"level": 2, "round": 3, "order": order, "hash": VH}})
    assert merge(find(tmp_path)) == {key(slot): Mark(2, 3, DIGEST)}


def test_attestations_with_dal_share_the_slot(tmp_path: Path) -> None:
    kinds = {"attestation": {"level": 4, "round": 0}, "attestation_with_dal": {"level": 6, "round": 0, "hash": None}}
    write(tmp_path / "watermark_v2" / f"{CHAIN}.json", {TZ1: kinds})
    assert merge(find(tmp_path)) == {key(Slot.ATTESTATION): Mark(6, 0)}


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("watermark_v2/nochain.json", {}, "'nochain' is not a chain id"),
        (f"watermark_v2/{CHAIN}.json", "{", "Expecting"),
        (f"watermark_v2/{CHAIN}.json", [], "an object was expected"),
        (f"watermark_v2/{CHAIN}.json", {"tz1x": {"block": {"level": 1, "round": 0}}}, "not a public key hash"),
        (f"watermark_v2/{CHAIN}.json", {TZ1: {"blok": {"level": 1, "round": 0}}}, "unknown kind 'blok'"),
        (f"watermark_v2/{CHAIN}.json", {TZ1: {"block": {"level": -1, "round": 0}}}, "level -1 is not an integer"),
        (f"watermark_v2/{CHAIN}.json", {TZ1: {"block": {"round": 0}}}, "level None is not"),
        (f"watermark_v2/{CHAIN}.json", {TZ1: {"block": {"level": 2**31, "round": 0}}}, "from 0 to 2147483647"),
        (f"watermark_v2/{CHAIN}.json", {TZ1: {"block": {"level": 1, "round": 0, "hash": "x"}}}, "hash 'x'"),
        (f"watermark_v1/{CHAIN}.json", {TZ1: {"level": 1, "round": 0, "order": "1"}}, "order '1' is not an integer"),
        (f"watermark_v2/{CHAIN}.json", f'{{"{TZ1}": {{}}, "{TZ1}": {{}}}}', f"'{TZ1}' occurs twice"),
        (f"watermark_v2/{CHAIN}.json", "[" * 100_000, "recursion"),
        (f"watermark_v2/{CHAIN}.json", " " * (64 * 1024 * 1024 + 1), "larger than 67108864 bytes"),
        ("block_high_watermarks", "", "Expecting value"),
        ("block_high_watermarks", {CHAIN: {TZ1: {"level": 5.0}}}, "level 5.0 is not an integer"),
        ("block_high_watermarks", {CHAIN: {TZ1: {"level": 1, "hash": "zz"}}}, "not hexadecimal"),
        ("block_high_watermarks", {CHAIN: {TZ1: {"level": 1, "hash": "00"}}}, "1 bytes instead of 32"),
    ],
)
def test_a_damaged_source_stops_the_start(tmp_path: Path, name: str, content: Any, text: str) -> None:
    write(tmp_path / name, content)
    database = Database(tmp_path / FILE_NAME)
    with pytest.raises(WatermarkStoreError, match=text) as caught:
        take_over(database, tmp_path)
    assert name.rpartition("/")[2] in str(caught.value)
    assert "move it away" in str(caught.value)
    assert database.all() == []
    database.close()


@pytest.mark.parametrize("name", ["watermark_v2", "watermark", "endorsement_high_watermarks", "watermark_v2/x.json"])
def test_a_link_that_leads_nowhere_stops_the_start(tmp_path: Path, name: str) -> None:
    """A disk that isn't mounted is not a disk without marks."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).symlink_to(tmp_path / "not mounted")
    with pytest.raises(WatermarkStoreError, match=f"cannot read the watermarks in .*{name}: No such file"):
        find(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to(tmp_path / "loop")
    with pytest.raises(WatermarkStoreError, match="Too many levels"):
        find(tmp_path)


def test_links_are_followed(tmp_path: Path) -> None:
    write(tmp_path / "disk" / f"{CHAIN}.json", {TZ1: {"block": {"level": 3, "round": 0}}})
    (tmp_path / "watermark_v2").symlink_to(tmp_path / "disk")
    assert merge(find(tmp_path)) == {key(Slot.BLOCK): Mark(3, 0)}


def test_a_directory_that_cannot_be_listed_stops_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signatory's directory of another user; root, as whom the tests may run, can list any."""
    write(tmp_path / "watermark_v2" / f"{CHAIN}.json", {TZ1: {"block": {"level": 3, "round": 0}}})

    def iterdir(_directory: Path) -> Iterator[Path]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", iterdir)
    for look in (find, admin.list_marks):
        with pytest.raises(WatermarkStoreError, match="watermark_v2: Permission denied"):
            look(tmp_path)
    with pytest.raises(WatermarkStoreError, match="Permission denied"):
        read(tmp_path / "watermark_v2")


def test_what_is_no_source_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "watermark_v2" / "old.json").mkdir(parents=True)
    (tmp_path / "watermark_v2" / "watermark123").write_text("left by a crash")
    (tmp_path / "watermark").write_text("a file")
    (tmp_path / "block_high_watermarks").mkdir()
    assert merge(find(tmp_path)) == {}


def test_taken_over_whenever_it_has_changed(tmp_path: Path) -> None:
    """Who goes back to the other signer and returns loses nothing; what was reset here stays reset."""
    source = tmp_path / "watermark_v2" / f"{CHAIN}.json"
    write(source, {TZ1: {"block": {"level": 10, "round": 1, "hash": VH}}})
    database = Database(tmp_path / FILE_NAME)
    take_over(database, tmp_path)
    assert database.all() == [(key(Slot.BLOCK), Mark(10, 1, DIGEST))]
    database.delete(key(Slot.BLOCK))
    take_over(database, tmp_path)
    assert database.all() == []
    write(source, {TZ1: {"block": {"level": 99, "round": 1}}})
    take_over(database, tmp_path)
    assert database.all() == [(key(Slot.BLOCK), Mark(99, 1))]
    database.close()


def test_listing_changes_nothing(tmp_path: Path) -> None:
    """Before the first start: what will count is shown, and no file is made."""
    write(tmp_path / "watermark_v2" / f"{CHAIN}.json", {TZ1: {"block": {"level": 10, "round": 1, "hash": VH}}})
    assert admin.list_marks(tmp_path) == [(key(Slot.BLOCK), Mark(10, 1, DIGEST))]
    assert [path.name for path in tmp_path.iterdir()] == ["watermark_v2"]


def test_what_would_be_taken_over_counts_for_changes(tmp_path: Path) -> None:
    """What `list` shows is what `set` raises and `reset` forgets."""
    write(tmp_path / "watermark_v2" / f"{CHAIN}.json", {TZ1: {"block": {"level": 10, "round": 1, "hash": VH}}})
    with pytest.raises(MarkRefusedError, match="stands at level 10, round 1"):
        admin.set_mark(tmp_path, key(Slot.BLOCK), 5, 0)
    forgotten = admin.reset_mark(tmp_path, PKH, CHAIN, None, confirm_key=TZ1, confirm_chain=CHAIN)
    assert forgotten == [(key(Slot.BLOCK), Mark(10, 1, DIGEST))]
    assert admin.list_marks(tmp_path) == []


def test_a_start_without_any_mark_is_said(tmp_path: Path) -> None:
    """Whoever lost the database, and starts again, must not believe that its marks are still there."""
    path = tmp_path / FILE_NAME
    for expected in (1, 0):  # said once: afterwards an empty database is what the operator has
        with structlog.testing.capture_logs() as logged, closing(Database(path)) as database:
            take_over(database, tmp_path)
        assert len([line for line in logged if "without a mark" in line["event"]]) == expected
    path.unlink()
    write(tmp_path / "watermark_v2" / f"{CHAIN}.json", {TZ1: {"block": {"level": 10, "round": 1, "hash": VH}}})
    with structlog.testing.capture_logs() as logged, closing(Database(path)) as database:
        take_over(database, tmp_path)
    assert [line["log_level"] for line in logged] == ["info"]


def test_an_export_without_marks_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(MarkRefusedError, match="there are no marks"):
        admin.export_signatory(tmp_path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_administration(tmp_path: Path) -> None:
    block = key(Slot.BLOCK)
    assert admin.list_marks(tmp_path) == []
    assert admin.set_mark(tmp_path, block, 10, 2) is None
    assert admin.set_mark(tmp_path, block, 10, 3) == Mark(10, 2)
    for level, round_ in ((10, 3), (9, 9), (-1, 0), (2**31, 0)):
        with pytest.raises(MarkRefusedError):
            admin.set_mark(tmp_path, block, level, round_)
    with pytest.raises(MarkRefusedError, match="stands at level 10, round 3"):
        admin.set_mark(tmp_path, block, 1, 1)
    for confirm in ({"confirm_key": "", "confirm_chain": CHAIN}, {"confirm_key": TZ1, "confirm_chain": "x"}):
        with pytest.raises(MarkRefusedError, match="nothing was reset"):
            admin.reset_mark(tmp_path, PKH, CHAIN, None, **confirm)
    sure = {"confirm_key": TZ1, "confirm_chain": CHAIN}
    assert admin.reset_mark(tmp_path, PKH, CHAIN, Slot.ATTESTATION, **sure) == []
    assert admin.reset_mark(tmp_path, PKH, CHAIN, None, **sure) == [(block, Mark(10, 3))]
    assert admin.list_marks(tmp_path) == []


def test_there_and_back(tmp_path: Path) -> None:
    """Export and import keep every mark, and the file is Signatory's to the space."""
    ours, theirs, again = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    for directory in (ours, again):
        directory.mkdir()
    write(tmp_path / "v2" / f"{CHAIN}.json", {TZ1: {"attestation": {"level": 20877, "round": 0, "hash": VH}}})
    assert admin.import_marks(ours, tmp_path / "v2") == (1, 1)
    assert admin.import_marks(ours, tmp_path / "v2" / f"{CHAIN}.json") == (1, 0)
    admin.set_mark(ours, key(Slot.BLOCK), 5, 1)
    (path,) = admin.export_signatory(ours, theirs)
    mark = f'{{\n            "level": 20877,\n            "round": 0,\n            "hash": "{VH}"\n        }}'
    assert path.read_text() == (
        f'{{\n    "{TZ1}": {{\n        "attestation": {mark},\n        "attestation_with_dal": {mark},\n'
        '        "block": {\n            "level": 5,\n            "round": 1,\n'
        '            "hash": null\n        }\n    }\n}'
    )
    with pytest.raises(MarkRefusedError, match="exists already"):
        admin.export_signatory(ours, theirs)
    assert admin.import_marks(again, theirs)[1] == 2
    assert admin.list_marks(again) == admin.list_marks(ours)
    with pytest.raises(WatermarkStoreError, match="no watermarks found"):
        admin.import_marks(ours, tmp_path / "a")
    (tmp_path / "flat").write_text("")
    with pytest.raises(MarkRefusedError, match="cannot export"):
        admin.export_signatory(ours, tmp_path / "flat")
    write(tmp_path / "o" / "block_high_watermarks", {CHAIN: {TZ1: {"level": 50, "signature": "nonsense"}}})
    assert admin.import_marks(ours, tmp_path / "o") == (1, 1)
    assert admin.import_marks(ours, tmp_path / "o" / "block_high_watermarks") == (1, 0)
