"""The enclave program in an emulated Nitro Enclave, over real vsock: a drill, and our own image; `make test-nitro`."""
