"""`python -m signer` is the command `signer`."""

import sys

if __name__ == "__main__":
    try:
        from signer.cli import main
    except KeyboardInterrupt:
        sys.exit("Aborted.")
    main()
