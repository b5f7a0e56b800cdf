"""`signer config check`."""

import click

from signer.cli.common import CliGroup, config_path, load_settings


@click.group("config", cls=CliGroup)
def config_group() -> None:
    """Look at the configuration."""


@config_group.command()
def check() -> int:
    """Say whether the file is good, and print the settings that count, without secrets.

    Changes nothing. Exit status 1 for a file with which the signer would not start.
    """
    from signer import config

    settings = load_settings(prepare=False)
    for warning in config.warnings(settings):
        click.echo(f"Warning: {warning}", err=True)
    refused = config.unsupported(settings)
    for text in refused:
        click.echo(f"Error: {text}", err=True)
    click.echo(config.effective(settings), nl=False)
    if refused:
        return 1
    click.echo(f"{config_path() or 'the default configuration'} is good", err=True)
    return 0


COMMANDS = (config_group,)
