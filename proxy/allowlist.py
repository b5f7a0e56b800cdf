"""Which hosts and ports the proxy may connect to: parts 1.3 and P2.19 to P2.22 of the proxy specification. No I/O.

The file is YAML, `allowlist: [{address: kms.eu-west-1.amazonaws.com, port: 443}, ...]`. A name is matched by name and
needs no lookup. An address literal is matched by an equal literal, or by what the listed names resolve to; looking
those up is the caller's.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher

import yaml

from proxy.names import IpAddress, NameError_, canonical, literal

_STRING, _INTEGER = "tag:yaml.org,2002:str", "tag:yaml.org,2002:int"
_DECIMAL = re.compile(r"\+?(0|[1-9][0-9]{0,19})")  # YAML would also read 0673, 0x1BB, 4_43 and 7:23 as numbers
_MAX_SHOWN = 8  # addresses in a message

NOT_ALLOWED = "The given address and port are not allowed"


class AllowListError(Exception):
    """The list cannot be used, or refuses; the text is for the person who wrote it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the list."""

    address: str  # as written
    port: int
    line: int

    @property
    def name(self) -> str | None:
        """The name in the form that is compared; None for an address literal."""
        return None if literal(self.address) else canonical(self.address)


@dataclass(frozen=True, slots=True)
class AllowList:
    """What may be reached, in the order of the file."""

    entries: tuple[Entry, ...]

    def by_name(self, host: str, port: int) -> Entry | None:
        """The entry that allows the name or literal *host* as it is written."""
        address = literal(host)
        if address is not None:
            return next((e for e in self.entries if e.port == port and literal(e.address) == address), None)
        name = canonical(host)
        return next((e for e in self.entries if e.port == port and e.name == name), None)

    def names_with(self, port: int) -> list[Entry]:
        """The entries whose names are to be looked up, to match an address literal."""
        return [entry for entry in self.entries if entry.port == port and entry.name is not None]

    def refusal(self, host: str, port: int, compared: Iterable[IpAddress] = ()) -> str:
        """Why *host* and *port* are not allowed: what was asked, what was compared, what comes nearest."""
        parts = [
            f"{host} port {port} was compared with {len(self.entries)} entr{'y' if len(self.entries) == 1 else 'ies'}"
        ]
        resolved = [str(address) for address in compared]
        if resolved:
            shown = resolved[:_MAX_SHOWN] + ["..."] * (len(resolved) > _MAX_SHOWN)
            parts.append(f"whose names with that port resolve to {', '.join(shown)}")
        parts += self._nearest(host, port)
        return f"{'; '.join(parts)}: {NOT_ALLOWED}"

    def _nearest(self, host: str, port: int) -> list[str]:
        """The entry that comes nearest: the same host with another port, or the most similar host with this port."""
        same_host = [entry for entry in self.entries if _same_host(entry, host)]
        if same_host:
            ports = ", ".join(dict.fromkeys(str(entry.port) for entry in same_host))
            return [f"the same host is listed with port {ports} (line {same_host[0].line})"]
        same_port = [entry for entry in self.entries if entry.port == port]
        if not same_port:
            return [f"no entry has port {port}"]
        nearest = max(same_port, key=lambda entry: SequenceMatcher(None, entry.address.lower(), host.lower()).ratio())
        return [f"the nearest with port {port} is {nearest.address} (line {nearest.line})"]


def _same_host(entry: Entry, host: str) -> bool:
    address = literal(host)
    if address is not None:
        return literal(entry.address) == address
    return entry.name == canonical(host)


def parse(text: str | bytes) -> AllowList:
    """The list in *text*; raises `AllowListError` with the reason, and the line of the entry where there is one."""
    try:
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_node() if loader.check_node() else None
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as exc:
        mark = exc.problem_mark or exc.context_mark
        where = f" (line {mark.line + 1}: {exc.problem or exc.context})" if mark else ""
        raise AllowListError(f"Bad yaml format{where}") from exc
    except RecursionError as exc:
        raise AllowListError("Bad yaml format (nested too deeply)") from exc
    # SafeLoader lets others through where the text is odd, such as the ValueError of `%YAML 1.<5000 digits>`
    except (yaml.YAMLError, ValueError, LookupError) as exc:
        raise AllowListError(f"Bad yaml format ({_first_line(exc)})") from exc
    return AllowList(tuple(_entries(root)))


def _first_line(exc: Exception) -> str:
    return next(iter(str(exc).splitlines()), type(exc).__name__)


def _entries(root: yaml.Node | None) -> Iterable[Entry]:
    if root is None:
        raise AllowListError("No allowlist field: the file is empty")
    if not isinstance(root, yaml.MappingNode):
        raise AllowListError("No allowlist field: the file is no mapping")
    listed = _field(root, "allowlist")
    if not isinstance(listed, yaml.SequenceNode):
        raise AllowListError("No allowlist field" + ("" if listed is None else ": it is no list"))
    if not listed.value:
        raise AllowListError("No allowlist field: the list is empty, nothing is allowed")
    for number, node in enumerate(listed.value, 1):
        yield _entry(node, number)


def _field(node: yaml.Node, name: str) -> yaml.Node | None:
    """What *name* stands for in the mapping *node*; nothing else of it is looked at."""
    if not isinstance(node, yaml.MappingNode):
        return None
    found = [(key, value) for key, value in node.value if isinstance(key, yaml.ScalarNode) and key.value == name]
    if len(found) > 1:
        raise AllowListError(f"Bad yaml format (line {found[1][0].start_mark.line + 1}: {name} is there twice)")
    return found[0][1] if found else None


def _entry(node: yaml.Node, number: int) -> Entry:
    line = node.start_mark.line + 1
    where = f"entry {number}, line {line}"
    address = _address(_field(node, "address"))
    if address is None:
        raise AllowListError(f"No address field ({where})")
    port = _field(node, "port")
    if not isinstance(port, yaml.ScalarNode) or port.tag != _INTEGER or not _DECIMAL.fullmatch(port.value):
        raise AllowListError(f"No port field or invalid type ({where})")
    if not 1 <= int(port.value) <= 65535:
        raise AllowListError(f"No port field or invalid type ({where}: {port.value} is outside 1 to 65535)")
    if literal(address) is None:
        try:
            canonical(address)
        except NameError_ as exc:
            raise AllowListError(f"{exc} ({where}: {address!r})") from exc
    return Entry(address, int(port.value), line)


def _address(node: yaml.Node | None) -> str | None:
    """The address as written; None where it is no text, though YAML takes some IPv6 addresses for numbers (2:1:...)."""
    if not isinstance(node, yaml.ScalarNode) or not node.value:
        return None
    is_text = node.tag == _STRING or literal(node.value) is not None
    return str(node.value) if is_text else None
