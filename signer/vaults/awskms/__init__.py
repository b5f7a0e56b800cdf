"""Keys in AWS KMS, section 5 of the signer specification: public keys read from it, signatures asked of it."""
