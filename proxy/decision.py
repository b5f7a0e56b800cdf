"""Whether a target may be reached: the allow list applied, with the lookups that this takes.

Part 1.3 and P2.9, P2.14, P2.21 of the proxy specification. A listed name needs no lookup. An address literal is allowed
by an equal literal, or by a listed name that resolves to it. A name that is not listed is allowed by listed literals
only: then just those of its addresses that are listed are used, at every refresh.
"""

import logging
from collections.abc import Sequence

import trio

from proxy.allowlist import AllowList, AllowListError, Entry
from proxy.names import IpAddress, NameError_, canonical, literal
from proxy.resolver import Accept, Lookup, LookupFailedError, of_family

logger = logging.getLogger("vsock_proxy.proxy")

LOOKUP_LIMIT = 10.0  # seconds in which all listed names are looked up


class UndecidedError(AllowListError):
    """Nothing known allows the target, but some lookups failed: later it may be allowed."""


class Decision:
    """That a target is allowed: *entry* says by what, `accept` which of its addresses may be used."""

    def __init__(self, entry: Entry | None, accept: Accept) -> None:
        self.entry = entry  # None: without a list
        self.accept = accept

    @property
    def name(self) -> str | None:
        """The listed name, in the form that is compared; None where the target is allowed by address, or by no list."""
        return None if self.entry is None else self.entry.name


def without_list(family: int | None) -> Decision:
    """Every address of the family, for a target that comes from our own configuration."""
    return Decision(None, lambda addresses: of_family(addresses, family))


async def decide(allow: AllowList, host: str, port: int, family: int | None, lookup: Lookup) -> Decision:
    """Look for an entry that allows *host* and *port*; raises `AllowListError` with the reason."""
    address = literal(host)
    if address is None:
        _check_name(host)
    elif family not in (None, address.version):
        raise AllowListError(f"{host} is not an IPv{family} address: No accepted IP was found.")
    entry = allow.by_name(host, port)
    if entry is not None:
        logger.info('Matched with host name "%s" and port "%d"', entry.address, entry.port)
        return Decision(entry, lambda addresses: of_family(addresses, family))
    if address is not None:
        return await _by_address(allow, address, port, family, lookup)
    return await _by_literals(allow, host, port, family, lookup)


def _check_name(host: str) -> None:
    if host.isascii() and host.isdigit():
        raise AllowListError(f'"{host}" is no host: this is the TCP host to connect to, not the CID of the enclave')
    try:
        canonical(host)
    except NameError_ as exc:
        raise AllowListError(f"{exc}: {host}") from exc


async def _by_address(allow: AllowList, address: IpAddress, port: int, family: int | None, lookup: Lookup) -> Decision:
    """A literal, allowed by what the listed names resolve to."""
    found: dict[IpAddress, Entry] = {}
    open_: set[Entry] = set(allow.names_with(port))  # no answer yet

    async def resolve(entry: Entry) -> None:
        try:
            for one in await lookup(entry.address):
                found.setdefault(one, entry)
        except LookupFailedError:
            return
        open_.discard(entry)

    with trio.move_on_after(LOOKUP_LIMIT):
        async with trio.open_nursery() as nursery:
            for entry in allow.names_with(port):
                nursery.start_soon(resolve, entry)
    if address not in found:
        refused = _refused(allow, str(address), port, sorted(found, key=str))
        if open_:
            names = ", ".join(sorted(entry.address for entry in open_)[:3])
            raise UndecidedError(f"{len(open_)} listed name(s) could not be looked up ({names}); {refused}")
        raise refused
    logger.info('Matched with host IP "%s" and port "%d"', address, port)
    return Decision(found[address], lambda addresses: of_family(addresses, family))


async def _by_literals(allow: AllowList, host: str, port: int, family: int | None, lookup: Lookup) -> Decision:
    """A name that is not listed: some of its addresses may be."""
    listed = {address: entry for entry in allow.entries if entry.port == port and (address := literal(entry.address))}

    def accept(addresses: Sequence[IpAddress]) -> list[IpAddress]:
        kept = [address for address in of_family(addresses, family) if address in listed]
        if not kept:
            found = ", ".join(map(str, addresses))
            raise LookupFailedError(f"{host} resolves to {found} now, which is not in the allow list")
        return kept

    if not listed:
        raise _refused(allow, host, port)
    try:
        addresses = await lookup(host)
    except LookupFailedError as exc:
        raise UndecidedError(f"{host} is not listed by name, and its address is not known: {exc}") from exc
    try:
        kept = accept(addresses)
    except LookupFailedError:
        raise _refused(allow, host, port, addresses) from None
    logger.info('Matched with host IP "%s" and port "%d"', kept[0], port)
    return Decision(listed[kept[0]], accept)


def _refused(allow: AllowList, host: str, port: int, compared: Sequence[IpAddress] = ()) -> AllowListError:
    logger.warning('Unable to resolve allow listed host: "%s".', host)
    return AllowListError(allow.refusal(host, port, compared))
