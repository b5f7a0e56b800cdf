"""The utility server: `/metrics`, `/healthz` (the truth per vault), `/livez`; see section 2.9 of the specification."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from signer.http.values import ApiRequest, ApiResponse, json_response, method_not_allowed, not_found
from signer.observe.metrics import CONTENT_TYPE, Metrics
from signer.vaults.interface import VaultHealth


@dataclass(frozen=True, slots=True)
class Health:
    """What works now. *serving* is False before the signing API accepts connections, and from the drain on."""

    serving: bool
    vaults: Mapping[str, VaultHealth]
    marks: str = ""  # what keeps the watermark store from working, empty for nothing

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
        return answer()

    def _exposition(self) -> ApiResponse:
        for name, state in self._health().vaults.items():
            self._metrics.vault_state(name, up=state.ready, keys=state.keys)
        return ApiResponse(200, self._metrics.exposition(), CONTENT_TYPE)

    def _healthz(self) -> ApiResponse:
        health = self._health()
        vaults = {
            name: {"ready": state.ready, "detail": state.detail, "keys": state.keys}
            | ({"skipped": dict(state.skipped)} if state.skipped else {})
            for name, state in health.vaults.items()
        }
        body: dict[str, object] = {"ready": health.ready}
        if not health.ready or any(state.skipped for state in health.vaults.values()):
            body |= {"serving": health.serving, "vaults": vaults}
        if health.marks:
            body["watermarks"] = health.marks
        return json_response(body, 200 if health.ready else 503)

    def _livez(self) -> ApiResponse:
        return json_response({"alive": True})
