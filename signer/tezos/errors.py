"""The errors of the encodings: bytes or text from outside that are not what they should be."""


class TezosError(Exception):
    """Base of all errors in this package; the caller sent something malformed (HTTP 400)."""


class Base58Error(TezosError):
    """Text is not valid Base58check, or is Base58check of another kind."""


class DecodeError(TezosError):
    """The bytes are not a request that may be signed.

    *offset* is the position in the request, in bytes, where something else was expected.
    """

    def __init__(self, message: str, *, offset: int) -> None:
        super().__init__(message)
        self.offset = offset
