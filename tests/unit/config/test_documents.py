"""The configurations in the documentation are good ones."""

import re
from pathlib import Path

import pytest

from signer import config
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
