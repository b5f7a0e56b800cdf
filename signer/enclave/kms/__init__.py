"""AWS KMS as the enclave talks to it: signed requests over TLS of its own; section 3 of the enclave specification."""
