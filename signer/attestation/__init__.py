"""Attestation of enclaves: documents judged, what ours say, keys sealed to one. Pure: no I/O, no Trio.

Implements sections 2, 7.2 and 7.4 of the enclave specification. Asking for a document, and what follows from a
refusal, are left to the enclave program, the vault and the commands.
"""
