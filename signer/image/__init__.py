"""The enclave's image: its file format, its measurements, and a builder whose images are the same everywhere."""
