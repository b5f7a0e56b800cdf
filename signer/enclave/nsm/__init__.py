"""The Nitro security module (NSM): registers, random bytes, documents; section 1 of the enclave specification."""
