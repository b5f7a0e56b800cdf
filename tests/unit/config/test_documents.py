"""The configurations in the documentation are good ones."""

import re
from pathlib import Path

import pytest

from proxy.address import parse
from signer import config
from signer.config.models import NitroSettings
from tests.unit.config.test_loading import load

_DOCS = Path(__file__).parents[3] / "docs"
_YAML = re.compile(r"^```yaml\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", ["aws.md", "configuration.md"])
def test_what_the_documentation_shows_is_accepted(tmp_path: Path, name: str) -> None:
    (text,) = _YAML.findall((_DOCS / name).read_text())
    settings = load(tmp_path, text)
    assert settings.vaults
    assert not config.unsupported(settings)
    assert not config.warnings(settings)


def test_the_combined_configuration_of_signatory_is_accepted_as_it_stands(tmp_path: Path) -> None:
    """The CID from the environment, vsock, a proxy to KMS, and a region for the KMS vault alone."""
    text = f"""
base_dir: {tmp_path}
server:
  address: :6732
  utility_address: :9583
vaults:
  aws-kms:
    driver: awskms
    config:
      region: us-west-2
  nitro-companion:
    driver: nitro
    config:
      enclave_cid: ${{ENCLAVE_CID}}
      enclave_port: 2000
      encryption_key_id: 771dfdac-e8e9-4f40-9747-f56d0911fce4
      proxy_remote_address: kms.us-west-2.amazonaws.com:443
      storage:
        driver: file
        config: {tmp_path}/enclave_keys.json
tezos:
  tz2QPsZoZse4eeahhg5DdfnBDB4VbU1PwgxN:
    log_payloads: true
    vault: aws-kms
    allow:
      block: []
      attestation_with_dal: []
      generic: [reveal, delegation, origination, transaction, stake, unstake, update_companion_key]
"""
    settings = load(tmp_path, text, ENCLAVE_CID="16")
    assert not config.unsupported(settings)
    assert not config.warnings(settings)
    companion = settings.vaults["nitro-companion"].config
    assert isinstance(companion, NitroSettings)
    assert companion.fixed_enclave == parse("vsock:16:2000")
    assert companion.proxy_listen == parse("vsock:any:8000")
    assert companion.kms_region == "us-west-2"
