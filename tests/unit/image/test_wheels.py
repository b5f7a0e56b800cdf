"""Packages: which the program needs, the lock's part for them, and wheels that are held to it."""

import ast
import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from signer.image import program, wheels
from signer.image.tree import BuildError, Tree
from signer.image.wheels import DISTRIBUTIONS, Target, read_wheels
from tests.unit.image.toys import OWN, write_wheel

ROOT = Path(__file__).parents[3]
TARGET = Target((sys.version_info[0], sys.version_info[1]), "x86_64")
ONE = {"one/__init__.py": b"x = 1\n"}


def imported() -> set[str]:
    """What the program's modules import of others, also inside functions: names of top-level modules."""
    found = set()
    for name, path in program.modules(ROOT):
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - set(program.PACKAGES)


def closure(names: set[str]) -> set[str]:
    """The distributions, and those that they require here."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            for text in metadata.requires(name) or ():
                requirement = Requirement(text)
                if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                    names.add(re.sub(r"[-_.]+", "-", requirement.name).lower())
    return found


def test_the_packages_are_what_the_program_imports() -> None:
    by_module = metadata.packages_distributions()
    direct = {by_module[module][0].lower() for module in imported()}
    assert {"trio", "cryptography"} <= direct
    assert closure(direct) - {"pycparser"} == set(DISTRIBUTIONS), "see DISTRIBUTIONS in signer/image/wheels.py"


def test_the_requirements_of_the_image_are_those_of_the_lock() -> None:
    stored = (ROOT / "contrib/enclave/requirements.txt").read_text()
    assert stored == wheels.requirements(ROOT / "requirements.lock"), (
        "make it anew: contrib/enclave/build requirements > contrib/enclave/requirements.txt"
    )


def test_a_lock_without_a_package(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text(
        (ROOT / "requirements.lock").read_text().replace("\ntrio==", "\ntri==").replace("\nidna==", "\nid==")
    )
    with pytest.raises(BuildError, match="does not have idna, trio"):
        wheels.requirements(lock)


def test_a_lock_without_hashes(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    lock.write_text("one==1.0\ntwo==1.0 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(BuildError, match="one has no hash"):
        wheels.read_lock(lock)


def read(tmp_path: Path, *pins: str) -> Tree:
    lock = tmp_path / "lock"
    lock.write_text("# the lock\n" + "".join(pins))
    return read_wheels(tmp_path / "wheels", lock, TARGET)


def refused(tmp_path: Path, *pins: str) -> str:
    with pytest.raises(BuildError) as caught:
        read(tmp_path, *pins)
    return str(caught.value)


def test_what_is_taken_of_a_wheel(tmp_path: Path) -> None:
    left_out = {
        "one/tests/test_one.py": b"",
        "one/_tests/__init__.py": b"",
        "one/one.pyi": b"",
        "one/py.typed": b"",
        "one/__pycache__/x.cpython-311.pyc": b"",
        "one/cacert.pem": b"",
        "one-1.0.data/scripts/one": b"",
        "one-1.0.dist-info/RECORD": b"",
        "one-1.0.dist-info/INSTALLER": b"pip",
        "one-1.0.dist-info/direct_url.json": b"{}",
        "one-1.0.dist-info/sboms/one.json": b"{}",
        "one.pth": b"import os",
    }
    taken = ONE | {"one-1.0.dist-info/METADATA": b"Name: one\n", "one/data.txt": b"data"}
    pin = write_wheel(tmp_path / "wheels", "one", left_out | taken)
    write_wheel(tmp_path / "wheels", "unlisted", {"unlisted.py": b""})
    assert {path: entry.content for path, entry in read(tmp_path, pin) if entry.mode & 0o100000} == taken


def test_a_changed_wheel(tmp_path: Path) -> None:
    pin = write_wheel(tmp_path / "wheels", "one", ONE)
    write_wheel(tmp_path / "wheels", "one", {"one/__init__.py": b"x = 2\n"})
    assert "one-1.0-py3-none-any.whl has SHA-256 " in refused(tmp_path, pin)
    assert "which the lock does not have: it is another file, don't use it" in refused(tmp_path, pin)


def test_no_wheel_for_this_interpreter(tmp_path: Path) -> None:
    pin = write_wheel(tmp_path / "wheels", "one", ONE, tags="cp39-cp39-manylinux2014_x86_64")
    told = refused(tmp_path, pin)
    assert (
        f"has no wheel of one 1.0 for Python {TARGET.version[0]}.{TARGET.version[1]} on x86_64, only one-1.0-cp39"
        in told
    )
    assert "get it by pip download" in refused(tmp_path, pin.replace("one==", "none=="))


def test_more_than_one_wheel(tmp_path: Path) -> None:
    pin = write_wheel(tmp_path / "wheels", "one", ONE)
    write_wheel(tmp_path / "wheels", "one", ONE, tags=f"{OWN}-{OWN}-manylinux2014_x86_64")
    assert "has more than one wheel of one 1.0" in refused(tmp_path, pin)


def test_another_version_beside(tmp_path: Path) -> None:
    pin = write_wheel(tmp_path / "wheels", "one", ONE)
    wheel = tmp_path / "wheels/one-1.0-py3-none-any.whl"
    wheel.with_name("one-0.9-py3-none-any.whl").write_bytes(b"older")
    assert "one/__init__.py" in read(tmp_path, pin)
    wheel.unlink()
    assert "has no wheel of one 1.0 " in refused(tmp_path, pin)


def test_the_name_is_the_lock_s_in_any_spelling(tmp_path: Path) -> None:
    pin = write_wheel(tmp_path / "wheels", "Some_Name", ONE).replace("Some_Name", "some-name")
    assert "one/__init__.py" in read(tmp_path, pin)


def test_a_wheel_that_leaves_its_place(tmp_path: Path) -> None:
    assert "cannot be a path" in refused(tmp_path, write_wheel(tmp_path / "wheels", "one", {"../one.py": b""}))


def test_two_wheels_with_one_file(tmp_path: Path) -> None:
    pins = [write_wheel(tmp_path / "wheels", name, {"same.py": name.encode()}) for name in ("one", "two")]
    assert refused(tmp_path, *pins) == "two different files want to be same.py"


def test_a_wheel_that_is_too_great(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wheels, "_MAX_UNPACKED", 1)
    assert "unpacks to more than" in refused(tmp_path, write_wheel(tmp_path / "wheels", "one", ONE))


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("py3-none-any", True),
        ("py2.py3-none-any", True),
        ("py2-none-any", False),
        ("cp311-cp311-manylinux_2_17_x86_64.manylinux2014_x86_64", True),
        ("cp311-cp311-manylinux_2_17_aarch64", False),
        ("cp311-cp311-musllinux_1_2_x86_64", False),
        ("cp311-cp311-macosx_11_0_x86_64", False),
        ("cp311-cp311-win_amd64", False),
        ("cp312-cp312-manylinux_2_17_x86_64", False),
        ("cp38-abi3-manylinux_2_34_x86_64", True),
        ("cp311-abi3-manylinux_2_34_x86_64", True),
        ("cp312-abi3-manylinux_2_34_x86_64", False),
        ("pp311-pypy311_pp73-manylinux_2_28_x86_64", False),
        ("cp311-cp311t-manylinux_2_28_x86_64", False),
        ("py3-none-manylinux_2_28_x86_64", True),
        ("cp311-none-any", True),
    ],
)
def test_tags(tags: str, expected: bool) -> None:
    python, abi, platform = tags.split("-")
    assert Target((3, 11), "x86_64").runs(python, abi, platform) is expected
