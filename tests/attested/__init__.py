"""Stand-ins for what surrounds an attested enclave: documents, the security module, KMS."""
