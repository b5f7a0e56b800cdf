"""The command line: one module for each group of commands, no logic of its own."""

from signer.cli.main import main

__all__ = ["main"]
