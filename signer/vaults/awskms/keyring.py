"""Which keys of KMS are used, and why the others are not; pure, section 5.1 of the signer specification.

A key is known by the id that was asked for (an ARN, or a name of the configuration), used by its ARN, and found by its
hash. A key of KMS never changes; one that seems to is not taken.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from signer.aws.errors import AwsError
from signer.tezos.keys import PublicKeyHash
from signer.vaults.awskms.keys import KmsKey
from signer.vaults.interface import VaultKey

__all__ = ["Keyring", "Reading"]


@dataclass(slots=True)
class Reading:
    """What became of the ids that were asked for, each in one of the three."""

    keys: dict[str, KmsKey] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)  # why: by their kind, or by KMS
    unanswered: dict[str, AwsError] = field(default_factory=dict)  # it may be over at the next try

    @property
    def silence(self) -> AwsError | None:
        """An error that stands for all, if nothing was heard of KMS about any key."""
        errors = list(self.unanswered.values())
        heard = self.keys or self.refused or not all(error.silent for error in errors)
        return None if heard or not errors else errors[0]


class Keyring:
    """The keys as the last readings left them."""

    def __init__(self) -> None:
        self.keys: dict[PublicKeyHash, VaultKey] = {}  # in the order of the list
        self.signers: dict[PublicKeyHash, KmsKey] = {}
        self.known: dict[str, KmsKey] = {}  # by the id that was asked for
        self.refused: Mapping[str, str] = {}  # by id: why it cannot be used; asked for again at a whole reading only
        self.unanswered: Mapping[str, str] = {}  # by id: why it is not known yet

    def unread(self, ids: Sequence[str]) -> Sequence[str]:
        """Those of *ids* that nothing final is known about."""
        return [one for one in ids if one not in self.known and one not in self.refused]

    def adopt(self, one: str, key: KmsKey) -> bool:
        """Use a new key at once, while others are still on their way; False if it is to wait for `settle`."""
        pkh = key.public_key.hash
        if one in self.known or pkh in self.signers:
            return False
        self.known[one] = self.signers[pkh] = key
        self.keys[pkh] = VaultKey(key.public_key, key.arn)
        return True

    def settle(self, ids: Sequence[str], reading: Reading, *, whole: bool) -> Mapping[str, str]:
        """Take over what was read of *ids*; returns what is refused now and was not, or not for that reason.

        Only a *whole* reading takes keys away: a list may be late, or short for once.
        """
        known, refused = dict(self.known), {} if whole else dict(self.refused)
        for one, why in reading.refused.items():
            if whole or one not in known:
                known.pop(one, None)
                refused[one] = why
        before = {key.arn: key for key in self.signers.values()}
        for one, key in reading.keys.items():
            if not whole and one in known and known[one].arn != key.arn:
                continue  # an alias that means another key now
            known[one] = before.get(key.arn, key)
            if known[one].public_key != key.public_key:  # something lies in between
                refused[one] = f"KMS told another public key than {known[one].public_key}: {key.public_key}, not taken"
        order = dict.fromkeys(ids if whole else [*ids, *known])
        refused |= self._use({one: known[one] for one in order if one in known})
        news = {one: why for one, why in refused.items() if self.refused.get(one) != why}
        self.refused = refused
        self.unanswered = {one: str(error) for one, error in reading.unanswered.items() if one not in known}
        return news

    def _use(self, known: dict[str, KmsKey]) -> Mapping[str, str]:
        """Use exactly *known*; returns the ids that are left out, and why."""
        keys, signers, left_out = dict[PublicKeyHash, VaultKey](), dict[PublicKeyHash, KmsKey](), dict[str, str]()
        for one, key in known.items():
            pkh = key.public_key.hash
            twin = signers.setdefault(pkh, key)
            if twin.arn != key.arn:
                left_out[one] = f"the same key as {twin.arn}"
            elif pkh not in keys:
                earlier = self.keys.get(pkh)
                same = earlier is not None and earlier.reference == key.arn  # keeps its labels
                keys[pkh] = earlier if same and earlier is not None else VaultKey(key.public_key, key.arn)
        self.known, self.keys, self.signers = known, keys, signers
        return left_out

    def label(self, aliases: Mapping[str, Sequence[str]], tags: Mapping[str, Sequence[tuple[str, str]]]) -> None:
        """Say what people call the keys: *aliases* by key id, *tags* by ARN."""
        self.keys = {
            pkh: replace(
                key,
                aliases=tuple(aliases.get(key.reference.rpartition("/")[2], ())),
                tags=tuple(tags.get(key.reference, ())),
            )
            for pkh, key in self.keys.items()
        }
