"""Which keys of two configurations differ, by path, never by value: some are secrets. Pure."""

from collections.abc import Iterator, Mapping

from signer.config.models import Settings, Strict

_FOLLOWED = frozenset(("tezos",))  # sections that take effect in a running signer


def restart_needed(running: Settings, new: Settings) -> list[str]:
    """The key paths in which *new* differs from *running*, and which count from the next start on only."""
    sections = (name for name in Settings.model_fields if name not in _FOLLOWED)
    return [path for name in sections for path in _differences(name, getattr(running, name), getattr(new, name))]


def _differences(path: str, old: object, new: object) -> Iterator[str]:
    match old, new:
        case Strict(), Strict() if type(old) is type(new):
            for name in type(old).model_fields:
                yield from _differences(f"{path}.{name}", getattr(old, name), getattr(new, name))
        case Mapping(), Mapping():
            for name in [*old, *(name for name in new if name not in old)]:
                if name in old and name in new:
                    yield from _differences(f"{path}.{name}", old[name], new[name])
                else:
                    yield f"{path}.{name}"
        case _:
            if old != new:
                yield path
