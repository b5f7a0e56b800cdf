"""`signer serve` and `signer version`."""

import click

from signer import __version__
from signer.cli.common import CliCommand, configure_logs, load_settings


@click.command(cls=CliCommand)
@click.option("--no-list", is_flag=True, help="Don't list the keys into the log at start.")
def serve(*, no_list: bool) -> None:
    """Run the signing API and the utility server.

    SIGINT and SIGTERM stop accepting and finish what runs; a second one doesn't wait.
    """
    import trio

    from signer import service

    configure_logs()
    settings = load_settings()

    async def run() -> None:
        await service.serve(settings, no_list=no_list)

    trio.run(run)


@click.command(cls=CliCommand)
def version() -> None:
    """Print the version (alias: v)."""
    click.echo(f"Release Version: {__version__}")


COMMANDS = (serve, version)
