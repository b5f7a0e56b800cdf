"""YAML with line numbers: plain values, and the line of every key, so that a fault can say where it is.

Duplicate keys are refused. `${NAME}` is replaced in string values after parsing, so that a value from the environment
can't inject YAML; `$${NAME}` stands for itself.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml
from yaml.parser import ParserError

Path = tuple[str | int, ...]
Value = dict[str, "Value"] | list["Value"] | str | int | float | bool | None

_VARIABLE = re.compile(r"\$(\$?)\{([A-Za-z_][A-Za-z0-9_]*)\}")
_QUOTED = re.compile(r"""(\w+ )?(?:'([^']*)'|"([^"]*)")""")
# How the parser names tokens: `<scalar>`, `,`, `]`.
_TOKENS = {token.id for token in vars(yaml.tokens).values() if isinstance(token, type) and hasattr(token, "id")}
_TYPES = ("null", "bool", "int", "float", "binary", "timestamp", "omap", "pairs", "set", "str", "seq", "map")
_MAX_NODES = 100_000  # with what anchors repeat
_MAX_DEPTH = 32  # of containers; the deepest configuration has five
_MERGE = "tag:yaml.org,2002:merge"


class YamlError(Exception):
    """The text is not YAML; *line* counts from 1."""

    def __init__(self, message: str, line: int | None) -> None:
        super().__init__(message)
        self.line = line


@dataclass(slots=True)
class Document:
    """A parsed file: its value, the line of each path, and what is wrong with it apart from its structure."""

    value: Value = None
    lines: dict[Path, int] = field(default_factory=dict)
    faults: list[tuple[Path, str]] = field(default_factory=list)
    unset: set[Path] = field(default_factory=set)  # of values with a variable that isn't set: they say nothing


def parse(text: str, environ: Mapping[str, str]) -> Document:
    """Parse one document; raises `YamlError`. An empty one has the value None."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            document = Document()
            if node is not None:
                document.value = _Builder(loader, environ, document).build(node, (), 0)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        text = _without_values(exc.problem or exc.context or "", names_tokens=isinstance(exc, ParserError))
        raise YamlError(text, mark.line + 1 if mark else None) from None
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise YamlError(_without_values(str(exc).splitlines()[0]), None) from None
    return document


def _without_values(text: str, *, names_tokens: bool = False) -> str:
    """The message without what it quotes of the file, which may be half of a secret.

    What was expected stays, and so does the kind of token that was found; a character that was found does not.
    """

    def replace(match: re.Match[str]) -> str:
        before, quoted = match[1] or "", match[2] or match[3]
        known = before in ("expected ", "or ") or (names_tokens and quoted in _TOKENS) or quoted == "\\t"
        return match[0] if known else f"{before}'...'"

    shown = _QUOTED.sub(replace, text)
    if "'...' that cannot start any token" in shown:
        return "a value that begins with @, ` or % must be quoted"
    return shown


def _unfit(tag: str) -> str:
    """What to say of a value that doesn't fit its tag; a tag that isn't YAML's own may be a secret without quotes."""
    kind = tag.removeprefix("tag:yaml.org,2002:")
    if kind in _TYPES:
        return f"not a value of type {kind}"
    return "a value that begins with ! must be quoted"


class _Builder:
    def __init__(self, loader: yaml.SafeLoader, environ: Mapping[str, str], document: Document) -> None:
        self._loader = loader
        self._environ = environ
        self._document = document
        self._nodes = 0

    def build(self, node: yaml.Node, path: Path, depth: int) -> Value:
        self._document.lines.setdefault(path, node.start_mark.line + 1)
        self._nodes += 1
        if self._nodes > _MAX_NODES:
            raise YamlError(f"more than {_MAX_NODES} values, counting what anchors repeat", node.start_mark.line + 1)
        if depth > _MAX_DEPTH:
            raise YamlError("nested too deep, or an anchor that contains itself", node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self.build(child, (*path, index), depth + 1) for index, child in enumerate(node.value)]
        try:
            value = self._loader.construct_object(node)
        except Exception:  # a value that doesn't fit its tag: anything at all comes from the constructors
            raise YamlError(_unfit(node.tag), node.start_mark.line + 1) from None
        if isinstance(value, str):
            return self._expand(value, path)
        if value is None or isinstance(value, bool | int | float):
            return value
        return str(node.value)  # a timestamp, say: the text as written

    def _mapping(self, node: yaml.MappingNode, path: Path, depth: int) -> Value:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise YamlError("a key must be a text", key_node.start_mark.line + 1)
            key = str(key_node.value)
            if key in seen and key_node.tag != _MERGE:
                raise YamlError(f"the key {key!r} is there twice", key_node.start_mark.line + 1)
            seen.add(key)
        self._loader.flatten_mapping(node)  # merge keys (<<)
        mapping: dict[str, Value] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value)
            inner = (*path, key)
            self._document.lines[inner] = key_node.start_mark.line + 1
            mapping[key] = self.build(value_node, inner, depth + 1)
        return mapping

    def _expand(self, text: str, path: Path) -> str:
        def replace(match: re.Match[str]) -> str:
            if match[1]:
                return "${" + match[2] + "}"
            value = self._environ.get(match[2])
            if value is None:
                self._document.faults.append((path, f"the environment variable {match[2]} is not set"))
                self._document.unset.add(path)
                return ""
            return value

        expanded = _VARIABLE.sub(replace, text)
        if "\0" in expanded:
            self._document.faults.append((path, "a text must not hold a NUL character"))
        return expanded
