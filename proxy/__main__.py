"""`python -m proxy` is the command `nitro-vsock-proxy`."""

from proxy.cli import main

if __name__ == "__main__":
    main()
