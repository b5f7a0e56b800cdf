"""The parts of a build that need no whole interpreter: settings, files for init, metadata, our own modules."""

import json
import marshal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from signer import __version__
from signer.enclave import settings
from signer.image import __main__ as command
from signer.image import build, interpreter, program
from signer.image.tree import BuildError, Tree
from signer.image.wheels import Target

ROOT = Path(__file__).parents[3]


def test_the_program_is_all_that_goes_in_of_the_signer() -> None:
    found = [name for name, _ in program.modules(ROOT)]
    assert {"signer/enclave/__main__.py", "signer/enclave/session.py", "signer/crypto/bls.py"} <= set(found)
    assert found == sorted(found)
    allowed = ("enclave/", "crypto/", "tezos/", "rpc/", "attestation/", "__init__.py", "errors.py", "process.py")
    assert [name for name in found if not name.startswith(("proxy/", *(f"signer/{one}" for one in allowed)))] == []
    assert {name for name in found if name.startswith("proxy/")} <= {
        "proxy/__init__.py",
        "proxy/address.py",
        "proxy/names.py",
        "proxy/output.py",
    }


def sources(root: Path, *names: str) -> Path:
    """The least that the builder takes as the signer's sources, and *names*."""
    for name in ("signer/__init__.py", "signer/enclave/__init__.py", *program.DATA, *names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / program.START).write_text("import trio\n\ndef main():\n    from signer.enclave import lazy\n")
    (root / "signer/enclave/lazy.py").touch()
    return root


MINIMAL = [
    "signer/__init__.py",
    "signer/enclave/__init__.py",
    "signer/enclave/__main__.py",
    "signer/enclave/kms/roots.pem",
    "signer/enclave/lazy.py",
]


def test_of_data_files_those_go_in_that_the_program_reads(tmp_path: Path) -> None:
    strangers = ["signer/enclave/baker.pem", "signer/enclave/development.key", "signer/enclave/notes", "signer/.env"]
    root = sources(tmp_path, *strangers, "signer/enclave/__pycache__/lazy.cpython-311.pyc", "signer/enclave/unused.py")
    (root / "signer/enclave/gone.pem").symlink_to("nowhere")
    assert [name for name, _ in program.modules(root)] == MINIMAL
    assert program.left_out(root) == sorted([*strangers, "signer/enclave/gone.pem"])


def test_nothing_is_left_out_of_the_sources_as_they_are() -> None:
    assert set(program.DATA) <= {name for name, _ in program.modules(ROOT)}
    assert program.left_out(ROOT) == []


def test_what_lies_beside_the_packages_stays_out(tmp_path: Path) -> None:
    root = sources(tmp_path, "trio.py")
    assert [name for name, _ in program.modules(root)] == MINIMAL


def test_sources_without_a_data_file(tmp_path: Path) -> None:
    root = sources(tmp_path)
    (root / "signer/enclave/kms/roots.pem").unlink()
    with pytest.raises(BuildError, match="there is no signer/enclave/kms/roots.pem"):
        list(program.modules(root))


def test_the_builder_says_what_it_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sources(tmp_path, "signer/enclave/baker.pem")
    monkeypatch.setattr(command, "Inputs", partial(build.Inputs, sources=tmp_path))
    absent = str(tmp_path / "absent")
    arguments = [part for name in ("python", "wheels", "blobs", "pins", "output") for part in (f"--{name}", absent)]
    assert command.main(["image", *arguments]) == 1, "there is nothing to build of"
    told = capsys.readouterr().err
    assert "left out, since the enclave's program does not read it: signer/enclave/baker.pem\n" in told


def test_a_directory_without_the_sources(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="does not hold the signer's sources"):
        list(program.modules(tmp_path))


def test_the_environment() -> None:
    fixed = ["LANG=C.UTF-8", "LD_LIBRARY_PATH=/lib", "PATH=/usr/bin"]
    assert build._environment({}) == fixed
    empty = {"SEAL_STRICT": "", "ENDPOINT": "", "LISTEN_PORT": ""}
    assert build._environment(empty) == fixed, "as a Dockerfile's arguments that are not set"
    given = {"SEAL_STRICT": "1", "PROXY_PORT": "8001", "PROXY_CID": "3", "ENDPOINT": "https://kms.example"}
    assert build._environment(given) == sorted([*fixed, *(f"{name}={value}" for name, value in given.items())])


def test_an_image_can_have_every_setting_that_the_program_reads() -> None:
    asked = []

    class Asked(dict[str, str]):
        def get(self, key: str, default: object = None, /) -> Any:
            asked.append(key)
            return default

    settings.read(Asked())
    assert sorted(asked) == sorted(build.SETTINGS)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PROXY_PORT", "abc"),
        ("PROXY_PORT", "0"),
        ("LISTEN_PORT", "4294967295"),
        ("LISTEN_PORT", "-1"),
        ("LOG_PORT", "on"),
        ("LISTEN_PORT", "٣"),
        ("SEAL_STRICT", "yes"),
        ("ENDPOINT", "http://kms.example"),
        ("KMS_KEY", "alias/baker"),
        ("ENDPOINT", "https://kms.example\nPATH=/tmp"),
        ("SEAL_STRCT", "1"),
        ("LD_PRELOAD", "/x.so"),
    ],
)
def test_bad_settings(name: str, value: str) -> None:
    with pytest.raises(BuildError, match=name):
        build._environment({name: value})


def test_files_for_init() -> None:
    assert build._lines(["a b", "c"]) == b"a b\nc\n"
    for lines in (["a", ""], ["a\nb"]):
        with pytest.raises(BuildError):
            build._lines(lines)


def test_metadata() -> None:
    found = json.loads(build._metadata("6.6.79"))
    assert found["ImageName"] == "nitro-signer"
    assert found["ImageVersion"] == found["BuildMetadata"]["BuildToolVersion"] == __version__
    assert found["BuildMetadata"]["BuildTime"] == "1970-01-01T00:00:00+00:00"
    assert found["BuildMetadata"]["KernelVersion"] == "6.6.79"


def test_the_interpreter() -> None:
    found = interpreter.find(Path(sys.executable))
    assert found.target == Target((sys.version_info[0], sys.version_info[1]), found.target.machine)
    assert found.program == Path(sys.executable).resolve(), "that behind a virtual environment"
    assert found.place == f"usr/bin/python{sys.version_info[0]}.{sys.version_info[1]}"
    names = {name for name, _ in interpreter.standard_library(found)}
    assert {"os.py", "ssl.py", "encodings/utf_8.py", "encodings/idna.py", "json/decoder.py"} <= names
    assert not {"test/__init__.py", "unittest/case.py", "ensurepip/__init__.py", "encodings/cp1250.py"} & names
    assert not any("__pycache__" in name or "site-packages" in name for name in names)


def fake(tmp_path: Path, script: str) -> Path:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def told(**facts: object) -> str:
    usual = {
        "program": "/usr/bin/python3.11",
        "version": [3, 11],
        "full": "3.11.2",
        "machine": "x86_64",
        "name": "CPython",
        "library": "/usr/lib/python3.11",
        "folder": "lib",
        "extensions": None,
        "sites": ["/prefix/lib/python3.11/site-packages"],
    }
    return f"echo '{json.dumps(usual | facts)}'"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo broken >&2; exit 1", "does not run: broken"),
        (told(version=[3, 10], full="3.10.1"), "is CPython 3.10.1; CPython 3.11 or newer is needed"),
        (told(name="PyPy"), "is PyPy 3.11.2; CPython 3.11 or newer is needed"),
        (
            told(sites=["/prefix/local/lib/python3.11/dist-packages"]),
            "looks for packages in places of its distribution",
        ),
    ],
)
def test_interpreters_that_do_not_do(tmp_path: Path, script: str, expected: str) -> None:
    with pytest.raises(BuildError, match=expected):
        interpreter.find(fake(tmp_path, script))


def test_the_machine_s_environment_does_not_reach_what_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LD_LIBRARY_PATH would let other libraries in than the interpreter has by itself."""
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    asked = fake(tmp_path, f'test -z "$LD_LIBRARY_PATH" || exit 1; {told()}')
    assert interpreter.find(asked).full_version == "3.11.2"
    assert list(interpreter._needed(str(asked), Path("/bin/true"))) == []


def test_an_interpreter_whose_library_is_in_lib64(tmp_path: Path) -> None:
    sites = ["/prefix/lib64/python3.11/site-packages", "/prefix/lib/python3.11/site-packages"]
    found = interpreter.find(fake(tmp_path, told(folder="lib64", sites=sites)))
    assert found.packages == "usr/lib64/python3.11/site-packages"
    assert found.extensions == Path("/usr/lib/python3.11/lib-dynload")


def test_byte_code_is_the_same_every_time_and_knows_no_path_of_the_machine() -> None:
    """Strings that are used in several places, sets, and nested code: what made it differ."""
    found = interpreter.find(Path(sys.executable))
    source = b"def f(a={'x', 'y', 'z'}, b='shared'):\n    return a in {'p', 'q', 'r'}, [b for b in ('shared', b)]\n"
    sources = [("usr/lib/one.py", source), ("usr/lib/two.py", source), ("usr/lib/one.py", source)]
    runs = [list(interpreter.compiled_contents(found, sources)) for _ in range(4)]
    assert all(run == runs[0] for run in runs)
    assert runs[0][0] == runs[0][2], "what was compiled before makes no difference"
    assert b"/usr/lib/one.py" in runs[0][0]
    assert b"/tmp" not in runs[0][0]
    assert runs[0][0][4:8] == b"\x01\0\0\0", "never compared with a source"


def test_sources_that_do_not_compile() -> None:
    found = interpreter.find(Path(sys.executable))
    with pytest.raises(BuildError, match="usr/lib/bad.py"):
        list(interpreter.compiled_contents(found, [("usr/lib/bad.py", b"def\n")]))


def test_byte_code_has_no_references() -> None:
    """Which objects later versions of marshal mark depends on who else uses them (CPython issue 78274)."""
    found = interpreter.find(Path(sys.executable))
    (data,) = interpreter.compiled_contents(
        found, [("usr/lib/one.py", b"a, b = ('long' * 3, 1000), ('long' * 3, 1000)\n")]
    )
    assert data[16:] == marshal.dumps(marshal.loads(data[16:]), 2)
    assert data[16:] != marshal.dumps(marshal.loads(data[16:]), 4)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '	libodd.so.1 => not found'", "needs what this machine does not have: libodd.so.1"),
        ("echo 'wrong ELF class' >&2; exit 1", "needs what this machine does not have: wrong ELF class"),
    ],
)
def test_a_library_that_is_missing(tmp_path: Path, script: str, expected: str) -> None:
    with pytest.raises(BuildError, match=expected):
        list(interpreter._needed(str(fake(tmp_path, script)), Path("/bin/true")))


def test_libraries_by_the_loader(tmp_path: Path) -> None:
    told = "\n".join(
        [
            "\tlinux-vdso.so.1 (0x00007f)",
            "\tlibc.so.6 => /lib/libc.so.6 (0x00007f)",
            "\t/lib64/ld-linux.so.2 (0x00007f)",
        ]
    )
    loader = fake(tmp_path, f"echo '{told}'")
    assert list(interpreter._needed(str(loader), Path("/bin/true"))) == [("libc.so.6", Path("/lib/libc.so.6"))]


def test_a_program_without_a_loader(tmp_path: Path) -> None:
    found = interpreter.find(Path(sys.executable))
    library = next(path for name, path in interpreter.standard_library(found) if path.suffix == ".so")
    with pytest.raises(BuildError, match="has no loader on this machine"):
        interpreter.add_libraries(Tree(), replace(found, program=library), [], tmp_path)
