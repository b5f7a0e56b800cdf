"""The base of our own errors, with the HTTP status that each of them becomes.

A subclass stands wherever a caller would act differently. The status classes are those of the Octez client
(section 7 of the remote-signer specification): above all, 502 is the one that it repeats by itself, so it is
used only where a repeat is safe. Errors of the encodings (`signer.tezos.errors`) are malformed input: 400.
"""


class SignerError(Exception):
    """Base of all errors that end one request or one command; the text is shown to the user as it is."""

    status = 500  # HTTP


class MalformedRequestError(SignerError):
    """The caller sent something that cannot be read; nothing was done."""

    status = 400


class RefusedError(SignerError):
    """A policy forbids it; nothing was done. *rule* names the setting, *violation* the metric's label."""

    status = 403

    def __init__(self, message: str, *, rule: str, violation: str | None = None) -> None:
        super().__init__(message)
        self.rule = rule
        self.violation = violation


class KeyNotFoundError(SignerError):
    """No vault holds the key."""

    status = 404


class UnavailableError(SignerError):
    """The vault cannot be asked now; no signature was let out, and a repeat of the same bytes is safe."""

    status = 502


class ConfigurationError(SignerError):
    """The program cannot start, or the command cannot run, as it is configured."""
