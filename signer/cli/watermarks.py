"""`signer watermark list | set | reset | import | export`; works beside a running signer."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio

from signer.cli.common import CliGroup, configure_logs, load_settings
from signer.errors import ConfigurationError
from signer.tezos.errors import TezosError
from signer.tezos.keys import PublicKeyHash, digest_text, parse_chain_id
from signer.watermark.interface import MarkKey, Slot

_SLOTS = [slot.value for slot in Slot]


class _Key(click.ParamType[PublicKeyHash]):
    name = "PKH"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> PublicKeyHash:
        if isinstance(value, PublicKeyHash):
            return value
        try:
            return PublicKeyHash.from_base58(str(value))
        except TezosError as exc:
            self.fail(str(exc), param, ctx)


class _Chain(click.ParamType[str]):
    name = "CHAIN"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_chain_id(str(value))
        except TezosError as exc:
            self.fail(str(exc), param, ctx)
        return str(value)


@click.group(cls=CliGroup)
def watermark() -> None:
    """Look at the marks that keep a slot from being signed twice, raise them, carry them over."""


class _Marks:
    """Where the configuration keeps the marks: in the base directory, or in a table."""

    def __init__(self, *, writing: bool = True) -> None:
        configure_logs()
        settings = load_settings(prepare=writing)
        table = settings.watermark.in_table
        if table is None and settings.watermark.driver != "file":
            raise ConfigurationError(f"watermark.driver is {settings.watermark.driver}: there is no file to look at")
        self._base_dir, self._table = settings.base_dir, table
        self.place = str(settings.base_dir)
        if table is not None:
            from signer.watermark.table_admin import name_of

            self.place = f"the table {name_of(table)}"

    def do(self, name: str, *arguments: Any, **options: Any) -> Any:
        """Call the function *name* of `signer.watermark.admin`, or of its twin for tables."""
        if self._table is None:
            from signer.watermark import admin

            return getattr(admin, name)(self._base_dir, *arguments, **options)
        from signer.watermark import table_admin
        from signer.watermark.table import MarkTable

        marks = MarkTable(table_admin.client_for(self._table), table_admin.name_of(self._table))
        return trio.run(partial(getattr(table_admin, name), marks, *arguments, **options))


@watermark.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def list_command(*, as_json: bool) -> None:
    """Print every mark."""
    marks = _Marks(writing=False)
    rows = [
        {
            "chain_id": key.chain_id,
            "public_key_hash": str(key.public_key_hash),
            "slot": key.slot.value,
            "level": mark.level,
            "round": mark.round,
            "hash": None if mark.digest is None else digest_text(mark.digest),
        }
        for key, mark in marks.do("list_marks")
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    if not rows:
        click.echo(f"there are no marks in {marks.place}", err=True)
    for row in rows:
        click.echo("{chain_id} {public_key_hash} {slot:14} level {level} round {round}".format(**row))


@watermark.command("set")
@click.argument("pkh", type=_Key())
@click.argument("chain", type=_Chain())
@click.argument("slot", type=click.Choice(_SLOTS))
@click.argument("level", type=int)
@click.argument("round_", metavar="[ROUND]", type=int, default=0)
def set_command(pkh: PublicKeyHash, chain: str, slot: str, level: int, round_: int) -> None:
    """Raise a mark: from then on nothing at or below LEVEL and ROUND is signed.

    PKH is the key's address (tz1...), CHAIN the chain's id (Net...); ROUND is 0 if left out.
    """
    _Marks().do("set_mark", MarkKey(chain, pkh, Slot(slot)), level, round_)
    click.echo(f"{slot} mark of {pkh} on {chain}: level {level}, round {round_}")


@watermark.command("reset")
@click.argument("pkh", type=_Key())
@click.argument("chain", type=_Chain())
@click.option("--slot", type=click.Choice(_SLOTS), help="Only this one. [default: all]")
@click.option("--confirm-key", metavar="PKH", default="", help="The key once more.")
@click.option("--confirm-chain", metavar="CHAIN", default="", help="The chain once more.")
def reset_command(pkh: PublicKeyHash, chain: str, slot: str | None, confirm_key: str, confirm_chain: str) -> None:
    """Forget the marks of a key on a chain. DANGER: what was signed can be signed again, differently."""
    forgotten = _Marks().do(
        "reset_mark",
        pkh,
        chain,
        None if slot is None else Slot(slot),
        confirm_key=confirm_key,
        confirm_chain=confirm_chain,
    )
    for key, mark in forgotten:
        click.echo(f"forgotten: {key.slot} mark of {pkh} on {chain}, level {mark.level}, round {mark.round}")
    if not forgotten:
        click.echo("there was no such mark")


@watermark.command("import")
@click.argument("source", type=click.Path(exists=True, path_type=Path))
def import_command(source: Path) -> None:
    """Take over the marks of Signatory or octez-signer at SOURCE; the higher mark wins."""
    entries, moved = _Marks().do("import_marks", source)
    click.echo(f"{entries} mark(s) read, {moved} of ours raised")


@watermark.command("export")
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--format", "form", type=click.Choice(["signatory"]), default="signatory", help="[default: signatory]")
def export_command(target: Path, form: str) -> None:
    """Write all marks to the directory TARGET, so that another signer can go on with them.

    Stop this signer first: what it signs later isn't in the export.
    """
    assert form == "signatory"
    for path in _Marks(writing=False).do("export_signatory", target):
        click.echo(str(path))


COMMANDS = (watermark,)
