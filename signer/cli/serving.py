"""`signer serve` and `signer version`."""

import signal
from functools import partial

import click

from signer import __version__
from signer.cli.common import CliCommand, Globals, configure_logs, load_settings


@click.command(cls=CliCommand)
@click.option("--no-list", is_flag=True, help="Don't list the keys into the log at start.")
def serve(*, no_list: bool) -> None:
    """Run the signing API and the utility server.

    SIGINT and SIGTERM stop accepting and finish what runs; a second one doesn't wait. SIGHUP reads the configuration
    again: policies and keys change at once, the log names what needs a restart.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGHUP])  # it waits until the service can heed it

    import trio

    from signer import config, service

    configure_logs()
    settings = load_settings()
    flags = click.get_current_context().ensure_object(Globals)

    async def run() -> None:
        await service.serve(
            settings, no_list=no_list, reload=partial(config.load, flags.config, base_dir=flags.base_dir)
        )

    trio.run(run)


@click.command(cls=CliCommand)
def version() -> None:
    """Print the version (alias: v)."""
    click.echo(f"Release Version: {__version__}")


COMMANDS = (serve, version)
