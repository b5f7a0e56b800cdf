"""Reads the primitive encodings of section 2 of the request specification, inside a region of the request.

A `Reader` never looks behind the end of its region, and every failure is a `DecodeError` that names the offset and
what was expected. Every method is linear in what it consumes.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from signer.tezos.errors import DecodeError

MAX_COUNT = 2**30 - 1  # bytes that a 4-byte count may announce
MAX_BOUNDED_NATURAL = 10  # bytes of a fee, counter, limit or amount
MAX_MUTEZ = 2**63  # exclusive


class Reader:
    """A position in *data*, and the end of the region that is being read."""

    __slots__ = ("data", "end", "position")

    def __init__(self, data: bytes, position: int = 0) -> None:
        self.data = data
        self.position = position
        self.end = len(data)

    @property
    def remaining(self) -> int:
        return self.end - self.position

    def fail(self, expected: str, *, offset: int | None = None) -> DecodeError:
        """The error for something unexpected at *offset*, by default here."""
        where = self.position if offset is None else offset
        return DecodeError(f"at offset {where}: expected {expected}", offset=where)

    def unknown_tag(self, tag: int, expected: str) -> DecodeError:
        """The error for a tag that was just read; begins with the reference's text."""
        where = self.position - 1
        return DecodeError(f"gotez: unknown tag {tag}: at offset {where}: expected {expected}", offset=where)

    def need(self, count: int, what: str) -> None:
        """Raise unless *count* more bytes are left."""
        if count > self.end - self.position:
            raise DecodeError(
                f"gotez: buffer is too short, at least {count} byte(s) were expected, had {self.remaining}: "
                f"at offset {self.position}: expected {what}",
                offset=self.position,
            )

    def skip(self, count: int, what: str) -> None:
        self.need(count, what)
        self.position += count

    def take(self, count: int, what: str) -> bytes:
        self.need(count, what)
        start, self.position = self.position, self.position + count
        return self.data[start : self.position]

    def u8(self, what: str) -> int:
        self.need(1, what)
        self.position += 1
        return self.data[self.position - 1]

    def u16(self, what: str) -> int:
        return int.from_bytes(self.take(2, what), "big")

    def i32(self, what: str) -> int:
        return int.from_bytes(self.take(4, what), "big", signed=True)

    def natural_i32(self, what: str) -> int:
        """An i32 that must not be negative: a level, a round, a period."""
        value = self.i32(what)
        if value < 0:
            raise self.fail(f"{what}, not negative; got {value}", offset=self.position - 4)
        return value

    def int31(self, what: str) -> int:
        value = self.i32(what)
        if not -(2**30) <= value < 2**30:
            raise self.fail(f"{what}, a 31-bit integer; got {value}", offset=self.position - 4)
        return value

    def boolean(self, what: str) -> bool:
        return self.u8(what) != 0

    def present(self, what: str) -> bool:
        """The presence byte of an option. One that would be the first byte after the region counts as false."""
        return self.position < self.end and self.boolean(what)

    def natural(self, what: str, *, limit: int | None = None) -> int:
        """N: groups of 7 bits, least significant first; *limit* is in bytes. Returns the encoded length."""
        start = self._end_of_groups(what, limit)
        return self.position - start

    def mutez(self, what: str) -> int:
        """An N of at most 10 bytes and below 2^63; returns the amount."""
        start = self._end_of_groups(what, MAX_BOUNDED_NATURAL)
        value = 0
        for index, byte in enumerate(self.data[start : self.position]):
            value |= (byte & 0x7F) << (7 * index)
        if value >= MAX_MUTEZ:
            raise self.fail(f"{what} below 2^63", offset=start)
        return value

    def integer(self, what: str) -> None:
        """Z: as N with a sign bit in the first byte."""
        self._end_of_groups(what, None)

    def _end_of_groups(self, what: str, limit: int | None) -> int:
        start = position = self.position
        data, end = self.data, self.end
        while position < end and data[position] & 0x80:
            position += 1
        if position >= end:
            raise DecodeError(
                f"gotez: (bigint) buffer is too short, at least 1 byte(s) were expected, had 0: at offset {end}: "
                f"expected the end of {what}",
                offset=end,
            )
        if position > start and data[position] == 0:
            raise self.fail(f"{what} without a useless last group", offset=position)
        self.position = position + 1
        if limit is not None and self.position - start > limit:
            raise self.fail(f"{what} of at most {limit} bytes", offset=start)
        return start

    def count(self, what: str) -> int:
        """The 4-byte count of a `dyn` region, checked against what is left."""
        start = self.position
        size = int.from_bytes(self.take(4, f"length of {what}"), "big")
        if size > MAX_COUNT:
            raise self.fail(f"length of {what} of at most {MAX_COUNT}, got {size}", offset=start)
        self.need(size, what)
        return size

    def blob(self, what: str, *, limit: int | None = None) -> bytes:
        """`dyn` bytes; *limit* is in bytes."""
        start = self.position
        size = self.count(what)
        if limit is not None and size > limit:
            raise self.fail(f"{what} of at most {limit} bytes, got {size}", offset=start)
        return self.take(size, what)

    @contextmanager
    def region(self, what: str) -> Iterator[None]:
        """`dyn(X)`: what is read inside must fill the region exactly."""
        size = self.count(what)
        outer, self.end = self.end, self.position + size
        yield
        if self.position != self.end:
            raise self.fail(f"the end of {what}, {self.remaining} byte(s) are left")
        self.end = outer
