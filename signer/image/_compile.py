"""Compiles Python sources with the interpreter that will run them; a script of its own, without other imports.

Standard input: JSON, a list of [path of the source, path in the image]. Standard output: for each the length, four
bytes big-endian, and that many bytes of a .pyc file.

The same source gives the same bytes everywhere: the path is the image's, the check against the source is by hash and
off, and marshal's version 2 knows no references, which CPython writes by how often an object happens to be used
(CPython issue 78274).
"""

import importlib.util
import json
import marshal
import struct
import sys
import warnings

_UNCHECKED_HASH = 1  # PEP 552
_VERSION = 2  # of marshal; versions before 3 write no references


def main() -> None:
    """Compile what standard input names."""
    warnings.simplefilter("ignore")
    for path, shown in json.load(sys.stdin):
        with open(path, "rb") as file:  # noqa: PTH123 # without an import that costs more than all of this
            source = file.read()
        code = compile(source, shown, "exec", dont_inherit=True, optimize=0)
        head = importlib.util.MAGIC_NUMBER + struct.pack("<I", _UNCHECKED_HASH) + importlib.util.source_hash(source)
        data = head + marshal.dumps(code, _VERSION)
        sys.stdout.buffer.write(struct.pack(">I", len(data)) + data)


if __name__ == "__main__":
    main()
