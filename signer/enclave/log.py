"""What the program in the enclave says, on standard error; never a secret, nor an error's text from outside."""

import sys
from contextlib import suppress


def say(text: str) -> None:
    """Write one line. Nobody may be there to read it: that must not end a session."""
    with suppress(OSError, ValueError):
        print(f"enclave: {text}", file=sys.stderr, flush=True)
