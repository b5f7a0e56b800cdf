"""`signer measure`: what an enclave image measures, without nitro-cli."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli.common import CliCommand
from signer.errors import ConfigurationError

if TYPE_CHECKING:
    from signer.image.measure import Measured

_CHECKED = re.compile(r"PCR([0128])=([0-9a-f]{96})", re.IGNORECASE)


@click.command(cls=CliCommand)
@click.argument("file", metavar="FILE", type=click.Path(path_type=Path))
@click.option(
    "--check",
    "checks",
    metavar="PCR0=HEX",
    multiple=True,
    help="Fail unless the image has this value; PCR0, 1, 2 or 8, may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON also on a terminal; elsewhere it is the form anyway.")
def measure(*, file: Path, checks: tuple[str, ...], as_json: bool) -> int:
    """Print what an enclave image (EIF) measures: PCR0, PCR1, PCR2, and PCR8 if it is signed.

    These are the values that its attestation documents will have, and that a KMS key policy names. The member
    Measurements is that of `nitro-cli build-enclave`.
    """
    from signer.image.measure import measure_file

    expected = dict(map(_check, checks))
    found = measure_file(file)
    values = {f"PCR{number}": value.hex() for number, value in found.registers.items()}
    facts = _facts(found)
    if as_json or not sys.stdout.isatty():
        measurements = {"HashAlgorithm": "Sha384 { ... }"} | values
        click.echo(json.dumps({"Measurements": measurements} | facts, indent=2))
    else:
        for name, value in (values | facts).items():
            click.echo(f"{name:14}{_shown(value)}")
    return _compare(values, expected)


def _shown(value: object) -> str:
    """Registers as they are, the rest as JSON: texts of the file may have control characters."""
    return value if isinstance(value, str) and re.fullmatch(r"[\w.+-]+", value, re.ASCII) else json.dumps(value)


def _check(text: str) -> tuple[str, str]:
    found = _CHECKED.fullmatch(text)
    if not found:
        raise click.UsageError(f"--check {text}: expected PCR0= (or 1, 2, 8) and 96 hexadecimal digits")
    return f"PCR{found[1]}", found[2].lower()


def _facts(found: Measured) -> dict[str, object]:
    """The rest, by nitro-cli's names where it has one; name and version are the file's word, and not measured."""
    facts: dict[str, object] = {
        "EifVersion": 4,
        "Architecture": found.layout.architecture,
        "Size": found.size,
        "IsSigned": found.certificate is not None,
    }
    if found.certificate is not None:
        facts["NotAfter"] = found.certificate.not_valid_after_utc.isoformat()
    return facts | {name: found.metadata[name] for name in ("ImageName", "ImageVersion") if name in found.metadata}


def _compare(values: Mapping[str, str], expected: Mapping[str, str]) -> int:
    differing = {name: value for name, value in expected.items() if values.get(name) != value}
    if differing:
        lines = [f"{name} is {values.get(name, 'not there')}, expected {value}" for name, value in differing.items()]
        raise ConfigurationError("the image is another one: " + "; ".join(lines))
    return 0


COMMANDS = (measure,)
