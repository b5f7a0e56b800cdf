"""Host names and address literals as text; no I/O."""

import ipaddress

IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_MAX_NAME = 253  # characters, RFC 1035 without the final dot
_MAX_TEXT = 1024  # characters before the conversion, which takes its time


class NameError_(ValueError):  # noqa: N801, N818
    """The text is no host name; says why."""


def literal(host: str) -> IpAddress | None:
    """The address that *host* writes, with or without brackets; None for a name."""
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def canonical(host: str) -> str:
    """The form in which names are compared: IDNA, lower case, no final dot. Raises `NameError_`."""
    try:
        name = _to_ascii(host).lower().removesuffix(".")
    except UnicodeError as exc:
        raise NameError_("Could not parse domain name") from exc
    labels = name.split(".")
    # The system takes a name that ends in a number for an IPv4 address of the old forms, such as 127.1 or 0x7f000001.
    if len(name) > _MAX_NAME or not all(map(_is_label, labels)) or _is_number(labels[-1]):
        raise NameError_("Could not parse domain name")
    return name


def _to_ascii(host: str) -> str:
    if host.isascii():
        return host
    if len(host) > _MAX_TEXT:
        raise UnicodeError("too long")
    return host.encode("idna").decode("ascii")


def _is_label(label: str) -> bool:
    inner = label.replace("-", "").replace("_", "")
    return 0 < len(label) <= 63 and inner.isalnum() and not label.startswith("-") and not label.endswith("-")


def _is_number(label: str) -> bool:
    return label.isdigit() or (label.startswith("0x") and all(c in "0123456789abcdef" for c in label[2:]))
