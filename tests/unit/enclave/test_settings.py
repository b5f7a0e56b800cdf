"""The measured environment of an image."""

import pytest

from signer.enclave.settings import Settings, SettingsError, read

DEFAULTS = Settings(listen_port=2000, proxy_cid=3, proxy_port=8000, endpoint=None, strict=False)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        dict.fromkeys(("LISTEN_PORT", "PROXY_CID", "PROXY_PORT", "ENDPOINT", "SEAL_STRICT", "KMS_KEY"), ""),
        {"SEAL_STRICT": "0", "PATH": "/usr/bin"},
    ],
)
def test_empty_is_the_default(environment: dict[str, str]) -> None:
    assert read(environment) == DEFAULTS


def test_every_setting() -> None:
    environment = {
        "LISTEN_PORT": "2100",
        "PROXY_CID": "4294967294",
        "PROXY_PORT": "1",
        "ENDPOINT": "https://kms-fips.us-west-2.amazonaws.com",
        "SEAL_STRICT": "1",
        "KMS_KEY": "arn:aws-us-gov:kms:us-gov-west-1:123456789012:key/mrk-0d990263",
    }
    assert read(environment) == Settings(
        listen_port=2100,
        proxy_cid=2**32 - 2,
        proxy_port=1,
        endpoint="kms-fips.us-west-2.amazonaws.com",
        strict=True,
        kms_key="arn:aws-us-gov:kms:us-gov-west-1:123456789012:key/mrk-0d990263",
    )


@pytest.mark.parametrize("name", ["LISTEN_PORT", "PROXY_CID", "PROXY_PORT"])
@pytest.mark.parametrize("value", ["abc", "0", "-1", "2000x", " 2000", "0x10", "4294967295", "9" * 5000, "２０００"])
def test_numbers_that_are_none(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=f"^{name}: expected a (port number|CID), got '"):
        read({name: value})


@pytest.mark.parametrize("value", ["yes", "true", "2", " 1", "off"])
def test_a_switch_is_0_or_1(value: str) -> None:
    with pytest.raises(SettingsError, match="^SEAL_STRICT: expected 0 or 1"):
        read({"SEAL_STRICT": value})


@pytest.mark.parametrize("suffix", ["", "/", ":443", ":443/"])
def test_endpoints(suffix: str) -> None:
    assert read({"ENDPOINT": f"https://kms.example.com{suffix}"}).endpoint == "kms.example.com"


@pytest.mark.parametrize(
    "value",
    [
        "http://kms.us-west-2.amazonaws.com",
        "kms.us-west-2.amazonaws.com",
        "https://",
        "https://localhost",
        "https://kms.example.com:8443",
        "https://kms.example.com:x",
        "https://kms.example.com/path",
        "https://kms.example.com?query",
        "https://kms.example.com#fragment",
        "https://user@kms.example.com",
        "https://kms.example.com ",
        "https://-kms.example.com",
        "https://kms..com",
        "https://[::1]",
        "https://[",
        "https://kms.exämple.com",
        "https://KMS.example.com",
        "ftp://kms.example.com",
    ],
)
def test_endpoints_that_are_none(value: str) -> None:
    with pytest.raises(SettingsError, match="^ENDPOINT: expected https://<host name>, got "):
        read({"ENDPOINT": value})


@pytest.mark.parametrize(
    "value",
    [
        "alias/baker",
        "0d990263-6727-4a53-a8a5-6b4a7a2f2c36",
        "arn:aws:kms:us-west-2:123456789012:alias/baker",
        "arn:aws:kms:us-west-2::key/0d990263",
        "arn:aws:kms:us-west-2:123456789012:key/",
        "arn:aws:kms:us-west-2:123456789012:key/0d990263\n",
        "arn:aws:s3:us-west-2:123456789012:key/0d990263",
    ],
)
def test_the_key_is_named_by_its_arn(value: str) -> None:
    with pytest.raises(SettingsError, match="^KMS_KEY: expected arn:aws:kms:"):
        read({"KMS_KEY": value})
