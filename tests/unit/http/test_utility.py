"""The utility server: what `/healthz` calls ready, what `/metrics` says at each scrape, and nothing else."""

import json
import time
from datetime import datetime
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from signer.http.utility import Health, UtilityApi
from signer.http.values import ApiRequest, ApiResponse
from signer.observe.metrics import Metrics
from signer.observe.tasks import Tasks
from signer.vaults.interface import VaultHealth

UP = VaultHealth(ready=True, detail="up", keys=2, skipped={})
EMPTY = VaultHealth(ready=True, detail="no keys", keys=0, skipped={})
DOWN = VaultHealth(ready=False, detail="connection refused", keys=0, skipped={})
PARTLY = VaultHealth(ready=True, detail="up", keys=1, skipped={"tz1x": "blob cannot be decrypted"})


async def ask(path: str, health: Health, method: str = "GET", metrics: Metrics | None = None) -> ApiResponse:
    return await UtilityApi(metrics=metrics or Metrics(), health=lambda: health).respond(ApiRequest(method, path))


@pytest.mark.parametrize(
    ("serving", "vaults", "ready"),
    [
        (True, {"a": UP}, True),
        (True, {"a": UP, "b": EMPTY}, True),
        (True, {"a": PARTLY}, True),
        (False, {"a": UP}, False),
        (True, {"a": UP, "b": DOWN}, False),
        (True, {"a": EMPTY}, False),
        (True, {}, False),
    ],
)
async def test_ready_means_that_requests_can_be_signed(
    serving: bool, vaults: dict[str, VaultHealth], ready: bool
) -> None:
    response = await ask("/healthz", Health(serving, vaults))
    assert response.status == (200 if ready else 503)
    assert json.loads(response.body)["ready"] is ready
    assert response.content_type == "application/json; charset=utf-8"


async def test_a_healthy_signer_answers_as_the_reference_does() -> None:
    assert (await ask("/healthz", Health(True, {"a": UP}))).body == b'{"ready":true}\n'


@pytest.mark.parametrize(
    ("health", "shown"),
    [
        (Health(True, {"a": DOWN}), {"a": {"ready": False, "detail": "connection refused", "keys": 0}}),
        (
            Health(True, {"a": PARTLY}),
            {"a": {"ready": True, "detail": "up", "keys": 1, "skipped": {"tz1x": "blob cannot be decrypted"}}},
        ),
        (Health(False, {"a": UP}), {"a": {"ready": True, "detail": "up", "keys": 2}}),
    ],
)
async def test_whatever_is_wrong_is_named_per_vault(health: Health, shown: dict[str, object]) -> None:
    body = json.loads((await ask("/healthz", health)).body)
    assert body == {"ready": health.ready, "serving": health.serving, "vaults": shown}


async def test_a_store_that_fails_is_named() -> None:
    response = await ask("/healthz", Health(True, {"a": UP}, "the disk is full"))
    body = json.loads(response.body)
    assert (response.status, body["ready"], body["watermarks"]) == (503, False, "the disk is full")


@pytest.mark.parametrize("health", [Health(True, {"a": UP}), Health(False, {"a": DOWN}), Health(False, {})])
async def test_alive_whatever_the_vaults_do(health: Health) -> None:
    response = await ask("/livez", health)
    assert (response.status, response.body) == (200, b'{"alive":true}\n')


async def test_each_scrape_shows_the_vaults_as_they_are_now() -> None:
    metrics, health = Metrics(), Health(True, {"a": UP})
    api = UtilityApi(metrics=metrics, health=lambda: health)

    async def scrape() -> dict[str, float]:
        response = await api.respond(ApiRequest("GET", "/metrics"))
        assert (response.status, response.content_type) == (200, "text/plain; version=0.0.4; charset=utf-8")
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(response.body.decode())
            for sample in family.samples
            if sample.labels.get("vault") == "a"
        }

    assert await scrape() == {"vault_up": 1, "vault_keys": 2}
    health = Health(True, {"a": DOWN})
    assert await scrape() == {"vault_up": 0, "vault_keys": 0}


@pytest.mark.parametrize("method", ["HEAD", "OPTIONS", "POST"])
@pytest.mark.parametrize("path", ["/healthz", "/livez", "/metrics"])
async def test_another_method_is_405(method: str, path: str) -> None:
    response = await ask(path, Health(True, {"a": UP}), method)
    assert (response.status, response.body, response.headers) == (405, b"", (("allow", "GET"),))


@pytest.mark.parametrize("path", ["/", "/healthz/", "/keys/x", "/authorized_keys", "*", ""])
async def test_another_path_is_404(path: str) -> None:
    assert await ask(path, Health(True, {"a": UP})) == ApiResponse(404, b"404 page not found\n")


# -- tasks


def board() -> Tasks:
    tasks = Tasks()
    tasks.add("signing API").running()
    tasks.add("vault a session 2", quiet=True)
    return tasks


async def healthz(tasks: Tasks, query: str = "", vaults: dict[str, VaultHealth] | None = None) -> dict[str, Any]:
    health = Health(True, vaults or {"a": UP}, tasks=tasks.all())
    api = UtilityApi(metrics=Metrics(), health=lambda: health)
    body = json.loads((await api.respond(ApiRequest("GET", "/healthz", query))).body)
    assert isinstance(body, dict)
    return body


async def test_tasks_that_run_or_start_are_no_news() -> None:
    assert await healthz(board()) == {"ready": True}


@pytest.mark.parametrize("query", ["verbose", "verbose=", "a=b&verbose=1"])
async def test_verbose_shows_everything(query: str) -> None:
    body = await healthz(board(), query)
    assert set(body) == {"ready", "serving", "vaults", "tasks"}
    since = body["tasks"]["signing API"].pop("since")
    assert abs(datetime.fromisoformat(since).timestamp() - time.time()) < 60
    assert since.endswith("Z")
    assert body["tasks"]["signing API"] == {"state": "running", "restarts": 0, "last_fault": ""}
    assert body["tasks"]["vault a session 2"]["state"] == "starting"


async def test_a_task_that_fails_or_ended_shows_them_all_but_is_not_the_readiness() -> None:
    tasks = board()
    tasks.add("vault a session 2").failing("refused")
    body = await healthz(tasks)
    assert body["ready"] is True
    assert body["tasks"]["vault a session 2"]["last_fault"] == "refused"
    assert body["tasks"]["signing API"]["state"] == "running"
    tasks = board()
    tasks.add("signing API").stopped()
    assert (await healthz(tasks))["tasks"]["signing API"]["state"] == "stopped"


async def test_what_is_not_ready_shows_its_tasks() -> None:
    assert set((await healthz(board(), vaults={"a": DOWN}))["tasks"]) == set(board().all())
