"""Standard output and error that perhaps nobody reads any more: that is no failure of the program."""

import os
import sys
from contextlib import suppress


def settle() -> None:
    """Write out what is buffered, before the end; what can't be written is dropped.

    Left in the buffer, it would be tried again while the interpreter ends, with a complaint and exit status 120.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is None:  # closed before the program began
            continue
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)
