"""The command line: part 1.1 and 1.2 of the proxy specification, and the options of part 2 beside it.

`vsock-proxy [OPTIONS] <local_port> <remote_addr> <remote_port>`. Exit status: 0 for help, version and an end by signal,
1 for an error at run time (`Error: "<text>"` on standard error), 2 for wrong usage.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click
from pydantic import ValidationError

from proxy import logs, output
from proxy.address import VSOCK_ANY, Address, AddressError, VsockAddress, parse
from proxy.daemon import StartError, run
from proxy.settings import (
    DEFAULT_ALLOW_LIST,
    DEFAULT_WORKERS,
    PARENT_CID,
    Forward,
    Limits,
    Settings,
    SettingsError,
    explain,
    host_port,
    load,
)

_NAME = "vsock-proxy"  # of the original
_NUMBER = re.compile(r"\+?[0-9]+", re.ASCII)
_MAX_DIGITS = 20  # of 64 bits; int() refuses thousands of them
_MAX_UINT64, _MAX_UINT32, _MAX_UINT16 = 2**64 - 1, 2**32 - 1, 2**16 - 1
_SHORT_WITH_VALUE = re.compile(r"-([46hV]*)w(=?)(.*)", re.DOTALL)
_DRAIN_TIMEOUT: float = Settings.model_fields["drain_timeout"].default
_METAVARS = {
    "max_waiting": "N",
    "max_connections_per_cid": "N",
    "max_rate_per_cid": "PER_SECOND",
}


class _RuntimeError(Exception):
    """Printed as the original does it; exit status 1."""


def _once(ctx: click.Context, parameter: click.Parameter, values: Any) -> Any:
    """An option that is given twice is wrong usage; of a flag, whether it is there."""
    if isinstance(values, int):
        if values > 1:
            raise click.UsageError(f"the option {parameter.opts[-1]} is there twice", ctx)
        return bool(values)
    if len(values) > 1:
        raise click.UsageError(f"the option {parameter.opts[-1]} is there twice", ctx)
    return values[0] if values else None


def _option(*names: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(*names, multiple=True, callback=_once, **more)


def _flag(*names: str, **more: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option(*names, count=True, callback=_once, **more)


def _limits(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of `Limits` that the original doesn't have."""
    for name, field in reversed(Limits.model_fields.items()):
        option = "--" + name.replace("_", "-")
        help_ = field.description or ""
        if name == "num_workers":
            continue
        if name == "check_tls_name":
            function = _flag(option, help=f"{help_[0].upper()}{help_[1:]}.")(function)
        elif name == "allowed_cids":
            text = "A CID that may connect; repeatable. [default: any]"
            function = click.option("--allowed-cid", "allowed_cids", metavar="CID", multiple=True, help=text)(function)
        else:
            text = f"{help_[0].upper()}{help_[1:]}. [default: {field.default:g}]"
            function = _option(option, name, metavar=_METAVARS.get(name, "SECONDS"), help=text)(function)
    return function


class _Command(click.Command):
    """Reads arguments as the original does, where click would not."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, list(self._as_original(ctx, args)))

    def _as_original(self, ctx: click.Context, args: list[str]) -> Iterator[str]:
        """`-w=8` is `-w 8`, and what starts with `-` is no value of an option, unless `=` joins them."""
        rest = iter(args)
        for arg in rest:
            if arg == "--":
                yield arg
                break
            short = _SHORT_WITH_VALUE.fullmatch(arg)
            if short is not None and (short[2] or short[3]):
                yield from [f"-{short[1]}"] if short[1] else []
                yield f"--num_workers={short[3]}"
                continue
            yield arg
            takes_next = short is not None or arg in self._long_with_value
            if takes_next and (value := next(rest, None)) is not None:
                if value.startswith("-") and value != "-":
                    raise click.UsageError(f"the option {arg} needs a value, and {value} is none", ctx)
                yield value
        yield from rest

    @property
    def _long_with_value(self) -> set[str]:
        options = (one for one in self.params if isinstance(one, click.Option))
        return {name for one in options if not (one.is_flag or one.count) for name in one.opts if name.startswith("--")}


@click.command(
    cls=_Command,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    options_metavar="[OPTIONS]",
    add_help_option=True,
)
@click.argument("operands", nargs=-1, metavar="<local_port> <remote_addr> <remote_port>")
@_flag("-4", "--ipv4", "ipv4", help="Only IPv4 targets.")
@_flag("-6", "--ipv6", "ipv6", help="Only IPv6 targets.")
@_option(
    "-w",
    "--num_workers",
    "--num-workers",
    "num_workers",
    metavar="N",
    help=f"Connections served at the same time. [default: {DEFAULT_WORKERS}]",
)
@_option("--config", metavar="FILE", help=f"Allow list, YAML. [default: {DEFAULT_ALLOW_LIST}]")
@click.option(
    "--listen",
    metavar="ADDRESS",
    multiple=True,
    help="Take the place of <local_port>: vsock:<cid>:<port>, unix:<base>:<port> (hybrid vsock) or tcp:<host>:<port>; "
    "repeatable.",
)
@_option("--bind-cid", metavar="CID", help=f"CID for <local_port>: any, local or a number. [default: {PARENT_CID}]")
@_option(
    "--settings",
    metavar="FILE",
    help="YAML file with several listeners, in place of the arguments; the options here go before what it says.",
)
@_limits
@_option(
    "--drain-timeout",
    metavar="SECONDS",
    help=f"Seconds for connections to end after SIGTERM. [default: {_DRAIN_TIMEOUT:g}]",
)
@_option("--metrics", metavar="HOST:PORT", help="Serve Prometheus metrics there. [default: nowhere]")
@click.option("-V", "--version", "show_version", is_flag=True, help="Print the version.")
def cli(operands: tuple[str, ...], **options: Any) -> int:
    """Forward vsock connections to a TCP host that the allow list names.

    The level of the log is that of RUST_LOG, by default info. SIGTERM lets connections end, SIGHUP reads the allow list
    again.
    """
    if options.pop("show_version"):
        click.echo(f"nitro-vsock-proxy {_version()}")
        return 0
    settings = _settings(operands, {key: value for key, value in options.items() if value not in (None, (), False)})
    logs.configure(os.environ)
    try:
        return run(settings)
    except StartError as exc:
        raise _RuntimeError(str(exc)) from exc


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""
    status = _status(list(sys.argv[1:] if arguments is None else arguments))
    output.settle()
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    try:
        result = cli.main(arguments, prog_name=_NAME, standalone_mode=False)
    except click.UsageError as exc:
        usage = cli.get_usage(click.Context(cli, info_name=_NAME))
        click.echo(f"error: {exc.format_message()}\n{usage}", err=True)
        return 2
    except _RuntimeError as exc:
        click.echo(f"Error: {_quoted(str(exc))}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        return 1
    except BrokenPipeError:
        return 1
    return result if isinstance(result, int) else 0


def _quoted(text: str) -> str:
    """As the original prints an error: in quotes, in one line."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _version() -> str:
    try:
        return version("nitro-signer")
    except PackageNotFoundError:
        return "(not installed)"


def _settings(operands: tuple[str, ...], options: dict[str, Any]) -> Settings:
    if options.get("ipv4") and options.get("ipv6"):
        raise click.UsageError("-4 can't be used with -6")
    if options.get("listen") and options.get("bind_cid"):
        raise click.UsageError("--bind-cid is for <local_port>: with --listen, write vsock:<cid>:<port>")
    family = 4 if options.pop("ipv4", False) else 6 if options.pop("ipv6", False) else None
    listen, bind_cid, file = (options.pop(name, None) for name in ("listen", "bind_cid", "settings"))
    _check_operands(operands, listen, file)
    local_port, (host, remote_port) = None, ("", 0)
    if file is None:
        local_port, host, remote_port = _ports(operands, listen)
    values = _values(options) | ({} if family is None else {"family": family})
    if file is not None:
        if listen or bind_cid:
            raise click.UsageError("--settings says where to listen: --listen and --bind-cid can't be used with it")
        try:
            return load(Path(file), values)
        except SettingsError as exc:
            raise _RuntimeError(str(exc)) from exc
    addresses = [_address(text) for text in listen or ()] or [VsockAddress(_cid(bind_cid), local_port or 0)]
    limits = {key: value for key, value in values.items() if key in Limits.model_fields or key == "family"}
    rest = {key: value for key, value in values.items() if key not in limits}
    try:
        forwards = tuple(
            Forward(listen=address, remote_host=host, remote_port=remote_port, **limits) for address in addresses
        )
        return Settings(forwards=forwards, **rest)
    except ValidationError as exc:
        raise click.UsageError("; ".join(_with_option(text) for text in explain(exc))) from exc


def _with_option(fault: str) -> str:
    """The name of a field at its front becomes that of the option."""
    field, colon, text = fault.partition(": ")
    return f"--{field.partition('.')[0].replace('_', '-')}{colon}{text}"


def _check_operands(operands: tuple[str, ...], listen: Sequence[str] | None, file: str | None) -> None:
    names = ("<local_port>", "<remote_addr>", "<remote_port>")
    wanted = () if file is not None else names[1:] if listen else names
    if len(operands) > len(wanted):
        raise click.UsageError(f"unexpected argument: {operands[len(wanted)]}")
    if len(operands) < len(wanted):
        raise click.UsageError(f"the following arguments are required: {' '.join(wanted[len(operands) :])}")


def _ports(operands: tuple[str, ...], listen: Sequence[str] | None) -> tuple[int | None, str, int]:
    """Local port, host and remote port, checked in the original's order."""
    local_port = None
    if not listen:
        local_port = _number(operands[0], _MAX_UINT32)
        if local_port is None or local_port == VSOCK_ANY:  # which Linux takes for any port
            raise _RuntimeError("Local port is not valid")
    host, remote = operands[-2:]
    host = host.encode(errors="backslashreplace").decode()  # what is no text stays visible, and is no name
    remote_port = _number(remote, _MAX_UINT16)
    if remote_port is None:
        raise _RuntimeError("Remote port is not valid")
    return local_port, host, remote_port


def _number(text: str, maximum: int) -> int | None:
    """A decimal number as the original reads it; None for anything else."""
    if _NUMBER.fullmatch(text) is None:
        return None
    digits = text.lstrip("+0") or "0"
    return int(digits) if len(digits) <= _MAX_DIGITS and int(digits) <= maximum else None


def _values(options: dict[str, Any]) -> dict[str, Any]:
    """The other options as values; pydantic checks their ranges."""
    values = dict(options)
    if "num_workers" in values:
        workers = _number(values["num_workers"], _MAX_UINT64)
        if workers is None:
            raise _RuntimeError("Number of workers is not valid")
        if workers == 0:
            raise _RuntimeError("Number of workers must not be 0")
        values["num_workers"] = workers
    if "config" in values:
        values["allowlist"] = Path(values.pop("config"))
    if "metrics" in values:
        endpoint = host_port(values["metrics"])
        if endpoint is None:
            raise click.UsageError(f"--metrics: expected HOST:PORT, got {values['metrics']}")
        values["metrics"] = endpoint
    return values


def _address(text: str) -> Address:
    try:
        return parse(text)
    except AddressError as exc:
        raise click.UsageError(f"--listen: {exc}") from exc


def _cid(text: str | None) -> int:
    if text is None:
        return PARENT_CID
    try:
        address = parse(f"vsock:{text}:0")
    except AddressError as exc:
        raise click.UsageError(f"--bind-cid: expected any, local or a number, got {text!r}") from exc
    assert isinstance(address, VsockAddress)
    return address.cid
