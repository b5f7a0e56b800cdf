"""What `nitro-cli describe-enclaves` prints, and which of its enclaves is ours; sections 6.3 and 6.4 of the enclave
specification. Pure.

Readers take unknown fields, missing optional ones, and numbers given as strings. The measurements are the parent's
own account of the image file: comparing them catches mistakes, not a hostile parent; KMS's condition does that.
"""

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from signer.errors import SignerError

FIRST_CID, LAST_CID = 4, 2**32 - 2  # below: hypervisor, loopback, host, parent; above: any
REGISTERS = ("PCR0", "PCR1", "PCR2")
_MAX_SHOWN = 100  # characters of a text from outside, in an error
_MAX_LISTED = 8  # enclaves in an error; a host with more than four is a rare one
_RUNNING = "RUNNING"
_NO_FLAGS = "NONE"
_BY_HAND = "see what `nitro-cli describe-enclaves` prints to the user that runs the signer"


class DiscoveryError(SignerError):
    """The enclave was not found, or is not the one that is wanted; the text says what to do."""


@dataclass(frozen=True, slots=True)
class Enclave:
    """One entry of the listing, as it is there. Empty texts, and None, where the entry doesn't say."""

    cid: int | None
    name: str = ""
    enclave_id: str = ""
    state: str = ""
    flags: str | None = None
    measurements: Mapping[str, str] = field(default_factory=dict)  # register to lower-case hex

    @property
    def is_running(self) -> bool:
        return self.state.upper() == _RUNNING

    def __str__(self) -> str:
        facts = [shown(self.name) or "(no name)"]
        if self.enclave_id:
            facts.append(shown(self.enclave_id))
        facts.append("no CID" if self.cid is None else f"CID {shown(str(self.cid))}")
        return f"{', '.join(facts)}: {shown(self.state) or '(no state)'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What the configuration says of the enclave."""

    name: str = ""  # EnclaveName or EnclaveID; empty: the only one
    cid: int | None = None
    allow_debug: bool = False
    check_debug: bool = False  # whether an entry that doesn't tell its flags is refused
    expected: Mapping[str, Collection[str]] = field(default_factory=dict)  # register to the values accepted


def parse(text: bytes) -> list[Enclave]:
    """The entries of a listing. Raises `DiscoveryError`."""
    if not text.strip():
        raise DiscoveryError(f"nitro-cli printed nothing where a list of enclaves was expected; {_BY_HAND}")
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as exc:
        said = shown(text[: 2 * _MAX_SHOWN].decode(errors="replace"))
        raise DiscoveryError(f"nitro-cli printed no JSON ({shown(str(exc))}), but: {said}; {_BY_HAND}") from exc
    if not isinstance(entries, list):
        raise DiscoveryError(f"nitro-cli printed no list of enclaves, but: {shown(str(entries))}; {_BY_HAND}")
    return [_entry(entry) for entry in entries]


def choose(enclaves: Iterable[Enclave], wanted: Wanted) -> Enclave:
    """The enclave to connect to, whose CID is good and whose checks hold. Raises `DiscoveryError`."""
    known = list(enclaves)
    running = _matching([one for one in known if one.is_running], wanted)
    if len(running) > 1 and wanted.cid is not None:
        raise DiscoveryError(f"nitro-cli lists CID {wanted.cid} more than once ({_listed(running)})")
    if len(running) > 1:
        raise DiscoveryError(
            f"several enclaves are RUNNING ({_listed(running)}): say which one with enclave_name, "
            "by its name or, if two have the same, by its EnclaveID"
        )
    if not running:
        raise DiscoveryError(_none_running(known, wanted))
    (chosen,) = running
    if chosen.cid is None or not FIRST_CID <= chosen.cid <= LAST_CID:
        raise DiscoveryError(f"nitro-cli names no usable CID for the enclave ({chosen})")
    _check_debug(chosen, wanted)
    _check_measurements(chosen, wanted)
    return chosen


def shown(text: str) -> str:
    """*text* from outside, fit for one line of a log."""
    printable = "".join(one if one.isprintable() else " " for one in text)
    short = " ".join(printable.split())
    return short if len(short) <= _MAX_SHOWN else f"{short[:_MAX_SHOWN]}..."


def _entry(entry: object) -> Enclave:
    if not isinstance(entry, dict):
        raise DiscoveryError(f"nitro-cli listed something that is no enclave: {shown(str(entry))}")
    measurements = entry.get("Measurements")
    flags = entry.get("Flags")
    return Enclave(
        cid=_number(entry.get("EnclaveCID")),
        name=_text(entry.get("EnclaveName")),
        enclave_id=_text(entry.get("EnclaveID")),
        state=_text(entry.get("State")),
        flags=None if flags is None else _text(flags) or "?",
        measurements={
            register: value.lower()
            for register, value in (measurements.items() if isinstance(measurements, dict) else ())
            if isinstance(value, str)
        },
    )


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _number(value: object) -> int | None:
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 10:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _matching(enclaves: list[Enclave], wanted: Wanted) -> list[Enclave]:
    """A name goes before an id: it is the operator's own word, even where it looks like somebody's id."""
    if wanted.cid is not None:
        return [one for one in enclaves if one.cid == wanted.cid]
    if not wanted.name:
        return enclaves
    named = [one for one in enclaves if one.name == wanted.name]
    return named or [one for one in enclaves if one.enclave_id == wanted.name]


def _none_running(enclaves: list[Enclave], wanted: Wanted) -> str:
    what = "no enclave is RUNNING"
    if wanted.cid is not None:
        what = f"no enclave with CID {wanted.cid} is RUNNING"
    elif wanted.name:
        what = f"no enclave called {shown(wanted.name)} is RUNNING"
    there = f"; nitro-cli lists {_listed(enclaves)}" if enclaves else "; nitro-cli lists none"
    return f"{what}{there}. Start it with nitro-cli run-enclave"


def _listed(enclaves: list[Enclave]) -> str:
    more = len(enclaves) - _MAX_LISTED
    return "; ".join(map(str, enclaves[:_MAX_LISTED])) + (f"; and {more} more" if more > 0 else "")


def _check_debug(enclave: Enclave, wanted: Wanted) -> None:
    if wanted.allow_debug:
        return
    if enclave.flags is None:
        if wanted.check_debug:
            raise DiscoveryError(f"nitro-cli does not tell whether the enclave runs in debug mode ({enclave})")
        return
    if enclave.flags.upper() != _NO_FLAGS:
        raise DiscoveryError(
            f"the enclave ({enclave}) runs in debug mode (Flags: {shown(enclave.flags)}): its console shows what it "
            "does, and KMS sees measurements of zeros. Nothing was sent to it. Run it without --debug-mode, or set "
            "allow_debug_mode: true where no key is worth anything"
        )


def _check_measurements(enclave: Enclave, wanted: Wanted) -> None:
    for register, accepted in wanted.expected.items():
        found = enclave.measurements.get(register)
        if found is None:
            raise DiscoveryError(f"nitro-cli does not tell {register} of the enclave ({enclave}); it is expected")
        if found not in accepted:
            raise DiscoveryError(
                f"the enclave ({enclave}) is not the expected image: its {register} is {shown(found)}, expected "
                f"{' or '.join(sorted(accepted))}. Nothing was sent to it. Run the right image, or set expected_pcrs"
            )
