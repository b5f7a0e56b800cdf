"""What can be signed: `list-requests`, `list-ops`, `decode`."""

import json
from collections.abc import Iterator

import click

from signer.cli.common import CliCommand, standard_input
from signer.tezos.kinds import OPERATION_KINDS, REQUEST_KINDS

_NOT_HEXADECIMAL = "not a hexadecimal text with an even number of digits"
_MAX_LINE = 2 * 1024 * 1024 + 64  # characters of one request in hexadecimal
_TOO_LONG = f"the line is longer than {_MAX_LINE} characters"


def _print_kinds(title: str, kinds: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(list(kinds)))
        return
    click.echo(title)
    for kind in kinds:
        click.echo(f"    - {kind}")


@click.command("list-requests", cls=CliCommand)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_requests(*, as_json: bool) -> None:
    """Print the request kinds that a policy can allow."""
    _print_kinds("Possible request types:", REQUEST_KINDS, as_json=as_json)


@click.command("list-ops", cls=CliCommand)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_ops(*, as_json: bool) -> None:
    """Print the operation kinds that a policy can allow under `generic`."""
    _print_kinds("Possible operation types:", OPERATION_KINDS, as_json=as_json)


@click.command(cls=CliCommand)
@click.argument("requests", metavar="[HEX]...", nargs=-1)
@click.option(
    "--version", "signing_version", type=int, default=2, help="Signing version; 1: protocol 022. [default: 2]"
)
@click.option("--strict", is_flag=True, help="Exit with status 1 if a request is refused.")
def decode(requests: tuple[str, ...], *, signing_version: int, strict: bool) -> int:
    """Say what requests ask for: one JSON object for each HEX, or for each line of standard input.

    A request that the signer refuses gives {"error": ...}.
    """
    refused = False
    for text in requests or _lines():
        facts = _facts(text, signing_version)
        refused = refused or "error" in facts
        click.echo(json.dumps(facts))
    return 1 if refused and strict else 0


def _facts(text: str | None, version: int) -> dict[str, object]:
    """What is printed for one request; *text* is None for a line that is too long."""
    from signer.tezos.requests import describe

    if text is None:
        return {"error": _TOO_LONG}
    try:
        data = bytes.fromhex(_digits(text))
    except ValueError:
        return {"error": _NOT_HEXADECIMAL}
    return describe(data, version=version)


def _digits(text: str) -> str:
    digits = text.strip().strip("\"'").removeprefix("0x").removeprefix("0X")
    if any(character.isspace() for character in digits):
        raise ValueError("white space between the digits")
    return digits


def _lines() -> Iterator[str | None]:
    """The lines of standard input; None for one that is too long."""
    stdin = standard_input()
    while line := stdin.readline(_MAX_LINE):
        if len(line) == _MAX_LINE and not line.endswith(b"\n"):
            while (rest := stdin.readline(_MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield None
        else:
            yield line.decode("ascii", "replace")


COMMANDS = (list_requests, list_ops, decode)
