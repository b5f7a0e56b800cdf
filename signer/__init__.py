"""nitro-signer: a Tezos remote signer for AWS Nitro Enclaves."""

__version__ = "0.1.0"
