"""The command `signer`: the programs `signatory` and `signatory-cli` of the reference in one.

Section 7 of the signer specification: command names, flags, texts and the listing's format are kept. Libraries are
loaded by the command that needs them, so that `--help` and `decode` answer at once.
"""

import itertools
import sys

import click

from proxy import output
from signer.cli import attestation, configuration, demo, images, keys, policies, requests, sealing, serving, watermarks
from signer.cli.common import CliCommand, CliGroup
from signer.errors import SignerError
from signer.process import forbid_core_dumps


@click.group(cls=CliGroup, invoke_without_command=True)
@click.option("--serve-by-default", is_flag=True, hidden=True)
@click.pass_context
def cli(context: click.Context, *, serve_by_default: bool) -> None:
    """Tezos remote signer for AWS Nitro Enclaves.

    Keys live in an enclave; this program answers bakers over HTTP, applies policy and watermarks, and has the
    enclave sign. Try `signer demo` first; `signer serve -c FILE` is the real thing.
    """
    if context.invoked_subcommand is None:
        if serve_by_default:  # as the program `signatory` of the reference; see contrib/compat
            context.invoke(serving.serve, no_list=False)
        else:
            click.echo(context.get_help())


for _command in (
    *serving.COMMANDS,
    *keys.COMMANDS,
    *requests.COMMANDS,
    *configuration.COMMANDS,
    *watermarks.COMMANDS,
    *policies.COMMANDS,
    *attestation.COMMANDS,
    *sealing.COMMANDS,
    *images.COMMANDS,
    *demo.COMMANDS,
):
    cli.add_command(_command)


def main() -> None:
    """Run the command line; the exit status is 0 for success, 1 for any error."""
    status = run(sys.argv[1:])
    output.settle()
    sys.exit(status)


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status."""
    try:
        forbid_core_dumps()
        result = cli.main(arguments, prog_name="signer", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as exc:
        click.echo(exc.ctx.get_help())
    except click.UsageError as exc:
        usage = exc.ctx.get_usage() + "\n" if exc.ctx is not None else ""
        click.echo(f"Error: {exc.format_message()}\n{usage}", err=True, nl=False)
        return 1
    except click.ClickException as exc:
        click.echo(f"Error: {exc.format_message()}", err=True)
        return 1
    except SignerError as exc:
        click.echo(f"Error: {exc}", err=True)
        return 1
    except (click.Abort, KeyboardInterrupt):
        click.echo("Aborted.", err=True)
        return 1
    except BrokenPipeError:
        return 1
    except OSError as exc:
        click.echo(f"Error: {exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}", err=True)
        return 1
    except BaseExceptionGroup as group:
        expected, rest = group.split(SignerError)
        if rest is not None:
            raise
        assert expected is not None
        for error in _leaves(expected):
            click.echo(f"Error: {error}", err=True)
        return 1
    except Exception as exc:
        if _debugging(arguments):
            raise
        click.echo(
            f"Error: internal error ({type(exc).__name__}); --log debug shows the trace, please report it", err=True
        )
        return 1
    else:
        return result if isinstance(result, int) else 0
    return 0


def _debugging(arguments: list[str]) -> bool:
    """Whether `--log debug` or `--log=debug` is given; the parser's own answer is gone by the time of an error."""
    levels = [level for option, level in itertools.pairwise(arguments) if option == "--log"]
    levels += [argument.removeprefix("--log=") for argument in arguments if argument.startswith("--log=")]
    return not {"debug", "trace"}.isdisjoint(levels)


@cli.command("help", cls=CliCommand)
@click.argument("names", metavar="[COMMAND]...", nargs=-1)
@click.pass_context
def help_command(context: click.Context, names: tuple[str, ...]) -> None:
    """Print the help of a command."""
    command: click.Command = cli
    inner = click.Context(cli, info_name="signer")
    for name in names:
        found = command.get_command(inner, name) if isinstance(command, click.Group) else None
        if found is None:
            raise click.UsageError(f"no such command: {' '.join(names)}", context)
        command, inner = found, click.Context(found, info_name=name, parent=inner)
    click.echo(command.get_help(inner))


@cli.command(cls=CliCommand)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of a shell; for bash: source <(signer completion bash)."""
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(cli, {}, "signer", "_SIGNER_COMPLETE").source())


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
