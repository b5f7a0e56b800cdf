"""Stand-ins for what only an enclave has: documents, the security module, the custody of KMS."""
