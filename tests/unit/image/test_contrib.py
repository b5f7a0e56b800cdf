"""What operators copy fits the builder: the Dockerfile, the unit, the manual."""

import re
from pathlib import Path

import pytest

from signer.image import __main__ as command
from signer.image import build, program

CONTRIB = Path(__file__).parents[3] / "contrib"
DOCKERFILE = (CONTRIB / "enclave/Dockerfile").read_text()
README = (CONTRIB / "enclave/README.md").read_text()


def instructions(name: str) -> list[str]:
    joined = DOCKERFILE.replace("\\\n", " ")
    return [line.partition(" ")[2] for line in joined.splitlines() if line.partition(" ")[0] == name]


def test_the_dockerfile() -> None:
    assert len(instructions("CMD")) == 1
    assert instructions("ENTRYPOINT") == []
    assert len(instructions("FROM")) == 2
    for line in instructions("FROM"):
        assert line.startswith("${PYTHON_IMAGE:?set-it-by:"), "no base without a digest"
        assert len(line.split()) in (1, 3), "Docker divides it at blanks, also within braces: image, or image AS name"
    arguments = [line.partition("=") for line in instructions("ARG")]
    assert arguments[0] == ("PYTHON_IMAGE", "", "")
    assert {name: value for name, _, value in arguments[1:]} == dict.fromkeys(build.SETTINGS, '""')
    assert set(re.findall(r"(\w+)=", instructions("ENV")[0])) == set(build.SETTINGS)
    for line in instructions("COPY"):
        source = line.split()[-2]
        assert line.startswith("--from=") or (CONTRIB.parent / source).exists(), line
    assert '"signer.enclave", "--sealing", "kms"]' in instructions("CMD")[0]
    assert list(build.ARGUMENTS) == ["--sealing", "kms"]


def test_the_context_of_docker_has_what_it_copies_and_no_more() -> None:
    ignored = (CONTRIB / "enclave/Dockerfile.dockerignore").read_text().splitlines()
    assert ignored[1] == "*"
    assert {line for line in ignored if line.startswith("!")} == {
        "!signer",
        "!proxy",
        "!contrib",
        "!contrib/enclave",
        "!contrib/enclave/requirements.txt",
        *(f"!{name}" for name in program.DATA),
    }
    assert {"**/*.pem", "**/*.key"} <= set(ignored)


def test_the_dockerfile_takes_the_data_that_the_builder_takes() -> None:
    """Anything else that is no module is deleted in the first stage, of which the second has only what is left."""
    (deleting,) = [line for line in instructions("RUN") if line.startswith("find /packages/signer /packages/proxy ")]
    assert re.findall(r"! -path /packages/(\S+)", deleting) == list(program.DATA)
    assert "! -name '*.py'" in deleting
    assert deleting.endswith(" -delete")
    final = DOCKERFILE.rpartition("\nFROM ")[2]
    assert [line.split()[1] for line in final.splitlines() if line.startswith("COPY ")] == ["--from=packages"]


def test_the_manual_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["image", "--help"])
    options = set(re.findall(r"--[a-z]+", capsys.readouterr().out)) - {"--help", "--sealing"}
    assert {option for option in options if f"{option} " not in README} == set()
    assert all(f"`{name}`" in README for name in build.SETTINGS)


def test_the_manual_counts_the_packages() -> None:
    names = {11: "eleven", 12: "twelve", 13: "thirteen"}
    pins = re.findall(r"^[\w-]+==", (CONTRIB / "enclave/requirements.txt").read_text(), re.MULTILINE)
    assert f"{names[len(pins)]} packages" in README


def test_the_unit_starts_what_the_manual_installs() -> None:
    unit = (CONTRIB / "systemd/nitro-enclave.service").read_text()
    assert "IMAGE=/opt/nitro-signer/signer.eif" in unit
    assert "/opt/nitro-signer/signer.eif" in README
    assert re.search(r"^User=nitro-enclave\nGroup=ne$", unit, re.MULTILINE)
    assert "--gid ne nitro-enclave" in README


def test_the_unit_gets_over_whatever_fails_at_its_start() -> None:
    """An allocator that fails at boot, memory that is missing for a week."""
    lines = (CONTRIB / "systemd/nitro-enclave.service").read_text().splitlines()
    assert {"Restart=always", "StartLimitIntervalSec=0"} <= set(lines)
    assert not [line for line in lines if line.startswith(("Requires=", "BindsTo=", "Requisite="))]
    (cleaning,) = [line for line in lines if line.startswith("ExecStartPre=")]
    assert cleaning.startswith("ExecStartPre=-"), "the start doesn't depend on it"
    assert " /var/log/nitro_enclaves -name err*.log -user nitro-enclave " in cleaning
