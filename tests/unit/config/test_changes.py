"""Which changes wait for a restart: paths, and never a value."""

from pathlib import Path

import pytest
import yaml

from signer.config import Settings, load
from signer.config.changes import restart_needed

KEY = "tz1LggX2HUdvJ1tF4Fvv8fjsrzLeW4Jr9t2Q"
BASE = {
    "base_dir": "/a",
    "server": {"address": ":6732"},
    "vaults": {
        "n": {
            "driver": "nitro",
            "config": {"encryption_key_id": "k", "credentials": {"secret_access_key": "before"}, "enclave_cid": 16},
        }
    },
    "tezos": {KEY: {"allow": {"block": None}}},
}


def settings(tmp_path: Path, **changes: object) -> Settings:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(BASE | changes))
    return load(str(file), environ={})


def nitro(**changes: object) -> dict[str, object]:
    return {"n": {"driver": "nitro", "config": {"encryption_key_id": "k", **changes}}}


@pytest.mark.parametrize(
    ("changes", "paths"),
    [
        ({}, []),
        ({"tezos": {}}, []),
        ({"base_dir": "/b"}, ["base_dir"]),
        ({"server": {"known_keys": True, "address": ":1"}}, ["server.address", "server.known_keys"]),
        ({"watermark": {"driver": "mem"}}, ["watermark.driver"]),
        (
            {"vaults": nitro(credentials={"secret_access_key": "after"}, enclave_cid=16)},
            ["vaults.n.config.credentials.secret_access_key"],
        ),
        (
            {"vaults": nitro(credentials={"secret_access_key": "before"}, storage={"driver": "file", "config": "/k"})},
            ["vaults.n.config.enclave_cid", "vaults.n.config.storage"],
        ),
        ({"vaults": {"m": BASE["vaults"]["n"]}}, ["vaults.n", "vaults.m"]),  # type: ignore[index]  # a literal above
        ({"policy_hook": {"address": "http://a/"}}, ["policy_hook"]),
    ],
)
def test_what_differs_is_named(tmp_path: Path, changes: dict[str, object], paths: list[str]) -> None:
    assert restart_needed(settings(tmp_path), settings(tmp_path, **changes)) == paths
