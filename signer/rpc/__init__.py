"""The wire between host and enclave: frames and messages. Pure; shared by both sides."""
