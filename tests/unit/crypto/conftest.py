"""py-ecc raises the interpreter's limit of recursion to 100,000, at which deep input ends the process: put it back."""

import sys

_LIMIT = sys.getrecursionlimit()
import py_ecc.bls.ciphersuites  # noqa: E402, F401

sys.setrecursionlimit(_LIMIT)
