"""The program inside the enclave. Shares encodings, cryptography, the codec and addresses with the host, no more."""
