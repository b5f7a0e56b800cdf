"""Tests that need real AF_VSOCK with a loopback (CID 1): `make test-vsock` runs them in a guest that has one."""
