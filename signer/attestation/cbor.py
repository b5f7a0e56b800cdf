"""The strict CBOR of attestation documents, section 2.5 of the enclave specification. Does no I/O.

Written out instead of cbor2, which takes malformed input in silence: bytes behind the item, tags, floats and chunked
strings. Integers and lengths need not be in their shortest form: bytes that are signed are compared and hashed as
they came, never encoded anew.
"""

from typing import NamedTuple

MAX_DEPTH = 6  # containers inside one another; a document has two

_UNSIGNED, _NEGATIVE, _BYTES, _TEXT, _ARRAY, _MAP, _TAG, _SIMPLE = range(8)  # major types
_SIMPLE_VALUES = {20: False, 21: True, 22: None}
_WIDTHS = {24: 1, 25: 2, 26: 4, 27: 8}  # additional information to bytes that hold the value
_INDEFINITE = 31
_BREAK = 0xFF


class CborError(ValueError):
    """The bytes are not one well-formed item of the kinds that documents use."""


class _Head(NamedTuple):
    major: int
    info: int
    value: int | None  # None: indefinite


def decode(data: bytes, *, max_depth: int = MAX_DEPTH) -> object:
    """The one item in *data*: int, bytes, str, bool, None, list or dict; raises `CborError` for anything else.

    Time and memory are linear in the length of *data*: a declared length is checked against what is left before
    anything is made of it.
    """
    reader = _Reader(data)
    item = reader.item(max_depth)
    reader.expect_end()
    return item


def split_tag(data: bytes) -> tuple[int | None, bytes]:
    """The tag in front of an item, None if there is none, and the rest; raises `CborError` when cut short."""
    if not data or data[0] >> 5 != _TAG:
        return None, data
    reader = _Reader(data)
    tag = reader.head().value
    if tag is None:
        raise CborError("indefinite tag")
    return tag, data[reader.position :]


class _Reader:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def expect_end(self) -> None:
        if self.position != len(self._data):
            raise CborError(f"{len(self._data) - self.position} byte(s) after the item")

    def item(self, depth: int) -> object:
        """One item; *depth* more containers may be opened."""
        head = self.head()
        match head.major:
            case 0 | 1:
                return self._integer(head)
            case 2:
                return self._take(self._definite(head))
            case 3:
                return self._text(head)
            case 4:
                return self._array(head, self._deeper(depth))
            case 5:
                return self._map(head, self._deeper(depth))
            case 6:
                raise CborError(f"tag {head.value}")
        return self._simple(head)

    def head(self) -> _Head:
        first = self._take(1)[0]
        major, info = first >> 5, first & 0x1F
        if info < 24:
            return _Head(major, info, info)
        if info == _INDEFINITE:
            return _Head(major, info, None)
        width = _WIDTHS.get(info)
        if width is None:
            raise CborError(f"reserved length form {info}")
        return _Head(major, info, int.from_bytes(self._take(width), "big"))

    def _take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self._data):
            raise CborError(f"{count} byte(s) announced, {len(self._data) - self.position} left")
        taken = self._data[self.position : end]
        self.position = end
        return taken

    def _definite(self, head: _Head) -> int:
        if head.value is None:
            raise CborError("indefinite string or integer")
        return head.value

    def _deeper(self, depth: int) -> int:
        if depth == 0:
            raise CborError("nested too deeply")
        return depth - 1

    def _integer(self, head: _Head) -> int:
        value = self._definite(head)
        return value if head.major == _UNSIGNED else -1 - value

    def _text(self, head: _Head) -> str:
        try:
            return self._take(self._definite(head)).decode()
        except UnicodeDecodeError:
            raise CborError("text that is not UTF-8") from None

    def _array(self, head: _Head, depth: int) -> list[object]:
        if head.value is None:
            items = []
            while not self._at_break():
                items.append(self.item(depth))
            return items
        self._expect_room(head.value)
        return [self.item(depth) for _ in range(head.value)]

    def _map(self, head: _Head, depth: int) -> dict[int | str, object]:
        pairs: dict[int | str, object] = {}
        if head.value is None:
            while not self._at_break():
                self._pair(pairs, depth)
            return pairs
        self._expect_room(2 * head.value)
        for _ in range(head.value):
            self._pair(pairs, depth)
        return pairs

    def _pair(self, pairs: dict[int | str, object], depth: int) -> None:
        key = self.item(0)
        if isinstance(key, bool) or not isinstance(key, int | str):
            raise CborError("a map key that is neither integer nor text")
        if key in pairs:
            raise CborError("a map key twice")
        pairs[key] = self.item(depth)

    def _expect_room(self, items: int) -> None:
        """Each item takes at least one byte: so a huge count fails here, not after a long walk."""
        left = len(self._data) - self.position
        if items > left:
            raise CborError(f"{items} item(s) announced, {left} byte(s) left")

    def _at_break(self) -> bool:
        if self.position < len(self._data) and self._data[self.position] == _BREAK:
            self.position += 1
            return True
        return False

    def _simple(self, head: _Head) -> bool | None:
        if head.info not in _SIMPLE_VALUES:
            raise CborError("a float, undefined or unassigned simple value, or a stray break")
        return _SIMPLE_VALUES[head.info]
