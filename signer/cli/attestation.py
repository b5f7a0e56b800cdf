"""What enclaves prove of themselves: `attest`; and keys sealed for one: `seal-for`, `import --sealed`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from signer.cli.common import CliCommand, configure_logs, load_settings
from signer.errors import ConfigurationError, SignerError

if TYPE_CHECKING:
    from signer.attestation.document import Document
    from signer.config import NitroSettings, Settings
    from signer.vaults.nitro.visit import Visit

_AS_EXPECTED, _DIFFERS, _NO_PROOF = 0, 1, 2  # exit statuses
_MEANINGS = {
    0: "the whole image",
    1: "kernel and bootstrap",
    2: "the program",
    3: "the parent's IAM role",
    4: "the parent instance",
    8: "the image's signing certificate",
}


@click.command(cls=CliCommand)
@click.option("-v", "--vault", metavar="NAME", help="The nitro vault whose enclave is asked. [default: the only one]")
@click.option(
    "--image",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Compare with the measurements of this image file.",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def attest(*, vault: str | None, image: Path | None, as_json: bool) -> int:
    """Have the running enclave prove what it is, and print it.

    No credentials are sent. The document is verified to AWS's root; its registers are compared with the vault's pcrs
    and, with --image, with that file. Exit status 0: as expected, 1: something differs, 2: no valid proof.
    """
    import trio

    from signer.vaults.nitro.judge import Wanted, wanted_of
    from signer.vaults.nitro.visit import visit

    configure_logs()
    nitro = _nitro(load_settings(prepare=False), vault)  # nothing is read or written there
    wanted, expected = wanted_of(nitro), _expected(nitro, image)
    try:
        found = trio.run(visit, nitro, Wanted(allow_debug=True, root_sha256=wanted.root_sha256))
    except SignerError as exc:
        click.echo(f"Error: no proof: {exc}", err=True)
        return _NO_PROOF
    document = found.evidence.document
    faults = _faults(document, expected, allow_debug=wanted.allow_debug)
    root = wanted.root_sha256.hex()
    click.echo(json.dumps(_facts(found, faults, root)) if as_json else _report(found, expected, faults, root))
    return _DIFFERS if faults else _AS_EXPECTED


def _nitro(settings: Settings, name: str | None) -> NitroSettings:
    from signer.config import NitroSettings

    vaults = {key: one.config for key, one in settings.vaults.items() if isinstance(one.config, NitroSettings)}
    if name is None and len(vaults) == 1:
        return next(iter(vaults.values()))
    if name is None:
        raise ConfigurationError(f"--vault is needed: the configuration has {', '.join(vaults) or 'no nitro vault'}")
    if name not in vaults:
        raise ConfigurationError(f"there is no nitro vault {name}; the configuration has {', '.join(vaults) or 'none'}")
    return vaults[name]


def _expected(nitro: NitroSettings, image: Path | None) -> dict[int, dict[str, frozenset[bytes]]]:
    """For each register: by whom it is expected, and the values that are good."""
    from signer.image.measure import measure_file
    from signer.vaults.nitro.judge import registers_of

    sources = {
        "the configuration": registers_of(nitro.pcrs),
        "expected_pcrs of the configuration": registers_of(nitro.expected_pcrs),
    }
    if image is not None:
        measured = measure_file(image).registers
        sources[str(image)] = {register: frozenset([value]) for register, value in measured.items()}
    expected: dict[int, dict[str, frozenset[bytes]]] = {}
    for source, registers in sources.items():
        for register, values in registers.items():
            expected.setdefault(register, {})[source] = values
    return expected


def _faults(
    document: Document, expected: Mapping[int, Mapping[str, frozenset[bytes]]], *, allow_debug: bool
) -> list[str]:
    if document.is_debug:
        text = "it runs in debug mode: root on the parent can read its memory, and PCR0, 1 and 2 say nothing"
        return [] if allow_debug else [text]
    return [
        f"PCR{register} is not that of {source}: {' or '.join(sorted(value.hex() for value in values))}"
        for register, sources in sorted(expected.items())
        for source, values in sources.items()
        if document.pcrs.get(register) not in values
    ]


def _facts(found: Visit, faults: Sequence[str], root: str) -> dict[str, object]:
    document = found.evidence.document
    return {
        "place": str(found.place),
        "module_id": document.module_id,
        "made_at": document.made_at.isoformat(timespec="milliseconds"),
        "age_seconds": round((found.at - document.made_at).total_seconds(), 3),
        "root_sha256": root,
        "debug": document.is_debug,
        "boot_id": found.evidence.claims.boot_id.hex(),
        "pcrs": {f"PCR{register}": value.hex() for register, value in sorted(document.pcrs.items())},
        "differs": list(faults),
    }


def _report(
    found: Visit, expected: Mapping[int, Mapping[str, frozenset[bytes]]], faults: Sequence[str], root: str
) -> str:
    from signer.attestation.document import ROOT_SHA256

    document = found.evidence.document
    whose = "AWS's root" if root == ROOT_SHA256.hex() else "attestation_root, NOT to AWS's root"
    age = (found.at - document.made_at).total_seconds()
    lines = [
        f"{'Enclave:':10}{found.place}",
        f"{'Module:':10}{document.module_id}",
        f"{'Document:':10}{document.made_at:%Y-%m-%d %H:%M:%S} UTC, {age:.1f} s old, verified to {whose}",
        f"{'Boot:':10}{found.evidence.claims.boot_id.hex()}",
        f"{'Debug:':10}{'YES: root on the parent can read its memory' if document.is_debug else 'no'}",
        "",
    ]
    for register, value in sorted(document.pcrs.items()):
        if any(value) or register in expected or register in _MEANINGS:
            lines += [
                f"PCR{register:<6}{_MEANINGS.get(register, '')}",
                f"{'':9} {value.hex() if any(value) else 'zero'}",
            ]
            lines += [
                f"{'':9} {_comparison(source, value in good)}" for source, good in expected.get(register, {}).items()
            ]
    lines += ["", *(f"DIFFERS: {fault}" for fault in faults)]
    if not faults:
        lines.append(
            "as expected" if expected else "nothing to compare with: pcrs in the configuration, or --image FILE"
        )
    return "\n".join(lines)


def _comparison(source: str, is_good: bool) -> str:
    return f"{'as in' if is_good else 'NOT as in'} {source}"


COMMANDS = (attest,)
