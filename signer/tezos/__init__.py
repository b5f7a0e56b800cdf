"""Tezos encodings: Base58check, keys and hashes, signing requests. Pure; imports nothing of ours."""
