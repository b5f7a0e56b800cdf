"""The settings of the vault awskms (section 5), and what we added: named keys, limits of time."""

from pathlib import Path

import pytest

from signer import config
from signer.config.models import AwsKmsSettings
from tests.unit.config.test_loading import faults, load

ARN = "arn:aws:kms:eu-west-1:111122223333:key/1234abcd-12ab-34cd-56ef-1234567890ab"
ID = "1234abcd-12ab-34cd-56ef-1234567890ab"


def vault(body: str) -> str:
    return f"vaults: {{k: {{driver: awskms, config: {body}}}}}\n"


def settings(tmp_path: Path, body: str) -> AwsKmsSettings:
    found = load(tmp_path, vault(body)).vaults["k"].config
    assert isinstance(found, AwsKmsSettings)
    return found


def test_the_credentials_are_all_that_the_reference_has(tmp_path: Path) -> None:
    found = settings(tmp_path, "{access_key_id: A, secret_access_key: S, session_token: T, region: eu-west-1}")
    assert (found.access_key_id, found.secret_access_key.get_secret_value()) == ("A", "S")
    assert (found.session_token.get_secret_value(), found.region) == ("T", "eu-west-1")
    assert (found.keys, found.wait_timeout, found.refresh_interval) == (None, 2.5, 300.0)


def test_without_a_config_everything_is_left_to_the_sdk(tmp_path: Path) -> None:
    found = load(tmp_path, "vaults: {k: {driver: awskms}}\n")
    assert found.vaults["k"].config == AwsKmsSettings()
    assert config.unsupported(found) == []


@pytest.mark.parametrize(
    "key",
    [
        ID,
        ARN,
        "alias/baker",
        "alias/team/baker_2-a",
        "mrk-1234abcd12ab34cd56ef1234567890ab",
        "arn:aws:kms:eu-west-1:111122223333:alias/baker",
        "arn:aws-us-gov:kms:us-gov-west-1:111122223333:key/mrk-1234abcd12ab34cd56ef1234567890ab",
    ],
)
def test_a_key_is_named_as_kms_does(tmp_path: Path, key: str) -> None:
    assert settings(tmp_path, f"{{keys: ['{key}']}}").keys == (key,)


@pytest.mark.parametrize("key", ["baker", "alias/", f"key/{ID}", f" {ID}", ARN.replace(":kms:", ":s3:"), "tz1abc", ""])
def test_another_name_is_a_fault_at_its_place(tmp_path: Path, key: str) -> None:
    (found,) = faults(tmp_path, vault(f"{{keys: ['{ID}', '{key}']}}"))
    assert found.endswith("vaults.k.config.keys.1: expected a key id, alias/<name>, or an ARN of either")


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("{keys: []}", "vaults.k.config.keys: an empty list names no key: name some, or leave keys out for all"),
        (
            f"{{keys: ['alias/a', '{ARN}'], region: us-east-1}}",
            "vaults.k.config: keys.1 is in eu-west-1, and region is us-east-1: a vault has one region",
        ),
        ("{key: [a]}", "vaults.k.config.key: unknown key; did you mean keys?"),
        ("{wait_timeout: 0}", "vaults.k.config.wait_timeout: must be greater than 0"),
        ("{refresh_interval: soon}", "vaults.k.config.refresh_interval: expected a number"),
    ],
)
def test_faults(tmp_path: Path, body: str, fault: str) -> None:
    (found,) = faults(tmp_path, vault(body))
    assert found.endswith(fault)


def test_a_region_that_comes_from_elsewhere_is_no_fault(tmp_path: Path) -> None:
    assert settings(tmp_path, f"{{keys: ['{ARN}']}}").region == ""


def test_secrets_never_show(tmp_path: Path) -> None:
    shown = config.effective(load(tmp_path, vault(f"{{secret_access_key: TopSecret, keys: ['{ARN}']}}")))
    assert "TopSecret" not in shown
    assert ARN in shown
    assert "refresh_interval: 300.0" in shown
