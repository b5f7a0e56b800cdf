"""A drill with the enclave program in an emulated Nitro Enclave, over real vsock: `make test-nitro` runs it."""
