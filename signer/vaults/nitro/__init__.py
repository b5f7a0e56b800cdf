"""The vault whose keys live in a Nitro enclave; section 4 of the signer specification."""
