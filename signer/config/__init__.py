"""The configuration: YAML and environment to frozen models."""

from signer.config.loading import escaped, load, prepare_base_dir
from signer.config.models import NitroSettings, Policy, Settings
from signer.config.policies import Compiled, compile_policy
from signer.config.report import effective, unsupported, warnings

__all__ = [
    "Compiled",
    "NitroSettings",
    "Policy",
    "Settings",
    "compile_policy",
    "effective",
    "escaped",
    "load",
    "prepare_base_dir",
    "unsupported",
    "warnings",
]
