"""Trees and their archives: order, normalised fields, conflicts; read back by a reader of its own."""

import io
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from signer.image import cpio
from signer.image.tree import BuildError, Tree


@dataclass(frozen=True)
class Member:
    inode: int
    mode: int
    owner: tuple[int, int]
    links: int
    time: int
    devices: tuple[int, ...]
    content: bytes


def unpacked(data: bytes) -> dict[str, Member]:
    """What a newc archive holds, in its order."""
    at = 0
    found: dict[str, Member] = {}
    while True:
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        inode, mode, uid, gid, links, time, size, *devices, length, checksum = fields
        name = data[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        assert checksum == 0
        start = at + 110 + length
        start += -start % 4
        at = start + size
        at += -at % 4
        if name == b"TRAILER!!!\0":
            assert not data[at:].strip(b"\0")
            return found
        found[name[:-1].decode()] = Member(
            inode, mode, (uid, gid), links, time, tuple(devices), data[start : start + size]
        )


def archive(tree: Tree) -> bytes:
    file = io.BytesIO()
    cpio.write(file, tree)
    return file.getvalue()


def test_an_archive() -> None:
    tree = Tree()
    tree.file("usr/bin/python", b"ELF", program=True)
    tree.file("env", b"A=1\n")
    tree.folder("dev")
    data = archive(tree)
    assert len(data) % 512 == 0
    assert data.rindex(b"070701" + b"%08x" % 6) > data.rindex(b"usr/bin/python"), "the trailer is counted, too"
    found = unpacked(data)
    assert list(found) == ["dev", "env", "usr", "usr/bin", "usr/bin/python"]
    assert [member.inode for member in found.values()] == [1, 2, 3, 4, 5]
    assert [oct(member.mode) for member in found.values()] == [
        "0o40755",
        "0o100644",
        "0o40755",
        "0o40755",
        "0o100755",
    ]
    for member in found.values():
        assert (member.owner, member.links, member.time, member.devices) == ((0, 0), 1, 0, (0, 0, 0, 0))
    assert found["usr/bin/python"].content == b"ELF"
    assert found["env"].content == b"A=1\n"


def test_an_empty_tree() -> None:
    assert unpacked(archive(Tree())) == {}


names = st.text("abc-.é", min_size=1, max_size=4).filter(lambda name: name not in (".", ".."))
paths = st.lists(names, min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(paths, st.binary(max_size=20), max_size=8), st.randoms(use_true_random=False))
def test_the_order_of_adding_makes_no_difference(files: dict[str, bytes], chance: random.Random) -> None:
    trees = []
    for _ in range(2):
        items = list(files.items())
        chance.shuffle(items)
        tree = Tree()
        try:
            for path, content in items:
                tree.file(path, content)
        except BuildError:  # a file and a folder of one name
            return
        trees.append(archive(tree))
    assert trees[0] == trees[1]
    found = unpacked(trees[0])
    assert {path: member.content for path, member in found.items() if member.mode & 0o100000} == files
    for place, path in enumerate(found):
        assert "/" not in path or path.rpartition("/")[0] in list(found)[:place], "folders come before what is in them"


@pytest.mark.parametrize("path", ["", "/etc", "a/../b", "./a", "a//b", "a/", "a\nb", "a\0"])
def test_bad_paths(path: str) -> None:
    with pytest.raises(BuildError, match="cannot be a path"):
        Tree().file(path, b"")


def test_conflicts() -> None:
    tree = Tree()
    tree.file("a", b"1")
    tree.file("a", b"1")
    with pytest.raises(BuildError, match="two different files want to be a"):
        tree.file("a", b"2")
    with pytest.raises(BuildError, match="two different files want to be a"):
        tree.file("a", b"1", program=True)
    with pytest.raises(BuildError, match="a is a file and a folder"):
        tree.file("a/b", b"")


def test_grafted() -> None:
    inner, outer = Tree(), Tree()
    inner.file("bin/sh", b"x", program=True)
    inner.folder("tmp")
    outer.graft("rootfs", inner)
    assert [(path, oct(entry.mode)) for path, entry in outer] == [
        ("rootfs", "0o40755"),
        ("rootfs/bin", "0o40755"),
        ("rootfs/bin/sh", "0o100755"),
        ("rootfs/tmp", "0o40755"),
    ]
    assert outer.size == 1
    lines = outer.manifest().splitlines()
    assert lines[2].split() == [
        "-rwxr-xr-x",
        "1",
        "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881",
        "rootfs/bin/sh",
    ]
