"""`python -m signer.image` builds the enclave's image; `contrib/enclave/build` calls it, the README there tells how."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from signer.errors import SignerError
from signer.image import program
from signer.image.build import ARGUMENTS, REPOSITORY, SETTINGS, Built, Inputs, build
from signer.image.wheels import requirements


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "requirements":
            print(requirements(options.lock), end="")
        else:
            _build(options)
    except SignerError as exc:
        print(f"Error: {exc}", file=sys.stderr)
        return 1
    except OSError as exc:
        print(f"Error: {exc.strerror or exc}{f': {exc.filename}' if exc.filename else ''}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="contrib/enclave/build", description="Builds the enclave's image.")
    commands = parser.add_subparsers(dest="command", required=True)
    locked = commands.add_parser("requirements", help="print the packages of the image, for pip download")
    locked.add_argument("--lock", type=Path, default=REPOSITORY / "requirements.lock", metavar="FILE")
    image = commands.add_parser("image", help="write the image, and beside it what is in it (FILE.manifest)")
    image.add_argument("--python", type=Path, required=True, help="the interpreter to put in: CPython 3.11 or newer")
    image.add_argument("--wheels", type=Path, required=True, metavar="DIR", help="what pip download has fetched")
    image.add_argument("--blobs", type=Path, required=True, metavar="DIR", help="kernel, cmdline, init, nsm.ko of AWS")
    image.add_argument("--pins", type=Path, required=True, metavar="FILE", help="their SHA-256, as sha256sum writes it")
    image.add_argument("--output", type=Path, required=True, metavar="FILE")
    image.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help=f"setting of the enclave program, measured: {', '.join(SETTINGS)}",
    )
    image.add_argument(
        "arguments",
        nargs="*",
        metavar="ARGUMENT",
        help=f"of the enclave program, after --; default: {' '.join(ARGUMENTS)}",
    )
    return parser


def _build(options: argparse.Namespace) -> None:
    settings = [setting.partition("=") for setting in options.env]
    inputs = Inputs(
        python=options.python,
        wheels=options.wheels,
        blobs=options.blobs,
        pins=options.pins,
        environment={name: value for name, _, value in settings},
        arguments=options.arguments or ARGUMENTS,
    )
    for name in program.left_out(inputs.sources):
        print(f"left out, since the enclave's program does not read it: {name}", file=sys.stderr)
    built = build(inputs, options.output)
    manifest = options.output.with_name(f"{options.output.name}.manifest")
    manifest.write_text(built.manifest, encoding="utf-8")
    print(_summary(options.output, manifest, built))


def _summary(output: Path, manifest: Path, built: Built) -> str:
    lines = [f"PCR{number}  {value.hex()}" for number, value in built.measured.registers.items()]
    size = built.measured.size
    lines.append(f"{output}: {_mebibytes(size)} MiB, root file system {_mebibytes(built.root_size)} MiB")
    # nitro-cli's error E26: the memory is at least four times the image.
    lines.append(f"memory of the enclave: at least {-(-4 * size // 2**20)} MiB")
    lines.append(f"{manifest}: what is in it; compare it with another build's where the PCRs differ")
    return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"


if __name__ == "__main__":
    sys.exit(main())
