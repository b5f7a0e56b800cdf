"""What all commands share: the global flags, which stand before or after the command's name, and loading."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

if TYPE_CHECKING:
    from signer.config import Settings

DEFAULT_CONFIG = "/etc/signatory.yaml"
DEFAULT_LEVEL = "info"
LEVELS = ["error", "warn", "warning", "info", "debug", "trace", "fatal", "panic"]

F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Globals:
    """The global flags of section 7.1."""

    config: str = DEFAULT_CONFIG
    log: str = ""  # empty: not given
    base_dir: str = ""
    json_log: bool = False


class _GlobalsMixin(click.Command):
    """Accepts the global flags, wherever they stand."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # click's own signature
        context = kwargs.setdefault("context_settings", {})
        context.setdefault("help_option_names", ["-h", "--help"])
        super().__init__(*args, **kwargs)
        self.params += _global_options()


class CliCommand(_GlobalsMixin):
    """A command with the global flags."""


class CliGroup(_GlobalsMixin, click.Group):
    """A group with the global flags, whose commands may have aliases."""

    command_class = CliCommand
    aliases: dict[str, str]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return super().get_command(ctx, {"v": "version"}.get(cmd_name, cmd_name))


def _global_options() -> list[click.Parameter]:
    def store(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
        def callback(ctx: click.Context, _parameter: click.Parameter, value: Any) -> None:
            flags = ctx.ensure_object(Globals)
            if value is not None:
                setattr(flags, name, value)

        return callback

    return [
        click.Option(
            ["-c", "--config"],
            metavar="PATH",
            help=f"Configuration file; empty: none. [default: {DEFAULT_CONFIG}]",
            expose_value=False,
            callback=store("config"),
        ),
        click.Option(
            ["--log"],
            type=click.Choice(LEVELS),
            metavar="LEVEL",
            help="error, warn, info, debug or trace. [default: info]",
            expose_value=False,
            callback=store("log"),
        ),
        click.Option(
            ["--base-dir"],
            metavar="DIR",
            help="Takes the place of base_dir.",
            expose_value=False,
            callback=store("base_dir"),
        ),
        click.Option(
            ["--json-log"],
            is_flag=True,
            default=None,
            help="Log lines as JSON.",
            expose_value=False,
            callback=store("json_log"),
        ),
    ]


def configure_logs() -> None:
    """Set up logging as the flags say; every command that can log calls this first."""
    from signer.observe import logs

    flags = click.get_current_context().ensure_object(Globals)
    logs.configure(flags.log or DEFAULT_LEVEL, json_lines=flags.json_log)


def load_settings(*, prepare: bool = True) -> Settings:
    """The configuration as the flags say, and a base directory that can be written, if *prepare*."""
    from signer import config

    flags = click.get_current_context().ensure_object(Globals)
    settings = config.load(flags.config, base_dir=flags.base_dir)
    if prepare:
        config.prepare_base_dir(settings)
    return settings


def standard_input() -> BinaryIO:
    """Standard input as bytes; an empty one where it is closed."""
    return sys.stdin.buffer if sys.stdin is not None else io.BytesIO()


def config_path() -> str:
    """The path given by `-c`."""
    return click.get_current_context().ensure_object(Globals).config
