"""The utility server: `/metrics`, `/healthz` (the truth per vault), `/livez`; see section 2.9 of the specification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from urllib.parse import parse_qs

from signer.http.values import ApiRequest, ApiResponse, json_response, method_not_allowed, not_found
from signer.observe.metrics import CONTENT_TYPE, Metrics
from signer.observe.tasks import Task, TaskState
from signer.vaults.interface import VaultHealth


@dataclass(frozen=True, slots=True)
class Health:
    """What works now. *serving* is False before the signing API accepts connections, and from the drain on."""

    serving: bool
    vaults: Mapping[str, VaultHealth]
    marks: str = ""  # what keeps the watermark store from working, empty for nothing
    tasks: Mapping[str, Task] = field(default_factory=dict)

    @property
    def ready(self) -> bool:
        """Whether requests can be signed: serving, marks kept, every vault up and its blobs tried, at least one key."""
        states = self.vaults.values()
        return (
            self.serving
            and not self.marks
            and all(state.ready for state in states)
            and any(state.keys for state in states)
        )

    @property
    def flawless(self) -> bool:
        """Whether there is nothing to tell: ready, no key skipped, and no task failing or ended."""
        return (
            self.ready
            and not any(state.skipped for state in self.vaults.values())
            and all(task.state in (TaskState.STARTING, TaskState.RUNNING) for task in self.tasks.values())
        )


class UtilityApi:
    """Answers the requests of Prometheus, load balancers and people."""

    def __init__(self, *, metrics: Metrics, health: Callable[[], Health]) -> None:
        self._metrics = metrics
        self._health = health

    async def respond(self, request: ApiRequest) -> ApiResponse:
        """The answer to *request*; never raises."""
        answer = {"/metrics": self._exposition, "/healthz": self._healthz, "/livez": self._livez}.get(request.path)
        if answer is None:
            return not_found()
        if request.method != "GET":
            return method_not_allowed("GET")
        return answer(request)

    def _exposition(self, _: ApiRequest) -> ApiResponse:
        for name, state in self._health().vaults.items():
            self._metrics.vault_state(name, up=state.ready, keys=state.keys)
        return ApiResponse(200, self._metrics.exposition(), CONTENT_TYPE)

    def _healthz(self, request: ApiRequest) -> ApiResponse:
        """Short while all is well, as the reference answers; the whole truth otherwise, or for `?verbose`."""
        health = self._health()
        body: dict[str, object] = {"ready": health.ready}
        if not health.flawless or "verbose" in parse_qs(request.query, keep_blank_values=True):
            body |= {"serving": health.serving, "vaults": {name: _vault(one) for name, one in health.vaults.items()}}
            if health.tasks:
                body["tasks"] = {name: _task(one) for name, one in health.tasks.items()}
        if health.marks:
            body["watermarks"] = health.marks
        return json_response(body, 200 if health.ready else 503)

    def _livez(self, _: ApiRequest) -> ApiResponse:
        return json_response({"alive": True})


def _vault(state: VaultHealth) -> dict[str, object]:
    shown: dict[str, object] = {"ready": state.ready, "detail": state.detail, "keys": state.keys}
    return shown | ({"skipped": dict(state.skipped)} if state.skipped else {})


def _task(task: Task) -> dict[str, object]:
    since = datetime.fromtimestamp(task.since, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return {"state": task.state, "since": since, "restarts": task.restarts, "last_fault": task.fault}
