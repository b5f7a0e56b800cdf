"""Walks Micheline expressions (section 3 of the request specification) without recursion.

Only the structure is checked: a batch can't be read past an expression without knowing its length.
"""

from signer.tezos._reader import Reader

MAX_DEPTH = 10_000  # nodes inside one another; ample for any contract, and it bounds the walk's own memory

_EXPR, _ANNOTATIONS, _SEQUENCE_END = range(3)

# Tag of a primitive with a fixed number of arguments: (arguments, whether annotations follow)
_PRIMITIVES = {3: (0, False), 4: (0, True), 5: (1, False), 6: (1, True), 7: (2, False), 8: (2, True)}


def skip_expression(reader: Reader) -> None:
    """Move *reader* behind exactly one node; raises `DecodeError`."""
    work: list[tuple[int, int, int]] = [(_EXPR, 1, 0)]  # what to do, depth, end of the region around a sequence
    while work:
        step, depth, outer_end = work.pop()
        if step == _EXPR:
            _node(reader, depth, work)
        elif step == _ANNOTATIONS:
            reader.skip(reader.count("annotations"), "annotations")
        elif reader.position < reader.end:
            work.append((_SEQUENCE_END, depth, outer_end))
            work.append((_EXPR, depth + 1, 0))
        else:
            reader.end = outer_end


def _node(reader: Reader, depth: int, work: list[tuple[int, int, int]]) -> None:
    if depth > MAX_DEPTH:
        raise reader.fail(f"at most {MAX_DEPTH} Micheline nodes inside one another")
    tag = reader.u8("Micheline node")
    if tag == 0:
        reader.integer("Micheline integer")
    elif tag in (1, 10):
        reader.skip(reader.count("Micheline string or bytes"), "Micheline string or bytes")
    elif tag == 2:
        _open_sequence(reader, depth, work)
    elif tag in _PRIMITIVES:
        reader.skip(1, "Micheline primitive")
        arguments, annotated = _PRIMITIVES[tag]
        if annotated:
            work.append((_ANNOTATIONS, depth, 0))
        work.extend([(_EXPR, depth + 1, 0)] * arguments)
    elif tag == 9:
        reader.skip(1, "Micheline primitive")
        work.append((_ANNOTATIONS, depth, 0))
        _open_sequence(reader, depth, work)
    else:
        raise reader.unknown_tag(tag, "Micheline node tag 0 to 10")


def _open_sequence(reader: Reader, depth: int, work: list[tuple[int, int, int]]) -> None:
    size = reader.count("Micheline sequence")
    work.append((_SEQUENCE_END, depth, reader.end))
    reader.end = reader.position + size
